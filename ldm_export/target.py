"""What is made of a bundle for one kind of machine, under ``targets/<kind>/``, and when it may be used.

``target.json`` says what it was made from and for what, so that a target that does not fit is passed over, never run:

    {"format_version": 1, "kind": "ort-cpu",
     "made_from": {"unet/model.onnx": "…64 hex digits…", ...},        the bundle's own files
     "needs": {"onnxruntime": "1.32.0", "cpu": "x86_64 avx512f"},     all must be equal
     "files": {"unet.onnx": {"size_bytes": 1234, "sha256": "…"}, ...},
     "graphs": {"unet": {"path": "unet.onnx", "once": {"timestep": "unet.timestep.onnx", ...},
                         "shallow": "unet.shallow.onnx", "deep_channels": 128}, ...},
     "report": {...}}                                                  free: rules, parity, seconds

A target may be deleted and rebuilt at any time; the bundle is complete without it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle, sha256_of
from ldm_export.errors import BundleError
from ldm_export.manifest import TARGETS, FileEntry, check_relative, is_loop
from ldm_export.onnx_wire import external_data_from_onnx

TARGET = "target.json"
FORMAT_VERSION = 1
ORT_CPU = "ort-cpu"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a document of an unexpected form may raise."""
LEVELS = ("avx512f", "avx2", "avx", "neon", "asimd")
"""Vector instructions that decide how weights are laid out, the widest first."""


@dataclass(frozen=True)
class TargetGraph:
    """One graph of a target.

    Attributes
    ----------
    path : of what is run in every call
    once : by name of the input that it depends on alone, the graph of what need not be; it gives inputs of the first
    shallow : the outermost blocks alone, which take what ``path`` gives as ``deep``; empty where there are none
    deep_channels : of ``deep``, which else has the latents' sizes
    """

    path: str
    once: Mapping[str, str]
    shallow: str = ""
    deep_channels: int = 0

    @property
    def paths(self) -> list[str]:
        return [self.path, *self.once.values(), *([self.shallow] if self.shallow else [])]


@dataclass(frozen=True)
class Target:
    """A target whose ``target.json`` was read and fits its bundle."""

    folder: Path
    graphs: Mapping[str, TargetGraph]
    needs: Mapping[str, str]
    report: Mapping[str, Any]

    def file(self, relative: str) -> Path:
        return self.folder / relative


def folder_of(bundle: Bundle, kind: str) -> Path:
    return bundle.path / TARGETS / kind


def made_from(bundle: Bundle) -> dict[str, str]:
    """The hashes of all files that a bundle's graphs consist of."""
    graphs = {graph.path for graph in bundle.manifest.graphs.values()}
    data = {path for path in bundle.manifest.files if path.endswith(".onnx_data")}
    return {path: bundle.manifest.files[path].sha256 for path in sorted(graphs | data) if not is_loop(path)}


def cpu_level() -> str:
    """The kind of processor as far as the layout of weights depends on it."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
        flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    widest = next((level for level in LEVELS if level in flags), platform.processor())
    return f"{platform.machine()} {widest}".strip()


def needs_of(version: str) -> dict[str, str]:
    """What ``ort-cpu`` must have been made for, to be used here with this release of ONNX Runtime."""
    return {"onnxruntime": version, "cpu": cpu_level()}


def write_target(
    folder: Path, bundle: Bundle, kind: str, graphs: Mapping[str, TargetGraph], needs: Mapping[str, str], report: Any
) -> None:
    """Write ``target.json`` for what lies in ``folder``."""
    document = {
        "made_from": made_from(bundle),
        "needs": dict(needs),
        "graphs": {name: asdict(graph) for name, graph in graphs.items()},
        "report": report,
    }
    write_document(folder, kind, document)


def write_document(folder: Path, kind: str, document: Mapping[str, Any]) -> None:
    """Write ``target.json``: what it says of its kind, and the format and files that every target lists."""
    files = {
        str(file.relative_to(folder)): asdict(FileEntry(file.stat().st_size, sha256_of(file)))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != TARGET
    }
    whole = {"format_version": FORMAT_VERSION, "kind": kind, "files": files, **document}
    (folder / TARGET).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_document(folder: Path) -> dict[str, Any] | str | None:
    """What the ``target.json`` of a folder says, if its format and files are right; why not; or None if there is none.

    Of the files, paths and sizes are checked, not hashes.
    """
    if not (folder / TARGET).is_file():
        return None
    try:
        found = json.loads((folder / TARGET).read_text(encoding="utf-8"))
        version, sizes = found["format_version"], {name: entry["size_bytes"] for name, entry in found["files"].items()}
        for name in sizes:
            check_relative(name)
    except (*MALFORMED, OSError, BundleError) as error:
        return f"its {TARGET} cannot be read ({error})"
    if version != FORMAT_VERSION:
        return f"it has format_version {version}, and this ldm_export reads {FORMAT_VERSION}"
    for name, size in sorted(sizes.items()):
        file = folder / name
        if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
            return f"its {name} is missing or of another size"
    return dict(found)


def read_target(bundle: Bundle, kind: str, has: Mapping[str, str]) -> Target | str | None:
    """The bundle's target of a kind; why it does not fit, in words; or None where there is none.

    Parameters
    ----------
    has : what there is of what a target may need, such as the version of its library
    """
    folder = folder_of(bundle, kind)
    found = read_document(folder)
    if found is None or isinstance(found, str):
        return found
    try:
        needs, report, source, files = dict(found["needs"]), found["report"], found["made_from"], set(found["files"])
        graphs = {
            name: TargetGraph(entry["path"], dict(entry["once"]), entry["shallow"], int(entry["deep_channels"]))
            for name, entry in found["graphs"].items()
        }
        paths = {path for graph in graphs.values() for path in graph.paths}
    except MALFORMED as error:
        return f"its {TARGET} cannot be read ({error})"
    if source != made_from(bundle):
        return "it was made from other graphs"
    for name, wanted in needs.items():
        if has.get(name) != wanted:
            return f"it was made for {name} {wanted}, and this is {has.get(name)}"
    own = [name for name, graph in bundle.manifest.graphs.items() if not is_loop(graph.path)]
    if graphs.keys() != set(own):
        return f"it has the graphs {', '.join(graphs)}, and the bundle {', '.join(own)}"
    for name in sorted(paths):
        if name not in files:
            return f"its {name} is not among its files"
        try:
            strays = {data.location for data in external_data_from_onnx(folder / name)} - files
        except BundleError as error:
            return f"its {name} cannot be read ({error})"
        if strays:
            return f"its {name} reads weights from {sorted(strays)[0]!r}, which it does not list"
    return Target(folder, graphs, needs, report)
