"""Holds an exported graph against the PyTorch network that it came from, on sizes that the export did not see.

The measure is max |onnx - torch| / max |torch| over every element of an output, the worst of all runs; of graphs whose
numbers a pass has rounded, also the signal-to-noise ratio 10 log10(|torch|^2 / |onnx - torch|^2), in dB, of the worst
run. The network runs first and can be freed before the graph is loaded, so that both need not fit into memory together.

On seeded inputs both run in one thread: they then sum in the same order however many there are, and a checkpoint gives
the same errors, and so the same manifest, each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from ldm_export.contract import GraphSpec
from ldm_export.errors import ExportError, ParityError
from ldm_export.export.onnx import GraphModule, random_inputs
from ldm_export.graph.base import Array
from ldm_export.graph.weights import missing_weights

TOLERANCE = 1e-4
"""Allowed error of an fp32 graph."""

SILENT_DB = 200.0
"""Signal-to-noise ratio beyond which none is told apart: float64 ends at about 300 dB, and JSON has no infinity."""

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
    """How far a graph's output is from the network's.

    Attributes
    ----------
    max_error : max |onnx - torch| / max |torch|, at most ``tolerance``
    snr_db : signal-to-noise ratio, at least ``least_snr_db`` where that is given: of graphs with rounded numbers
    """

    graph: str
    output: str
    max_error: float
    tolerance: float
    snr_db: float = SILENT_DB
    least_snr_db: float | None = None

    @property
    def passed(self) -> bool:
        loud = self.least_snr_db is None or self.snr_db >= self.least_snr_db  # false for NaN, as is the next
        return loud and self.max_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As a manifest has it: without signal-to-noise ratios where none was asked for."""
        record = {"graph": self.graph, "output": self.output, "max_error": self.max_error, "tolerance": self.tolerance}
        if self.least_snr_db is not None:
            record |= {"snr_db": self.snr_db, "least_snr_db": self.least_snr_db}
        return {**record, "passed": self.passed}


@torch.no_grad()
def reference_runs(module: GraphModule, graph: GraphSpec, pixels_per_latent: int, vocab_size: int) -> list[Run]:
    """The network on seeded inputs, once for each of :data:`SIZES`, in one thread."""
    inputs = [random_inputs(graph, sizes, pixels_per_latent, vocab_size) for sizes in SIZES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [(tensors, module(*tensors)) for tensors in inputs]
    finally:
        torch.set_num_threads(threads)


def compare_graph(path: Path, graph: GraphSpec, runs: list[Run], *, threads: int = 0) -> list[Parity]:
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
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    large = _is_large(path)
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if as_written:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # fp32, as the runtime
    if large or as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def _compare_graph(path: Path, graph: GraphSpec, runs: list[Run], threads: int) -> list[Parity]:
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


@np.errstate(invalid="ignore")
def snr_db(exact: Array, given: Array) -> float:
    """10 log10(|exact|^2 / |given - exact|^2), in dB, within +-:data:`SILENT_DB`; NaN if a value is no number."""
    signal = exact.astype(np.float64)
    noise = float(np.square(given - signal).sum())
    if noise == 0:
        return SILENT_DB
    return float(np.clip(10 * np.log10(max(float(np.square(signal).sum()) / noise, 1e-300)), -SILENT_DB, SILENT_DB))


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


@np.errstate(invalid="ignore")
def largest_error(expected: Sequence[Array], results: Sequence[Array]) -> float:
    """Of one call, as a share of each output's largest value; NaN if a result is, infinite if a shape is another."""
    errors = [
        float(np.abs(array - other).max()) / max(float(np.abs(array).max()), 1e-30)
        if array.shape == other.shape
        else np.inf
        for array, other in zip(expected, results, strict=True)
    ]
    return float(np.max(errors))  # NaN if one is, which max() is not


def least_snr(expected: Sequence[Array], results: Sequence[Array]) -> float:
    """Signal-to-noise ratio of the noisiest array, in dB; NaN if a value is no number."""
    ratios = [
        snr_db(array, other) if array.shape == other.shape else -SILENT_DB
        for array, other in zip(expected, results, strict=True)
    ]
    return float(np.min(ratios))  # NaN if one is, which min() is not


def check_parity(parities: list[Parity]) -> None:
    """Raise ParityError, with the graph, the tensor and the numbers, unless every output is close enough."""
    for parity in parities:
        if not parity.max_error <= parity.tolerance:  # NaN is not, either
            raise ParityError(
                f"{parity.graph} output {parity.output!r} differs from PyTorch by {parity.max_error:.3g} of its "
                f"largest value; {parity.tolerance:.3g} is allowed. Nothing was sealed."
            )
        if not parity.passed:
            raise ParityError(
                f"{parity.graph} output {parity.output!r} has a signal-to-noise ratio of {parity.snr_db:.1f} dB, "
                f"compared with PyTorch; {parity.least_snr_db:.1f} dB is the least for numbers that are rounded as its "
                "are. Nothing was sealed."
            )
