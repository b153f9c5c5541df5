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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldm_export import __version__
from ldm_export.contract import GraphSpec, TensorSpec
from ldm_export.errors import BundleError, ExportError
from ldm_export.fields import FileEntry, MalformedError, check_path, check_type, field, files_of, parsed

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TARGETS = "targets"
LOOPS = "loops"


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
        found = parsed(text)
    except MalformedError as exc:
        raise BundleError(f"{MANIFEST} is {exc}. Export the bundle anew.") from exc
    try:
        return _manifest_of(found)
    except MalformedError as exc:
        raise _bad(str(exc)) from exc


def _manifest_of(found: Any) -> Manifest:
    check_type(found, dict, "the whole")
    version = field(found, "format_version", int)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST} has format_version {version}; this ldm_export reads {FORMAT_VERSION}. "
            "Export the bundle anew, or install the ldm_export that made it."
        )
    unknown = sorted(found.keys() - {known.name for known in fields(Manifest)})
    if unknown:
        raise MalformedError(f"the whole has the unknown key {unknown[0]!r}")
    files = files_of(found)
    for path in files:
        _check_listed(path)
    graphs = {}
    for name, entry in field(found, "graphs", dict).items():
        where = f"graphs[{name!r}]"
        path = field(entry, "path", str, where)
        if path not in files:
            raise MalformedError(f"{where} has the path {path!r}, which is not among the files")
        graphs[name] = GraphSpec(path, *(_specs(entry, side, where) for side in ("inputs", "outputs")))
    for key in ("passes", "parity"):
        for number, entry in enumerate(field(found, key, list)):
            check_type(entry, dict, f"{key}[{number}]")
            check_type(entry.get("made_of", {}), dict, f"{key}[{number}].made_of")
    return Manifest(
        files=files,
        graphs=graphs,
        model=field(found, "model", dict),
        source=field(found, "source", dict),
        passes=tuple(found["passes"]),
        parity=tuple(found["parity"]),
        ldm_export_version=field(found, "ldm_export_version", str),
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
    try:
        check_path(relative)
        _check_listed(relative)
    except MalformedError as exc:
        raise _bad(str(exc)) from exc


def _check_listed(relative: str) -> None:
    if relative == MANIFEST or is_target(relative):
        raise MalformedError(f"the path {relative!r} is listed, but {MANIFEST} and what is under {TARGETS}/ never are")


def _specs(entry: Mapping[str, Any], side: str, where: str) -> tuple[TensorSpec, ...]:
    specs = []
    for number, spec in enumerate(field(entry, side, list, where)):
        at = f"{where}.{side}[{number}]"
        shape = field(spec, "shape", list, at)
        if not all(isinstance(size, str) or (type(size) is int and size >= 0) for size in shape):
            raise MalformedError(f"{at} has the shape {shape}; sizes are whole numbers from 0, or names")
        specs.append(TensorSpec(field(spec, "name", str, at), field(spec, "dtype", str, at), tuple(shape)))
    return tuple(specs)


def _bad(what: str) -> BundleError:
    return BundleError(f"{MANIFEST}: {what}. Export the bundle anew.")
