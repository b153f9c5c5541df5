"""Exports a Stable Diffusion 1.5-size model with random weights: seconds, peak memory of the process, parity.

sd15_export.py [FOLDER]        needs 12 GB of disk in FOLDER (build/sd15)
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.peers.workloads import make_checkpoint
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint


def main(folder: Path) -> None:
    if not (folder / "checkpoint" / "model_index.json").is_file():
        make_checkpoint(folder / "checkpoint")
        print("checkpoint written; run again, so that only the export is measured")
        return
    seconds: dict[str, float] = {}
    peaks_gb: dict[str, float] = {}
    running, started = "start", time.perf_counter()

    def progress(stage: str) -> None:
        nonlocal running, started
        now = time.perf_counter()
        graph = running.partition(":")[0]
        seconds[graph] = seconds.get(graph, 0.0) + now - started
        usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        peaks_gb[graph] = max(usages) / 1e6  # of the larger process: a large graph is compared in its own
        running, started = stage, now

    begun = time.perf_counter()
    bundle = export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", force=True, progress=progress)
    progress("end")
    total = time.perf_counter() - begun
    for graph, value in seconds.items():
        print(f"{graph:22} {value:7.1f} s   peak so far {peaks_gb[graph]:.2f} GB")
    print(f"{'whole pipeline':22} {total:7.1f} s   peak {max(peaks_gb.values()):.2f} GB")
    errors = {f"{record['graph']}/{record['output']}": record["max_error"] for record in bundle.manifest.parity}
    print(json.dumps({"seconds": seconds, "total_s": total, "peak_gb": peaks_gb, "max_error": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/sd15"))
