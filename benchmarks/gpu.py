"""All that draws on the GPU at hand, against TensorRT engines, unattended.

gpu.py [WORKLOAD ...] [--device cpu] [--rounds N] [--result FILE] [--folder F]
       [--kinds unet,picture] [--precisions fp32,fp16] [--seconds N]

A workload is one of peers/workloads.py, or a folder in F that has a checkpoint/.

Of each workload, in fp32 (without TF32) and fp16: engines are built; then one UNet call and prompt to picture are timed
of each peer in turn with ours, the first engine that runs, each in a process of its own. Errors are against diffusers
in fp32 on the CPU; ``device_bytes`` is what the GPU holds more, a peer's CUDA context included, after its first call.
What cannot be made or measured is a row with the reason, and the rest goes on. Every row is written as soon as it is
there; run again, the same command goes on, and tries again what was left out. Prints tables; the last line of the
output is one JSON document. Without a GPU it says what is missing, and the exit code is 2. ``--device cpu`` tries all
of it on the CPU. After ``--seconds`` nothing more is begun; what is left out for that reason is tried by the next run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.peer import STEPS, Setup
from benchmarks.peers.run import OURS, REFERENCE, Peer, Table, in_turn, python_peer
from benchmarks.peers.workloads import WORKLOADS, make_workload
from ldm_export.bench.harness import write_document
from ldm_export.bench.image_similarity import LARGEST
from ldm_export.bench.machine import machine, versions
from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import is_loop
from ldm_export.errors import BackendError, InputError
from ldm_export.export.graphs import change_graphs, copy_bundle, graphs_of
from ldm_export.families import open_checkpoint
from ldm_export.graph.half import Half
from ldm_export.runtime.backends import ENGINES
from ldm_export.runtime.backends.base import one_line
from ldm_export.runtime.backends.cuda import gpus
from ldm_export.runtime.backends.providers import PROVIDERS
from ldm_export.verify.engines.build import EngineSettings, build_engines
from ldm_export.verify.engines.calls import CALIBRATED, example_calls

RESULTS = Path(__file__).parent / "results" / "gpu.json"
FOLDER = Path("build/gpu")
PRECISIONS = ("fp32", "fp16")
KINDS = ("unet", "picture")
LOOP = f"ddim-{STEPS}"
HALF = "half.bundle"
NO_TIME = "no time was left"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What is measured: a peer of ``peer.py``, and how it is set up."""

    name: str
    peer: str
    setup: Setup


def rows_of(precision: str, device: str) -> list[Row]:
    """All that draws in a precision; what is ours comes first."""
    rows = []
    for backend in ENGINES if device == "cuda" else ():
        recorded = Setup(precision=precision, bundle=f"{precision}.bundle", backend=backend)
        rows.append(Row(backend, OURS, recorded))
        rows.append(Row(f"{backend}, no CUDA graphs", OURS, replace(recorded, cuda_graphs=False)))
        rows.append(Row(f"{backend}, whole loop", OURS, replace(recorded, whole=True)))
    bundle = "bundle" if precision == "fp32" else HALF
    for backend in PROVIDERS if device == "cuda" else ("cpu",):
        setup = Setup(precision=precision, bundle=bundle, backend=backend, cuda_graphs=False)
        rows.append(Row(backend, OURS, setup))
        if backend == "cuda":
            rows.append(Row("cuda, CUDA graphs", OURS, replace(setup, cuda_graphs=True)))
    for peer in (REFERENCE, "torch.compile"):
        rows.append(Row(peer, peer, Setup(device=device, precision=precision)))
    return rows


class Kept:
    """The document in a file: what was built and measured, each by what it is.

    Raises
    ------
    InputError
        If the file is of another machine, of other versions or rounds, or no such document.

    Parameters
    ----------
    seconds : from now, after which nothing more is begun
    """

    def __init__(self, path: Path, header: Figures, seconds: float = math.inf):
        self.path, self.document = path, {**header, "builds": {}, "rows": {}}
        self._deadline = time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = _read(path)
            if {key: found.get(key) for key in header} != header:
                raise InputError(
                    f"{path} is of another machine, of other versions or --rounds, or no such document. "
                    "Move it away, or name another file with --result."
                )
            self.document = found

    def make(self, section: str, what: dict[str, str], make: Callable[[], Figures], *, again: bool = False) -> Figures:
        """A row, made if it is not there, was left out, or costs nothing to make ``again``; kept at once."""
        key = " ".join(what.values())
        row: Figures = self.document[section].get(key, {"left_out": ""})
        late = time.monotonic() >= self._deadline
        if "left_out" in row or (again and not late):
            print(key, file=sys.stderr)
            try:
                if late:
                    raise TimeoutError(NO_TIME)
                row = {**row, **what, **make()}
                row.pop("left_out", None)
            except Exception as error:  # whatever it is, the others can still be measured
                row = {**what, "left_out": one_line(error) or type(error).__name__}
                print(f"{key} is left out: {row['left_out']}", file=sys.stderr)
            self.document[section][key] = row
            write_document(self.document, self.path)
        return row


def run(
    kept: Kept,
    workloads: Sequence[str],
    folder: Path,
    rounds: int,
    device: str,
    capability: str,
    rows: Callable[[str, str], list[Row]] = rows_of,
    kinds: Sequence[str] = KINDS,
    precisions: Sequence[str] = PRECISIONS,
) -> None:
    """Build and measure what is not there yet.

    Parameters
    ----------
    capability : the GPU's compute capability, such as ``8.9``
    """
    for workload in workloads:
        place, bundle = folder / workload, partial(bundle_of, workload, folder / workload, device)

        def build(what: str, make: Callable[[], Figures], workload: str = workload) -> Figures:
            return kept.make("builds", {"workload": workload, "what": what}, make, again=True)

        if "left_out" in build("bundle", bundle):
            continue
        for kind in kinds:
            build(f"reference {kind}", partial(reference_of, kind, place))
        for precision in precisions:
            if precision == "fp16":
                build(HALF, partial(half_of, place))
            for backend, flavour in ENGINES.items() if device == "cuda" else ():
                engines = partial(engines_of, place, precision, flavour, capability)
                if "left_out" not in build(f"{backend} {precision}", engines):
                    build(f"{backend} {precision}, whole loop", partial(engines, (LOOP,)))
            for kind in kinds:
                ours: Row | None = None
                for row in rows(precision, device):
                    if row.setup.whole and kind == "unet":
                        continue
                    what = {"workload": workload, "kind": kind, "precision": precision, "name": row.name}
                    figures = kept.make("rows", what, partial(figures_of, row, ours, kind, place, rounds))
                    if ours is None and row.peer == OURS and "left_out" not in figures:
                        ours = row


# --- what is built --------------------------------------------------------------------------------------------------


def bundle_of(workload: str, place: Path, device: str) -> Figures:
    """The workload's bundle, with the target for this CPU only where that is what is measured."""
    place.mkdir(parents=True, exist_ok=True)
    make_workload(workload, place, cpu_target=device == "cpu")
    return {"bytes": bytes_of(Bundle.open(place / "bundle"))}


def reference_of(kind: str, place: Path) -> Figures:
    """What diffusers makes in fp32 on the CPU, as a file."""
    file = place / f"reference-{kind}.npy"
    if file.exists():
        return {}
    started = time.perf_counter()
    peer = python_peer(REFERENCE, kind, place)
    try:
        peer.ask("open")
        peer.ask(f"save 2 {file.with_suffix('.partial.npy')}")
    finally:
        peer.end()
    os.replace(file.with_suffix(".partial.npy"), file)
    return {"seconds": time.perf_counter() - started}


def half_of(place: Path) -> Figures:
    """The bundle in fp16, for ONNX Runtime; engines are made of graphs in fp32."""
    if (place / HALF).is_dir():
        return {"bytes": bytes_of(Bundle.open(place / HALF))}
    started = time.perf_counter()
    bundle, step = Bundle.open(place / "bundle"), Half()
    graphs = bundle.manifest.graphs
    calls = {name: example_calls(bundle, graphs[name], CALIBRATED) for name in graphs_of(bundle, step)}
    with tempfile.TemporaryDirectory(dir=place) as work:
        checkpoint = open_checkpoint(place / "checkpoint")
        changed, reports = change_graphs(bundle, Path(work) / HALF, step, calls, [], checkpoint)
        passes = [{"name": step.name, "kept": True, "report": reports}]  # by which a provider knows that fp16 will do
        made = copy_bundle(changed, place / HALF, passes=passes, force=False)
    return {"seconds": time.perf_counter() - started, "bytes": bytes_of(made)}


def engines_of(place: Path, precision: str, flavour: str, capability: str, loops: tuple[str, ...] = ()) -> Figures:
    """Engines in a copy of the bundle for each precision, since the fastest that is there is what runs."""
    copy = place / f"{precision}.bundle"
    if not copy.is_dir():
        ignored = shutil.ignore_patterns("targets")
        begun = place / f"{precision}.partial"
        os.replace(shutil.copytree(place / "bundle", begun, ignore=ignored, dirs_exist_ok=True), copy)
    sm_versions = (capability.replace(".", ""),) if flavour == "tensorrt_rtx" else ()
    target = build_engines(Bundle.open(copy), EngineSettings(flavour, sm_versions, precision), loops=loops).target
    wanted = [name for name in target.engines if is_loop(f"{name}.onnx") == bool(loops)]
    return {
        "seconds": sum(target.engines[name].seconds for name in wanted),
        "bytes": sum(target.report[name]["engine_bytes"] for name in wanted),
        "engines": {name: {"seconds": target.engines[name].seconds, **target.report[name]} for name in wanted},
        "version": target.version,
    }


def bytes_of(bundle: Bundle) -> int:
    return sum(entry.size_bytes for path, entry in bundle.manifest.files.items() if not is_loop(path))


# --- what is measured -----------------------------------------------------------------------------------------------


def figures_of(row: Row, ours: Row | None, kind: str, place: Path, rounds: int) -> Figures:
    """A peer's figures, timed in turn with ours.

    Raises
    ------
    BackendError
        If it does not run here, with its own words.
    """
    table = Table({}, None)
    pair = {each.name: each for each in (row, ours) if each is not None}
    starts = {
        name: partial(python_peer, each.peer, kind, place, row=name, setup=each.setup) for name, each in pair.items()
    }
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "result.npy"

        def finish(peer: Peer) -> None:
            if peer.name == row.name:
                peer.ask(f"save 2 {saved}")

        in_turn(starts, table, rounds, finish=finish)
        found = table.rows[row.name]
        if "left_out" in found:
            raise BackendError(found["left_out"])
        result = np.load(saved, allow_pickle=False)
    figures = {"median_ms": statistics.median(found["ms"]), "min_ms": min(found["ms"]), "ms": found["ms"]}
    figures |= {name: found[name][0] for name in ("load_s", "first_s", "peak_bytes")}
    figures["device_bytes"] = found.get("device_bytes", [None])[0]
    figures["error"] = error_of(result, place / f"reference-{kind}.npy")
    if ours is not None and "ms" in table.rows[ours.name]:
        pairs = zip(found["ms"], table.rows[ours.name]["ms"], strict=True)
        figures |= {"ours": ours.name, "ours_is_faster": statistics.median(theirs / own for theirs, own in pairs)}
    return figures


def error_of(result: Any, reference: Path) -> float | None:
    """The largest difference as a share of the largest value; None without a reference."""
    if not reference.exists():
        return None
    expected = np.load(reference, allow_pickle=False)
    error = float(np.abs(result - expected).max() / np.abs(expected).max())
    return error if math.isfinite(error) else LARGEST


def print_tables(document: Figures) -> None:
    """Markdown: what was measured, then what was built."""
    for section, columns in (("rows", ROWS), ("builds", BUILDS)):
        print("| what | " + " | ".join(columns) + " |")
        print("|---" + "|---:" * len(columns) + "|")
        for key, row in document[section].items():
            if "left_out" in row:
                print(f"| {key} | left out: {row['left_out']} |" + " |" * (len(columns) - 1))
                continue
            cells = ["" if row.get(name) is None else shown(row[name]) for name, shown in columns.values()]
            print(f"| {key} | " + " | ".join(cells) + " |")
        print()


def _read(path: Path) -> Figures:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}"


ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median ms": ("median_ms", "{:.2f}".format),
    "min ms": ("min_ms", "{:.2f}".format),
    "ours is faster": ("ours_is_faster", "{:.2f}x".format),
    "error": ("error", "{:.1e}".format),
    "load s": ("load_s", "{:.2f}".format),
    "first result s": ("first_s", "{:.2f}".format),
    "GPU MB": ("device_bytes", _megabytes),
    "peak MB": ("peak_bytes", _megabytes),
}
BUILDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("seconds", "{:.1f}".format),
    "MB": ("bytes", _megabytes),
}
"""Of each table's columns, the figure and how it is written."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures all that draws on this GPU.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--result", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=math.inf)
    given = parser.parse_args(arguments)
    for option, allowed in (("kinds", KINDS), ("precisions", PRECISIONS)):
        if unknown := sorted(set(getattr(given, option)) - set(allowed)):
            parser.error(f"--{option} has {unknown[0]!r}; there are {', '.join(allowed)}")
    there = {*WORKLOADS, *(name for name in given.workloads if (given.folder / name / "checkpoint").is_dir())}
    if unknown := sorted(set(given.workloads) - there):
        parser.error(f"there is no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} measures nothing; give 1 or more")
    try:
        capability = gpus()[0].compute_capability if given.device == "cuda" else ""
        header = {"device": given.device, "machine": machine(), "versions": versions(), "rounds": given.rounds}
        kept = Kept(given.result, header, given.seconds)
    except (BackendError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run(
        kept,
        given.workloads or WORKLOADS,
        given.folder,
        given.rounds,
        given.device,
        capability,
        kinds=given.kinds,
        precisions=given.precisions,
    )
    print_tables(kept.document)
    print(json.dumps(kept.document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
