"""The ONNX graphs that engines are built from: the bundle's own, converted where another precision is asked for.

TensorRT takes every type as the graph has it (it is strongly typed), so precision is a matter of the graph. Nothing is
built of a graph that was not compared with what it shall compute (`ldm_export.verify.engines.proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import is_loop, source_hashes_of
from ldm_export.bundle.plans import plan_in
from ldm_export.contract import STEP, GraphSpec, step_spec
from ldm_export.errors import InputError
from ldm_export.export.chain import tolerances
from ldm_export.export.loop import build_loop
from ldm_export.export.step import step_model
from ldm_export.graph.base import GraphPass
from ldm_export.graph.files import load, save
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.graph.weights import check_weights
from ldm_export.plan import Plan
from ldm_export.verify.engines.calls import CALIBRATED, example_calls
from ldm_export.verify.engines.proof import compare_converted, compare_loop, compare_step, recorded

PRECISIONS: dict[str, GraphPass | None] = {"fp32": None, "fp16": Half(), "int8": QuantizeWeights()}
"""How a plain graph comes to each precision; of int8 only the weights are integers, which is all that RTX has."""


@dataclass(frozen=True)
class Source:
    """What an engine is made of: of what graph it is, which of the bundle's files says so, and all that go into it."""

    spec: GraphSpec
    path: str
    source_hashes: Mapping[str, str]


def source_of(bundle: Bundle, name: str) -> Source:
    """What an engine is built from, by the name of a bundle's graph, ``step``, or ``loops/<plan>``.

    Raises
    ------
    InputError
        If there is no such graph or plan, or no loop can be made of the model.
    """
    if is_loop(name):
        loop = build_loop(bundle, plan_of(bundle, Path(name).name))
        return Source(loop.spec, f"plans/{Path(name).name}.json", loop.source_hashes)
    own = {graph: spec for graph, spec in bundle.manifest.graphs.items() if not is_loop(spec.path)}
    graph = bundle.roles.denoiser if name == STEP else name
    if graph not in own:
        raise InputError(f"{bundle.path} has no graph {graph!r}; it has {', '.join(own)}. Name some of these.")
    path = own[graph].path
    source_hashes = source_hashes_of(bundle.manifest, path)
    return Source(step_spec(own[graph]) if name == STEP else own[graph], path, source_hashes)


def parts_of(bundle: Bundle, sources: Iterable[Source]) -> list[str]:
    """The graphs that go into some engines, in the bundle's order; ``step`` has only the denoiser's shapes."""
    of = {path for source in sources if source.spec.name != STEP for path in source.source_hashes}
    return [name for name, spec in bundle.manifest.graphs.items() if spec.path in of]


def onnx_of(
    bundle: Bundle, made: Bundle, source: Source, reports: Mapping[str, dict[str, Any]], work: Path
) -> tuple[Path, dict[str, Any]]:
    """The file to build from, and what is to be reported of it.

    A loop is composed of the graphs as they were converted; a step is always in fp32.

    Parameters
    ----------
    made, reports : the bundle and the reports that `converted` gave
    work : where what is not a file of ``made`` is written

    Raises
    ------
    ParityError
        If a loop or the step does not compute what it shall.
    """
    name = source.spec.name
    if name == STEP:
        file = work / f"{STEP}.onnx"
        file.write_bytes(
            step_model(bundle.manifest.graphs[bundle.roles.denoiser]).SerializeToString(deterministic=True)
        )
        return file, {"compared": [compare_step(source.spec, file)]}
    if not is_loop(source.spec.path):
        return made.file(source.spec.path), reports[name]
    folder = work / "loops"
    folder.mkdir(exist_ok=True)
    plan = plan_of(bundle, Path(source.path).stem)
    file = build_loop(made, plan).save(folder)
    parts = [each for part in parts_of(bundle, [source]) for each in reports[part]["compared"]]
    return file, {"compared": [*parts, *compare_loop(bundle, made, source.spec, plan, file)]}


def converted(
    bundle: Bundle, names: list[str], precision: str, folder: Path, progress: Callable[[str], None]
) -> tuple[Bundle, dict[str, dict[str, Any]]]:
    """The bundle with some graphs converted, as files under ``folder``, and what is to be reported of each.

    Raises
    ------
    BundleError
        If a file of them was altered.
    ParityError
        If a converted graph, or a weight of it, differs from the plain one by more than its conversion may.
    """
    paths = [bundle.manifest.graphs[name].path for name in names]
    bundle.check_hashes(file for path in paths for file in source_hashes_of(bundle.manifest, path))
    reports: dict[str, dict[str, Any]] = {name: {"compared": [recorded(bundle, name)]} for name in names}
    step = PRECISIONS[precision]
    if step is None:
        return bundle, reports
    made = replace(bundle, path=folder)
    for name, path in zip(names, paths, strict=True):
        progress(f"{name}: to {precision}")
        graph, report = bundle.manifest.graphs[name], reports[name]
        change = step.apply(load(bundle.file(path)), example_calls(bundle, graph, CALIBRATED))
        made.file(path).parent.mkdir(parents=True)
        save(onnx_ir.from_proto(change.model), made.file(path))
        report |= change.report
        del change  # what it is compared with takes its place
        progress(f"{name}: comparing with the plain graph")
        check_weights(onnx_ir.load(bundle.file(path)), onnx_ir.load(made.file(path)), name)
        allowed = max([step.tolerance, *tolerances(bundle, name).values()])
        report["compared"].append(compare_converted(bundle, made, graph, precision, allowed))
    return made, reports


def plan_of(bundle: Bundle, name: str) -> Plan:
    """One of the plans that a bundle has files of, which are what engines are recorded to be made from.

    Raises
    ------
    InputError
        If there is no such plan.
    BundleError
        If its file is of another.
    """
    if f"plans/{name}.json" not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path} has no plan {name!r}; it has {', '.join(plans_of(bundle)) or 'none'}. Use one of these, or "
            "add it with ldm-export plan."
        )
    return plan_in(bundle, f"plans/{name}.json")


def plans_of(bundle: Bundle) -> list[str]:
    return sorted(Path(path).stem for path in bundle.manifest.files if path.startswith("plans/"))
