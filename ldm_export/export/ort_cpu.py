"""The target ``ort-cpu``: a bundle's graphs rewritten for ONNX Runtime's CPU and laid out to be mapped into memory.

ONNX Runtime optimizes a graph, and packs its weights for its kernels, each time that it opens one, into copies of its
own. Here both are done once: what is written is the optimized graph and the packed weights, which a session then maps
from the file. They hold for one release of ONNX Runtime and one kind of processor, which the target says.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from ldm_export.bundle import Bundle, export_error
from ldm_export.bundle.atomic import move_into_place, partial_folder
from ldm_export.bundle.manifest import is_loop
from ldm_export.bundle.parity import TOLERANCE, largest_error, least_snr
from ldm_export.bundle.targets.base import (
    ADAPTERS,
    ADAPTERS_ORT_CPU,
    ORT_CPU,
    Target,
    TargetGraph,
    adapters_needs,
    folder_of,
    needs_of,
    read_target,
    write_target,
)
from ldm_export.contract import GraphSpec, is_branch_input
from ldm_export.errors import ExportError
from ldm_export.export.chain import tolerances
from ldm_export.export.onnx import random_inputs
from ldm_export.graph.base import Array
from ldm_export.graph.branches import branch_specs
from ldm_export.graph.cpu import RULES
from ldm_export.graph.cpu.deepcache import cut_deep
from ldm_export.graph.cpu.hoist import hoist_invariants
from ldm_export.graph.cpu.matching import CONTRIB
from ldm_export.graph.cpu.rule import apply_rules
from ldm_export.graph.files import check_links
from ldm_export.graph.running import session_options
from ldm_export.graph.weights import least_snr_db

COSTLY = {"Conv", "FusedMatMul", "Gemm", "MatMul"}
"""Operators for whose sake it is worth to call a graph of its own."""
SMALLEST_OUTSIDE_BYTES = 1024
SHARE = np.float32(0.1)
"""Standard deviation of the factors that graphs with branches are compared with."""
SIZES = (
    {"batch": 2, "height": 8, "width": 16, "tokens": 7},
    {"batch": 1, "height": 16, "width": 8, "tokens": 5},
)
"""Sizes of the calls that a rewritten graph is compared in; no two sides of one are the same."""

Progress = Callable[[str], None]


def build_ort_cpu(bundle: Bundle, progress: Progress = lambda stage: None) -> Target:
    """Make the target ``ort-cpu`` of a bundle, for this machine, in the place of one that is there.

    Raises
    ------
    ExportError
        If a rewritten graph differs from the plain one by more than sums in another order do, or, where values are
        rounded as it runs, by more than the plain one may from PyTorch or with more noise than such numbers have; or
        if the target cannot be written.
    BundleError
        If a graph's weights lie in a file of several hard links.
    """
    plain = {name: (bundle.file(spec.path), spec) for name, spec in bundle.manifest.graphs.items()}
    graphs = {name: graph for name, graph in plain.items() if not is_loop(graph[1].path)}
    made = _build_target(bundle, ORT_CPU, graphs, needs_of(onnxruntime.__version__), progress)
    adapters = read_target(bundle, ADAPTERS, {})
    if isinstance(adapters, Target):
        build_adapters_ort_cpu(bundle, adapters, progress)
    return made


def build_adapters_ort_cpu(bundle: Bundle, adapters: Target, progress: Progress = lambda stage: None) -> Target:
    """Make the target ``adapters-ort-cpu``, of the graphs with branches that the target ``adapters`` has; raises as
    `build_ort_cpu` does."""
    graphs = {}
    for name, graph in adapters.graphs.items():
        file, spec = adapters.file(graph.path), bundle.manifest.graphs[name]
        graphs[name] = file, replace(spec, inputs=(*spec.inputs, *branch_specs(file)))
    needs = adapters_needs(adapters, onnxruntime.__version__)
    return _build_target(bundle, ADAPTERS_ORT_CPU, graphs, needs, progress)


def _build_target(
    bundle: Bundle,
    kind: str,
    plain: Mapping[str, tuple[Path, GraphSpec]],
    needs: Mapping[str, str],
    progress: Progress,
) -> Target:
    """Make a target of plain graphs, given with what they take and give, by name."""
    target = folder_of(bundle, kind)
    started = time.perf_counter()
    try:
        with partial_folder(target) as folder:
            graphs: dict[str, TargetGraph] = {}
            report: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "graphs": {}}
            for name, (file, spec) in plain.items():
                progress(f"{kind}: {name}")
                graphs[name], report["graphs"][name] = _build(bundle, name, file, spec, folder)
            write_target(folder, bundle, kind, graphs, needs, {**report, "seconds": time.perf_counter() - started})
            move_into_place(folder, target)
    except OSError as error:
        raise export_error(error, target, None) from error
    made = read_target(bundle, kind, needs)
    assert isinstance(made, Target), made
    return made


def _build(bundle: Bundle, name: str, plain: Path, spec: GraphSpec, folder: Path) -> tuple[TargetGraph, dict[str, Any]]:
    check_links(plain)
    model = ir.load(plain)
    model.opset_imports.setdefault(CONTRIB, 1)
    ShapeInferencePass()(model)
    reports = apply_rules(model, RULES)
    roles = bundle.manifest.roles
    is_denoiser = roles is not None and name == roles.denoiser
    parts = {}
    invariants = ("timestep", *roles.conditions) if roles is not None and is_denoiser else ()
    for tensor in spec.inputs:
        if tensor.name in invariants:  # the timestep comes back, conditions stay
            parts[tensor.name] = hoist_invariants(model, [tensor.name], f"hoisted.{tensor.name}", COSTLY)
    files = {key: f"{name}.{key}.onnx" for key, part in parts.items() if part is not None}
    for key, file in files.items():
        _lay_out(parts[key], folder / file)
    shallow, channels = (cut_deep(model) if is_denoiser else None) or (None, 0)
    _lay_out(model, folder / f"{name}.onnx")
    if shallow is not None:
        _lay_out(shallow, folder / f"{name}.shallow.onnx")
    graph = TargetGraph(f"{name}.onnx", files, f"{name}.shallow.onnx" if shallow is not None else "", channels)
    try:
        error, snr = _compared(plain, spec, graph, folder, bundle)
    except Exception as exc:  # ONNX Runtime's have no common base class
        raise ExportError(f"{ORT_CPU}: the rewritten {name} does not run ({exc}). Nothing was kept.") from exc
    least = least_snr_db(ir.load(plain), weights=False)
    allowed = TOLERANCE if least is None else max([TOLERANCE, *tolerances(bundle, name).values()])
    compared = {"error": error, "allowed": allowed}
    if not error <= allowed:
        raise ExportError(
            f"{ORT_CPU}: {name} differs from the plain graph by {error:.1e}; {allowed:.0e} is allowed. "
            "Nothing was kept."
        )
    if least is not None:
        compared |= {"snr_db": snr, "least_snr_db": least}
        if not snr >= least:
            raise ExportError(
                f"{ORT_CPU}: {name} has a signal-to-noise ratio of {snr:.1f} dB, compared with the plain graph; "
                f"{least:.1f} dB is the least for numbers that are rounded as its are. Nothing was kept."
            )
    hoisted = {key: len(part.graph.outputs) for key, part in parts.items() if part is not None}
    return graph, {"rules": [asdict(rule) for rule in reports], "hoisted": hoisted, **compared}


def _lay_out(model: ir.Model | None, file: Path) -> None:
    """Write a graph as ONNX Runtime would hold it in memory: optimized for this machine, its weights packed, beside."""
    assert model is not None
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        given = Path(temporary) / "model.onnx"
        ir.save(model, given, external_data="model.onnx_data")
        options = session_options()
        options.optimized_model_filepath = str(file)
        for key, value in {
            "session.optimized_model_external_initializers_file_name": f"{file.name}_data",
            "session.optimized_model_external_initializers_min_size_in_bytes": str(SMALLEST_OUTSIDE_BYTES),
            "session.save_external_prepacked_constant_initializers": "1",
        }.items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(given, options, ["CPUExecutionProvider"])
    optimized = onnx.load(file, load_external_data=False)
    if _name_branches_apart(optimized):
        file.write_bytes(optimized.SerializeToString())


def _name_branches_apart(model: onnx.ModelProto) -> bool:
    """Give the values inside an If names that no other graph has: ONNX Runtime counts what it adds in each anew."""
    branches = [
        (f"{node.output[0]}.{attribute.name}", attribute.g)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.HasField("g")
    ]
    for prefix, graph in branches:
        names = {name for node in graph.node for name in node.output} | {value.name for value in graph.initializer}
        own = {name: f"{prefix}.{name}" for name in names if name}
        for node in graph.node:
            node.input[:] = [own.get(name, name) for name in node.input]
            node.output[:] = [own.get(name, name) for name in node.output]
        for value in (*graph.initializer, *graph.output, *graph.value_info):
            value.name = own.get(value.name, value.name)
    return bool(branches)


def _compared(plain: Path, spec: GraphSpec, graph: TargetGraph, folder: Path, bundle: Bundle) -> tuple[float, float]:
    """The target's outputs on seeded inputs, compared with the plain graph's as the runtime opens it.

    Returns
    -------
    The largest error, as a share of each output's largest value, and the least signal-to-noise ratio, in dB
    """
    names = [tensor.name for tensor in spec.outputs]
    calls = seeded_calls(bundle, spec)
    before = _opened(plain)
    expected = [array for call in calls for array in before.run(names, call)]
    del before  # one of the two is in memory at a time
    after = {path: _opened(folder / path) for path in (graph.path, *graph.hoisted.values())}
    results = [array for call in calls for array in run_parts(graph, call, after.__getitem__, names)]
    return largest_error(expected, results), least_snr(expected, results)


def seeded_calls(bundle: Bundle, spec: GraphSpec) -> list[dict[str, Array]]:
    """Inputs of a graph for calls of the sizes `SIZES`; adapters are of rank 3 and change a layer by a part of it."""
    model, calls = bundle.manifest.model, []
    free = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    for sizes in SIZES:
        tensors = random_inputs(
            spec,
            {**{size: sizes["batch"] if size.endswith((".rows", ".gains")) else 3 for size in free}, **sizes},
            model["pixels_per_latent"],
            int(model.get("class_count") or 2),
            model.get("patch_size", 1),
        )
        call = {tensor.name: np.asarray(value) for tensor, value in zip(spec.inputs, tensors, strict=True)}
        calls.append({key: value * SHARE if is_branch_input(key) else value for key, value in call.items()})
    return calls


def run_parts(
    graph: TargetGraph, call: Mapping[str, Array], opened: Callable[[str], Any], names: list[str]
) -> list[Array]:
    """One call of a target's graph, what is cut out of it first."""
    given = dict(call)
    for path in graph.hoisted.values():
        session = opened(path)
        outputs = [value.name for value in session.get_outputs()]
        inputs = {value.name: call[value.name] for value in session.get_inputs()}
        given |= zip(outputs, session.run(outputs, inputs), strict=True)
    session = opened(graph.path)
    return list(session.run(names, {value.name: given[value.name] for value in session.get_inputs()}))


def _opened(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, session_options(), ["CPUExecutionProvider"])
