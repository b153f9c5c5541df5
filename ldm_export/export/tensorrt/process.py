"""Runs :mod:`ldm_export.export.tensorrt.child`, which may crash or be killed, and says how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ldm_export.errors import ExportError
from ldm_export.processes import environment

CHILD = (sys.executable, "-m", "ldm_export.export.tensorrt.child")
_NO_MEMORY = re.compile(r"bad_alloc|out ?of ?memory|MemoryError", re.IGNORECASE)
_CLUTTER = re.compile(r"\x1b\[[0-9;]*m|\[[A-Z!]\]\s+|\s*\bIn \w+ at \S+|^Internal Error: ")


def in_a_process(request: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the process found, by graph.

    Parameters
    ----------
    what : begins the sentence that says how it ended, if not well

    Raises
    ------
    ExportError
        If the process crashes, is killed or runs out of memory, or TensorRT fails; with its last words.
    OSError
        If an engine cannot be written.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(CHILD, env=environment(), text=True, errors="replace", **pipes) as process:
        try:
            output, errors = process.communicate(json.dumps(request))
        except BaseException:
            process.kill()
            raise
    words = last_words(errors)
    found: dict[str, Any] = {} if process.returncode else json.loads(output)
    unfinished = process.returncode or any(graph.keys() & {"failed", "refused"} for graph in found.values())
    if unfinished and _NO_MEMORY.search(errors):
        raise ExportError(
            f"{what} ran out of memory, saying: {words}. Nothing was kept. End other programs, or build for fewer or "
            "smaller pictures with --batch and --size."
        )
    if process.returncode:
        raise ExportError(
            f"{what} {_ended(process.returncode)}{f', saying: {words}' if words else ''}. Nothing was kept."
        )
    for graph in found.values():
        if "errno" in graph:
            raise OSError(graph["errno"], os.strerror(graph["errno"]))
        if "failed" in graph:
            raise ExportError(f"{what} failed{f': {words}' if words else ''}. {_advice(request)}")
        if "missing" in graph:
            lacking = f"{graph['missing'][0]!r} and {len(graph['missing']) - 1} more of its weights"
            raise ExportError(f"{what} failed: the graph does not give {lacking}. Nothing was kept; build anew.")
    return found


def last_words(errors: str) -> str:
    """The last line that says something, without colours and places in TensorRT's own source."""
    lines = [" ".join(_CLUTTER.sub("", line).split()).rstrip(".") for line in errors.splitlines()]
    said = [line for line in lines if line and not line.startswith(("Invalid Engine", "Finished"))]
    errors_said = [line for line in said if "Error Code" in line]
    return (errors_said or said or [""])[-1]


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, most likely for want of memory"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _advice(request: Mapping[str, Any]) -> str:
    if request.get("refittable") or request.get("stripped"):
        return "Engines that can be refitted are built where there is a GPU; else leave --refit and --strip out."
    return "Nothing was kept."
