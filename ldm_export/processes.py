"""Processes of their own: what they must find, and what they took."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """This process's, with its import path, so that another finds the same packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process since it began, bytes; None where the system does not tell.

    Linux' ``ru_maxrss`` is no use here: it starts at the parent's, whose memory a new process shares for a moment.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
