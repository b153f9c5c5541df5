"""What pruned channels buy where arithmetic, not overhead, is what a call costs: a UNet of 52 M parameters, in turn.

pruned_unet.py [RESULT.json]        random weights; importance by magnitude, and nothing is trained

The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from benchmarks.peers.workloads import SMALL_UNET
from ldm_export.bench.machine import cpu
from ldm_export.contract import GraphSpec, TensorSpec, graph_spec
from ldm_export.export.onnx import export_graph, random_inputs
from ldm_export.families.base import GraphModule
from ldm_export.graph.running import session
from ldm_export.passes.channels import Channels, nearest_share
from ldm_export.passes.imitation import flops, parameters
from ldm_export.passes.importance import magnitude
from ldm_export.passes.prune_channels import narrowed
from ldm_export.runtime.backends.auto import SETTLE_S

ROUNDS, RATIO = 12, 0.3
SIZES = {"batch": 2, "height": 32, "width": 32, "tokens": 77}


def spec_of(network: UNet2DConditionModel) -> GraphSpec:
    """What the network takes and gives, as a graph."""
    config, free = network.config, ("batch", "height", "width")
    width = int(config.cross_attention_dim)  # type: ignore[arg-type]
    inputs = [
        TensorSpec("sample", "float32", (free[0], config.in_channels, *free[1:])),
        TensorSpec("timestep", "float32", free[:1]),
        TensorSpec("encoder_hidden_states", "float32", (free[0], "tokens", width)),
    ]
    return graph_spec("unet", inputs, [TensorSpec("out_sample", "float32", (free[0], config.out_channels, *free[1:]))])


def predicted(network: UNet2DConditionModel, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (network(*inputs),)


def main() -> dict[str, Any]:
    torch.manual_seed(0)
    whole = UNet2DConditionModel.from_config(SMALL_UNET).requires_grad_(False).eval()
    channels, share = Channels(whole), nearest_share(whole.config, 1 - RATIO)
    networks = {
        "whole": whole,
        "pruned": narrowed(whole, channels, magnitude(whole, channels), Fraction(share)).student,
    }
    variants, rows = {}, {}
    for name, network in networks.items():
        graph = spec_of(network)
        example = random_inputs(graph, SIZES, 8, 1)
        with tempfile.TemporaryDirectory() as folder:
            path = export_graph(GraphModule(network.eval(), predicted), graph, example, Path(folder))
            one = dict(zip(("latents", "timesteps", "encoder_hidden_states"), example, strict=True))
            rows[name] = {
                "bytes": path.stat().st_size,
                "parameters": parameters(network),
                "flops": flops(network, noise=one["latents"], **one),
            }
            opened = session(onnx.load(str(path)))
        call = {spec.name: np.asarray(value) for spec, value in zip(graph.inputs, example, strict=True)}
        variants[name] = lambda opened=opened, call=call: opened.run(None, call)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(ROUNDS + 1):
        for name, run in variants.items():
            time.sleep(SETTLE_S)
            started = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - started) * 1000)
    for name, spent in times.items():
        rows[name] |= {"median_ms": statistics.median(spent), "min_ms": min(spent)}
    ratios = {key: rows["whole"][key] / rows["pruned"][key] for key in ("bytes", "parameters", "flops")}
    ratios["time"] = statistics.median(a / b for a, b in zip(times["whole"], times["pruned"], strict=True))
    for key, ratio in ratios.items():
        print(f"{key:10} {ratio:.2f}x less")
    return {"asked": RATIO, "taken": float(1 - share), "machine": cpu(), "rounds": ROUNDS, "rows": rows, "less": ratios}


if __name__ == "__main__":
    document = main()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
