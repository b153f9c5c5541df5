"""Files of a folder that is not trusted: only those that a document lists are read, and no link is followed.

There is one exception, the cache of the Hugging Face Hub, where ``snapshots/<revision>`` has links in place of files.
The rule: where the folder's real path has a parent that is named ``snapshots``, a link may stand for a file if its real
path is a regular file directly in ``<parent of snapshots>/blobs``. A folder that is a link is never entered.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldm_export.bundle.onnx_wire import ExternalData, external_data_from_bytes, with_nested_data
from ldm_export.reading.documents import MOST_BYTES, MalformedError
from ldm_export.reading.json_fields import MOST_FILE_BYTES, FileEntry

CHUNK_BYTES = 1 << 20
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_LINK = "a link; a bundle has none"
_FOLDER = getattr(os, "O_DIRECTORY", 0) | _NO_LINK


class UnlikeFileError(MalformedError):
    """A link, a pipe or a device where a file is due; ``relative`` is its path."""

    def __init__(self, relative: str, what: str) -> None:
        super().__init__(f"{relative!r} is {what}")
        self.relative = relative


class Folder:
    """A folder in which links are refused, but for the Hub's cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        real = os.path.realpath(path)
        parent = os.path.dirname(real)
        self._blobs = os.path.join(os.path.dirname(parent), "blobs") if os.path.basename(parent) == "snapshots" else ""

    def open(self, relative: str) -> int:
        """A descriptor of a regular file, by its path with ``/``.

        Raises
        ------
        MalformedError
            If it, or a folder on the way, is a link, or if it is no regular file.
        OSError
            If it cannot be opened.
        """
        parent = self._descended(relative)
        try:
            name = relative.rpartition("/")[2] if parent is not None else os.fspath(self.path / relative)
            found = os.lstat(name, dir_fd=parent)
            if _is_link(found):
                return self._open_blob(relative)
            descriptor = os.open(name, _FLAGS | _NO_LINK, dir_fd=parent)
        finally:
            if parent is not None:
                os.close(parent)
        return _regular(descriptor, relative, found)

    def walk(self, start: str = "", leave_out: str = "") -> dict[str, int]:
        """The size in bytes of every file below ``start``, by its path from there.

        Raises
        ------
        MalformedError
            If there is a link, a pipe or a device.
        OSError
            If a folder cannot be read.
        """
        top = f"{start}/" if start else ""
        found, waiting = {}, [top]
        while waiting:
            prefix = waiting.pop()
            with os.scandir(self.path / prefix) as entries:
                statuses = [(prefix + entry.name, os.lstat(entry.path)) for entry in entries]
            for relative, status in statuses:
                if relative == leave_out:
                    continue
                if _is_link(status):
                    status = os.stat(self._blob(relative))
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(relative + "/")
                elif stat.S_ISREG(status.st_mode):
                    found[relative.removeprefix(top)] = status.st_size
                else:
                    raise UnlikeFileError(relative, "neither a file nor a folder")
        return found

    def is_linked(self, relative: str) -> bool:
        """Whether a file is one of the Hub's cache."""
        return bool(self._blobs) and os.path.islink(self.path / relative)

    def _descended(self, relative: str) -> int | None:
        """A descriptor of the folder that a file is in; None where the system has no such calls, and names serve."""
        folders = relative.split("/")[:-1]
        if os.open not in os.supports_dir_fd or os.lstat not in {*os.supports_dir_fd, os.lstat}:
            for depth in range(1, len(folders) + 1):
                if _is_link(os.lstat(self.path / "/".join(folders[:depth]))):
                    raise UnlikeFileError("/".join(folders[:depth]), _LINK)
            return None
        parent = os.open(self.path, _FLAGS | getattr(os, "O_DIRECTORY", 0))
        for name in folders:
            try:
                below = os.open(name, _FLAGS | _FOLDER, dir_fd=parent)
            except OSError as error:
                if stat.S_ISLNK(os.lstat(name, dir_fd=parent).st_mode):
                    raise UnlikeFileError(relative, _LINK) from error
                raise
            finally:
                os.close(parent)
            parent = below
        return parent

    def _blob(self, relative: str) -> str:
        real = os.path.realpath(self.path / relative)
        if not self._blobs or os.path.dirname(real) != os.path.realpath(self._blobs) or not os.path.isfile(real):
            raise UnlikeFileError(relative, _LINK)
        return real

    def _open_blob(self, relative: str) -> int:
        real = self._blob(relative)
        found = os.lstat(real)
        return _regular(os.open(real, _FLAGS | _NO_LINK), relative, found)


@dataclass(frozen=True)
class GraphFiles:
    """What a session is opened from.

    Attributes
    ----------
    path : the ``.onnx`` file
    model : its bytes, where it must not be opened by its path: its hash was taken of these, or it has links
    data : with ``model``, the bytes of its weights' files, by what it calls them
    mapped : without ``model``, its weights' files, which a library maps into memory
    """

    path: Path
    model: bytes | None
    data: Mapping[str, bytes | mmap.mmap] = field(default_factory=dict)
    mapped: tuple[MappedFile, ...] = ()


class MappedFile:
    """A file that a library has mapped into memory: cut short, a read of it would end the process by a signal."""

    def __init__(self, name: str, path: Path, descriptor: int) -> None:
        self.name = name
        self._path, self._descriptor = path, descriptor
        weakref.finalize(self, os.close, descriptor)
        self._was = self._now()

    def is_changed(self) -> bool:
        return self._now() != self._was

    def is_in_place(self) -> bool:
        """Whether the file is still the one that has its path."""
        return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class ListedFiles:
    """The files that a manifest, or a ``target.json``, lists, each checked when it is read.

    Parameters
    ----------
    folder : of the bundle
    files : every file's size and hash, by its path
    document : the name of what lists them, for errors
    prefix : what a path begins with in the folder, such as ``targets/ort-cpu/``
    verified : whether hashes are checked, each of the very bytes that are given
    """

    def __init__(
        self, folder: Folder, files: Mapping[str, FileEntry], document: str, prefix: str = "", *, verified: bool
    ) -> None:
        self.folder, self.files, self.verified = folder, files, verified
        self._document, self._prefix = document, prefix
        self._scanned: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}
        self._beneath: dict[str, ListedFiles] = {}

    def beneath(self, files: Mapping[str, FileEntry], document: str, prefix: str) -> ListedFiles:
        """The files that another document lists; asked for again, the same, which knows what it has checked."""
        known = self._beneath.get(prefix)
        if known is None or known.files != files:
            known = ListedFiles(self.folder, files, document, prefix, verified=self.verified)
            self._beneath[prefix] = known
        return known

    def read(self, name: str, most_bytes: int = MOST_BYTES) -> bytes:
        """A file's bytes.

        Raises
        ------
        MalformedError
            If it is not listed, not as it is listed, a link, or larger than ``most_bytes``.
        """
        with open(self._opened(name), "rb", buffering=0) as file:
            size = self.files[name].size_bytes
            if size > most_bytes:
                raise MalformedError(f"{name} is {size:,} bytes long; at most {most_bytes:,} are read")
            data = _all_of(file.fileno(), size)
        if len(data) != size:
            raise MalformedError(f"{name} has {len(data)} bytes; {self._document} says {size}")
        if self.verified:
            self._check_hash(name, hashlib.sha256(data).hexdigest())
        return data

    def check_hash(self, name: str) -> None:
        """Raise MalformedError unless a file still has the hash that is listed; it may be of any size."""
        digest = hashlib.sha256()
        with open(self._opened(name), "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        self._check_hash(name, digest.hexdigest())

    def check_graph(self, name: str) -> frozenset[str]:
        """What an ``.onnx`` file calls the files that it reads weights from; one that is as it was is not read again.

        Raises
        ------
        MalformedError
            Unless the file can be read in one way alone, and reads only listed files, within their sizes.
        """
        descriptor = self._opened(name)
        with open(descriptor, "rb", buffering=0) as file:
            identity = _identity(os.fstat(descriptor))
            known = self._scanned.get(name)
            if known is not None and known[0] == identity:
                return known[1]
            try:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    locations = self._locations(name, data)
            except MalformedError:
                raise
            except ValueError as error:  # mmap's word for an empty file
                raise _no_model(name, "it is empty") from error
        self._scanned[name] = identity, locations
        return locations

    def graph(self, name: str) -> GraphFiles:
        """What a session of an ``.onnx`` file is to be opened from; raises as `check_graph` and `read` do.

        Of a bundle that is verified everything is in memory, so that what changes on the disk is not used. So are
        weights that have several links, which ONNX Runtime does not map.
        """
        path = self.folder.path / self._prefix / name
        if self.verified:
            model = self.read(name, self.files[name].size_bytes)
            data = {each: self.read(_beside(name, each), MOST_FILE_BYTES) for each in self._locations(name, model)}
            return _in_memory(path, model, data)
        locations = self.check_graph(name)
        opened = {each: self._opened(_beside(name, each)) for each in sorted(locations)}
        linked = any(self.folder.is_linked(self._prefix + one) for one in (name, *(_beside(name, e) for e in opened)))
        if opened and (linked or any(os.fstat(descriptor).st_nlink > 1 for descriptor in opened.values())):
            return _in_memory(path, self.read(name, self.files[name].size_bytes), dict(map(_mapped, opened.items())))
        mapped = (MappedFile(_beside(name, each), path.parent / each, opened[each]) for each in opened)
        return GraphFiles(path, None, mapped=tuple(mapped))

    def _opened(self, name: str) -> int:
        """A descriptor of a listed file of the listed size."""
        if name not in self.files:
            raise MalformedError(f"{name} is not listed in {self._document}")
        try:
            descriptor = self.folder.open(self._prefix + name)
        except FileNotFoundError:
            raise MalformedError(f"{name} is missing") from None
        except OSError as error:
            raise MalformedError(f"{name} cannot be read ({error.strerror})") from error
        size, listed = os.fstat(descriptor).st_size, self.files[name].size_bytes
        if size != listed:
            os.close(descriptor)
            raise MalformedError(f"{name} has {size} bytes; {self._document} says {listed}")
        return descriptor

    def _check_hash(self, name: str, actual: str) -> None:
        expected = self.files[name].sha256
        if actual != expected:
            raise MalformedError(f"{name} has been altered: its SHA-256 is {actual}, {self._document} says {expected}")

    def _locations(self, name: str, data: bytes | mmap.mmap) -> frozenset[str]:
        try:
            found = external_data_from_bytes(data)
        except MalformedError as error:
            raise _no_model(name, error) from error
        for each in found:
            self._check_location(name, each)
        return frozenset(each.location for each in found)

    def _check_location(self, name: str, data: ExternalData) -> None:
        entry = self.files.get(_beside(name, data.location))
        if entry is None:
            reading = f"{name} reads tensor {data.tensor!r} from {data.location!r}"
            raise MalformedError(f"{reading}, which {self._document} does not list")
        if data.offset + (data.length or 0) > entry.size_bytes:
            raise MalformedError(
                f"{name} reads tensor {data.tensor!r} beyond the {entry.size_bytes} bytes of {data.location!r}"
            )


def _beside(name: str, location: str) -> str:
    """The listed path of what a graph calls ``location``; it lies beside the graph or below it."""
    return name[: name.rfind("/") + 1] + location


def _no_model(name: str, why: object) -> MalformedError:
    return MalformedError(f"{name} is not a readable ONNX model: {why}")


def _is_link(status: os.stat_result) -> bool:
    return stat.S_ISLNK(status.st_mode) or bool(getattr(status, "st_reparse_tag", 0))


def _regular(descriptor: int, relative: str, found: os.stat_result) -> int:
    """The descriptor, if it is of the regular file that was found under that name."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != (found.st_dev, found.st_ino):
        os.close(descriptor)
        raise MalformedError(f"{relative} is not a regular file")
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _all_of(descriptor: int, size: int) -> bytes:
    """So many bytes from the start, or fewer if the file ends before."""
    parts = []
    while size > 0 and (part := os.read(descriptor, min(size, 1 << 30))):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _in_memory(path: Path, model: bytes, data: Mapping[str, bytes | mmap.mmap]) -> GraphFiles:
    def data_of(found: ExternalData) -> bytes:
        end = None if found.length is None else found.offset + found.length
        return bytes(data[found.location][found.offset : end])

    return GraphFiles(path, with_nested_data(model, data_of) if data else model, data)


def _mapped(opened: tuple[str, int]) -> tuple[str, mmap.mmap]:
    location, descriptor = opened
    with open(descriptor, "rb", buffering=0) as file:
        return location, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
