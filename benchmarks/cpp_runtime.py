"""The C++ runtime against the Python runtime on the same bundle: a picture in turn, and processes started in turn.

cpp_runtime.py [RESULT.json] [--folder F] [--rounds N]      F a workload of `make bench`; needs `make cpp-sdk`

The pictures must be the same to the bit. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.run import Peer, Table, in_turn, python_peer
from ldm_export.bench.machine import cpu

SOURCES = Path(__file__).parent / "peers" / "cpp"
BUILD = Path("build/cpp-peer")
PYTHON, CPP = "ldm_export", "ldm_export, C++"
STARTS = 9


def built() -> Path:
    """The peer in C++, as a Release build."""
    sdk = Path(os.environ.get("ONNXRUNTIME_ROOT", "build/cpp-sdk")).resolve()
    if not (sdk / "include").is_dir():
        sys.exit("error: there is no SDK to build the C++ runtime against: set ONNXRUNTIME_ROOT, or run `make cpp-sdk`")
    configure = ["cmake", "-S", SOURCES, "-B", BUILD, f"-DONNXRUNTIME_ROOT={sdk}", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (configure, ["cmake", "--build", BUILD, "--parallel"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return BUILD / "peer"


def ratio(table: Table, figure: str) -> float:
    """How much less C++ takes, round by round."""
    return statistics.median(a / b for a, b in zip(*(table.rows[name][figure] for name in (PYTHON, CPP)), strict=True))


def main(folder: Path, rounds: int) -> dict[str, Any]:
    starts = {
        PYTHON: partial(python_peer, PYTHON, "picture", folder),
        CPP: partial(Peer, CPP, [built(), folder / "bundle"]),
    }
    header = {"workload": folder.name, "machine": cpu()}
    warm, cold = Table(header, None), Table(header, None)
    with tempfile.TemporaryDirectory() as saved:
        files = {name: Path(saved) / f"{number}.npy" for number, name in enumerate(starts)}

        def finish(peer: Peer) -> None:
            peer.ask(f"save 2 {files[peer.name]}")

        in_turn(starts, warm, rounds, finish=finish)
        one, other = (np.load(file, allow_pickle=False) for file in files.values())
    if not np.array_equal(one, other):
        sys.exit(f"error: the pictures differ, by up to {np.abs(one - other).max() * 255:.0f} levels")
    in_turn(starts, cold, STARTS, one_at_a_time=True)
    rows = {
        name: {
            "picture_ms": statistics.median(warm.rows[name]["ms"]),
            "start_to_picture_s": statistics.median(cold.rows[name]["first_s"]),
            "peak_bytes": max(cold.rows[name]["peak_bytes"]),
            "held_bytes": max(cold.rows[name]["held_bytes"]),
        }
        for name in starts
    }
    return {
        **header,
        "rounds": rounds,
        "starts": STARTS,
        "rows": rows,
        "cpp_is_faster": ratio(warm, "ms"),
        "cpp_starts_faster": ratio(cold, "first_s"),
        "cpp_takes_less_memory": ratio(cold, "peak_bytes"),
    }


def show(document: dict[str, Any]) -> None:
    print("| runtime | picture ms | process start to picture s | peak MB |")
    print("|---|---:|---:|---:|")
    for name, row in document["rows"].items():
        cells = f"{row['picture_ms']:.1f} | {row['start_to_picture_s']:.3f} | {row['peak_bytes'] / 1e6:.0f}"
        print(f"| {name} | {cells} |")
    print(
        f"C++ is {document['cpp_is_faster']:.3f}x as fast, starts {document['cpp_starts_faster']:.2f}x as fast, "
        f"and takes {document['cpp_takes_less_memory']:.2f}x less memory."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/peers/emoji64"))
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    measured = main(given.folder, given.rounds)
    if given.result:
        given.result.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    show(measured)
    print(json.dumps(measured))
