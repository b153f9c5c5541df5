"""What adapters that are given when a picture is drawn cost: a call of the denoiser with one and without, in turn.

adapters.py BUNDLE NAME [--cases attention-8 ...] [--size PIXELS] [--rounds N]

Each case is an adapter of random factors: of the attention's projections, of all linear layers, or of convolutions
too, and of one rank, or four of rank 8 at once. For each the bundle is copied, so that it has branches for just these.
A call has two rows, as guidance takes, on the backend cpu with the target for this machine. NAME is the key under which
results/adapters.json keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from ldm_export.bench.machine import machine
from ldm_export.bundle import Bundle
from ldm_export.export.adapters import make_adapter
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.graph.layers import layers_of
from ldm_export.runtime import Pipeline

RESULTS = Path(__file__).parent / "results" / "adapters.json"
CASES = ("attention-4", "attention-8", "attention-16", "linear-8", "all-8", "four of attention-8")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SPREAD = 0.02
"""Standard deviation of factors."""


def layers(bundle: Bundle, which: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the denoiser's weights that such an adapter changes."""
    model = ir.load(bundle.file(bundle.manifest.graphs[bundle.roles.denoiser].path))
    found = {name: product.shape for name, product in layers_of(model).items()}
    if which == "attention":
        return {name: shape for name, shape in found.items() if name.endswith(ATTENTION)}
    return {name: shape for name, shape in found.items() if which == "all" or len(shape) == 2}


def write_adapter(file: Path, component: str, shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def random(*shape: int) -> Any:
        return (SPREAD * generator.standard_normal(shape)).astype(np.float32)

    tensors = {}
    for name, (out, *into) in shapes.items():
        tensors[f"{component}.{name}.lora_A.weight"] = random(rank, *into)
        tensors[f"{component}.{name}.lora_B.weight"] = random(out, rank, *[1] * (len(into) - 1))
    save_file(tensors, file)


def measure(bundle: Bundle, case: str, size: int | None, rounds: int) -> dict[str, Any]:
    which, _, rank = case.removeprefix("four of ").partition("-")
    shapes, component = layers(bundle, which), str(bundle.manifest.source["components"][bundle.roles.denoiser])
    count = 4 if case.startswith("four") else 1
    started, uses = time.perf_counter(), []
    for number in range(count):
        file = bundle.path.with_name(f"{number}.safetensors")
        write_adapter(file, component, shapes, int(rank), number)
        made = make_adapter(bundle, file, file.with_suffix(".ldma"))
        uses.append((made.path, 0.8))
    seconds = time.perf_counter() - started
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    assert pipeline.backend.endswith("ort-cpu")
    prompts = ["red apple"] if bundle.roles.text_encoders else None
    sides = {"height": size, "width": size} if size else {}
    calls = {}
    for name, adapters in {"without": None, "with": uses}.items():
        denoiser, noise = pipeline.denoiser(prompts, adapters=adapters, guidance=4.0, **sides)
        denoiser.sample[...] = noise
        calls[name] = denoiser
    print(f"{case}: timing", flush=True)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            _, ms = call(431.0)
            if turn:
                times[name].append(ms)
    ratios = [b / a for a, b in zip(times["without"], times["with"], strict=True)]
    return {
        "layers": len(shapes),
        "parity": made.error,
        "seconds_to_make": seconds / count,
        "ms": {name: statistics.median(each) for name, each in times.items()},
        "with_over_without": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": rounds,
    }


def table(results: dict[str, Any]) -> str:
    """The rows of docs/adapters.md: cost by case, a column a model."""
    cases = [case for case in CASES if any(case in model["cases"] for model in results.values())]
    rows = [["adapter, rank", *results], ["---", *("---:" for _ in results)]]
    for case in cases:
        found = [model["cases"].get(case) for model in results.values()]
        layers = next(each["layers"] for each in found if each)
        cells = [f"{each['with_over_without']:.2f}x" if each else "" for each in found]
        which, _, rank = case.rpartition("-")
        rows.append([f"{which}, {rank} ({layers} layers of {next(iter(results))})", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("name")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    for case in options.cases:
        with tempfile.TemporaryDirectory(dir=options.bundle.parent) as folder:
            copy = Path(folder) / "bundle"
            shutil.copytree(options.bundle, copy, ignore=shutil.ignore_patterns("targets"))
            bundle = Bundle.open(copy)
            build_ort_cpu(bundle)
            found = measure(bundle, case, options.size, options.rounds)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept.setdefault(options.name, {"machine": machine(), "size": options.size, "cases": {}})
        kept[options.name]["cases"][case] = found
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
        print(f"{options.name}: {case}: {found['with_over_without']:.3f}x, {found['layers']} layers", flush=True)
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
