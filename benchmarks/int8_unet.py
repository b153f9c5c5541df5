"""One UNet call in int8 against the same graph in fp32, in turn, beside PyTorch's own dynamic quantization.

int8_unet.py [BUNDLE] [RESULT.json]        a bundle of emoji64, as `ldm-export export emoji64 -o BUNDLE` makes it
int8_unet.py 52m [RESULT.json]             a UNet of 52 M parameters in Stable Diffusion's shape, random weights

Errors are root mean square, as a share of the fp32 output, of the worst of some calibration calls. The last line of the
output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from ldm_reference.layout import config_to_dict
from ldm_reference.unet import UNet2DConditionModel

from benchmarks.peers.workloads import SMALL_UNET
from ldm_export.bench.calibration import calibration_calls, calibration_conditions
from ldm_export.bench.machine import cpu
from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import unet_spec
from ldm_export.export.onnx import export_graph, graph_module, random_inputs
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.running import outputs_of, session, worst_error
from ldm_export.recipe.settings import read_recipe
from ldm_export.runtime.backends.auto import SETTLE_S

ROUNDS = 40

Calls = Sequence[Mapping[str, np.ndarray]]


def emoji64(bundle: Path) -> tuple[onnx.ModelProto, UNet2DConditionModel, Calls]:
    told = calibration_conditions(read_recipe("cpu-fast").prompts)
    calls = calibration_calls(Bundle.open(bundle), told)["unet"]
    return onnx.load(str(bundle / "unet" / "model.onnx")), LatentDiffusion.open("emoji64").load("unet"), calls


def random_52m() -> tuple[onnx.ModelProto, UNet2DConditionModel, Calls]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(SMALL_UNET).requires_grad_(False).eval()
    graph = unet_spec(config_to_dict(unet))
    sizes = {"batch": 2, "height": 32, "width": 32, "tokens": 77}
    example = random_inputs(graph, sizes, 8, 1)
    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(str(export_graph(graph_module(unet, graph), graph, example, Path(folder))))
    rng = np.random.default_rng(0)
    calls = []
    for timestep in (981, 661, 341, 21):
        call = {spec.name: value.numpy() for spec, value in zip(graph.inputs, example, strict=True)}
        call |= {"timestep": np.array(timestep, np.float32)}
        call |= {"sample": rng.standard_normal(call["sample"].shape).astype(np.float32)}
        calls.append(call)
    return model, unet, calls


def main(what: str) -> dict[str, Any]:
    model, unet, calls = random_52m() if what == "52m" else emoji64(Path(what))
    some = list(calls[:: max(1, len(calls) // 4)])
    references = outputs_of(model, some)

    def copied() -> onnx.ModelProto:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        return other

    graphs: dict[str, onnx.ModelProto] = {"ONNX Runtime, fp32": model}
    reports: dict[str, Any] = {}
    for name, passes in {
        "quantize-dynamic": [QuantizeDynamic()],
        "quantize-static, Conv": [QuantizeStatic(operators=("Conv",))],
        "quantize-static, Conv and MatMul": [QuantizeStatic()],
        "quantize-static, Conv + quantize-dynamic": [QuantizeStatic(operators=("Conv",)), QuantizeDynamic()],
    }.items():
        graphs[name] = copied()
        for step in passes:
            change = step.apply(graphs[name], calls)
            graphs[name] = change.model
            reports[f"{name}: {step.name}"] = {
                key: len(value) if isinstance(value, list) else value for key, value in change.report.items()
            }
        print(f"{name}: {reports[f'{name}: {step.name}']}")
    sides: dict[str, Callable[[], Any]] = {}
    errors, sizes = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move to another package
        dynamic = torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)
    call = dict(some[len(some) // 2])
    for name, network in (("PyTorch eager, fp32", unet), ("PyTorch quantize_dynamic", dynamic)):
        sides[name] = torch_call(network, call)
        errors[name] = worst_error(references, [[torch_call(network, dict(other))()] for other in some])
    for name, graph in graphs.items():
        opened = session(graph)
        sides[name] = lambda opened=opened: opened.run(None, call)
        errors[name] = worst_error(references, outputs_of(graph, some))
        sizes[name] = len(graph.SerializeToString())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 3):
        for name, run in sides.items():
            time.sleep(SETTLE_S)
            run()  # wakes its threads, as the step before does in a sampling loop
            started = time.perf_counter()
            run()
            if number >= 3:
                times[name].append((time.perf_counter() - started) * 1000)
    plain = times["ONNX Runtime, fp32"]
    rows = [
        {
            "name": name,
            "median_ms": statistics.median(spent),
            "min_ms": min(spent),
            "faster": statistics.median(a / b for a, b in zip(plain, spent, strict=True)),
            "error": errors[name],
            "bytes": sizes.get(name),
        }
        for name, spent in times.items()
    ]
    print("| UNet call | median ms | min ms | against fp32 | error | MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        megabytes = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        print(
            f"| {row['name']} | {row['median_ms']:.2f} | {row['min_ms']:.2f} | {row['faster']:.2f}x | "
            f"{row['error']:.4f} | {megabytes} |"
        )
    shapes = {name: list(array.shape) for name, array in call.items()}
    return {"unet": what, "inputs": shapes, "machine": cpu(), "rounds": ROUNDS, "rows": rows, "reports": reports}


def torch_call(network: torch.nn.Module, call: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    tensors = {name: torch.from_numpy(array) for name, array in call.items()}

    @torch.no_grad()
    def run() -> np.ndarray:
        return network(**tensors).numpy()

    return run


if __name__ == "__main__":
    document = main(sys.argv[1] if len(sys.argv) > 1 else "demo/bundle")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(document, ensure_ascii=False))
