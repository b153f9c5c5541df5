"""What is made of a bundle for one kind of machine, under ``targets/<kind>/``, and when it may be used.

``target.json`` says what it was made from and for what, so that a target that does not fit is passed over, never run:

    {"format_version": 2, "kind": "ort-cpu",
     "source_hashes": {"unet/model.onnx": "…64 hex digits…", ...},        the bundle's own files
     "needs": {"onnxruntime": "1.32.0", "cpu": "x86_64 GenuineIntel 6 85 avx avx2 …"},   all must be equal
     "files": {"unet.onnx": {"size_bytes": 1234, "sha256": "…"}, ...},
     "graphs": {"unet": {"path": "unet.onnx", "hoisted": {"timestep": "unet.timestep.onnx", ...},
                         "shallow": "unet.shallow.onnx", "deep_channels": 128}, ...},
     "report": {...}}                                                  free: rules, parity, seconds

A target may be deleted and rebuilt at any time; the bundle is complete without it. So nothing that is wrong with one is
wrong with the bundle: it is passed over, for a reason in words that goes on from "since". Of a bundle that was opened
with ``verify=True``, a target's hashes are checked too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ldm_export.bundle.bundle import Bundle
from ldm_export.bundle.listed import ListedFiles, UnlikeFileError
from ldm_export.bundle.manifest import TARGETS, is_loop
from ldm_export.bundle.targets.cpu_level import cpu_level
from ldm_export.reading.documents import MalformedError, parsed, read_descriptor
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.json_fields import FileEntry, field, files_of

TARGET = "target.json"
FORMAT_VERSION = 2
MOST_CHANNELS = 1 << 20
ORT_CPU = "ort-cpu"
ADAPTERS, ADAPTERS_ORT_CPU = "adapters", "adapters-ort-cpu"
"""The plain graphs with branches for adapters that are given when they run, and those as ``ort-cpu`` has them. Only
graphs that some adapter changes are there."""


@dataclass(frozen=True)
class TargetGraph:
    """One graph of a target.

    Attributes
    ----------
    path : of the graph that runs in every call
    hoisted : {input: path of the graph that depends on that input alone}; its outputs are further inputs of ``path``
    shallow : path of the outermost blocks alone (DeepCache), which take the output ``deep`` of ``path``; "" for none
    deep_channels : C of the tensor ``deep`` (B, C, h, w), whose h and w are the latents'; 0 for none
    """

    path: str
    hoisted: Mapping[str, str]
    shallow: str = ""
    deep_channels: int = 0

    @property
    def paths(self) -> list[str]:
        return [self.path, *self.hoisted.values(), *([self.shallow] if self.shallow else [])]


@dataclass(frozen=True)
class Target:
    """A target whose ``target.json`` was read and whose files are as it says; ``source`` is what it was made from."""

    folder: Path
    graphs: Mapping[str, TargetGraph]
    needs: Mapping[str, str]
    report: Mapping[str, Any]
    source: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def file(self, relative: str) -> Path:
        return self.folder / relative

    @property
    def paths(self) -> set[str]:
        return {path for graph in self.graphs.values() for path in graph.paths}

    def fault(self, files: ListedFiles) -> str:
        try:
            for name in sorted(self.paths):
                files.check_graph(name)
        except MalformedError as error:
            return f"its {error}"
        return ""


class AnyTarget(Protocol):
    """What targets of every kind have in common.

    Attributes
    ----------
    paths : of the files that are opened; they must be listed
    """

    @property
    def folder(self) -> Path: ...

    @property
    def files(self) -> Mapping[str, FileEntry]: ...

    @property
    def paths(self) -> set[str]: ...

    def fault(self, files: ListedFiles) -> str:
        """Say what is wrong with it, its files being as listed; empty if nothing is."""
        ...


Found = TypeVar("Found", bound=AnyTarget)


def folder_of(bundle: Bundle, kind: str) -> Path:
    return bundle.path / TARGETS / kind


def source_hashes(bundle: Bundle) -> dict[str, str]:
    """The hashes of all files that a bundle's graphs consist of."""
    graphs = {graph.path for graph in bundle.manifest.graphs.values()}
    data = {path for path in bundle.manifest.files if path.endswith(".onnx_data")}
    return {path: bundle.manifest.files[path].sha256 for path in sorted(graphs | data) if not is_loop(path)}


def needs_of(version: str) -> dict[str, str]:
    """What ``ort-cpu`` must have been made for, to be used here with this release of ONNX Runtime."""
    return {"onnxruntime": version, "cpu": cpu_level()}


def adapters_needs(adapters: Target, version: str) -> dict[str, str]:
    """What ``adapters-ort-cpu`` must have been made for: as `needs_of`, and the very graphs with branches."""
    hashes = "".join(adapters.files[path].sha256 for path in sorted(adapters.paths))
    return {**needs_of(version), ADAPTERS: hashlib.sha256(hashes.encode()).hexdigest()}


def write_target(
    folder: Path, bundle: Bundle, kind: str, graphs: Mapping[str, TargetGraph], needs: Mapping[str, str], report: Any
) -> None:
    """Write ``target.json`` for what lies in ``folder``."""
    document = {
        "source_hashes": source_hashes(bundle),
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
        if file.is_file()
    }
    whole = {"format_version": FORMAT_VERSION, "kind": kind, "files": files, **document}
    (folder / TARGET).write_text(json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def kinds_of(bundle: Bundle) -> list[str]:
    """The kinds of targets that a bundle has; hidden folders are of builds that have not ended."""
    folder = bundle.path / TARGETS
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def read_target(bundle: Bundle, kind: str, has: Mapping[str, str]) -> Target | str | None:
    """The bundle's target of a kind; why it is not sound or does not fit, in words; or None where there is none.

    Parameters
    ----------
    has : what there is of what the target needs, such as the version of its library, by name
    """
    found = sound_target(bundle, kind)
    if not isinstance(found, Target):
        return found
    if found.source != source_hashes(bundle):
        return "it was made from other graphs"
    if found.needs.keys() != has.keys():
        return f"it says what it needs of {_listed(found.needs)}, and must of {_listed(has)}"
    for name, wanted in found.needs.items():
        if has[name] != wanted:
            return f"it was made for {name} {wanted}, and this is {has[name]}"
    own = [name for name, graph in bundle.manifest.graphs.items() if not is_loop(graph.path)]
    some = kind in (ADAPTERS, ADAPTERS_ORT_CPU)
    if not (found.graphs.keys() <= set(own) if some else found.graphs.keys() == set(own)):
        return f"it has the graphs {_listed(found.graphs)}, and the bundle {_listed(own)}"
    return found


def sound_target(bundle: Bundle, kind: str) -> Target | str | None:
    """The bundle's target of a kind, for whatever machine; what is wrong with its files, in words; or None."""
    return sound(bundle, kind, _target_of)


def sound(bundle: Bundle, kind: str, parse: Callable[[Any, Path], Found]) -> Found | str | None:
    """A target of a bundle as ``parse`` reads its ``target.json``; what is wrong with it, in words; or None.

    Parameters
    ----------
    parse : takes the document and the folder; raises ValueError, with what is wrong
    """
    target = listed(bundle, kind, parse)
    if target is None or isinstance(target, str):
        return target
    return (
        _unlike_listed(target)
        or target.fault(files_in(bundle, target))
        or (_altered(target) if bundle.verified else "")
        or target
    )


def listed(bundle: Bundle, kind: str, parse: Callable[[Any, Path], Found]) -> Found | str | None:
    """A target as `sound` gives it, whatever has become of the files that it lists."""
    folder = folder_of(bundle, kind)
    if not os.path.lexists(folder):
        return None
    try:
        if folder.is_symlink() or folder.parent.is_symlink():
            return "its folder is a link"
        present = bundle.listed.folder.walk(f"{TARGETS}/{kind}")
        if TARGET not in present:
            return f"its {TARGET} is missing"
        document = parsed(read_descriptor(bundle.listed.folder.open(f"{TARGETS}/{kind}/{TARGET}")))
        if (version := field(document, "format_version", int)) != FORMAT_VERSION:
            raise MalformedError(f"it has format_version {version}; this ldm_export reads {FORMAT_VERSION}")
        if (named := field(document, "kind", str)) != kind:
            raise MalformedError(f"it is of the kind {named!r}")
        return parse(document, folder)
    except UnlikeFileError as error:
        return f"its {error.relative.removeprefix(f'{TARGETS}/{kind}/')} is a link or a device"
    except (OSError, ValueError) as error:
        return f"its {TARGET} cannot be read ({error})"


def files_in(bundle: Bundle, target: AnyTarget) -> ListedFiles:
    """The files of a target, to be read as the bundle's own are."""
    return bundle.listed.beneath(target.files, TARGET, f"{TARGETS}/{target.folder.name}/")


def damage(target: AnyTarget, name: str, *, verified: bool) -> str:
    """Say what is wrong with one file of a target: missing, cut short or, if its hash is to be ``verified``, altered;
    empty if nothing is."""
    file = target.folder / name
    if name not in target.files or not file.is_file():
        return f"its {name} is missing"
    if (size := file.stat().st_size) != target.files[name].size_bytes:
        return f"its {name} has {size} bytes; {TARGET} says {target.files[name].size_bytes}"
    try:
        altered = verified and sha256_of(file) != target.files[name].sha256
    except OSError as error:
        return f"its {name} cannot be read ({error.strerror})"
    return f"its {name} has been altered" if altered else ""


def strays(target: AnyTarget) -> list[str]:
    """Files in a target's folder that it does not list."""
    present = {path.relative_to(target.folder).as_posix() for path in target.folder.rglob("*") if path.is_file()}
    return sorted(present - target.files.keys() - {TARGET})


def _target_of(found: Any, folder: Path) -> Target:
    """Parse and check ``target.json``.

    Raises
    ------
    MalformedError
        If a field is missing or of a wrong type.
    """
    graphs = {}
    for name in field(found, "graphs", dict):
        where = f"graphs[{name!r}]"
        entry = field(found["graphs"], name, dict, "graphs")
        graphs[name] = TargetGraph(
            field(entry, "path", str, where),
            texts(entry, "hoisted", where),
            field(entry, "shallow", str, where),
            field(entry, "deep_channels", int, where),
        )
        channels = graphs[name].deep_channels
        if not 0 <= channels <= MOST_CHANNELS or (channels > 0) != bool(graphs[name].shallow):
            raise MalformedError(f"{where} has deep_channels {channels} with shallow {graphs[name].shallow!r}")
    return Target(
        folder,
        graphs,
        texts(found, "needs"),
        field(found, "report", dict),
        texts(found, "source_hashes"),
        files_of(found),
    )


def texts(holder: object, key: str, where: str = "") -> dict[str, str]:
    """A field that has texts by name."""
    found = field(holder, key, dict, where)
    return {name: field(found, name, str, key) for name in found}


def _unlike_listed(target: AnyTarget) -> str:
    """Say which file is not as listed, or is opened and not listed; empty if none is."""
    for name in sorted(target.paths | target.files.keys()):
        if fault := damage(target, name, verified=False):
            return fault
    return f"its {unlisted[0]} is not listed" if (unlisted := strays(target)) else ""


def _altered(target: AnyTarget) -> str:
    """Say which file has another hash than is listed; empty if none has."""
    return next(filter(None, (damage(target, name, verified=True) for name in sorted(target.files))), "")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
