"""Puts a bundle's weights into engines that were built without them, or with those of another bundle.

A build takes minutes, and with one GPU's driver; putting weights in takes seconds. So one build of a network serves all
that was made of it by training: fine-tunes, merged LoRAs. The engines may be another bundle's; the weights, and what is
written, are the bundle's own, since engines lie with the graphs that they compute.

TensorRT's refitter goes by the names of weights and does not look at the graph between them. So the graphs are held
against each other here first, as they are and as they were converted, for what a conversion leaves in fp32 is measured
and may differ from model to model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir

from ldm_export.bundle import Bundle, export_error
from ldm_export.bundle.atomic import move_into_place, partial_folder
from ldm_export.bundle.manifest import is_loop
from ldm_export.bundle.targets.base import folder_of
from ldm_export.bundle.targets.engines import (
    Engine,
    EngineTarget,
    engine_targets,
    read_engine_target,
    write_engine_target,
)
from ldm_export.errors import BackendError, InputError
from ldm_export.export.tensorrt.library import library_of
from ldm_export.export.tensorrt.process import in_a_process
from ldm_export.graph.files import load
from ldm_export.verify.engines.build import Progress, bytes_of
from ldm_export.verify.engines.sources import Source, converted, onnx_of, parts_of, source_of

WEIGHTS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8)
"""Types of what may differ; of others, such as int64, are shapes and axes, which the engine was built for."""


def refit_engines(
    bundle: Bundle,
    kind: str,
    capability: Callable[[], str],
    base: Bundle | None = None,
    *,
    progress: Progress = lambda stage: None,
) -> EngineTarget:
    """Put a bundle's weights into its stripped engines, or into those of ``base``; gives the full target of the bundle.

    Parameters
    ----------
    kind : of the target, such as ``rtx-sm89-fp16``; what the bundle has of this kind is replaced
    capability : gives that of the GPU here, such as ``8.9``, or raises BackendError; asked when all else is well
    base : another bundle of the same networks, with refittable engines

    Raises
    ------
    InputError
        If there are no such engines, they do not fit this release or need no weights, or are of another network.
    BackendError
        If TensorRT, NVIDIA's driver or the GPU that the engines are for is missing.
    ParityError
        If a graph, converted or composed, differs too much from what it shall compute.
    ExportError
        If TensorRT refuses; the disk is full.
    """
    base = base or bundle
    target = _target_to_fill(bundle, kind, base)
    sources = {name: source_of(bundle, name) for name in target.engines}
    names = parts_of(bundle, sources.values())
    _check_can_be_filled(target, sources, base)
    if base is not bundle:
        check_same_networks(bundle, base, names, bundle.path, base.path)
    _check_device(target, capability())
    folder = folder_of(bundle, kind)
    try:
        with partial_folder(folder) as work, partial_folder(folder) as full:
            mine, of_base = work / "mine", work / "base"
            made, reports = converted(bundle, names, target.precision, mine, progress)
            if base is not bundle and made is not bundle:
                of, _ = converted(base, names, target.precision, of_base, progress)
                where = f"in {target.precision}"
                check_same_networks(made, of, names, f"{bundle.path} {where}", f"{base.path} {where}")
            engines, report = {}, {}
            for number, (name, engine) in enumerate(target.engines.items(), 1):
                progress(f"{name}: refitting, {number} of {len(target.engines)}")
                onnx, conversion = onnx_of(bundle, made, sources[name], reports, work)
                plan = full / engine.path
                engines[name] = _refitted(target, name, onnx, plan, sources[name])
                sizes = {"onnx_bytes": bytes_of(onnx), "engine_bytes": plan.stat().st_size}
                report[name] = {**target.report[name], **conversion, **sizes}
            filled = replace(target, folder=full, stripped=False, engines=engines, report=report)
            write_engine_target(filled)
            move_into_place(full, folder)
    except OSError as error:
        raise export_error(error, folder, None) from error
    found = read_engine_target(bundle, kind, version=target.version)
    assert isinstance(found, EngineTarget), found
    return found


def _target_to_fill(bundle: Bundle, kind: str, base: Bundle) -> EngineTarget:
    """The engines to refit, which were made from the graphs of ``base`` as these are now."""
    if kind not in (kinds := engine_targets(base)):
        raise InputError(
            f"{base.path} has no engines {kind!r}; it has {', '.join(kinds) or 'none'}. Build some that can be "
            "refitted with ldm-export build --refit or --strip."
        )
    target = read_engine_target(base.verifying(), kind)
    if not isinstance(target, EngineTarget):
        raise InputError(f"targets/{kind} of {base.path} cannot be refitted, since {target}. Build it anew.")
    if not (target.refittable or target.stripped):
        raise InputError(
            f"targets/{kind} of {base.path} was built with its weights fixed. Build it with --refit or --strip."
        )
    if base is bundle and not target.stripped:
        raise InputError(
            f"targets/{kind} of {base.path} has its weights. Name another bundle of the same networks, whose weights "
            "they are to have, with its own engines given by --engines-of."
        )
    version = library_of(target.flavour).__version__
    if version != target.version:
        raise InputError(
            f"targets/{kind} of {base.path} was made with {target.flavour} {target.version}, and this is {version}. "
            "Build it anew, or install that release."
        )
    return target


def _check_can_be_filled(target: EngineTarget, sources: Mapping[str, Source], base: Bundle) -> None:
    """Raise InputError unless the engines may have these weights, and loops are of the same plans."""
    for name, engine in target.engines.items():
        source = sources[name]
        if is_loop(name) and source.source_hashes[source.path] != engine.source_hashes[source.path]:
            raise InputError(
                f"{source.path} is another plan in {base.path}, and the engine {name} has it in it. Build {name} anew."
            )
        if not target.refittable and source.source_hashes != engine.source_hashes:
            raise InputError(
                f"targets/{target.kind} of {base.path} was built with --strip alone, and takes only the weights that "
                f"it was built from, of which {name}'s are not. Build it with --refit --strip."
            )


def check_same_networks(bundle: Bundle, base: Bundle, names: list[str], here: object, there: object) -> None:
    """Raise InputError unless graphs of two bundles differ in the values of their weights alone.

    Parameters
    ----------
    here, there : what errors call the two
    """
    for name in names:
        if name not in base.manifest.graphs:
            raise InputError(f"{there} has no graph {name!r}, which the engines take in {here}; build those of {here}.")
        mine, other = (onnx_ir.from_proto(load(each.file(each.manifest.graphs[name].path))) for each in (bundle, base))
        difference = _weights_differ(mine, other, here, there) or _nodes_differ(mine, other, here, there)
        if difference:
            raise InputError(
                f"{name} is another network: {difference}. Engines take weights of the network that they were built "
                "for; build those of this bundle."
            )


def _weights_differ(mine: onnx_ir.Model, other: onnx_ir.Model, here: object, there: object) -> str:
    """Say which weight is not in both, or of another shape or type, or which constant is another; empty if none is."""
    ours, theirs = mine.graph.initializers, other.graph.initializers
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            has, lacks = (here, there) if name in ours else (there, here)
            return f"{has} has the weight {name!r}, and {lacks} has not"
        a, b = ours[name].const_value, theirs[name].const_value
        assert a is not None
        assert b is not None
        if a.shape != b.shape:
            return f"weight {name!r} has shape {tuple(a.shape)} in {here}, and {tuple(b.shape)} in {there}"
        if a.dtype != b.dtype:
            return f"weight {name!r} is {a.dtype.name} in {here}, and {b.dtype.name} in {there}"
        if a.dtype not in WEIGHTS and not np.array_equal(a.numpy(), b.numpy()):
            return f"constant {name!r} is not the same in {here} and {there}"
    return ""


def _nodes_differ(mine: onnx_ir.Model, other: onnx_ir.Model, here: object, there: object) -> str:
    """Say which node, input or output is another; empty if none is."""
    ours, theirs = (_structure(model.graph) for model in (mine, other))
    if len(ours) != len(theirs):
        return f"{here} has {len(ours)} nodes, inputs and outputs, and {there} {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            return f"{a[0]} {a[1]!r} in {here} is {b[0]} {b[1]!r} in {there}, or has other attributes"
    return ""


def _structure(graph: onnx_ir.Graph) -> list[tuple[str, str, str]]:
    """What a graph is but for its weights: kind, name, and all that is said of it, of each input, node and output."""
    nodes = []
    for node in graph:
        proto = onnx_ir.to_proto(node)
        proto.doc_string = ""
        del proto.metadata_props[:]
        nodes.append((node.op_type, node.name or "", proto.SerializeToString(deterministic=True).hex()))
    ends = [("input", value) for value in graph.inputs] + [("output", value) for value in graph.outputs]
    return [(side, value.name or "", f"{value.type} {value.shape}") for side, value in ends] + nodes


def _check_device(target: EngineTarget, capability: str) -> None:
    """Raise BackendError unless the GPU here is one that the engines are for."""
    if capability not in target.compute_capabilities:
        raise BackendError(
            f"targets/{target.kind} is for compute capability {' and '.join(target.compute_capabilities)}, and the GPU "
            f"here has {capability}. Refit it on a GPU that it is for."
        )


def _refitted(target: EngineTarget, name: str, onnx: Path, plan: Path, source: Source) -> Engine:
    """Write a full engine to ``plan``."""
    engine = target.engines[name]
    plan.parent.mkdir(parents=True, exist_ok=True)
    files = {"onnx": str(onnx), "engine": str(target.file(engine.path)), "plan": str(plan)}
    request = {"flavour": target.flavour, "graphs": {name: {**files, "refittable": target.refittable}}}
    found = in_a_process(request, f"Refitting {name}")[name]
    return replace(engine, source_hashes=source.source_hashes, seconds=found["seconds"])
