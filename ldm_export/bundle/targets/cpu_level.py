"""The kind of processor that this machine has."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

MODEL = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
VECTORS = {
    "flags": re.compile(r"(amx|avx|fma|sse4).*"),
    "Features": re.compile(r"(asimd|neon|sme|sve).*|bf16|fphp|i8mm"),
}
"""Patterns of vector instructions, by the field of Linux's ``/proc/cpuinfo`` that names them: x86, ARM."""


def cpu_level() -> str:
    """The kind of processor, by all that the layout of packed weights may depend on.

    ONNX Runtime's MLAS (``onnxruntime/core/mlas/lib/platform.cpp``) chooses its kernels, and with them the layouts, by
    many instructions, not by one level: of blocked convolutions by AVX-512F; of 8-bit products and convolutions by
    AVX2, AVX-VNNI, AVX-VNNI-INT8, AVX-512 BW, DQ, VL and VNNI, and AMX; of 4-bit weights by most of these; on ARM by
    dot products, I8MM, BF16, SVE and SME. All vector instructions that the system names are in, also those that only a
    later release may look at. The model is in, since MLAS asks the processor itself and an old Linux does not name all
    that it has; the instructions are, since a virtual machine may hide some of a model's. Where the system tells
    neither, only the very machine is taken to be like itself.
    """
    info = cpuinfo()
    models = dict.fromkeys(value for name, value in info if name in MODEL)
    vectors = {
        flag for name, value in info if name in VECTORS for flag in value.split() if VECTORS[name].fullmatch(flag)
    }
    known = [*models, *sorted(vectors)] if vectors else []
    if not known:
        known = [platform.processor(), hashlib.sha256(platform.node().encode()).hexdigest()[:16]]
    return " ".join(" ".join([platform.machine(), *known]).split())


def processor() -> str:
    """Name and instructions of the processor, to tell apart what was measured on one from what was on another."""
    known = {f"{name}: {value}" for name, value in cpuinfo() if name in ("model name", *VECTORS)}
    return "\n".join(sorted(known)) or f"{platform.machine()} {platform.processor()}"


def cpuinfo() -> list[tuple[str, str]]:
    """Fields and values that Linux's ``/proc/cpuinfo`` has of all cores, in order; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    parts = (line.partition(":") for line in text.splitlines())
    return [(name.strip(), value.strip()) for name, colon, value in parts if colon]
