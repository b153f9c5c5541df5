"""What a measurement was made on: the machine and the versions of what ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ldm_export import __version__
from ldm_export.bundle.targets.cpu_level import cpuinfo
from ldm_export.errors import BackendError
from ldm_export.runtime.backends.cuda import driver_is_there, gpus, used_bytes

RAN = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
)
WIDEST = ("amx_tile", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
"""Instruction sets that matter for speed, the most telling first."""


def machine() -> dict[str, Any]:
    """The processor, how many CPUs this process may use, the system, and the first GPU or None."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu(), "cpus": cpus, "system": f"{platform.system()} {platform.machine()}", "gpu": gpu()}


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that run networks, those that are installed."""
    found = {"ldm_export": __version__, "python": platform.python_version()}
    for package in RAN:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu() -> str | None:
    """The first GPU's name; None where there is none, or CUDA's bindings are missing."""
    try:
        return gpus()[0].name if driver_is_there() else None
    except BackendError:
        return None


def used_device_bytes() -> int | None:
    """What all programs together hold of the first GPU's memory; None as for `gpu`."""
    try:
        return used_bytes() if driver_is_there() else None
    except BackendError:
        return None


def cpu() -> str:
    """The processor's name and its widest instruction set, as far as the system tells."""
    info = dict(reversed(cpuinfo()))  # the first core's
    flags = info.get("flags", "").split()
    widest = next((name for name in WIDEST if name in flags), "")
    name = info.get("model name", platform.processor())
    return f"{name or platform.machine()}{f' ({widest})' if widest else ''}"
