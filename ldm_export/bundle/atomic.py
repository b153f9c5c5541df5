"""Files and folders that are there whole or not at all.

A folder grows as a hidden sibling, ``.NAME.partial-<pid>-<random>``, and is renamed into place when it is complete;
what was there before is ``.NAME.old-<pid>-<random>`` for as long as that takes. A process that is killed leaves such a
folder behind. The next one that makes a folder of that name removes it, once the process whose number it has is gone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm_export.errors import InputError

_unfinished: set[Path] = set()
"""What this process is making."""
_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<what>partial|old)-(?P<pid>\d+)-[0-9a-f]+")


def is_partial(name: str) -> bool:
    """Return whether a folder's name is that of one that was never completed."""
    found = _LEFT.fullmatch(name)
    return found is not None and found["what"] == "partial"


def sibling(path: Path, what: str) -> Path:
    """A hidden path beside ``path`` that no other has: ``what`` is ``partial`` or ``old``."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill and to give to `move_into_place`; removed at the end if it is still there.

    Parameters
    ----------
    target : Path
        What it is to become. Its parents are made where missing; they are not removed.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    partial = sibling(target, "partial")
    _unfinished.add(partial)
    try:
        partial.mkdir(parents=True)
        _remove_abandoned(target)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unfinished.discard(partial)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and its folder, whole or not at all: what is there stays as it is until all is written beside it.

    A link is followed, permissions of a file that is there are kept, and a device, or a pipe that somebody reads, is
    written to as it is.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for a reader
        with open(descriptor, "wb") as file:
            os.set_blocking(descriptor, True)
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:30]}.partial-{os.getpid()}-{secrets.token_hex(4)}")  # a name has 255 bytes
    _unfinished.add(partial)
    try:
        partial.write_bytes(data)
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


def check_output(path: Path) -> None:
    """Raise InputError unless a file can be written to ``path``, before hours are spent on it; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.is_dir() and os.access(path.parent, os.W_OK)  # a name that is too long raises
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Name another file.") from error
    if not whole:
        raise InputError(f"{path} cannot be written: it is a folder, or in one that cannot be. Name another file.")


def write_output(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, under just this name; raises InputError where it cannot be."""
    try:
        write_whole(path, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Name another file, or make room.") from error


def remove_unfinished() -> None:
    """Remove what this process has begun and not completed, before it leaves without an orderly end."""
    for path in list(_unfinished):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a folder to the target; where that fails, what was there is back."""
    old = sibling(target, "old")
    with locked(target.parent):
        try:
            if target.exists():
                os.rename(target, old)
            os.rename(partial, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
        sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change what is in a folder; the others wait.

    The system's lock is of the folder itself (``flock``): it leaves no file behind, and ends with its process, however
    that ends. Windows and some network file systems have none; there, nobody waits.

    Raises
    ------
    OSError
        If the folder cannot be opened.
    """
    try:
        from fcntl import LOCK_EX, flock
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            flock(descriptor, LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut; Windows has no such call for these."""
    if os.name != "nt":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of ``target``; of old ones only what has been replaced."""
    for path in target.parent.iterdir():
        found = _LEFT.fullmatch(path.name)
        if found is None or found["name"] != target.name or not _is_gone(int(found["pid"])):
            continue
        if found["what"] == "partial" or target.exists():
            shutil.rmtree(path, ignore_errors=True)


def _is_gone(pid: int) -> bool:
    if os.name == "nt":  # there, os.kill ends a process whatever the signal
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it is another user's
        pass
    return False
