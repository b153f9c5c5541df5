"""Cold start and memory, each variant in processes of its own, in turn: see :mod:`ldm_export.bench.child`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm_export.bench.machine import used_device_bytes
from ldm_export.errors import BackendError
from ldm_export.processes import environment
from ldm_export.runtime.backends.auto import SETTLE_S

CHILD = (sys.executable, "-m", "ldm_export.bench.child")


class _Process(NamedTuple):
    start_ms: float
    rss_bytes: int | None
    device_bytes: int | None


def processes_in_turn(
    variants: Mapping[str, Mapping[str, Any]], rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What each variant needs in a new process, every round all variants.

    Parameters
    ----------
    variants : name -> the request, :mod:`ldm_export.bench.child`'s, of its process

    Returns
    -------
    name -> ``cold_start_ms``, from the start of the process to its first picture, median, and all of them in
    ``cold_starts_ms``; ``peak_rss_bytes``, the largest, after two pictures, None where the system does not tell;
    ``device_bytes``, by how much more of the first GPU's memory was taken then than before the process, the largest,
    CUDA's context included, None without a GPU

    Raises
    ------
    BackendError
        If a process ends without a picture.
    """
    found: dict[str, list[_Process]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, request in variants.items():
            progress(f"cold start {number + 1} of {rounds}, {name}")
            time.sleep(SETTLE_S)
            found[name].append(_one(name, request))
    measured = {}
    for name, runs in found.items():
        starts = [run.start_ms for run in runs]
        measured[name] = {
            "cold_start_ms": statistics.median(starts),
            "cold_starts_ms": starts,
            "peak_rss_bytes": max((run.rss_bytes for run in runs if run.rss_bytes is not None), default=None),
            "device_bytes": max((run.device_bytes for run in runs if run.device_bytes is not None), default=None),
        }
    return measured


def _one(name: str, request: Mapping[str, Any]) -> _Process:
    """What one new process takes."""
    device_before = used_device_bytes()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = time.perf_counter()
    with subprocess.Popen(CHILD, env=environment(), text=True, **pipes) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            first = process.stdout.readline()
            spent_ms = (time.perf_counter() - started) * 1000.0
            rss = process.stdout.readline()
            device_after = used_device_bytes()  # it waits for the end of its input
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode or first.strip() != "drawn":
        reason = [line for line in errors.splitlines() if line.strip()][-1:] or [f"exit code {process.returncode}"]
        raise BackendError(f"A process of its own could not draw with {name} ({reason[0]}). Try `ldm-export generate`.")
    device = None if device_before is None or device_after is None else max(device_after - device_before, 0)
    return _Process(spent_ms, json.loads(rss), device)
