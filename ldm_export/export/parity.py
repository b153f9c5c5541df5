"""Holds an exported graph against the PyTorch network that it came from, on sizes that the export did not see.

The measures are those of :mod:`ldm_export.bundle.parity`, of the worst run. The network runs first and can be freed
before the graph is loaded, so that both need not fit into memory together.

On seeded inputs both run in one thread: they then sum in the same order however many there are, and a checkpoint gives
the same errors, and so the same manifest, each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from ldm_export.bundle.parity import SILENT_DB, TOLERANCE, Parity, snr_db
from ldm_export.contract import GraphSpec
from ldm_export.errors import ExportError
from ldm_export.export.onnx import inputs_of
from ldm_export.families.base import GraphModule, ModelGraph
from ldm_export.graph.base import Array
from ldm_export.graph.running import session_options
from ldm_export.graph.weights import missing_weights

LARGE_BYTES = 1_000_000_000
"""A graph beyond this is checked without ONNX Runtime's second, re-packed copy of its weights."""

SIZES = (
    {"batch": 1, "height": 16, "width": 8, "tokens": 77},
    {"batch": 3, "height": 21, "width": 15, "tokens": 5},  # odd: every halving rounds
)

NetworkCall = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The inputs and outputs of one call of a network."""


@torch.no_grad()
def reference_runs(module: GraphModule, graph: ModelGraph, pixels_per_latent: int) -> list[NetworkCall]:
    """The network on seeded inputs, once for each of :data:`SIZES`, in one thread."""
    inputs = [inputs_of(graph, sizes, pixels_per_latent) for sizes in SIZES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [(tensors, module(*tensors)) for tensors in inputs]
    finally:
        torch.set_num_threads(threads)


def compare_graph(path: Path, graph: GraphSpec, runs: list[NetworkCall], *, threads: int = 0) -> list[Parity]:
    """The graph in ONNX Runtime on the CPU against ``runs``: one record an output.

    A large graph is run in a process of its own, since torch may still hold the network's weights in this one.

    Parameters
    ----------
    threads : 1 for errors that are the same however many there are; 0 for one a core
    """
    if not _is_large(path):
        return _compare_graph(path, graph, runs, threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_compare_graph, path, graph, runs, threads).result()


def _is_large(path: Path) -> bool:
    return sum(file.stat().st_size for file in path.parent.iterdir()) > LARGE_BYTES


def graph_session(path: Path, *, as_written: bool = False, threads: int = 0) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on the CPU; a large one without a second, packed copy of its weights.

    Parameters
    ----------
    as_written : values are rounded where the graph says so, and not where rewriting it for speed would, so that a graph
        gives the same bits alone and within another
    threads : 0 for one a core
    """
    options = session_options()
    options.intra_op_num_threads = threads
    large = _is_large(path)
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if large or as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def _compare_graph(path: Path, graph: GraphSpec, runs: list[NetworkCall], threads: int) -> list[Parity]:
    try:
        session = graph_session(path, threads=threads)
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime refuses the exported {graph.name}: {error}. Nothing was sealed.") from error
    names = [tensor.name for tensor in graph.inputs]
    results = [
        session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        for inputs, _ in runs
    ]
    return compare_outputs(graph, [outputs for _, outputs in runs], results)


@np.errstate(invalid="ignore")  # infinities: what comes of them is NaN, which no comparison lets through
def compare_outputs(
    graph: GraphSpec, references: list[tuple[Tensor, ...]], results: list[list[np.ndarray[Any, Any]]]
) -> list[Parity]:
    """The worst relative error of each output over all runs."""
    parities = []
    for index, tensor in enumerate(graph.outputs):
        errors, ratios = [], []
        for reference, result in zip(references, results, strict=True):
            exact, given = reference[index].numpy(), result[index]
            alike = given.shape == exact.shape
            errors.append(float(np.abs(given - exact).max()) / (float(np.abs(exact).max()) or 1.0) if alike else np.inf)
            ratios.append(snr_db(exact, given) if alike else -SILENT_DB)
        worst, least = float(np.max(errors)), float(np.min(ratios))  # NaN if one is, which max() and min() are not
        parities.append(Parity(graph.name, tensor.name, worst, TOLERANCE, least))
    return parities


def compare_weights(path: Path, graph: GraphSpec, weights: Mapping[str, Array]) -> list[Parity]:
    """Look for every weight of the network in the graph, as it is, transposed, or rounded.

    Gives one record if any is missing; its ``max_error`` is the share of the network's weights that are.
    """
    missing = missing_weights(onnx_ir.load(path), weights)
    if not missing:
        return []
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return [Parity(graph.name, f"weight {missing[0]}{others}", len(missing) / len(weights), TOLERANCE)]


@torch.enable_grad()
def weights_read(module: GraphModule, inputs: Sequence[Tensor]) -> dict[str, Array]:
    """The weights that the outputs depend on, by name, as float32 that shares the network's memory."""
    named = {name: parameter.requires_grad_(True) for name, parameter in module.network.named_parameters()}
    found, seen = set[int](), set[Any]()
    waiting = [output.grad_fn for output in module(*inputs)]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        found.add(id(getattr(function, "variable", None)))
        waiting += [source for source, _ in function.next_functions]
    return {name: p.requires_grad_(False).detach().numpy() for name, p in named.items() if id(p) in found}
