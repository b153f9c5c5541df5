"""Reading text and JSON that somebody else wrote: bounded, strict, and the same as the C++ runtime (``json.cpp``).

JSON is RFC 8259 in strict UTF-8. Refused besides what is no JSON: a byte order mark, a key that occurs twice in one
object, ``NaN`` and ``Infinity``, a number that no float64 holds, half of a surrogate pair, and more than `DEEPEST`
nested arrays and objects. Every error says what is wrong with the document; the caller says which document it is and
what to do.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from typing import Any

MOST_BYTES = 64 << 20
"""Largest document that is read, bytes: twice the largest tokenizer in use."""
DEEPEST = 500
"""Most arrays and objects inside one another."""
_MOST_DIGITS = 310
"""Digits of an integer, sign included, beyond which no float64 holds it."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedError(ValueError):
    """What is wrong with a document."""


def read_bytes(path: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> bytes:
    """Content of a regular file, whole.

    Parameters
    ----------
    path : the file; a link to a regular file is followed
    most_bytes : the largest content that is read

    Raises
    ------
    MalformedError
        If it is a folder, a pipe or a device, or larger than ``most_bytes``.
    OSError
        If it cannot be opened or read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return read_descriptor(os.open(path, flags), most_bytes)  # without O_NONBLOCK a pipe would be waited for


def read_descriptor(descriptor: int, most_bytes: int = MOST_BYTES) -> bytes:
    """Content of the file that a descriptor is of, which is closed; raises as `read_bytes` does."""
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedError("not a regular file")
        data = file.read(most_bytes + 1) if status.st_size <= most_bytes else None
    if data is None or len(data) > most_bytes:
        raise MalformedError(f"{max(status.st_size, most_bytes + 1):,} bytes long; at most {most_bytes:,} are read")
    return data


def text_of(data: bytes) -> str:
    """UTF-8 text, its line ends as they are.

    Raises
    ------
    MalformedError
        If it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 text (byte {error.start})") from error


def read_text(path: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> str:
    """Content of a regular file of UTF-8 text; raises as `read_bytes` and `text_of` do."""
    return text_of(read_bytes(path, most_bytes))


def parsed(document: str | bytes, *, repeats: bool = False, constants: bool = False) -> Any:
    """Value of a JSON document; the module's docstring says what is refused.

    Parameters
    ----------
    repeats : take a key that occurs twice, whose last value counts, as transformers does
    constants : take ``NaN``, ``Infinity`` and ``-Infinity``, which diffusers writes (``lambda_min_clipped``)

    Raises
    ------
    MalformedError
        With what is wrong, such as "not JSON: a key occurs twice among ['a', 'a']".
    """
    text = text_of(document) if isinstance(document, bytes) else document
    try:
        found = json.loads(
            text,
            object_pairs_hook=dict if repeats else _object_without_repeats,
            parse_constant=float if constants else _no_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise MalformedError(_TOO_DEEP) from None
    except ValueError as error:
        raise MalformedError(f"not JSON: {error}") from error
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(found)
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedError("not JSON: it has half of a surrogate pair") from None
    return found


def json_text(values: Any) -> str:
    """A value as the text of a JSON file, in which texts are as they are."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_json(
    path: str | os.PathLike[str], most_bytes: int = MOST_BYTES, *, repeats: bool = False, constants: bool = False
) -> Any:
    """Value of a JSON file; takes the parameters of `read_bytes` and `parsed`, and raises as they do."""
    return parsed(read_bytes(path, most_bytes), repeats=repeats, constants=constants)


_TOO_DEEP = f"not JSON that is read: more than {DEEPEST} arrays and objects are nested"


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST):
        level = [
            child
            for holder in level
            if isinstance(holder, (dict, list))
            for child in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise MalformedError(_TOO_DEEP)


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "one"
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is beyond a float64")
    return number


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text[:20]}... is beyond a float64")
    number = int(text)
    if abs(number) > 2**53:
        _finite(text)
    return number
