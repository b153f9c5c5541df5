"""Transformers of real size with random weights: seconds and peak memory of their export, parity, and one call, of the
graph in ONNX Runtime and of diffusers in turn, at a size that is not square.

real_size.py pixart|sd3 checkpoint FOLDER       writes a checkpoint: transformer and autoencoder of their real size,
                                                in fp16; text encoders of their real width, one layer deep
real_size.py pixart|sd3 export FOLDER           exports it
real_size.py pixart|sd3 call FOLDER [ROUNDS]    times a call of two rows, 384 x 512 pixels: A B A B, a process each

real_size.py pixart|sd3 engine FOLDER           builds the transformer's TensorRT-RTX engine in fp16, which takes no GPU

Each command is a process of its own, so that only what it says is measured. Results go to
results/real_size.json. PixArt needs 6 GB of disk and 8 GB of memory, Stable Diffusion 3 20 GB and 18 GB.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "real_size.json"
BATCH, HEIGHT, WIDTH = 2, 384, 512
TOGETHER_BYTES = 4e9
CLIP_SMALL = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 1000, "bos_token_id": 998}
CLIP_SMALL |= {"eos_token_id": 999, "pad_token_id": 999}
SHAPES: dict[str, dict[str, Any]] = {
    "pixart": {"sample_size": 64, "caption_channels": 4096},
    "sd3": {
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "out_channels": 16,
    },
}


def checkpoint(name: str, folder: Path) -> None:
    import diffusers
    import torch
    import transformers
    from ldm_reference.tokenizer import save_tokenizer, train_tokenizer

    from tests.bundle_fixture import t5_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16 if name == "sd3" else 4,
        scaling_factor=1.5305 if name == "sd3" else 0.18215,
        shift_factor=0.0609 if name == "sd3" else None,
    )
    if name == "pixart":
        config = transformers.T5Config(vocab_size=600, d_model=4096, d_kv=64, d_ff=256, num_layers=1, num_heads=4)
        diffusers.PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(folder.with_name(f"{folder.name}.tokenizer")),
            text_encoder=transformers.T5EncoderModel(config),
            vae=vae,
            transformer=filled(diffusers.PixArtTransformer2DModel(**SHAPES[name])),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        ).save_pretrained(folder)
        return
    tokenizer = folder.with_name(f"{folder.name}.tokenizer")
    save_tokenizer(train_tokenizer(["a lighthouse at dusk"], 600), tokenizer, 77)
    encoders = [
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                **CLIP_SMALL, hidden_size=width, projection_dim=width, num_attention_heads=width // 64
            )
        )
        for width in (768, 1280)
    ]
    diffusers.StableDiffusion3Pipeline(
        transformer=filled(diffusers.SD3Transformer2DModel(**SHAPES[name])),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        text_encoder_2=encoders[1],
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def filled(network: Any) -> Any:
    """The network with no weight at zero, as some are at first, so that what is lost shows."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    return network


def export(name: str, folder: Path) -> None:
    from ldm_export.export.chain import export_bundle
    from ldm_export.families import open_checkpoint

    seconds: dict[str, float] = {}
    running, started = "start", time.perf_counter()

    def progress(stage: str) -> None:
        nonlocal running, started
        now = time.perf_counter()
        graph = running.partition(":")[0]
        seconds[graph] = seconds.get(graph, 0.0) + now - started
        running, started = stage, now

    begun = time.perf_counter()
    model = open_checkpoint(folder / "checkpoint")
    bundle = export_bundle(model, folder / "bundle", force=True, progress=progress)
    progress("end")
    usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    errors = {f"{record['graph']}/{record['output']}": record["max_error"] for record in bundle.manifest.parity}
    transformer = model._skeleton("transformer")
    found = {
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "export_seconds": {graph: round(value, 1) for graph, value in seconds.items()},
        "export_total_s": round(time.perf_counter() - begun, 1),
        "export_peak_gb": round(max(usages) / 1e6, 2),  # of the larger process: a large graph is compared in its own
        "max_error": errors,
    }
    keep(name, found)


def keep(name: str, found: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[name] = {**known.get(name, {}), **found}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


def inputs_of(folder: Path) -> dict[str, Any]:
    """Inputs of a call, seeded, by name."""
    import numpy as np

    from ldm_export.bundle import Bundle

    rng = np.random.default_rng(0)
    sizes = {"batch": BATCH, "height": HEIGHT // 8, "width": WIDTH // 8, "tokens": 300}
    graph = Bundle.open(folder / "bundle").manifest.graphs["transformer"]
    made = {}
    for tensor in graph.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        made[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    made["timestep"] = np.array([250.0, 750.0], np.float32)
    if "encoder_attention_mask" in made:
        made["encoder_attention_mask"] = (np.arange(300) < np.array([[20], [150]])).astype(np.float32)
    return made


def serve(side: str, folder: Path) -> None:
    """One side of the comparison: opens, then answers each line of its input with the seconds of a call."""
    inputs = inputs_of(folder)
    if side == "graph":
        from ldm_export.bundle import Bundle
        from ldm_export.runtime.backends import open_backend

        graph = open_backend(Bundle.open(folder / "bundle"), "cpu", None).load("transformer")

        def call() -> Any:
            return graph.run(inputs)["out_sample"]
    else:
        import diffusers
        import torch

        config = json.loads((folder / "checkpoint" / "transformer" / "config.json").read_text())
        network = getattr(diffusers, config["_class_name"]).from_pretrained(
            folder / "checkpoint" / "transformer", torch_dtype=torch.float32
        )
        given = {key: torch.from_numpy(value) for key, value in inputs.items()}
        given["hidden_states"] = given.pop("sample")

        @torch.no_grad()
        def call() -> Any:
            return network(**given, return_dict=False)[0][:, : config["in_channels"]].numpy()

    import numpy as np

    np.save(folder / f"{side}.npy", call())
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        call()
        print(time.perf_counter() - begun, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)


def call(name: str, folder: Path, rounds: int) -> None:
    """Calls in turn; where both sides do not fit into memory together, each is opened anew in every round."""
    import numpy as np

    sides = ("diffusers", "graph")
    together = sum(file.stat().st_size for file in (folder / "bundle" / "transformer").iterdir()) < TOGETHER_BYTES
    opened = {side: _Side(name, side, folder) for side in sides} if together else {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for side in sides:
            running = opened[side] if together else _Side(name, side, folder)
            seconds[side].append(running.call())
            if not together:
                peaks[side] = running.close()
    peaks |= {side: running.close() for side, running in opened.items()}
    expected, given = (np.load(folder / f"{side}.npy") for side in sides)
    ratios = sorted(theirs / ours for theirs, ours in zip(seconds["diffusers"], seconds["graph"], strict=True))
    found = {
        "call": f"{BATCH} rows of {HEIGHT}x{WIDTH} pixels",
        "call_processes": "both open, in turn" if together else "one open at a time, in turn",
        "call_seconds": {side: [round(value, 2) for value in values] for side, values in seconds.items()},
        "diffusers_over_graph": [round(ratio, 3) for ratio in ratios],
        "call_peak_gb": {side: round(value, 2) for side, value in peaks.items()},
        "call_error": float(np.abs(given - expected).max() / np.abs(expected).max()),
    }
    keep(name, found)


def engine(name: str, folder: Path) -> None:
    command = ["ldm-export", "build", str(folder / "bundle"), "--target", "rtx", "--sm", "89", "--precision", "fp16"]
    begun = time.perf_counter()
    subprocess.run([*command, "--graphs", "transformer"], check=True)
    target = json.loads((folder / "bundle" / "targets" / "rtx-sm89-fp16" / "target.json").read_text())
    found = {
        "engine_total_s": round(time.perf_counter() - begun, 1),
        "engine_peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "engine_bytes": target["files"]["transformer.plan"]["size_bytes"],
        "engine": target["report"]["transformer"],
    }
    keep(name, found)


class _Side:
    def __init__(self, name: str, side: str, folder: Path):
        command = [sys.executable, "-m", "benchmarks.real_size", name, side, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process ended")
        return line.strip()

    def call(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> float:
        """Peak of its memory in GB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return float(self._line())


def main() -> None:
    name, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    if what == "checkpoint":
        checkpoint(name, folder / "checkpoint")
    elif what == "export":
        export(name, folder)
    elif what == "engine":
        engine(name, folder)
    elif what == "call":
        call(name, folder, int(sys.argv[4]) if len(sys.argv) > 4 else 4)
    else:
        serve(what, folder)


if __name__ == "__main__":
    main()
