"""Figures as people read them, on the console and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.bench.image_similarity import LARGEST


def times(ratio: float) -> str:
    """``1.83x``, ``17x``: three digits at most."""
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x"


def decibels(psnr_db: float) -> str:
    return "identical" if psnr_db >= LARGEST else f"{psnr_db:.1f} dB"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}" if value < 1e9 else f"{value / 1e6:,.0f}"


def verdict(record: Mapping[str, Any]) -> str:
    """Word for how a parity record came out; a graph whose weights are another network's is compared and not judged."""
    if not record["same_weights"]:
        return "other"
    return "ok" if record["passed"] else "FAIL"
