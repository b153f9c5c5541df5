"""What a measurement was made on: the machine and the versions of what ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ldm_export import __version__

RAN = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch")
WIDEST = ("amx_tile", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
"""Of the instruction sets that matter for speed, the most telling first."""


def machine() -> dict[str, Any]:
    """The processor, how many CPUs this process may use, the system."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu(), "cpus": cpus, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """Of this package, Python and the libraries that run networks, those that are installed."""
    found = {"ldm_export": __version__, "python": platform.python_version()}
    for package in RAN:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu() -> str:
    """The processor's name and its widest instruction set, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    flags = next((line.partition(": ")[2].split() for line in lines if line.startswith("flags")), [])
    widest = next((name for name in WIDEST if name in flags), "")
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}{f' ({widest})' if widest else ''}"
