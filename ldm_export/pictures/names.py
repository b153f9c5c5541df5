"""Names of picture files: one file for all, a folder, or a pattern such as ``out/{number:04}-{seed}-{prompt}.webp``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from string import Formatter

from ldm_export.errors import InputError
from ldm_export.pictures.files import format_of
from ldm_export.pictures.text import PictureRequest

FIELDS = ("number", "seed", "prompt")
"""Fields of a pattern: the picture's number from 0 on, its seed, and its prompt as `slug` makes it."""
IN_A_FOLDER = "{number:04}.png"
LONGEST_SLUG = 40
_WIDTH = re.compile(r"0?[0-9]{0,2}d?")
"""What may follow ``number:`` and ``seed:``."""


@dataclass(frozen=True)
class Names:
    """A folder, and the pattern of the names in it, which may have folders of its own."""

    folder: Path
    pattern: str


def names_from(output: str) -> Names | None:
    """The folder or the pattern that an output is, or None where it names one file.

    A folder is one that exists, or ends in ``/``; its pictures are ``0000.png``, ``0001.png`` ...

    Raises
    ------
    InputError
        For a pattern with unknown fields, with ``..`` after a field, or that is not the name of a picture file.
    """
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        return Names(Path(output), IN_A_FOLDER)
    if "{" not in output and "}" not in output:
        return None
    start = output.find("{")
    folder, slash, pattern = output[: max(start, 0)].rpartition("/")
    pattern += output[max(start, 0) :]
    _check_pattern(pattern)
    if ".." in PurePath(pattern).parts:
        raise InputError(f"{output} leaves its folder after a field. Leave the .. out.")
    format_of(Path(pattern))
    return Names(Path(folder + slash), pattern)


def _check_pattern(pattern: str) -> None:
    known = f"A pattern has the fields {', '.join(f'{{{field}}}' for field in FIELDS)}, such as {{number:04}}.png"
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError as error:
        raise InputError(f"{pattern} is no pattern ({error}). {known}.") from error
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if field not in FIELDS or conversion:
            raise InputError(f"{pattern} has the unknown field {{{field}}}. {known}.")
        if not _WIDTH.fullmatch(spec or "") or (spec and field == "prompt"):
            raise InputError(f"{pattern} has the field {field} with {spec!r}; a number takes a width. {known}.")


def slug(request: PictureRequest) -> str:
    """A prompt for a file's name: its letters and digits in lower case with ``-`` between, 40 characters at most;
    ``class-7`` where it is a class alone, ``picture`` where nothing is left."""
    text = request.prompt
    if text is None and request.class_label is not None:
        text = f"class {request.class_label}"
    words = re.sub(r"[\W_]+", "-", (text or "").lower())
    return words.strip("-")[:LONGEST_SLUG].strip("-") or "picture"


def paths_of(names: Names, requests: Sequence[PictureRequest]) -> list[Path]:
    """The file of each picture.

    Raises
    ------
    InputError
        If two have one name.
    """
    numbers: dict[Path, int] = {}
    for number, request in enumerate(requests):
        path = names.folder / names.pattern.format(number=number, seed=request.seed, prompt=slug(request))
        if path in numbers:
            raise InputError(
                f"Pictures {numbers[path]} and {number} would both be {path}. Put {{number}} in the pattern."
            )
        numbers[path] = number
    return list(numbers)
