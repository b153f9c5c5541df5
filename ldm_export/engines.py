"""TensorRT engines of a bundle, under ``targets/<kind>/``: what their ``target.json`` says, and when they may be run.

Kinds are named by what their engines are for: ``rtx-sm86-sm89``, ``rtx-sm89-fp16``, ``tensorrt-sm90-fp16``; fp32 goes
unsaid. Beside the format and the files, which are those of every target (``ldm_export.target``), there is:

    {"flavour": "tensorrt_rtx", "version": "1.7.1.116",         engines are not portable from release to release
     "compute_capabilities": ["8.6", "8.9"], "precision": "fp32",
     "refittable": false, "stripped": false, "sparse": false,
     "engines": {"unet": {"path": "unet.plan", "source": "unet/model.onnx",
                          "made_from": {"unet/model.onnx": "…64 hex digits…", ...},    with the files of its weights
                          "inputs": [{"name": "sample", "dtype": "float32", "shape": [-1, 4, -1, -1]}, ...],
                          "outputs": [...],
                          "profile": {"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 16, 16]}, ...},
                          "seconds": 12.3},
                 "loops/ddim-20": {"path": "loops/ddim-20.plan", ...}},
     "report": {...}}                                           free: parity, what stayed in fp32, layers

All this is checked without deserialising an engine, which takes a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.contract import TensorSpec
from ldm_export.manifest import TARGETS
from ldm_export.target import MALFORMED, TARGET, folder_of, read_document, write_document

FLAVOURS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
"""Libraries that engines are for, by the name that they are imported by, and what kinds are called after."""


@dataclass(frozen=True)
class ShapeRange:
    """Of a dynamic input: the smallest and largest shape that it may have, and the one that the engine is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """One engine of a target.

    Attributes
    ----------
    path : of the serialised engine, in the target's folder
    source : the graph of the bundle that it was built from
    made_from : SHA-256 of each file of the bundle that it was made from
    inputs, outputs : as the engine itself says, a free dimension being -1; names and dtypes are the graph's
    profile : what shapes each input with a free dimension may have; the engine's only optimization profile
    seconds : how long the build took
    """

    path: str
    source: str
    made_from: Mapping[str, str]
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
    report : free
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

    def file(self, relative: str) -> Path:
        return self.folder / relative


def engine_kind(flavour: str, compute_capabilities: tuple[str, ...], precision: str) -> str:
    """The name of the folder: ``rtx-sm86-sm89-fp16``."""
    models = [f"sm{capability.replace('.', '')}" for capability in compute_capabilities]
    return "-".join([FLAVOURS[flavour], *models, *([precision] if precision != "fp32" else [])])


def engine_targets(bundle: Bundle) -> list[str]:
    """The kinds of all engine targets of a bundle, whether they fit or not, by name."""
    starts = tuple(f"{name}-sm" for name in FLAVOURS.values())
    kinds = [path.parent.name for path in (bundle.path / TARGETS).glob(f"*/{TARGET}")]
    return sorted(kind for kind in kinds if kind.startswith(starts))


def write_engine_target(target: EngineTarget) -> None:
    """Write ``target.json`` for the engines that lie in the target's folder."""
    document = asdict(target)
    del document["folder"]
    write_document(target.folder, document.pop("kind"), document)


def read_engine_target(
    bundle: Bundle, kind: str, *, version: str | None = None, compute_capability: str | None = None
) -> EngineTarget | str | None:
    """The bundle's engines of a kind; why they do not fit, in words; or None where there are none.

    Parameters
    ----------
    version : of the flavour's library here, such as ``1.7.1.116``; None checks none
    compute_capability : of the device here, such as ``8.9``; None checks none
    """
    folder = folder_of(bundle, kind)
    found = read_document(folder)
    if found is None or isinstance(found, str):
        return found
    try:
        target, files = _target(folder, kind, found), found["files"]
        fault = next((fault for name in target.engines if (fault := _fault(target.engines[name], name, files))), None)
    except MALFORMED as error:
        return f"its {TARGET} cannot be read ({error})"
    if fault:
        return fault
    if version not in (None, target.version):
        return f"it was made with {target.flavour} {target.version}, and this is {version}"
    if compute_capability not in (None, *target.compute_capabilities):
        able = " and ".join(target.compute_capabilities)
        return f"it was made for compute capability {able}, and this device has {compute_capability}"
    now = {path: entry.sha256 for path, entry in bundle.manifest.files.items()}
    for name, engine in target.engines.items():
        if any(now.get(path) != sha256 for path, sha256 in engine.made_from.items()):
            return f"its {name} was made from another graph"
    return target


def _target(folder: Path, kind: str, found: Mapping[str, Any]) -> EngineTarget:
    flavour, capabilities = found["flavour"], tuple(map(str, found["compute_capabilities"]))
    if engine_kind(flavour, capabilities, found["precision"]) != kind or found["kind"] != kind:
        raise ValueError(f"what it says that it is for does not go by the name {kind}")
    return EngineTarget(
        folder=folder,
        kind=kind,
        flavour=flavour,
        version=str(found["version"]),
        compute_capabilities=capabilities,
        precision=found["precision"],
        refittable=bool(found["refittable"]),
        stripped=bool(found["stripped"]),
        sparse=bool(found["sparse"]),
        engines={name: _engine(entry) for name, entry in found["engines"].items()},
        report=found["report"],
    )


def _engine(entry: Mapping[str, Any]) -> Engine:
    return Engine(
        path=str(entry["path"]),
        source=str(entry["source"]),
        made_from=dict(entry["made_from"]),
        inputs=tuple(_tensor(tensor) for tensor in entry["inputs"]),
        outputs=tuple(_tensor(tensor) for tensor in entry["outputs"]),
        profile={
            name: ShapeRange(*(_shape(shapes[key]) for key in ("min", "opt", "max")))
            for name, shapes in entry["profile"].items()
        },
        seconds=float(entry["seconds"]),
    )


def _tensor(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(str(entry["name"]), str(entry["dtype"]), _shape(entry["shape"]))


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    if any(type(size) is not int for size in sizes):
        raise ValueError(f"the shape {sizes} has a size that is no whole number")
    return tuple(sizes)


def _fault(engine: Engine, name: str, files: Mapping[str, Any]) -> str | None:
    """What is wrong with an engine's entry, in words."""
    if engine.path not in files:
        return f"its {name} is to be in {engine.path!r}, which it does not list"
    if engine.source not in engine.made_from:
        return f"its {name} does not say what it was made from"
    dynamic = {tensor.name: tensor.shape for tensor in engine.inputs if -1 in tensor.shape}
    if engine.profile.keys() != dynamic.keys():
        return f"its {name} has a profile for {sorted(engine.profile)}, and free sizes in {sorted(dynamic)}"
    for tensor, shape in dynamic.items():
        if not fits(shape, engine.profile[tensor]):
            return f"the profile of its {name} for {tensor!r} is {engine.profile[tensor]}, which no {shape} can be"
    return None


def fits(shape: tuple[int | str, ...], sizes: ShapeRange) -> bool:
    """Whether a range of shapes can be a tensor's: as many sizes, min <= opt <= max, and the fixed ones as they are."""
    if any(len(each) != len(shape) for each in (sizes.min, sizes.opt, sizes.max)):
        return False
    return all(
        1 <= low <= best <= high and (size == -1 or low == high == size)
        for size, low, best, high in zip(shape, sizes.min, sizes.opt, sizes.max, strict=True)
    )
