"""Peers on the same model, each in a process of its own and, where its pins clash, its own environment.

run.py WORKLOAD KIND [RESULT.json] [--folder F] [--rounds N] [--in-pairs] [--optimum PYTHON] [--peers A,B]

Every round asks all peers in turn for one call. With --in-pairs, for models of which not all fit into memory, each peer
has its rounds with ours alone. A peer that is not installed is left out, and said so. What was measured is written
after every round or pair. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.peer import PEERS, Setup, unet_inputs
from ldm_export.bench.machine import cpu, used_device_bytes
from ldm_export.runtime.backends.auto import SETTLE_S

OURS = "ldm_export"
CPU = Setup()
REFERENCE = "diffusers eager"


class Peer:
    """A child process that takes the commands of ``peer.py``. In tables it is called ``name``."""

    def __init__(self, name: str, command: Sequence[str | Path]):
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Raises RuntimeError with the peer's last words if it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            words = self.process.communicate()[1].strip().splitlines()
            raise RuntimeError(words[-1] if words else f"exit code {self.process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def python_peer(
    peer: str, kind: str, folder: Path, python: str = sys.executable, row: str = "", setup: Setup = CPU
) -> Peer:
    """``peer.py`` as a child, called ``row`` in tables, by default as the peer."""
    script = Path(__file__).with_name("peer.py")
    return Peer(row or peer, [python, script, peer, kind, folder, json.dumps(asdict(setup))])


class Table:
    """What was measured, by peer."""

    def __init__(self, header: dict[str, Any], result: Path | None):
        self.header, self.result = header, result
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, peer: str, **figures: float) -> None:
        row = self.rows.setdefault(peer, {})
        for name, value in figures.items():
            row.setdefault(name, []).append(value)

    def leave_out(self, peer: str, why: str) -> None:
        print(f"{peer} is left out: {why}", file=sys.stderr)
        self.rows[peer] = {"left_out": why}

    def document(self) -> dict[str, Any]:
        measured = {name: row for name, row in self.rows.items() if row.get("ms")}
        rows = {name: dict(row) for name, row in self.rows.items()}
        for name, row in measured.items():
            rows[name]["median_ms"] = statistics.median(row["ms"])
            rows[name]["min_ms"] = min(row["ms"])
            if "flops" in self.header:
                reached = self.header["flops"] / rows[name]["median_ms"] / 1e6
                rows[name]["share_of_sgemm"] = reached / self.header["sgemm_gflops"]
            if OURS in measured:
                pairs = zip(row["ms"], row.get("ours_ms", measured[OURS]["ms"]), strict=False)
                rows[name]["ours_is_faster"] = statistics.median(theirs / ours for theirs, ours in pairs)
        return {**self.header, "rows": rows}

    def save(self) -> None:
        if self.result is not None:
            self.result.write_text(json.dumps(self.document(), indent=2) + "\n", encoding="utf-8")

    def print(self) -> None:
        heads = (
            "peer",
            "median ms",
            "min ms",
            "ours is faster",
            "of sgemm",
            "error",
            "load s",
            "first result s",
            "peak MB",
        )
        print("| " + " | ".join(heads) + " |")
        print("|---" + "|---:" * (len(heads) - 1) + "|")
        for name, row in self.document()["rows"].items():
            if "left_out" in row:
                print(f"| {name} | left out: {row['left_out']} |" + " |" * (len(heads) - 2))
                continue
            cells = [
                f"{row['median_ms']:.1f}",
                f"{row['min_ms']:.1f}",
                f"{row['ours_is_faster']:.2f}x" if "ours_is_faster" in row else "",
                f"{row['share_of_sgemm']:.0%}" if "share_of_sgemm" in row else "",
                f"{row['error'][-1]:.1e}" if "error" in row else "",
                f"{statistics.median(row['load_s']):.2f}",
                f"{statistics.median(row['first_s']):.2f}",
                f"{max(row['peak_bytes']) / 1e6:.0f}",
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")


def opened(peer: Peer, table: Table) -> bool:
    """Open a peer and let it make its first call; False if it cannot."""
    try:
        device_before = used_device_bytes()
        answer = peer.ask("open")
        first = peer.ask("run 0")
        device_after = used_device_bytes()
    except RuntimeError as reason:
        table.leave_out(peer.name, str(reason))
        return False
    if device_before is not None and device_after is not None:
        table.add(peer.name, device_bytes=device_after - device_before)
    table.add(peer.name, load_s=answer["load_s"], imported_s=answer["imported_s"], first_s=first["since_start_s"])
    return True


def main(options: argparse.Namespace) -> dict[str, Any]:
    folder = options.folder or Path("build/peers") / options.workload
    versions = {name: _version(name) for name in ("torch", "diffusers", "onnxruntime", "openvino")}
    header = {"workload": options.workload, "kind": options.kind, "machine": cpu(), "versions": versions}
    if options.kind == "unet":
        header |= {"flops": flops_of_call(folder), "sgemm_gflops": sgemm_gflops()}
    table = Table({**header, "in_pairs": options.in_pairs}, options.result)
    names = options.peers.split(",") if options.peers else list(PEERS[options.kind])
    with tempfile.TemporaryDirectory() as temporary:
        saved = {name: Path(temporary) / f"{number}.npy" for number, name in enumerate(names)}

        def start(name: str) -> Peer:
            python = options.optimum if name == "optimum-onnx" and options.kind == "picture" else sys.executable
            return python_peer(name, options.kind, folder, python)

        def finish(peer: Peer) -> None:
            if not saved[peer.name].exists():
                peer.ask(f"save 2 {saved[peer.name]}")

        starts = {name: partial(start, name) for name in names}
        if options.in_pairs:
            in_pairs(starts, table, options.rounds, finish)
        else:
            in_turn(starts, table, options.rounds, finish=finish)
        _compare(table, saved)
    table.save()
    table.print()
    return table.document()


def in_pairs(
    starts: Mapping[str, Callable[[], Peer]], table: Table, rounds: int, finish: Callable[[Peer], None]
) -> None:
    """Time one call of every peer and of ours in every round, with no other peer in memory."""
    for name in [name for name in starts if name != OURS]:
        pair = Table(table.header, None)
        in_turn({name: starts[name], OURS: starts[OURS]}, pair, rounds, finish=finish)
        table.rows[name] = {**pair.rows[name], "ours_ms": pair.rows[OURS]["ms"]}
        for figure, values in pair.rows[OURS].items():
            for value in values:
                table.add(OURS, **{figure: value})
        table.save()


def in_turn(
    starts: Mapping[str, Callable[[], Peer]],
    table: Table,
    rounds: int,
    one_at_a_time: bool = False,
    finish: Callable[[Peer], None] = lambda peer: None,
) -> None:
    """Time one call of every peer in every round, by what starts it; ``finish`` is called before one ends."""

    def end(peer: Peer) -> None:
        memory = peer.ask("memory")
        table.add(peer.name, peak_bytes=memory["peak_bytes"], held_bytes=memory["held_bytes"])
        finish(peer)

    if one_at_a_time:
        for _ in range(rounds):
            for name, start in starts.items():
                if "left_out" in table.rows.get(name, {}):
                    continue
                peer = start()
                if opened(peer, table):
                    table.add(name, ms=peer.ask("run 1")["ms"])
                    end(peer)
                peer.end()
            table.save()
        return
    peers: list[Peer] = []
    try:
        for start in starts.values():
            peers.append(start())
        open_ones = [peer for peer in peers if opened(peer, table)]
        for peer in open_ones:
            peer.ask("run 1")
        for number in range(2, rounds + 2):
            for peer in open_ones:
                time.sleep(SETTLE_S)
                peer.ask(f"run {number}")  # wakes its threads
                table.add(peer.name, ms=peer.ask(f"run {number}")["ms"])
            table.save()
        for peer in open_ones:
            end(peer)
    finally:
        for peer in peers:
            peer.end()


def flops_of_call(folder: Path) -> int:
    """Of the UNet on inputs.npz, a multiplication and an addition counted as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ldm_export.families import open_checkpoint

    unet = open_checkpoint(folder / "checkpoint").load("unet")
    inputs = {name: torch.from_numpy(array) for name, array in unet_inputs(folder, 0).items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return int(counter.get_total_flops())


def sgemm_gflops(size: int = 2048, rounds: int = 12) -> float:
    """What this machine reaches in a product of two square matrices, with PyTorch: the best of some rounds."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _compare(table: Table, saved: dict[str, Path]) -> None:
    """The largest difference of each result from the reference's, as a share of its largest value."""
    results = {name: np.load(file, allow_pickle=False) for name, file in saved.items() if file.exists()}
    reference = results.get(REFERENCE)
    for name, result in results.items() if reference is not None else ():
        assert reference is not None
        table.add(name, error=float(np.abs(result - reference).max() / np.abs(reference).max()))


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("kind", choices=list(PEERS))
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--in-pairs", action="store_true")
    parser.add_argument("--optimum", default=sys.executable)
    parser.add_argument("--peers")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} measures nothing; give 1 or more")
    print(json.dumps(main(given)))
