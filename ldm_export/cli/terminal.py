"""The terminal: what is printed is never taken as markup, and nothing in it reaches the terminal as a command."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line feed, C1 and DEL among them; what turns the direction of text; surrogates."""


def printable(text: str) -> str:
    """Text with its control characters as escapes: ``\\x1b``, ``\\u202e``."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class PlainConsole(Console):
    """Prints text as it is, without markup, emoji codes, highlighting or control characters."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # all strings come through here
        return super().render_str(printable(text), **options)


console = PlainConsole(soft_wrap=True)
status = PlainConsole(stderr=True)
errors = PlainConsole(stderr=True, soft_wrap=True)


def prepare_streams() -> None:
    """Let stdout and stderr take any text, whatever their encoding, and be there: where the shell closed stdout,
    writing fails with an error that can be reported; what would go to a closed stderr vanishes."""
    if sys.stdout is None or sys.stderr is None:
        while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:  # else a file that is opened later is 1 or 2
            pass
        os.close(descriptor)
        if sys.stdout is None:
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def give_up(stream: TextIO) -> None:
    """Drop what a stream has not written and cannot, so that Python does not try again at its end."""
    try:
        descriptor = stream.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    except (OSError, ValueError):  # not a file of the system's
        pass
