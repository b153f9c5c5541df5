"""Where the time of one UNet call goes: by operator, and how much of a plain matrix product's speed each reaches.

profile_unet.py WORKLOAD [RESULT.json]     one of peers/workloads.py, made before; the bundle's target ort-cpu is run

Times are medians over calls, of ONNX Runtime's own profiler. Operations are counted of convolutions, products with
weights and attention; a multiplication and an addition are two. The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.peers.peer import unet_inputs
from benchmarks.peers.run import sgemm_gflops
from ldm_export.bench.machine import cpu
from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import ORT_CPU, Target, needs_of, read_target
from ldm_export.export.ort_cpu import run_parts

CALLS = {"sd15": 3}
"""Of others: 20."""


def flops_of(kind: str, shapes: list[list[int]], output: list[int]) -> int:
    if kind == "Conv":
        return 2 * prod(output) * prod(shapes[1][1:])
    if kind in ("MatMul", "FusedMatMul"):  # the second may read its first factor transposed
        return 2 * prod(output) * shapes[0][-1 if shapes[0][-2] == output[-2] else -2]
    if kind == "MultiHeadAttention":
        batch, queries, width = shapes[0]
        return 4 * batch * queries * shapes[1][1] * width
    return 0


def nodes_of(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By node: its operator, what it computes in a call, and the times of all calls in ms."""
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        told = event["args"]
        shapes = [next(iter(each.values())) for each in told["input_type_shape"]]
        outputs = [next(iter(each.values())) for each in told["output_type_shape"]]
        node = nodes.setdefault(event["name"], {"kind": told["op_name"], "ms": []})
        node["flops"] = flops_of(told["op_name"], shapes, outputs[0])
        node["ms"].append(event["dur"] / 1000)
    return nodes


def main(workload: str) -> dict[str, Any]:
    folder = Path("build/peers") / workload
    bundle = Bundle.open(folder / "bundle")
    target = read_target(bundle, ORT_CPU, needs_of(onnxruntime.__version__))
    if not isinstance(target, Target):
        raise SystemExit(f"{bundle.path} has no fitting target. Run: ldm-export build {bundle.path} --target cpu")
    graph, inputs = target.graphs["unet"], unet_inputs(folder, 0)
    with tempfile.TemporaryDirectory() as temporary:
        sessions = {}
        for path in (graph.path, *graph.hoisted.values()):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.enable_mem_pattern = False
            options.add_session_config_entry("session.force_spinning_stop", "1")
            options.enable_profiling = path == graph.path
            options.profile_file_prefix = str(Path(temporary) / "profile")
            sessions[path] = onnxruntime.InferenceSession(target.file(path), options, ["CPUExecutionProvider"])
        for _ in range(1 + CALLS.get(workload, 20)):
            run_parts(graph, inputs, sessions.__getitem__, ["out_sample"])
        nodes = nodes_of(json.loads(Path(sessions[graph.path].end_profiling()).read_text(encoding="utf-8")))
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "ms": 0.0, "gflop": 0.0})
    for node in nodes.values():
        row = kinds[node["kind"]]
        row["count"] += 1
        row["ms"] += statistics.median(node["ms"][1:])  # the first call brings the weights into memory
        row["gflop"] += node["flops"] / 1e9
    peak, whole = sgemm_gflops(), sum(row["ms"] for row in kinds.values())
    print("| operator | count | ms | share | GFLOP/s | of a plain product's |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["ms"]):
        speed = row["gflop"] / row["ms"] * 1000
        reached = f"{speed:.0f} | {speed / peak:.0%}" if speed else "|"
        print(f"| {kind} | {row['count']:.0f} | {row['ms']:.1f} | {row['ms'] / whole:.1%} | {reached} |")
    return {"workload": workload, "machine": cpu(), "sgemm_gflops": peak, "ms": whole, "operators": kinds}


if __name__ == "__main__":
    document = main(sys.argv[1])
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
