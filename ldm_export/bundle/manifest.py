"""``manifest.json``: what a bundle says about itself, as dataclasses and as text.

The file is UTF-8 JSON with sorted keys and no time or machine path in it, so equal content gives equal bytes:

    {"format_version": 2, "ldm_export_version": "0.1.0",
     "model":  {"height": 512, "width": 512, ...},                            free, but for what a runtime reads
     "roles":  {"denoiser": "unet", "vae_decoder": "vae_decoder", "vae_encoder": "vae_encoder", "conditioner": null,
                "text_encoders": [{"graph": "text_encoder", "tokenizer": "tokenizer", "kind": "clip", "length": 77}],
                "conditions": {"encoder_hidden_states": "text_encoder.last_hidden_state"},
                "guidance": {"kind": "two_rows", "scale": 7.5},
                "controls": {"canny": "controlnet"}},                         ldm_export.contract has the meaning
     "files":  {"unet/model.onnx": {"size_bytes": 1234, "sha256": "…64 hex digits…"}, ...},
     "graphs": {"unet": {"path": "unet/model.onnx", "inputs": [{"name": "sample", "dtype": "float32",
                         "shape": ["batch", 4, "height", "width"]}, ...], "outputs": [...]}, ...},
     "source": {...},  "passes": [{...}, ...],                                free: where it comes from, what was done
     "parity": [{"graph": "unet", "output": "out_sample", "max_error": 1.2e-6, "tolerance": 1e-4, "passed": true}, ...]}

No other keys are allowed at the top. A graph's path is its name with ``/model.onnx`` or ``.onnx``; names of its tensors
are unique; a size is a whole number from 0 to 2**20, or the name of a free one. A record of ``parity`` is of an output
of a graph, with numbers from 0 to 2**20, and of loops it has ``source_hashes``, the SHA-256 of each file that went in.
Every file but ``manifest.json`` and those under ``targets/`` is listed. ``roles`` is null in a bundle that only holds
graphs; no runtime generates with it. Of its keys ``controls`` is absent where there are none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldm_export import __version__
from ldm_export.bundle.roles import LARGEST_SIZE, roles_document, roles_of
from ldm_export.contract import GraphSpec, Roles, TensorSpec
from ldm_export.errors import BundleError, ExportError
from ldm_export.reading.documents import MalformedError, parsed
from ldm_export.reading.json_fields import FileEntry, check_path, check_type, field, files_of

FORMAT_VERSION = 2
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
    roles: Roles | None = None
    ldm_export_version: str = __version__
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the file's text, the same for equal manifests."""
        try:
            document = asdict(self) | {"roles": None if self.roles is None else roles_document(self.roles)}
            return json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as exc:
            raise ExportError(f"The manifest has a value that JSON cannot hold: {exc}. Use numbers and text.") from exc


def manifest_from_json(text: str | bytes) -> Manifest:
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
        if is_loop(name) and path not in (f"{name}/model.onnx", f"{name}.onnx"):
            raise MalformedError(f"{where} has the path {path!r}; it must be its name with /model.onnx or .onnx")
        graphs[name] = GraphSpec(path, *(_specs(entry, side, where) for side in ("inputs", "outputs")))
        names = [tensor.name for tensor in (*graphs[name].inputs, *graphs[name].outputs)]
        if len(set(names)) < len(names):
            raise MalformedError(f"{where} has two tensors of one name")
    for number, entry in enumerate(field(found, "passes", list)):
        check_type(entry, dict, f"passes[{number}]")
    for number, entry in enumerate(field(found, "parity", list)):
        _check_parity(entry, graphs, f"parity[{number}]")
    return Manifest(
        files=files,
        graphs=graphs,
        model=field(found, "model", dict),
        source=field(found, "source", dict),
        passes=tuple(found["passes"]),
        parity=tuple(found["parity"]),
        roles=roles_of(found, graphs),
        ldm_export_version=field(found, "ldm_export_version", str),
        format_version=version,
    )


def stale_loops(manifest: Manifest) -> dict[str, list[str]]:
    """Name the loops that were made of a plan or of graphs which the bundle no longer has so, each with those files."""
    changed = {
        str(record.get("graph")): changed_files(manifest, source_hashes)
        for record in manifest.parity
        if (source_hashes := record.get("source_hashes"))
    }
    return {name: paths for name, paths in changed.items() if paths}


def source_hashes_of(manifest: Manifest, graph: str) -> dict[str, str]:
    """SHA-256 of each file that the graph with this path consists of, {path: hex}: its own and that of its weights."""
    files = manifest.files
    return {path: files[path].sha256 for path in (graph, f"{graph}_data") if path in files}


def changed_files(manifest: Manifest, source_hashes: Mapping[str, str]) -> list[str]:
    """Name the files that a bundle no longer has with these hashes, {path: SHA-256}, sorted."""
    now = {path: entry.sha256 for path, entry in manifest.files.items()}
    return sorted(path for path, sha256 in source_hashes.items() if now.get(path) != sha256)


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


def _check_parity(record: object, graphs: Mapping[str, GraphSpec], where: str) -> None:
    name, output = field(record, "graph", str, where), field(record, "output", str, where)
    if name not in graphs or output not in {tensor.name for tensor in graphs[name].outputs}:
        raise MalformedError(f"{where} is of the output {output!r} of the graph {name!r}, which there is not")
    assert isinstance(record, dict)
    for key in ("max_error", "tolerance"):
        value = field(record, key, type(record.get(key, 0.0)), where)
        if type(value) not in (int, float) or not 0 <= value <= LARGEST_SIZE:
            raise MalformedError(f"{where}.{key} is {str(value)[:40]}; a number from 0 to {LARGEST_SIZE} is needed")
    field(record, "passed", bool, where)
    if "source_hashes" in record:
        source_hashes = field(record, "source_hashes", dict, where)
        for path in source_hashes:
            if not re.fullmatch(r"[0-9a-f]{64}", field(source_hashes, path, str, f"{where}.source_hashes")):
                raise MalformedError(f"{where}.source_hashes[{path!r}] is not 64 hex digits")


def _specs(entry: Mapping[str, Any], side: str, where: str) -> tuple[TensorSpec, ...]:
    specs = []
    for number, spec in enumerate(field(entry, side, list, where)):
        at = f"{where}.{side}[{number}]"
        shape = field(spec, "shape", list, at)
        if not all(
            size if isinstance(size, str) else type(size) is int and 0 <= size <= LARGEST_SIZE for size in shape
        ):
            shape_text = f"{at} has the shape {str(shape)[:200]}"
            raise MalformedError(f"{shape_text}; sizes are whole numbers from 0 to {LARGEST_SIZE}, or names")
        specs.append(TensorSpec(field(spec, "name", str, at), field(spec, "dtype", str, at), tuple(shape)))
        if not specs[-1].name:
            raise MalformedError(f"{at} has no name")
    return tuple(specs)


def _bad(what: str) -> BundleError:
    return BundleError(f"{MANIFEST}: {what}. Export the bundle anew.")
