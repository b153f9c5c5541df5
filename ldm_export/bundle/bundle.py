"""The bundle on disk: a folder of files and ``manifest.json``, which lists them all with their sizes and hashes.

Every file but ``manifest.json`` and those under ``targets/`` is listed. What is under ``targets/`` is made from the
rest for one kind of machine and may be deleted and rebuilt at any time: opening a bundle does not look there, and
``ldm_export.bundle.targets.base`` checks what is used.

Opening a bundle trusts nothing in it: paths may not leave the folder, nothing may be a link (but in the Hugging Face
Hub's cache, by the rule of ``ldm_export.bundle.listed``), and an ``.onnx`` file may only read its weights from listed
files. What is not listed is never read. With ``verify`` each hash is taken of the very bytes that are used, and
unlisted files are refused, but for hidden ones and a ``README.md``, which the Hub and file managers put there.

Making one is all or nothing: the files grow in a hidden sibling folder, which is renamed into place when it is complete
and refused by name until then (``ldm_export.bundle.atomic``).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm_export.bundle.atomic import is_partial, locked, move_into_place, partial_folder, sibling, sync
from ldm_export.bundle.listed import Folder, GraphFiles, ListedFiles
from ldm_export.bundle.manifest import (
    MANIFEST,
    TARGETS,
    Manifest,
    check_relative,
    is_target,
    manifest_from_json,
)
from ldm_export.contract import GraphSpec, Roles
from ldm_export.errors import BundleError, ExportError
from ldm_export.reading.documents import MOST_BYTES, MalformedError, parsed, read_descriptor
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.json_fields import FileEntry

__all__ = ["Bundle", "BundleWriter", "FileEntry", "Manifest", "create_bundle"]

DOCUMENTS = (".json", ".txt")
"""Endings of the files that are kept in memory once they are verified."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its checked manifest, and whether hashes were and are to be checked."""

    path: Path
    manifest: Manifest
    listed: ListedFiles = field(compare=False, repr=False)
    _kept: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        """Size of all listed files, in bytes; targets are not listed."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())

    @property
    def roles(self) -> Roles:
        """Roles of the graphs; raises `BundleError` if the manifest says nothing of roles."""
        if self.manifest.roles is None:
            raise _bad(self.path, "manifest.json has no roles, so nothing can be generated")
        return self.manifest.roles

    @property
    def verified(self) -> bool:
        """Whether hashes are checked."""
        return self.listed.verified

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Open a bundle.

        Parameters
        ----------
        path : path
            The bundle's folder.
        verify : bool
            Also hash every listed file, and refuse files that are not listed, but for hidden ones and ``README.md``.
            Reads the whole bundle, and keeps its documents: `read` gives what was hashed. Of targets, those with
            altered files are skipped when they would be used.

        Raises
        ------
        BundleError
            If anything is missing, altered, malformed or reaches outside the folder. The message names the file.
        """
        folder = Path(path)
        if is_partial(folder.resolve().name):
            raise BundleError(f"{folder} is what an interrupted export left behind. Delete it and export again.")
        return _opened(folder, verify)

    def file(self, relative: str) -> Path:
        """Return where a listed file is; raise `BundleError` if it is not listed."""
        if relative not in self.manifest.files:
            raise BundleError(f"Bundle {self.path} has no {relative}; it has {', '.join(sorted(self.manifest.files))}.")
        return self.path / relative

    def read(self, relative: str) -> bytes:
        """Return a listed file's content: a document of at most 64 MiB, such as a plan or a tokenizer's file.

        Raises
        ------
        BundleError
            If it is not listed, not as it is listed, a link, too large or, with ``verify``, has another hash.
        """
        try:
            return self._kept[relative] if relative in self._kept else self.listed.read(relative)
        except MalformedError as exc:
            raise _bad(self.path, str(exc)) from exc

    def json(self, relative: str, *, constants: bool = False) -> Any:
        """Return the value of a listed JSON file, in which with ``constants`` may be ``Infinity``; raises as `read`."""
        try:
            return parsed(self.read(relative), constants=constants)
        except MalformedError as exc:
            raise _bad(self.path, f"{relative} is {exc}") from exc

    def graph_files(self, relative: str) -> GraphFiles:
        """Return what a session of a listed ``.onnx`` file is to be opened from; raises as `read` does."""
        try:
            return self.listed.graph(relative)
        except MalformedError as exc:
            raise _bad(self.path, str(exc)) from exc

    def verifying(self) -> Bundle:
        """Return this bundle, the hash of whatever is read from now on being checked."""
        return replace(self, listed=ListedFiles(self.listed.folder, self.manifest.files, MANIFEST, verified=True))

    def check_hashes(self, files: Iterable[str]) -> None:
        """Raise `BundleError` unless some listed files are still those that the manifest has the hashes of."""
        try:
            for relative in sorted(files):
                self.listed.check_hash(relative)
        except MalformedError as exc:
            raise _bad(self.path, str(exc)) from exc

    def add_file(
        self,
        relative: str,
        data: bytes | Path,
        *,
        graph: GraphSpec | None = None,
        parity: Sequence[Mapping[str, Any]] = (),
    ) -> Bundle:
        """Add a file, or replace one, and return the bundle as it then is.

        Each write is atomic, and a file is never listed before it is whole: a kill in between leaves a bundle that
        opens, with or without the file. Processes that add files at the same time wait for one another. Meant for plans
        and loops; a graph's weights are not to be replaced so.

        Parameters
        ----------
        relative : str
            Where in the bundle, with ``/`` between the parts; not under ``targets/``.
        data : bytes or path
            The file's content, or the file that has it.
        graph : GraphSpec, optional
            What the file takes and gives, if it is a graph.
        parity : sequence of mappings
            The graph's records; they replace those that the bundle has of it.

        Raises
        ------
        BundleError
            If the path is not allowed or the bundle is no longer sound.
        ExportError
            If the file cannot be written.
        """
        check_relative(relative)
        size_bytes = 0
        try:
            size_bytes = len(data) if isinstance(data, bytes) else data.stat().st_size
            sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else sha256_of(data)
            with locked(self.path):
                self._add(relative, data, FileEntry(size_bytes, sha256), graph, parity)
                return _opened(self.path, verify=False)
        except OSError as exc:
            raise export_error(exc, self.path, size_bytes) from exc

    def _add(
        self,
        relative: str,
        data: bytes | Path,
        entry: FileEntry,
        graph: GraphSpec | None,
        parity: Sequence[Mapping[str, Any]],
    ) -> None:
        manifest = _opened(self.path, verify=False).manifest
        others = {name: old for name, old in manifest.files.items() if name != relative}
        graphs = {name: old for name, old in manifest.graphs.items() if old.path != relative}
        dropped = manifest.graphs.keys() - graphs.keys()
        records = [record for record in manifest.parity if record["graph"] not in dropped]
        target = self.path / relative
        added = replace(manifest, files=others | {relative: entry})
        if graph is not None:
            added = replace(added, graphs=graphs | {graph.name: graph}, parity=[*records, *parity])
        manifest_from_json(added.to_json())  # or it could not be opened any more
        if manifest.files.get(relative, entry) != entry:
            without = replace(manifest, files=others, graphs=graphs, parity=records)
            _write(self.path / MANIFEST, without.to_json().encode())
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, data)
        try:
            if relative.lower().endswith(".onnx"):
                ListedFiles(self.listed.folder, added.files, MANIFEST, verified=False).check_graph(relative)
        except MalformedError as exc:
            target.unlink()
            raise _bad(self.path, str(exc)) from exc
        _write(self.path / MANIFEST, added.to_json().encode())


class BundleWriter:
    """A bundle in the making: put files under ``path``, then call `seal`. Made by `create_bundle`."""

    def __init__(self, path: Path, target: Path, force: bool, needed_bytes: int | None) -> None:
        self.path = path
        self._target = target
        self._force = force
        self._needed_bytes = needed_bytes

    def seal(
        self,
        *,
        model: Mapping[str, Any],
        graphs: Mapping[str, GraphSpec],
        source: Mapping[str, Any],
        passes: Sequence[Mapping[str, Any]] = (),
        parity: Sequence[Mapping[str, Any]] = (),
        roles: Roles | None = None,
    ) -> Bundle:
        """Hash the files, write the manifest, check the whole, and rename the folder into place.

        Raises
        ------
        BundleError
            If the bundle would not open, or the target has come into being or changed its nature meanwhile.
        ExportError
            If the disk is full or refuses, or the manifest has a value that JSON cannot hold.
        """
        try:
            manifest = Manifest(self._files(), graphs, model, source, passes, parity, roles)
            _write(self.path / MANIFEST, manifest.to_json().encode())
            _opened(self.path, verify=False)
            for relative in Folder(self.path).walk():
                sync(self.path / relative)
                sync((self.path / relative).parent)
            check_output_folder(self._target, self._force)
            move_into_place(self.path, self._target)
        except OSError as exc:
            raise export_error(exc, self._target, self._needed_bytes) from exc
        return _opened(self._target, verify=False)

    def _files(self) -> dict[str, FileEntry]:
        listed = (relative for relative in Folder(self.path).walk() if relative != MANIFEST and not is_target(relative))
        paths = {relative: self.path / relative for relative in listed}
        return {relative: FileEntry(path.stat().st_size, sha256_of(path)) for relative, path in paths.items()}


@contextmanager
def create_bundle(
    path: str | os.PathLike[str], force: bool = False, needed_bytes: int | None = None
) -> Iterator[BundleWriter]:
    """Make a bundle, or nothing: whatever ends the block before `BundleWriter.seal` is done removes all files.

    Parameters
    ----------
    path : path
        The folder to be. Its parents are made where missing.
    force : bool
        Replace a bundle, or an empty folder, that is there. It stays in place until the new one is whole.
    needed_bytes : int, optional
        How large the bundle will be; refused at once where the disk has less room.

    Raises
    ------
    BundleError
        If the path is taken.
    ExportError
        If the disk has no room, before or during the export, or the folder cannot be made.
    """
    target = Path(os.path.abspath(path))
    check_output_folder(target, force)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        with ExitStack() as stack:
            try:
                partial = stack.enter_context(partial_folder(target))
                if needed_bytes is not None and shutil.disk_usage(partial).free < needed_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as exc:
                raise export_error(exc, target, needed_bytes) from exc
            try:
                yield BundleWriter(partial, target, force, needed_bytes)
            except Exception as exc:
                if _is_full_disk(exc):
                    raise export_error(exc, target, needed_bytes) from exc
                raise
    finally:
        for parent in made:  # innermost first; fails, as it should, where the bundle or something else is
            with suppress(OSError):
                parent.rmdir()


def _opened(path: Path, verify: bool) -> Bundle:
    """Check a folder, whatever its name, and return it as a bundle."""
    folder = Folder(path)
    try:
        present = folder.walk(leave_out=TARGETS)
    except FileNotFoundError:
        raise _bad(path, "there is no such folder", "Check the path.") from None
    except OSError as exc:
        raise _bad(path, f"the folder cannot be read ({exc})", "Check the path.") from exc
    except MalformedError as exc:
        raise _bad(path, str(exc), "Put the file itself there, or delete it.") from exc
    if MANIFEST not in present:
        raise _bad(path, f"{MANIFEST} is missing, so it is no bundle", "Give the folder that export wrote.")
    manifest = _manifest_in(folder)
    listed = ListedFiles(folder, manifest.files, MANIFEST, verified=verify)
    kept = {}
    try:
        for relative, entry in manifest.files.items():
            if relative not in present:
                raise MalformedError(f"{relative} is missing")
            if present[relative] != entry.size_bytes:
                raise MalformedError(f"{relative} has {present[relative]} bytes; {MANIFEST} says {entry.size_bytes}")
        models = {graph.path for graph in manifest.graphs.values()}
        models |= {relative for relative in manifest.files if relative.lower().endswith(".onnx")}
        for relative in sorted(models):
            listed.check_graph(relative)
        for relative, entry in sorted(manifest.files.items()) if verify else ():
            if relative.endswith(DOCUMENTS) and entry.size_bytes <= MOST_BYTES:
                kept[relative] = listed.read(relative)
            else:
                listed.check_hash(relative)
    except MalformedError as exc:
        raise _bad(path, str(exc)) from exc
    strays = sorted(filter(_is_stray, present.keys() - manifest.files.keys() - {MANIFEST})) if verify else []
    if strays:
        raise _bad(path, f"{strays[0]!r} is not listed in {MANIFEST}", "Delete it, or export the bundle anew.")
    return Bundle(path, manifest, listed, kept)


def _manifest_in(folder: Folder) -> Manifest:
    try:
        return manifest_from_json(read_descriptor(folder.open(MANIFEST)))
    except OSError as exc:
        raise _bad(folder.path, f"{MANIFEST} cannot be read ({exc})") from exc
    except MalformedError as exc:
        raise _bad(folder.path, f"{MANIFEST} is {exc}") from exc
    except BundleError as exc:
        raise BundleError(f"Bundle {folder.path}: {exc}") from exc


def _is_stray(relative: str) -> bool:
    """Whether a file that is not listed is none of those that file managers and the Hub put beside a bundle's."""
    return relative != "README.md" and not any(part.startswith(".") for part in relative.split("/"))


def _write(path: Path, data: bytes | Path) -> None:
    """Write a file whole or not at all, from its content or from another file."""
    partial = sibling(path, "partial")
    try:
        with partial.open("wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def check_output_folder(target: Path, force: bool) -> None:
    """Raise BundleError unless a bundle may be written to ``target``: nothing is there, or ``force`` may replace it."""
    if not os.path.lexists(target):
        return
    if not force:
        raise BundleError(f"{target} exists; use --force to replace it, or choose another folder.")
    folder = target.is_dir() and not target.is_symlink()
    if not folder or (any(target.iterdir()) and not _says_bundle(target / MANIFEST)):
        raise BundleError(f"{target} is not a bundle; --force replaces a bundle or an empty folder. Choose another.")


def _says_bundle(manifest: Path) -> bool:
    """Return whether a ``manifest.json`` is a bundle's, however damaged, and not, say, a web page's."""
    return manifest.is_file() and b'"format_version"' in manifest.read_bytes()


def _is_full_disk(exc: Exception) -> bool:
    """Return whether an error means a full disk; libraries in other languages only say so in words."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    return (isinstance(exc, OSError) and exc.errno in full) or os.strerror(errno.ENOSPC) in str(exc)


def export_error(exc: Exception, target: Path, needed_bytes: int | None) -> ExportError:
    """What is to be raised where ``target`` could not be written."""
    if not _is_full_disk(exc):
        return ExportError(
            f"{target} cannot be written: {exc}. Choose another folder, or copy the bundle to one that can be written."
        )
    needed = f", {needed_bytes / 1e9:.2f} GB are needed" if needed_bytes is not None else ""
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return ExportError(f"The disk is full: {target} could not be written; {free:.2f} GB are free{needed}. Make room.")


def _bad(folder: Path, what: str, remedy: str = "Export the bundle anew.") -> BundleError:
    return BundleError(f"Bundle {folder}: {what}. {remedy}")
