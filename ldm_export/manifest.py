"""``manifest.json``: what a bundle says about itself, as dataclasses and as text.

The file is UTF-8 JSON with sorted keys and no time or machine path in it, so equal content gives equal bytes:

    {"format_version": 1, "ldm_export_version": "0.1.0",
     "model":  {"kind": "latent-diffusion", ...},                             free
     "files":  {"unet/model.onnx": {"size_bytes": 1234, "sha256": "…64 hex digits…"}, ...},
     "graphs": {"unet": {"path": "unet/model.onnx", "inputs": [{"name": "sample", "dtype": "float32",
                         "shape": ["batch", 4, "height", "width"]}, ...], "outputs": [...]}, ...},
     "source": {...},  "passes": [{...}, ...],  "parity": [{...}, ...]}       free: where it comes from, what was done

No other keys are allowed. Every file but ``manifest.json`` and those under ``targets/`` is listed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldm_export import __version__
from ldm_export.contract import GraphSpec, TensorSpec
from ldm_export.errors import BundleError, ExportError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TARGETS = "targets"
LOOPS = "loops"


@dataclass(frozen=True)
class FileEntry:
    """A listed file: its size in bytes and its SHA-256 as 64 lower-case hex digits."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says; the module's docstring has the format."""

    files: Mapping[str, FileEntry]
    graphs: Mapping[str, GraphSpec]
    model: Mapping[str, Any]
    source: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]]
    parity: Sequence[Mapping[str, Any]]
    ldm_export_version: str = __version__
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the file's text, the same for equal manifests."""
        try:
            return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as exc:
            raise ExportError(f"The manifest has a value that JSON cannot hold: {exc}. Use numbers and text.") from exc


def manifest_from_json(text: str) -> Manifest:
    """Parse and check a manifest.

    Raises
    ------
    BundleError
        If the text is not JSON, is of another format version, or a field is missing, unknown or of a wrong type.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{MANIFEST} is not JSON: {exc}. Export the bundle anew.") from exc
    _check_type(found, dict, "the whole")
    version = _field(found, "format_version", int, "")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST} has format_version {version}; this ldm_export reads {FORMAT_VERSION}. "
            "Export the bundle anew, or install the ldm_export that made it."
        )
    unknown = sorted(found.keys() - {field.name for field in fields(Manifest)})
    if unknown:
        raise _bad(f"the whole has the unknown key {unknown[0]!r}")
    files = {}
    for path, entry in _field(found, "files", dict, "").items():
        check_relative(path)
        where = f"files[{path!r}]"
        files[path] = FileEntry(_field(entry, "size_bytes", int, where), _field(entry, "sha256", str, where))
        if files[path].size_bytes < 0 or not re.fullmatch(r"[0-9a-f]{64}", files[path].sha256):
            raise _bad(f"{where} is {entry}; a size from 0 and 64 hex digits are needed")
    graphs = {}
    for name, entry in _field(found, "graphs", dict, "").items():
        where = f"graphs[{name!r}]"
        path = _field(entry, "path", str, where)
        if path not in files:
            raise _bad(f"{where} has the path {path!r}, which is not among the files")
        graphs[name] = GraphSpec(path, *(_specs(entry, side, where) for side in ("inputs", "outputs")))
    for key in ("passes", "parity"):
        for number, entry in enumerate(_field(found, key, list, "")):
            _check_type(entry, dict, f"{key}[{number}]")
            _check_type(entry.get("made_of", {}), dict, f"{key}[{number}].made_of")
    return Manifest(
        files=files,
        graphs=graphs,
        model=_field(found, "model", dict, ""),
        source=_field(found, "source", dict, ""),
        passes=tuple(found["passes"]),
        parity=tuple(found["parity"]),
        ldm_export_version=_field(found, "ldm_export_version", str, ""),
        format_version=version,
    )


def stale_loops(manifest: Manifest) -> dict[str, list[str]]:
    """Name the loops that were made of a plan or of graphs which the bundle no longer has so, each with those files."""
    now = {path: entry.sha256 for path, entry in manifest.files.items()}
    changed = {
        str(record.get("graph")): sorted(path for path, sha256 in made_of.items() if now.get(path) != sha256)
        for record in manifest.parity
        if (made_of := record.get("made_of"))
    }
    return {name: paths for name, paths in changed.items() if paths}


def is_loop(relative: str) -> bool:
    """Return whether a path in a bundle is of a loop graph, or of the weights that they share."""
    return relative.split("/")[0] == LOOPS


def is_target(relative: str) -> bool:
    """Return whether a path in a bundle is under ``targets/``, which the manifest leaves out."""
    return relative.split("/")[0] == TARGETS


def check_relative(relative: str) -> None:
    """Raise `BundleError` unless a path may be listed: relative, ``/`` between parts, inside the folder, no target."""
    parts = relative.split("/")
    if any(part in ("", ".", "..") or part != part.strip(" ") or part.endswith(".") for part in parts):
        raise _bad(f"the path {relative!r} is not a plain one inside the folder")
    if re.search(r'[\x00-\x1f\\:*?"<>|\ud800-\udfff]', relative):
        raise _bad(f"the path {relative!r} has a character that is not the same on every system")
    if relative == MANIFEST or is_target(relative):
        raise _bad(f"the path {relative!r} is listed, but {MANIFEST} and what is under {TARGETS}/ never are")


def _specs(entry: Mapping[str, Any], side: str, where: str) -> tuple[TensorSpec, ...]:
    specs = []
    for number, spec in enumerate(_field(entry, side, list, where)):
        at = f"{where}.{side}[{number}]"
        shape = _field(spec, "shape", list, at)
        if not all(isinstance(size, str) or (type(size) is int and size >= 0) for size in shape):
            raise _bad(f"{at} has the shape {shape}; sizes are whole numbers from 0, or names")
        specs.append(TensorSpec(_field(spec, "name", str, at), _field(spec, "dtype", str, at), tuple(shape)))
    return tuple(specs)


def _field(holder: object, key: str, kind: type, where: str) -> Any:
    """Return ``holder[key]``, checked."""
    _check_type(holder, dict, where or "the whole")
    assert isinstance(holder, dict)
    if key not in holder:
        raise _bad(f"{where or 'the whole'} lacks {key!r}")
    _check_type(holder[key], kind, f"{where}.{key}" if where else key)
    return holder[key]


def _check_type(value: object, kind: type, where: str) -> None:
    if type(value) is not kind:  # not isinstance: true is no whole number
        raise _bad(f"{where} is of type {type(value).__name__}; {kind.__name__} is needed")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return found


def _bad(what: str) -> BundleError:
    return BundleError(f"{MANIFEST}: {what}. Export the bundle anew.")
