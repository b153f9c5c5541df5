"""Reading the JSON documents of a bundle, ``manifest.json`` and ``target.json``, without trusting them.

Errors say what is wrong with the document; who reads it says which it is and what to do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.reading.documents import MalformedError

MOST_FILE_BYTES = (1 << 63) - 1
LONGEST_PATH = 1024
"""Characters of a listed path."""


@dataclass(frozen=True)
class FileEntry:
    """A listed file: its size in bytes and its SHA-256 as 64 lower-case hex digits."""

    size_bytes: int
    sha256: str


def field(holder: object, key: str, kind: type, where: str = "") -> Any:
    """Return ``holder[key]``, of exactly this type."""
    check_type(holder, dict, where or "the whole")
    assert isinstance(holder, dict)
    if key not in holder:
        raise MalformedError(f"{where or 'the whole'} lacks {key!r}")
    check_type(holder[key], kind, f"{where}.{key}" if where else key)
    return holder[key]


def check_type(value: object, kind: type, where: str) -> None:
    if type(value) is not kind:  # not isinstance: true is no whole number
        raise MalformedError(f"{where} is of type {type(value).__name__}; {kind.__name__} is needed")


def files_of(document: Mapping[str, Any]) -> dict[str, FileEntry]:
    """The field ``files``: entries by plain relative paths."""
    files = {}
    for path, entry in field(document, "files", dict).items():
        check_path(path)
        where = f"files[{path!r}]"
        files[path] = FileEntry(field(entry, "size_bytes", int, where), field(entry, "sha256", str, where))
        sized = 0 <= files[path].size_bytes <= MOST_FILE_BYTES
        if not sized or not re.fullmatch(r"[0-9a-f]{64}", files[path].sha256):
            raise MalformedError(f"{where} is {str(entry)[:200]}; a size from 0 and 64 hex digits are needed")
    return files


def check_path(relative: str) -> None:
    """Refuse a path unless it is relative, with ``/`` between its parts, and stays inside the folder."""
    parts = relative.split("/")
    if len(relative) > LONGEST_PATH:
        raise MalformedError(
            f"the path {relative[:40]!r}... has {len(relative)} characters; {LONGEST_PATH} are allowed"
        )
    if any(part in ("", ".", "..") or part != part.strip(" ") or part.endswith(".") for part in parts):
        raise MalformedError(f"the path {relative!r} is not a plain one inside the folder")
    if re.search(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]', relative):
        raise MalformedError(f"the path {relative!r} has a character that is not the same on every system")
