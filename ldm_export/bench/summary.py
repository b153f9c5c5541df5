"""A bench as rows of text, for the console."""

from __future__ import annotations

from typing import Any

from ldm_export.bench.formatting import decibels, milliseconds, times, verdict
from ldm_export.bench.harness import results_by_variant

HEADS = (
    "",
    "steps",
    "ms",
    "call\nms",
    "faster",
    "MB",
    "RSS\nMB",
    "GPU\nMB",
    "cold\ns",
    "worst\ndB",
    "worst\ndrift",
)

MEMORIES = ("peak_rss_bytes", "device_bytes")


def summary_rows(document: dict[str, Any]) -> list[list[str]]:
    """One row a variant, beneath :data:`HEADS`."""
    results, rows = results_by_variant(document), []
    for variant, drawn in document["variants"].items():
        spent, pictures = results["latency"][variant]["stages"], results["pictures"][variant]
        process, faster = results["process"][variant], results["latency"][variant]["faster"]
        drift = pictures.get("drift")
        rows.append(
            [
                variant,
                str(drawn["steps"]),
                milliseconds(spent["total"]["median_ms"]),
                milliseconds(spent["denoiser_call"]["median_ms"]),
                "" if faster is None else times(faster),
                f"{results['bytes'][variant]['bytes'] / 1e6:.1f}",
                *("" if size is None else f"{size / 1e6:.0f}" for size in map(process.get, MEMORIES)),
                f"{process['cold_start_ms'] / 1e3:.2f}",
                decibels(min(pictures["psnr_db"])).removesuffix(" dB") if "psnr_db" in pictures else "",
                f"{max(drift['worst']):.1e}" if drift else "",
            ]
        )
    return rows


def parity_lines(document: dict[str, Any]) -> list[str]:
    """One line an output of a graph that was compared with PyTorch."""
    return [
        f"{verdict(record):5} {variant}: {record['graph']} {record['output']} {record['max_error']:.1e} "
        f"(allowed {record['tolerance']:.0e})"
        for variant, records in results_by_variant(document).get("parity", {}).items()
        for record in records
    ]
