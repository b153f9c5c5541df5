"""Holds an exported graph against the PyTorch network that it came from, on sizes that the export did not see.

The measure is max |onnx - torch| / max |torch| over every element of an output, the worst of all runs. The network
runs first and can be freed before the graph is loaded, so that both need not fit into memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ldm_export.contract import GraphSpec
from ldm_export.errors import ExportError, ParityError
from ldm_export.export.onnx import GraphModule, random_inputs
from ldm_export.graph.base import Array

TOLERANCE = 1e-4
"""Allowed error of an fp32 graph."""

LARGE_BYTES = 1_000_000_000
"""A graph beyond this is checked without ONNX Runtime's second, re-packed copy of its weights."""

SIZES = (
    {"batch": 1, "height": 16, "width": 8, "tokens": 77},
    {"batch": 3, "height": 21, "width": 15, "tokens": 5},  # odd: every halving rounds
)

Run = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The inputs and outputs of one call of a network."""


@dataclass(frozen=True)
class Parity:
    """How far a graph's output is from the network's: ``max_error`` is max |onnx - torch| / max |torch|."""

    graph: str
    output: str
    max_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance  # false for NaN

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


@torch.no_grad()
def reference_runs(module: GraphModule, graph: GraphSpec, pixels_per_latent: int, vocab_size: int) -> list[Run]:
    """The network on seeded inputs, once for each of :data:`SIZES`."""
    inputs = [random_inputs(graph, sizes, pixels_per_latent, vocab_size) for sizes in SIZES]
    return [(tensors, module(*tensors)) for tensors in inputs]


def compare_graph(path: Path, graph: GraphSpec, runs: list[Run]) -> list[Parity]:
    """The graph in ONNX Runtime on the CPU against ``runs``: one record an output.

    A large graph is run in a process of its own, since torch may still hold the network's weights in this one.
    """
    if not _is_large(path):
        return _compare_graph(path, graph, runs)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_compare_graph, path, graph, runs).result()


def _is_large(path: Path) -> bool:
    return sum(file.stat().st_size for file in path.parent.iterdir()) > LARGE_BYTES


def graph_session(path: Path, *, as_written: bool = False) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on the CPU; a large one without a second, packed copy of its weights.

    Parameters
    ----------
    as_written : values are rounded where the graph says so, and not where rewriting it for speed would, so that a graph
        gives the same bits alone and within another
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    large = _is_large(path)
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if as_written:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # fp32, as the runtime
    if large or as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def _compare_graph(path: Path, graph: GraphSpec, runs: list[Run]) -> list[Parity]:
    try:
        session = graph_session(path)
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime refuses the exported {graph.name}: {error}. Nothing was sealed.") from error
    names = [tensor.name for tensor in graph.inputs]
    results = [
        session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        for inputs, _ in runs
    ]
    return compare_outputs(graph, [outputs for _, outputs in runs], results)


def compare_outputs(
    graph: GraphSpec, references: list[tuple[Tensor, ...]], results: list[list[np.ndarray[Any, Any]]]
) -> list[Parity]:
    """The worst relative error of each output over all runs."""
    parities = []
    for index, tensor in enumerate(graph.outputs):
        errors = [
            float(np.abs(result[index] - reference[index].numpy()).max()) / (reference[index].abs().max().item() or 1.0)
            if result[index].shape == tuple(reference[index].shape)
            else float("inf")
            for reference, result in zip(references, results, strict=True)
        ]
        worst = float("nan") if any(np.isnan(errors)) else max(errors)
        parities.append(Parity(graph.name, tensor.name, worst, TOLERANCE))
    return parities


def largest_error(expected: Sequence[Array], results: Sequence[Array]) -> float:
    """Of one call, as a share of each output's largest value; NaN if a result is."""
    scales = [max(float(np.abs(array).max()), 1e-30) for array in expected]
    errors = [
        float(np.abs(array - other).max()) / scale
        for array, other, scale in zip(expected, results, scales, strict=True)
    ]
    return float(np.max(errors))  # NaN if one is, which max() is not


def check_parity(parities: list[Parity]) -> None:
    """Raise ParityError, with the graph, the tensor and the numbers, unless every output is close enough."""
    for parity in parities:
        if not parity.passed:
            raise ParityError(
                f"{parity.graph} output {parity.output!r} differs from PyTorch by {parity.max_error:.3g} of its "
                f"largest value; {parity.tolerance:.3g} is allowed. Nothing was sealed."
            )
