"""What TensorRT-RTX engines cost to build on a machine without a GPU: seconds, bytes, peak memory of each build.

python -m benchmarks.engines BUNDLES [CASE ...]     BUNDLES/CASE/bundle are of benchmarks/peers/workloads.py

Cases: emoji64 (four graphs and a loop, fp32 and fp16, for three GPUs, then once more, when nothing is to be built),
52m and sd15 (the UNet in fp16 with free batch and size for one GPU). Bundles are copied, so that theirs get no targets.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ldm_export.bench.machine import machine, versions
from ldm_export.bundle import Bundle
from ldm_export.export.tensorrt.profiles import Range
from ldm_export.verify.engines.build import Built, EngineSettings, build_engines

RESULTS = Path(__file__).parent / "results" / "engines.json"
RTX = "tensorrt_rtx"
GPUS = ("86", "89", "120")
CASES: dict[str, list[tuple[EngineSettings, tuple[str, ...], tuple[str, ...]]]] = {
    "emoji64": [
        (EngineSettings(RTX, GPUS, "fp32", pixels=Range(64, 64, 128)), (), ("ddim-20",)),
        (EngineSettings(RTX, GPUS, "fp16", pixels=Range(64, 64, 128)), (), ("ddim-20",)),
    ],
    "52m": [(EngineSettings(RTX, ("89",), "fp16", pixels=Range(256, 256, 512)), ("unet",), ())],
    "sd15": [(EngineSettings(RTX, ("89",), "fp16", pixels=Range(512, 512, 768)), ("unet",), ())],
}


def timed(
    bundle: Bundle, settings: EngineSettings, graphs: tuple[str, ...], loops: tuple[str, ...]
) -> tuple[Built, float]:
    started = time.perf_counter()
    made = build_engines(bundle, settings, graphs, loops, progress=lambda stage: print(f"  {stage}", file=sys.stderr))
    return made, time.perf_counter() - started


def rows_of(case: str, folder: Path) -> list[dict[str, Any]]:
    """One row an engine, and one of the whole."""
    rows = []
    for settings, graphs, loops in CASES[case]:
        bundle = Bundle.open(folder)
        made, total_s = timed(bundle, settings, graphs, loops)
        again, again_s = timed(bundle, settings, graphs, loops)
        assert not again.built
        common = {"case": case, "precision": settings.precision, "sm": list(settings.sm_versions)}
        for name, engine in made.target.engines.items():
            report = made.target.report[name]
            kept = {key: report[key] for key in ("onnx_bytes", "engine_bytes", "peak_rss_bytes")}
            kept |= {key: report["compared"][-1].get(key) for key in ("against", "error")}
            rows.append({**common, "engine": name, "seconds": engine.seconds, **kept})
        rows.append({**common, "engine": "all", "seconds": total_s, "seconds_unchanged": again_s})
    return rows


def main(bundles: Path, cases: list[str]) -> None:
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for case in cases:
        with tempfile.TemporaryDirectory() as temporary:
            copy = shutil.copytree(
                bundles / case / "bundle", Path(temporary) / case, ignore=shutil.ignore_patterns("targets")
            )
            rows = [row for row in rows if row["case"] != case] + rows_of(case, copy)
    document = {"machine": machine(), "versions": versions(), "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{'':8} {'':4} {'engine':14} {'seconds':>8} {'ONNX MB':>8} {'engine MB':>9} {'peak MB':>8} {'error':>8}")
    for row in rows:
        sizes = [row.get(key, 0) / 1e6 for key in ("onnx_bytes", "engine_bytes", "peak_rss_bytes")]
        text = (
            "{:8.1f} {:9.1f} {:8.0f}".format(*sizes)
            if "engine_bytes" in row
            else f"again {row['seconds_unchanged']:.2f} s"
        )
        error = "" if row.get("error") is None else f"{row['error']:8.1e}"
        print(f"{row['case']:8} {row['precision']:4} {row['engine']:14} {row['seconds']:8.1f} {text} {error}")
    print(json.dumps(document))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
