"""TensorRT engines of a bundle, under ``targets/<kind>/``: what their ``target.json`` says, and when they may be run.

Kinds are named by what their engines are for: ``rtx-sm86-sm89``, ``rtx-sm89-fp16``, ``tensorrt-sm90-fp16``; fp32 goes
unsaid. Beside the format and the files, which are those of every target (``ldm_export.bundle.targets.base``), there is:

    {"flavour": "tensorrt_rtx", "version": "1.7.1.116",         engines are not portable from release to release
     "compute_capabilities": ["8.6", "8.9"], "precision": "fp32",
     "refittable": false, "stripped": false, "sparse": false,
     "engines": {"unet": {"path": "unet.plan", "source": "unet/model.onnx",
                          "source_hashes": {"unet/model.onnx": "…64 hex digits…", ...},    with the files of its weights
                          "inputs": [{"name": "sample", "dtype": "float32", "shape": [-1, 4, -1, -1]}, ...],
                          "outputs": [...],
                          "profile": {"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 16, 16]}, ...},
                          "seconds": 12.3},
                 "loops/ddim-20": {"path": "loops/ddim-20.plan", ...}},
     "report": {"unet": {"compared": [{"graph": "unet", "against": "PyTorch", "error": 3e-6, "allowed": 1e-4}, ...],
                         "layers": {"CONVOLUTION": {"HALF": 60, "FLOAT": 2}, ...}, ...}, ...}}    free

A report says what the graph that went in was compared with; its ``layers`` are counted by kind and precision.

All this is checked without deserialising an engine, which takes a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from ldm_export.bundle.bundle import Bundle
from ldm_export.bundle.listed import ListedFiles
from ldm_export.bundle.manifest import changed_files
from ldm_export.bundle.targets.base import kinds_of, listed, sound, texts, write_document
from ldm_export.contract import TensorSpec
from ldm_export.reading.documents import MalformedError
from ldm_export.reading.json_fields import FileEntry, check_type, field, files_of

FLAVOURS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
"""Libraries that engines are for, by the name that they are imported by, and what kinds are called after."""


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, tuned-for and largest shape of a dynamic input (TensorRT's optimization profile)."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """One engine of a target.

    Attributes
    ----------
    path : of the serialised engine, in the target's folder
    source : what it was built from: a graph of the bundle, or the plan of a loop
    source_hashes : SHA-256 of each file of the bundle that it was made from
    inputs, outputs : as the engine itself says, a free dimension being -1; names and dtypes are the graph's
    profile : what shapes each input with a free dimension may have; the engine's only optimization profile
    seconds : how long the build took
    """

    path: str
    source: str
    source_hashes: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, ShapeRange]
    seconds: float


@dataclass(frozen=True)
class EngineTarget:
    """Engines whose ``target.json`` was read and fits the bundle.

    Attributes
    ----------
    folder : where it lies
    kind : its name
    flavour : ``tensorrt_rtx`` or ``tensorrt``, as the library is imported
    version : of that library, whole
    compute_capabilities : of the devices that can run it, such as ``8.9``
    precision : ``fp32``, ``fp16`` or ``int8``
    refittable : whether weights can be replaced
    stripped : whether the engines have no weights, so that they must be refitted before they run
    sparse : whether 2:4 sparse kernels may have been chosen
    engines : by the name of their graph, such as ``unet`` or ``loops/ddim-20``; not always all graphs of the bundle
    report : by the name of the graph: what the graph that went in was compared with, layers, bytes; free
    files : every file, by its path in the folder
    """

    folder: Path
    kind: str
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    refittable: bool
    stripped: bool
    sparse: bool
    engines: Mapping[str, Engine]
    report: Mapping[str, Any]
    files: Mapping[str, FileEntry] = dataclass_field(default_factory=dict)

    @property
    def paths(self) -> set[str]:
        return {engine.path for engine in self.engines.values()}

    def file(self, relative: str) -> Path:
        return self.folder / relative

    def fault(self, files: ListedFiles) -> str:
        return next(filter(None, map(self.fault_of, self.engines)), "")

    def fault_of(self, name: str) -> str:
        """Say what is wrong with what is said of one engine; empty if nothing is."""
        engine = self.engines[name]
        if engine.source not in engine.source_hashes:
            return f"its {name} does not say what it was made from"
        free = {tensor.name: tensor.shape for tensor in engine.inputs if -1 in tensor.shape}
        if engine.profile.keys() != free.keys():
            return f"its {name} has a profile for {sorted(engine.profile)}, and free sizes in {sorted(free)}"
        for tensor, shape in free.items():
            if not fits(shape, sizes := engine.profile[tensor]):
                return f"its {name} takes {tensor} of {shape}, and has a profile of {sizes} for it"
        return ""


def engine_kind(flavour: str, compute_capabilities: tuple[str, ...], precision: str) -> str:
    """The name of the folder: ``rtx-sm86-sm89-fp16``."""
    models = [f"sm{capability.replace('.', '')}" for capability in compute_capabilities]
    return "-".join([FLAVOURS[flavour], *models, *([precision] if precision != "fp32" else [])])


def engine_targets(bundle: Bundle) -> list[str]:
    """The kinds of all engine targets of a bundle, whether they fit or not, by name."""
    starts = tuple(f"{name}-sm" for name in FLAVOURS.values())
    return [kind for kind in kinds_of(bundle) if kind.startswith(starts)]


def write_engine_target(target: EngineTarget) -> None:
    """Write ``target.json`` for the engines that lie in the target's folder; its files are listed as they are there."""
    document = asdict(target)
    for name in ("folder", "kind", "files"):
        del document[name]
    write_document(target.folder, target.kind, document)


def read_engine_target(
    bundle: Bundle, kind: str, *, version: str | None = None, compute_capability: str | None = None
) -> EngineTarget | str | None:
    """The bundle's engines of a kind; why they are not sound or do not fit, in words; or None where there are none.

    Parameters
    ----------
    version : of the flavour's library here, such as ``1.7.1.116``; None checks none
    compute_capability : of the device here, such as ``8.9``; None checks none
    """
    found = sound_engine_target(bundle, kind)
    if not isinstance(found, EngineTarget):
        return found
    if version not in (None, found.version):
        return f"it was made with {found.flavour} {found.version}, and this is {version}"
    if compute_capability not in (None, *found.compute_capabilities):
        able = " and ".join(found.compute_capabilities)
        return f"it was made for compute capability {able}, and this device has {compute_capability}"
    for name, engine in found.engines.items():
        if not is_current(engine, bundle):
            return f"its {name} was made from other graphs"
    return found


def sound_engine_target(bundle: Bundle, kind: str) -> EngineTarget | str | None:
    """The bundle's engines of a kind, of whatever release and graphs; what is wrong with their files; or None."""
    return sound(bundle, kind, _target_of)


def listed_engine_target(bundle: Bundle, kind: str) -> EngineTarget | str | None:
    """The bundle's engines of a kind, each yet to be checked; why their ``target.json`` is of no use; or None."""
    return listed(bundle, kind, _target_of)


def is_current(engine: Engine, bundle: Bundle) -> bool:
    """Whether a bundle's files are still those that an engine was made from."""
    return not changed_files(bundle.manifest, engine.source_hashes)


def fits(shape: tuple[int | str, ...], sizes: ShapeRange) -> bool:
    """Whether a range of shapes can be a tensor's: as many sizes, min <= opt <= max, and the fixed ones as they are."""
    if any(len(each) != len(shape) for each in (sizes.min, sizes.opt, sizes.max)):
        return False
    return all(
        1 <= low <= best <= high and (size == -1 or low == high == size)
        for size, low, best, high in zip(shape, sizes.min, sizes.opt, sizes.max, strict=True)
    )


def _target_of(found: Any, folder: Path) -> EngineTarget:
    """Parse ``target.json``.

    Raises
    ------
    MalformedError
        If a field is missing or of a wrong type.
    """
    flavour, precision = field(found, "flavour", str), field(found, "precision", str)
    capabilities = field(found, "compute_capabilities", list)
    for capability in capabilities:
        check_type(capability, str, "compute_capabilities")
    if flavour not in FLAVOURS or engine_kind(flavour, tuple(capabilities), precision) != folder.name:
        raise MalformedError(f"it is for {flavour}, {', '.join(capabilities)} in {precision}")
    report = field(found, "report", dict)
    return EngineTarget(
        folder=folder,
        kind=folder.name,
        flavour=flavour,
        version=field(found, "version", str),
        compute_capabilities=tuple(capabilities),
        precision=precision,
        refittable=field(found, "refittable", bool),
        stripped=field(found, "stripped", bool),
        sparse=field(found, "sparse", bool),
        engines={name: _engine(entry, f"engines[{name!r}]") for name, entry in field(found, "engines", dict).items()},
        report={name: field(report, name, dict, "report") for name in report},
        files=files_of(found),
    )


def _engine(entry: Any, where: str) -> Engine:
    profile = field(entry, "profile", dict, where)
    return Engine(
        path=field(entry, "path", str, where),
        source=field(entry, "source", str, where),
        source_hashes=texts(entry, "source_hashes", where),
        inputs=_tensors(entry, "inputs", where),
        outputs=_tensors(entry, "outputs", where),
        profile={
            name: ShapeRange(*(_shape(sizes, key, f"{where}.profile[{name!r}]") for key in ("min", "opt", "max")))
            for name, sizes in profile.items()
        },
        seconds=field(entry, "seconds", float, where),
    )


def _tensors(entry: Any, side: str, where: str) -> tuple[TensorSpec, ...]:
    at = f"{where}.{side}"
    return tuple(
        TensorSpec(field(tensor, "name", str, at), field(tensor, "dtype", str, at), _shape(tensor, "shape", at))
        for tensor in field(entry, side, list, where)
    )


def _shape(holder: Any, key: str, where: str) -> tuple[int, ...]:
    sizes = field(holder, key, list, where)
    for size in sizes:
        check_type(size, int, f"{where}.{key}")
    return tuple(sizes)
