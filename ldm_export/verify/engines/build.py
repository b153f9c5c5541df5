"""Builds a bundle's TensorRT engines, each in a process of its own, and puts them under ``targets/``.

What is there and still holds (the graph, the release, the devices, precision, shapes and switches, and the file itself,
by its hash) is not built again; of several engines only those that do not hold are. Each engine is put in place as soon
as it is done: the whole folder is made anew beside the old one and renamed, so that an interrupted build leaves the
engines before, and nothing half-written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle, export_error
from ldm_export.bundle.atomic import move_into_place, partial_folder
from ldm_export.bundle.manifest import is_loop
from ldm_export.bundle.plans import loop_of, with_plan
from ldm_export.bundle.targets.base import damage, folder_of, strays
from ldm_export.bundle.targets.engines import (
    FLAVOURS,
    Engine,
    EngineTarget,
    ShapeRange,
    engine_kind,
    is_current,
    listed_engine_target,
    read_engine_target,
    write_engine_target,
)
from ldm_export.contract import STEP, GraphSpec, TensorSpec
from ldm_export.errors import ExportError, InputError
from ldm_export.export.tensorrt.library import CALLED, capabilities_of, library_of
from ldm_export.export.tensorrt.process import in_a_process
from ldm_export.export.tensorrt.profiles import Range, check_pixels, profile_of
from ldm_export.reading.options import check_one_of
from ldm_export.runtime.facts import size_step
from ldm_export.verify.engines.sources import PRECISIONS, Source, converted, onnx_of, parts_of, source_of

DEFAULT_BATCH = Range(1, 1, 4)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EngineSettings:
    """What engines are built for.

    Attributes
    ----------
    flavour : ``tensorrt_rtx`` or ``tensorrt``
    sm_versions : GPUs for ``tensorrt_rtx``, such as ``89`` for compute capability 8.9; ``tensorrt`` takes the one here
    precision : one of `PRECISIONS`
    batch : pictures at a time
    pixels : their height and width; None for the model's own size
    refittable : weights can be replaced in the engine
    stripped : weights are left out of the engine, to be put in by refitting
    sparse : kernels for 2:4 sparse weights may be chosen
    """

    flavour: str
    sm_versions: tuple[str, ...] = ()
    precision: str = "fp32"
    batch: Range = DEFAULT_BATCH
    pixels: Range | None = None
    refittable: bool = False
    stripped: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        check_one_of("flavour", self.flavour, tuple(FLAVOURS))
        check_one_of("precision", self.precision, tuple(PRECISIONS))
        if (self.refittable or self.stripped) and len(self.sm_versions) > 1:
            raise InputError(
                f"Engines that can be refitted are for one GPU; {', '.join(self.sm_versions)} were given. "
                "Build for each."
            )


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes
    ----------
    target : as it now is
    built : names of the engines that were built; none if all were there
    because : why what was there did not do, in words
    """

    target: EngineTarget
    built: tuple[str, ...]
    because: str


@dataclass(frozen=True)
class _Task:
    """An engine that there shall be: made of what, for what shapes."""

    source: Source
    profile: Mapping[str, ShapeRange]


def build_engines(
    bundle: Bundle,
    settings: EngineSettings,
    graphs: Sequence[str] = (),
    loops: Sequence[str] = (),
    *,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Built:
    """Build engines of a bundle's graphs, of those that are named or of all, and of the sampling loops of some plans.

    With the denoiser's goes that of ``step`` (`ldm_export.contract.step_spec`), which is the same for all plans.

    Raises
    ------
    InputError
        For a device, size or graph that there is not, a plan that cannot be compiled, or a bundle with ControlNets
        or an IP-Adapter.
    BackendError
        If the flavour is not installed, or needs a GPU.
    BundleError
        If a graph's file was altered.
    ExportError
        If the parser refuses a graph, which is known before anything is built; a build fails or is killed; the disk is
        full.
    ParityError
        If a graph, converted or composed, differs too much from what it shall compute.
    """
    if bundle.roles.controls or bundle.roles.image_encoder is not None:
        raise InputError(
            f"Bundle {bundle.path} has ControlNets or an IP-Adapter, of which no engines are built. Use the backend "
            "cuda, or export the model without."
        )
    wanted = _target(bundle, settings)
    for plan in loops:
        bundle, _ = with_plan(bundle, *loop_of(plan))  # an engine records what it was made of
    tasks = _tasks(bundle, settings, graphs, loops)
    target, because = _kept(wanted, bundle, tasks, set(tasks) if force else set())
    waiting = {name: task for name, task in tasks.items() if name not in target.engines}
    if not waiting and not because:
        return Built(_as_it_is(bundle, target), (), "")
    try:
        with partial_folder(target.folder) as work:
            progress("parsing")
            parts = parts_of(bundle, [task.source for task in waiting.values()])
            _check_supported(bundle, parts, settings.flavour)
            made, reports = converted(bundle, parts, settings.precision, work, progress)
            for number, (name, task) in enumerate(waiting.items(), 1):
                progress(f"{name}: building, {number} of {len(waiting)}")
                target = _put(target, name, task, *onnx_of(bundle, made, task.source, reports, work))
            if not waiting:
                target = _replaced(target, work)
    except OSError as error:
        raise export_error(error, target.folder, None) from error
    return Built(_as_it_is(bundle, target), tuple(waiting), because)


def _target(bundle: Bundle, settings: EngineSettings) -> EngineTarget:
    """The target that there shall be, without engines yet."""
    library = library_of(settings.flavour)
    capabilities = capabilities_of(settings.flavour, library, settings.sm_versions)
    kind = engine_kind(settings.flavour, capabilities, settings.precision)
    return EngineTarget(
        folder=folder_of(bundle, kind),
        kind=kind,
        flavour=settings.flavour,
        version=library.__version__,
        compute_capabilities=capabilities,
        precision=settings.precision,
        refittable=settings.refittable,
        stripped=settings.stripped,
        sparse=settings.sparse,
        engines={},
        report={},
    )


def _tasks(bundle: Bundle, settings: EngineSettings, graphs: Sequence[str], loops: Sequence[str]) -> dict[str, _Task]:
    manifest = bundle.manifest
    own = {name: spec for name, spec in manifest.graphs.items() if not is_loop(spec.path)}
    pixels = settings.pixels or Range(*(int(manifest.model["height"]),) * 3)
    check_pixels(pixels, size_step(manifest.model))
    names = list(graphs or own)
    if bundle.roles.denoiser in names:  # what follows each of its calls
        names.append(STEP)
    sources = {name: source_of(bundle, name) for name in [*names, *(f"loops/{plan}" for plan in loops)]}
    return {
        name: _Task(source, profile_of(source.spec, own, bundle.roles, manifest.model, settings.batch, pixels))
        for name, source in sources.items()
    }


def _kept(
    target: EngineTarget, bundle: Bundle, tasks: Mapping[str, _Task], again: set[str]
) -> tuple[EngineTarget, str]:
    """The target with the engines that are there and hold, and why others do not, in words."""
    found = listed_engine_target(bundle, target.kind)
    if not isinstance(found, EngineTarget):
        return target, found or ""
    if found.version != target.version:
        return target, f"it was made with {found.flavour} {found.version}, and this is {target.version}"
    switches = ("refittable", "stripped", "sparse")
    if any(getattr(found, switch) != getattr(target, switch) for switch in switches):
        return target, "it was made with other switches"
    engines, reasons = {}, [f"its {path} is not listed" for path in strays(found)]
    for name, engine in found.engines.items():
        if name in again:
            reason = f"its {name} is to be built again"
        elif not is_current(engine, bundle):
            reason = f"its {name} was made from other graphs"
        elif name in tasks and engine.profile != tasks[name].profile:
            reason = f"its {name} was made for other shapes"
        elif "compared" not in found.report.get(name, {}):
            reason = f"it does not say what its {name} was compared with"
        else:
            reason = found.fault_of(name) or damage(found, engine.path, verified=True)
        if reason:
            reasons.append(reason)
        else:
            engines[name] = engine
    report = {name: found.report[name] for name in engines}
    return replace(target, engines=engines, report=report), "; ".join(reasons)


def _check_supported(bundle: Bundle, names: Sequence[str], flavour: str) -> None:
    """Raise ExportError for the first graph that the parser refuses, or whose network is not as the contract says."""
    graphs = {name: {"onnx": str(bundle.file(bundle.manifest.graphs[name].path))} for name in names}
    found = in_a_process({"flavour": flavour, "graphs": graphs}, "The parser")
    for name in names:
        _check_network(name, bundle.manifest.graphs[name], found[name], flavour)


def _check_network(name: str, spec: GraphSpec, found: Mapping[str, Any], flavour: str) -> None:
    if "refused" in found:
        refused = [f"node {each['node']} ({each['operator']}): {each['reason']}" for each in found["refused"]]
        raise ExportError(
            f"{CALLED[flavour]} cannot read {name}: {'; '.join(refused)}. Nothing was built. Export a bundle without "
            "the pass that made it; engines are made of graphs in fp32."
        )
    for side, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        listed = {tensor.name: (tensor.dtype, _free(tensor.shape)) for tensor in tensors}
        network = {each["name"]: (each["dtype"], tuple(each["shape"])) for each in found[side]}
        if listed != network:
            raise ExportError(
                f"{CALLED[flavour]} reads {name} with the {side} {network}; the bundle says {listed}. Nothing was "
                "built. Export the bundle anew."
            )


def _free(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)


def _put(target: EngineTarget, name: str, task: _Task, onnx: Path, report: Mapping[str, Any]) -> EngineTarget:
    """Build an engine and put it in place beside those that the target has."""
    with partial_folder(target.folder) as folder:
        plan = folder / f"{name}.plan"
        plan.parent.mkdir(parents=True, exist_ok=True)
        graph = {"onnx": str(onnx), "plan": str(plan), "profile": {key: asdict(r) for key, r in task.profile.items()}}
        names = ("flavour", "compute_capabilities", "refittable", "stripped", "sparse")
        request = {**{key: getattr(target, key) for key in names}, "graphs": {name: graph}}
        found = in_a_process(request, f"The build of {name}")[name]
        _check_network(name, task.source.spec, found, target.flavour)
        tensors = {
            side: tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in found[side])
            for side in ("inputs", "outputs")
        }
        source = task.source
        engine = Engine(
            f"{name}.plan", source.path, source.source_hashes, **tensors, profile=task.profile, seconds=found["seconds"]
        )
        told_of = {key: found[key] for key in ("layers", "peak_rss_bytes")}
        told_of |= {"onnx_bytes": bytes_of(onnx), "engine_bytes": plan.stat().st_size, **report}
        grown = replace(target, engines={**target.engines, name: engine}, report={**target.report, name: told_of})
        return _replaced(grown, folder)


def _replaced(target: EngineTarget, folder: Path) -> EngineTarget:
    """Put a folder in the place of the target's, with those of its engines that are not in it yet."""
    for engine in target.engines.values():
        if not (folder / engine.path).exists():
            (folder / engine.path).parent.mkdir(parents=True, exist_ok=True)
            _linked(target.file(engine.path), folder / engine.path)
    write_engine_target(replace(target, folder=folder))
    move_into_place(folder, target.folder)
    return target


def _linked(file: Path, other: Path) -> None:
    """The same file by another name or, where the file system has no such thing, a copy."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _as_it_is(bundle: Bundle, target: EngineTarget) -> EngineTarget:
    made = read_engine_target(bundle, target.kind, version=target.version)
    assert isinstance(made, EngineTarget), made
    return made


def bytes_of(onnx: Path) -> int:
    """A graph's size with its weights."""
    return sum(file.stat().st_size for file in onnx.parent.iterdir() if file == onnx or file.suffix == ".onnx_data")
