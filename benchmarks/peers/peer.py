"""One peer in a process of its own, told on its standard input what to do; it answers one JSON document a line.

peer.py PEER KIND FOLDER [SETUP]        KIND "unet" (one call of the UNet), "int8" (the same of what may be quantized)
                                        or "picture" (prompt to picture); SETUP where and how, as JSON

    open            {"imported_s", "load_s"}: since the process began, and from there to the first call
    run K           {"ms"}: the K-th call; of "picture", K is the seed
    save K FILE     writes the K-th call's result, float32, as .npy
    memory          {"peak_bytes", "held_bytes"}: resident, highest so far and now
    (end of input)  leaves

The weights and the inputs of a call are those in FOLDER: checkpoint/, bundle/, optimum/ and inputs.npz. Results are on
the host when a call ends, so that a device has done its work.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TIMESTEPS = tuple(range(951, 0, -50))
STEPS, GUIDANCE = 20, 4.0
PROMPTS = ("red apple", "black cat", "rocket", "pizza", "octopus", "snowman", "frog face", "crescent moon")

Call = Callable[[int], Any]
"""The K-th call; gives what it made."""


@dataclass(frozen=True)
class Setup:
    """Where and how a peer runs.

    Attributes
    ----------
    device, precision : of PyTorch: cpu or cuda, fp32 (without TF32) or fp16
    bundle, backend : of ours: the bundle's folder in FOLDER, and what runs it
    cuda_graphs : whether engines, and ONNX Runtime on the backend ``cuda``, may record what they launch
    whole : the sampling loop is one engine
    """

    device: str = "cpu"
    precision: str = "fp32"
    bundle: str = "bundle"
    backend: str = "cpu"
    cuda_graphs: bool = True
    whole: bool = False


def unet_inputs(folder: Path, k: int) -> dict[str, Any]:
    with np.load(folder / "inputs.npz", allow_pickle=False) as inputs:
        timestep = np.full(len(inputs["sample"]), TIMESTEPS[k % len(TIMESTEPS)], np.float32)
        return {**inputs, "timestep": timestep}


# --- PyTorch --------------------------------------------------------------------------------------------------------


def torch_unet(folder: Path, how: str, setup: Setup) -> Call:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_grad_enabled(False)
    place = _place(setup)
    unet = UNet2DConditionModel.from_pretrained(folder / "checkpoint" / "unet").eval().to(**place)
    first = {name: torch.from_numpy(array) for name, array in unet_inputs(folder, 0).items()}
    order = ("sample", "timestep", "encoder_hidden_states")
    network: Any = unet
    if how == "torch.compile":
        network = torch.compile(unet)
    if how == "PyTorch quantize_dynamic":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is to move to another package
            network = torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)
    if how == "torch.jit.trace":

        class Positional(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, sample: Any, timestep: Any, states: Any) -> Any:
                return self.unet(sample, timestep, states, return_dict=False)[0]

        traced = torch.jit.freeze(torch.jit.trace(Positional().eval(), tuple(first[name] for name in order)))
        return lambda k: traced(*(_torch(unet_inputs(folder, k))[name] for name in order)).numpy()

    def call(k: int) -> Any:
        inputs = {name: tensor.to(**place) for name, tensor in _torch(unet_inputs(folder, k)).items()}
        return network(**inputs, return_dict=False)[0].float().cpu().numpy()

    return call


def _torch(inputs: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _place(setup: Setup) -> dict[str, Any]:
    """Device and dtype, as ``to`` takes them."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    return {"device": setup.device, "dtype": {"fp32": torch.float32, "fp16": torch.float16}[setup.precision]}


def diffusers_picture(folder: Path, how: str, setup: Setup) -> Call:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "checkpoint").to(**_place(setup))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if how == "torch.compile":
        pipeline.unet = torch.compile(pipeline.unet)
    return _diffusers(pipeline, folder, setup)


def optimum_picture(folder: Path, how: str, setup: Setup) -> Call:
    from diffusers import DDIMScheduler
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipeline = ORTStableDiffusionPipeline.from_pretrained(folder / "optimum")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return _diffusers(pipeline, folder, setup)


def _diffusers(pipeline: Any, folder: Path, setup: Setup) -> Call:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    config = json.loads((folder / "checkpoint" / "unet" / "config.json").read_text(encoding="utf-8"))
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    dtype = _place(setup)["dtype"]

    def draw(k: int) -> Any:
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(k))  # the same in every precision
        return pipeline(
            [PROMPTS[k % len(PROMPTS)]],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise.to(dtype),
            output_type="np",
        ).images.astype(np.float32)

    return draw


# --- graphs ---------------------------------------------------------------------------------------------------------


def onnxruntime_unet(folder: Path, how: str, setup: Setup) -> Call:
    """ONNX Runtime as it comes, on the plain graph or on optimum-onnx's."""
    import onnxruntime

    owner = "optimum" if how == "optimum-onnx" else "bundle"
    session = onnxruntime.InferenceSession(folder / owner / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {value.name: value.type for value in session.get_inputs()}
    ranks = {value.name: len(value.shape) for value in session.get_inputs()}

    def call(k: int) -> Any:
        inputs = unet_inputs(folder, k)
        if ranks["timestep"] == 0:  # one for the whole batch
            inputs["timestep"] = inputs["timestep"][0]
        if kinds["timestep"] == "tensor(int64)":
            inputs["timestep"] = inputs["timestep"].astype(np.int64)
        return session.run(None, inputs)[0]

    return call


def openvino_unet(folder: Path, how: str, setup: Setup) -> Call:
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "bundle" / "unet" / "model.onnx")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda k: next(iter(request.infer(unet_inputs(folder, k)).values()))


def our_unet(folder: Path, how: str, setup: Setup) -> Call:
    """As the sampling loop calls it: the prompt stays, and timesteps come again from picture to picture."""
    pipeline = _our_pipeline(folder, setup)
    inputs = {name: array.copy() for name, array in unet_inputs(folder, 0).items()}
    out = np.empty_like(inputs["sample"])
    run = pipeline._graph("unet").bind(inputs, {"out_sample": out}, fixed=("encoder_hidden_states",))

    def call(k: int) -> Any:
        inputs["timestep"][...] = TIMESTEPS[k % len(TIMESTEPS)]
        run()
        return out

    return call


def our_picture(folder: Path, how: str, setup: Setup) -> Call:
    pipeline = _our_pipeline(folder, setup)
    told: dict[str, Any] = {"sampler": "ddim", "steps": STEPS, "guidance": GUIDANCE, "whole": setup.whole}

    def draw(k: int) -> Any:
        images = pipeline.generate([PROMPTS[k % len(PROMPTS)]], seed=k, **told).images
        return images.astype(np.float32) / np.float32(255)

    return draw


def _our_pipeline(folder: Path, setup: Setup) -> Any:
    from ldm_export.runtime import Pipeline
    from ldm_export.runtime.backends import engine, providers

    engine.CUDA_GRAPHS = setup.cuda_graphs
    providers.CUDA_GRAPHS = setup.cuda_graphs and setup.backend == "cuda"
    return Pipeline.open(folder / setup.bundle, backend=setup.backend)


PEERS: dict[str, dict[str, Callable[[Path, str, Setup], Call]]] = {
    "unet": {
        "diffusers eager": torch_unet,
        "torch.jit.trace": torch_unet,
        "torch.compile": torch_unet,
        "optimum-onnx": onnxruntime_unet,
        "ONNX Runtime plain": onnxruntime_unet,
        "OpenVINO": openvino_unet,
        "ldm_export": our_unet,
    },
    "int8": {
        "diffusers eager": torch_unet,
        "PyTorch quantize_dynamic": torch_unet,
        "ONNX Runtime plain": onnxruntime_unet,
        "ldm_export": our_unet,
    },
    "picture": {
        "diffusers eager": diffusers_picture,
        "torch.compile": diffusers_picture,
        "optimum-onnx": optimum_picture,
        "ldm_export": our_picture,
    },
}


def memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines if line and line[0] in ("VmHWM:", "VmRSS:")}
    return {"peak_bytes": kilobytes["VmHWM"] * 1024, "held_bytes": kilobytes["VmRSS"] * 1024}


def since_process_start() -> float:
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main(peer: str, kind: str, folder: Path, setup: Setup) -> None:
    call: Call | None = None
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    for line in sys.stdin:
        command, *rest = line.split(maxsplit=2)
        answer: dict[str, Any] = {}
        if command == "open":
            begun = since_process_start()
            call = PEERS[kind][peer](folder, peer, setup)
            answer = {"imported_s": begun, "load_s": since_process_start() - begun}
        elif command == "run":
            assert call is not None
            started = time.perf_counter()
            call(int(rest[0]))
            answer = {"ms": (time.perf_counter() - started) * 1000, "since_start_s": since_process_start()}
        elif command == "save":
            assert call is not None
            np.save(rest[1].strip(), np.asarray(call(int(rest[0])), np.float32), allow_pickle=False)
        elif command == "memory":
            answer = memory()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Setup(**json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}")))
