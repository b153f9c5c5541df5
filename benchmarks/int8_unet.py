"""One UNet call on integers against the same weights in fp32, in turn, each variant in a process of its own: ONNX
Runtime on the plain graphs, the targets that `export` makes of them, and PyTorch.

int8_unet.py WORKLOAD [RESULT.json] [--folder F] [--work W] [--rounds N] [--one-at-a-time]

A workload is one of `peers/workloads.py`, made before; its int8 bundles are made in W (build/int8/WORKLOAD): calibrated
on drawings of `emoji64`'s prompts or, where weights are random, on random latents at some of a plan's timesteps. With
--one-at-a-time, for models of which only one fits into memory, every round starts, calls (twice, the second counts) and
ends each variant, and only the passes of the recipes are applied, not every combination. Errors are root mean square,
as a share of the output in fp32, of the worst of some calibration calls. The last line of the output is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.peer import TIMESTEPS, unet_inputs
from benchmarks.peers.run import Peer, Table, in_turn, python_peer
from ldm_export.bench.child import peak_rss_bytes
from ldm_export.bench.machine import cpu
from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import ORT_CPU
from ldm_export.export.graphs import change_graphs
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import CALLS_JUDGED, Array, GraphPass, Inputs, spread
from ldm_export.graph.files import load
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.running import outputs_of, worst_error
from ldm_export.recipe.settings import read_recipe
from ldm_export.runtime import Pipeline
from ldm_export.verify.calibration import calibration_calls, calibration_conditions

PASSES: dict[str, tuple[GraphPass, ...]] = {
    "static Conv, dynamic MatMul": (QuantizeStatic(operators=("Conv",), graphs=("unet",)), QuantizeDynamic()),
    "dynamic MatMul": (QuantizeDynamic(),),
    "static Conv": (QuantizeStatic(operators=("Conv",), graphs=("unet",)),),
    "static Conv and MatMul": (QuantizeStatic(graphs=("unet",)),),
}
"""The first is what the recipes do."""
FP32 = "fp32"
HOW = {"plain graph": "ONNX Runtime plain", "target": "ldm_export"}
"""How each bundle is run, and the peer that runs it so."""


def calls_of(workload: str, folder: Path, bundle: Bundle) -> list[Inputs]:
    if workload == "emoji64":
        return calibration_calls(bundle, calibration_conditions(read_recipe("cpu-fast").prompts))["unet"]
    rng = np.random.default_rng(1)
    calls = []
    for k in range(0, len(TIMESTEPS), len(TIMESTEPS) // CALLS_JUDGED):
        call = unet_inputs(folder, k)
        calls.append({**call, "sample": rng.standard_normal(call["sample"].shape).astype(np.float32)})
    return calls


def quantized(
    folder: Path, work: Path, passes: Sequence[GraphPass], calls: Sequence[Inputs]
) -> tuple[Bundle, dict[str, Any]]:
    """A workload's bundle after some passes, with its target, in ``work``; and what that took and gave."""
    bundle, checkpoint = Bundle.open(folder / "bundle"), open_checkpoint(folder / "checkpoint")
    shutil.rmtree(work, ignore_errors=True)
    facts: dict[str, Any] = {}
    for step in passes:
        begun = time.perf_counter()
        spent: dict[str, float] = {}

        def done(stage: str, begun: float = begun, spent: dict[str, float] = spent) -> None:
            if "comparing" in stage:  # what comes now is the network in PyTorch
                spent["seconds"] = time.perf_counter() - begun
                spent["peak_bytes_so_far"] = float(peak_rss_bytes() or 0)

        bundle, reports = change_graphs(bundle, work / step.name, step, {"unet": calls}, [], checkpoint, done)
        counts = {key: len(value) if isinstance(value, list) else value for key, value in reports["unet"].items()}
        facts[step.name] = {**spent, **counts}
    begun = time.perf_counter()
    (work / "bundle").unlink(missing_ok=True)
    final = bundle.path.rename(work / "bundle")
    target = build_ort_cpu(Bundle.open(final))
    facts["ort-cpu"] = {"seconds": time.perf_counter() - begun, "rules": target.report["graphs"]["unet"]["rules"]}
    shutil.copyfile(folder / "inputs.npz", work / "inputs.npz")
    return Bundle.open(final), facts


def results(bundle: Bundle, calls: Sequence[Inputs], *, with_target: bool) -> list[list[Array]]:
    if with_target:
        graph = Pipeline.open(bundle.path, backend="cpu")._graph("unet")
        return [list(graph.run(call).values()) for call in calls]
    return outputs_of(load(bundle.file(bundle.manifest.graphs["unet"].path)), calls)


def unet_bytes(bundle: Bundle) -> int:
    return sum(entry.size_bytes for path, entry in bundle.manifest.files.items() if path.startswith("unet/model.onnx"))


def prepared(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Any], dict[str, dict[str, Any]]]:
    """The folders of what is compared, what each combination of passes took, and errors and bytes by row."""
    folder = options.folder or Path("build/peers") / options.workload
    work = options.work or Path("build/int8") / options.workload
    plain = Bundle.open(folder / "bundle")
    if ORT_CPU not in Pipeline.open(plain.path, backend="cpu").backend:
        sys.exit(f"{plain.path} has no target for this machine. Run: ldm-export build {plain.path} --target cpu")
    calls = calls_of(options.workload, folder, plain)
    judged = spread(calls, CALLS_JUDGED)
    folders, bundles, passes = {FP32: folder}, {FP32: plain}, {}
    for name, steps in list(PASSES.items())[: 1 if options.one_at_a_time else None]:
        folders[name] = work / name.replace(", ", "-").replace(" ", "-")
        bundles[name], passes[name] = quantized(folder, folders[name], steps, calls)
        print(f"{name}: {passes[name]}", file=sys.stderr)
    references = results(plain, judged, with_target=False)
    facts = {}
    for name, bundle in bundles.items():
        for how in HOW:
            off = worst_error(references, results(bundle, judged, with_target=how == "target"))
            facts[f"{name}, {how}"] = {"error": off, "bytes": unet_bytes(bundle)}
    return folders, passes, facts


def main(options: argparse.Namespace) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # what it held is free when variants are timed
        folders, passes, facts = apart.submit(prepared, options).result()
    starts: dict[str, Callable[[], Peer]] = {}
    for peer in ("diffusers eager", "PyTorch quantize_dynamic"):
        starts[peer] = partial(python_peer, peer, "int8", folders[FP32])
    for name, folder in folders.items():
        for how, peer in HOW.items():
            starts[f"{name}, {how}"] = partial(python_peer, peer, "int8", folder, row=f"{name}, {how}")
    table = Table({}, None)
    in_turn(starts, table, options.rounds, options.one_at_a_time)
    rows = [{"name": name, **row, **facts.get(name, {})} for name, row in table.rows.items()]
    measured = {row["name"]: row["ms"] for row in rows if "ms" in row}
    for row in rows:
        for how in HOW if "ms" in row else ():
            pairs = zip(measured[f"{FP32}, {how}"], row["ms"], strict=True)
            row[f"faster_than_fp32_{how.replace(' ', '_')}"] = statistics.median(theirs / own for theirs, own in pairs)
    print_rows(rows)
    shapes = {name: list(array.shape) for name, array in unet_inputs(folders[FP32], 0).items()}
    header = {"workload": options.workload, "inputs": shapes, "machine": cpu(), "rounds": options.rounds}
    document = {**header, "one_at_a_time": options.one_at_a_time, "rows": rows, "passes": passes}
    if options.result is not None:
        options.result.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    print("| one call | median ms | min ms | against fp32 plain | against its target | error | MB | load s | peak MB |")
    print("|---" + "|---:" * 8 + "|")
    for row in rows:
        if "ms" not in row:
            print(f"| {row['name']} | left out: {row['left_out']} |" + " |" * 7)
            continue
        cells = [f"{statistics.median(row['ms']):.1f}", f"{min(row['ms']):.1f}"]
        cells += [f"{row[f'faster_than_fp32_{how}']:.2f}x" for how in ("plain_graph", "target")]
        cells += [f"{row['error']:.4f}", f"{row['bytes'] / 1e6:.0f}"] if "error" in row else ["", ""]
        cells += [f"{statistics.median(row['load_s']):.2f}", f"{max(row['peak_bytes']) / 1e6:.0f}"]
        print(f"| {row['name']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--one-at-a-time", action="store_true")
    print(json.dumps(main(parser.parse_args())))
