"""What DeepCache buys and costs: one picture of 50 steps in turn, and the quality of 200, for every N.

deepcache.py BUNDLE DATA HELD_OUT [RESULT.json]        BUNDLE with its target ort-cpu; pictures as evaluate takes them

The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.waterfall import PROMPTS
from ldm_export.bench.machine import cpu
from ldm_export.bundle import Bundle
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.auto import SETTLE_S
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.metrics import psnr
from ldm_export.verify.quality import evaluate

EVERY, ROUNDS, STEPS, GUIDANCE = (1, 2, 3, 5), 11, 50, 4.0
FIGURES = ("frechet_distance", "retrieval_at_5")


def main(folder: Path, data: Path, held_out: Path) -> dict[str, Any]:
    bundle, settings = Bundle.open(folder), SamplingSettings(steps=STEPS, guidance=GUIDANCE)
    pipeline = Pipeline(bundle, "cpu")
    times: dict[int, list[float]] = {every: [] for every in EVERY}
    for number in range(ROUNDS + 1):  # the first is warm-up
        for every in EVERY:
            time.sleep(SETTLE_S)
            drawn = pipeline.generate(
                f"{PROMPTS[number % len(PROMPTS)]} {number}",
                seed=number,
                steps=STEPS,
                guidance=GUIDANCE,
                deepcache=every,
            )
            if number:
                times[every].append(drawn.timings.total_ms)
    rows, whole = [], None
    for every in EVERY:
        report = evaluate(
            BundleImageGenerator(bundle, deepcache=every), data, held_out, settings, None, lambda *_: None
        )
        whole = report.images if whole is None else whole
        rows.append(
            {
                "every": every,
                "median_ms": statistics.median(times[every]),
                "faster": statistics.median(a / b for a, b in zip(times[1], times[every], strict=True)),
                "psnr_db": float(np.median(psnr(report.images, whole))),
                **{name: report.figures[name].value for name in FIGURES},
            }
        )
        print(rows[-1], file=sys.stderr)
    print("| whole UNet in every … step | picture ms | faster | PSNR to every step, dB | Fréchet | R@5 |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['every']} | {row['median_ms']:.1f} | {row['faster']:.2f}x | {row['psnr_db']:.1f} | "
            f"{row['frechet_distance']:.1f} | {row['retrieval_at_5']:.3f} |"
        )
    return {"steps": STEPS, "guidance": GUIDANCE, "machine": cpu(), "backend": pipeline.backend, "rows": rows}


if __name__ == "__main__":
    document = main(*(Path(argument) for argument in sys.argv[1:4]))
    if len(sys.argv) > 4:
        Path(sys.argv[4]).write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
