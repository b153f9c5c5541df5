"""Everything that a rare machine with an NVIDIA GPU is wanted for, in one unattended visit of at most 8 minutes.

gpu_day.py [--device cpu] [--seconds 480] [--rounds N] [--workloads small,large] [--folder F] [--results F]
           [--library libldm.so] [--headers F]

Stages, in order of worth, each a process of its own with a time limit:

    tests       pytest -m gpu, what applies to this GPU
    pictures    emoji64 on ONNX Runtime's CUDA provider, fp32 and fp16, against the CPU, every sampler
    latency     emoji64: ours in fp32 and fp16, with and without CUDA graphs, diffusers eager and compiled
    cpp         the C++ runtime: built here, its pictures against the CPU
    large       as latency, one UNet call at Stable Diffusion 1.5's size, fp16 first

The results are ``gpu_day.json`` and ``gpu_day.log`` in the results folder, written after every stage. Run again, it
resumes: what passed stays, what failed, was skipped or cut short is tried again. At the end it says what was skipped
and why. The exit code is 1 if a stage that ran found something wrong. ``--device cpu`` tries all of it on the CPU.

The machine needs no network; ``make gpu-day-wheels`` fetches what has to be brought.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu import NO_TIME
from ldm_export.bench.harness import write_document
from ldm_export.bench.machine import machine, versions
from ldm_export.reading.documents import MalformedError, read_json

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "ldm_export" / "cpp"
SECONDS = 480.0
LEAST_SECONDS = 5.0
"""A stage that has less than this left is not begun."""
NEEDED = ("onnxruntime-gpu", "diffusers", "transformers", "torch", "onnx", "onnxscript", "pytest", "hypothesis")
"""Distributions that the stages use; the log names those that are not installed."""
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One part of the visit.

    Attributes
    ----------
    commands : run one after the other, until one fails
    seconds : the most that it may take
    result : what the last command writes, if it writes a document
    read : makes the outcome's ``result`` from that file
    needs : what is missing for it, as a sentence; empty where nothing is
    """

    name: str
    commands: Sequence[Sequence[str | Path]]
    seconds: float
    result: Path
    read: Callable[[Path], Any] = read_json
    needs: str = ""


class Day:
    """The document and the log of a visit, resumed from what the results folder has.

    Parameters
    ----------
    results : folder of ``gpu_day.json`` and ``gpu_day.log``
    device : ``cuda`` or ``cpu``
    seconds : for all stages together, from now
    """

    def __init__(self, results: Path, device: str, seconds: float):
        results.mkdir(parents=True, exist_ok=True)
        self._file, self._log = results / "gpu_day.json", results / "gpu_day.log"
        self._started, self._seconds = time.monotonic(), seconds
        header = {"device": device, "machine": machine(), "versions": versions()}
        self.document: dict[str, Any] = {**header, "stages": {}}
        try:
            found = read_json(self._file)
        except (OSError, MalformedError):
            found = {}
        if isinstance(found, dict) and {key: found.get(key) for key in header} == header:
            self.document["stages"] = dict(found.get("stages", {}))
        self.say(f"--- {json.dumps(header)}")

    def say(self, line: str) -> None:
        """Print a line and add it to the log, with the seconds since the start."""
        stamped = f"[{time.monotonic() - self._started:6.1f}] {line}"
        print(stamped, flush=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(stamped + "\n")

    def run(self, stage: Stage) -> None:
        """Run a stage, unless it is done, and keep its outcome."""
        if self.document["stages"].get(stage.name, {}).get("state") == "passed":
            self.say(f"{stage.name}: done before")
            return
        left = self._seconds - (time.monotonic() - self._started)
        if stage.needs:
            outcome: Outcome = {"state": "skipped", "why": stage.needs}
        elif left < LEAST_SECONDS:
            outcome = {"state": "skipped", "why": f"{NO_TIME} of {self._seconds:.0f} s"}
        else:
            self.say(f"{stage.name}: begins, at most {min(left, stage.seconds):.0f} s")
            outcome = self._outcome_of(stage, min(left, stage.seconds))
        self.document["stages"][stage.name] = outcome
        write_document(self.document, self._file)
        self.say(f"{stage.name}: {outcome['state']} {outcome.get('why', '')}".rstrip())

    def _outcome_of(self, stage: Stage, seconds: float) -> Outcome:
        began = time.monotonic()
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        state, why = "passed", ""
        for command in stage.commands:
            words = [str(word) for word in command]
            self.say("$ " + " ".join(words))
            with self._log.open("ab") as log:
                process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=environment())
                try:
                    code = process.wait(max(1.0, seconds - (time.monotonic() - began)))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    state, why = "cut short", f"it took longer than {seconds:.0f} s"
                    break
            if code:
                state, why = "failed", f"exit code {code}; {self._log.name} has what it said"
                break
        outcome: Outcome = {"state": state, "seconds": round(time.monotonic() - began, 1)}
        if why:
            outcome["why"] = why
        try:
            outcome["result"] = stage.read(stage.result)
        except (OSError, MalformedError, ET.ParseError) as error:
            if state == "passed":
                return {**outcome, "state": "failed", "why": f"it left no readable {stage.result.name} ({error})"}
        if state == "passed" and any(line.endswith(NO_TIME) for line in left_out_in(stage.name, outcome)):
            return {**outcome, "state": "cut short", "why": f"of some of its rows {NO_TIME}"}
        return outcome

    def summary(self) -> int:
        """Say what was skipped and why; gives the exit code."""
        stages = self.document["stages"]
        for name, outcome in stages.items():
            for line in left_out_in(name, outcome):
                self.say(line)
        failed = [name for name, outcome in stages.items() if outcome["state"] == "failed"]
        self.say(f"failed: {', '.join(failed)}" if failed else "nothing that ran failed")
        self.say(f"look at {self._file} and {self._log}")
        return 1 if failed else 0


def left_out_in(name: str, outcome: Outcome) -> list[str]:
    """One line for the stage, if it was not run to its end, and one for each of its parts that was left out."""
    lines = []
    if outcome["state"] != "passed" and "why" in outcome:
        lines.append(f"{outcome['state']}: {name}: {outcome['why']}")
    result = outcome.get("result", {})
    for section in ("builds", "rows"):
        lines += [
            f"left out: {name}: {key}: {row['left_out']}"
            for key, row in result.get(section, {}).items()
            if "left_out" in row
        ]
    lines += [f"skipped: {name}: {count} tests: {why}" for why, count in result.get("skipped", {}).items()]
    return lines


def environment() -> dict[str, str]:
    """This process's environment, in which children import what it imports and find NVIDIA's libraries of Python
    packages wherever those are installed."""
    folders: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        folders += sorted(str(folder) for folder in Path(place).glob("*/lib") if folder.is_dir())
    known = os.environ.get("LD_LIBRARY_PATH")
    paths = [str(ROOT), str(ROOT / "reference"), *(path for path in sys.path if path)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "LD_LIBRARY_PATH": os.pathsep.join([*folders, *([known] if known else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def junit_counts(file: Path) -> dict[str, Any]:
    """Counts of a JUnit file, the reasons of what was skipped with how often each, and the names of what failed."""
    cases = list(ET.parse(file).iter("testcase"))
    reasons: dict[str, int] = {}
    for skip in (case.find("skipped") for case in cases):
        if skip is not None:
            reason = re.sub(r"^.*?: ", "", skip.get("message") or "")
            reasons[reason] = reasons.get(reason, 0) + 1
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": len(cases) - len(failed) - sum(reasons.values()), "failed": failed, "skipped": reasons}


def cpp_build(folder: Path, headers: Path) -> tuple[list[list[str | Path]], Path, str]:
    """Commands that build the C++ library, the library, and what is missing for that."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    sdk, build = folder / "cpp-sdk", folder / "cpp"
    options = [f"-DONNXRUNTIME_ROOT={sdk.resolve()}", "-DCMAKE_BUILD_TYPE=Release"]
    commands: list[list[str | Path]] = [
        [sys.executable, SOURCES / "sdk.py", sdk, *([headers] if headers.is_dir() else [])],
        ["cmake", "-S", SOURCES, "-B", build, *options],
        ["cmake", "--build", build, "--parallel", "--target", "ldm"],
    ]
    why = f"{' and '.join(missing)} cannot be found; building the C++ runtime takes them" if missing else ""
    return commands, build / "libldm.so", why


def stages_of(given: argparse.Namespace) -> list[Stage]:
    """The stages of the module's docstring for what was asked."""
    python, device, work = sys.executable, given.device, given.folder
    backend = "cuda" if device == "cuda" else "cpu"
    small, large = given.workloads
    every = ["--rounds", str(given.rounds), "--device", device, "--folder", work]
    compare: list[str | Path] = [python, "-m", "benchmarks.gpu_pictures", work]

    def pictures(name: str, *more: str | Path) -> tuple[list[str | Path], Path]:
        result = work / f"{name}.json"
        samplers: list[str | Path] = [] if device == "cuda" else ["--samplers", "ddim"]
        return [*compare, result, "--workload", small, "--backend", backend, *samplers, *more], result

    def latency(name: str, workload: str, seconds: float, *more: str) -> Stage:
        result = work / f"{name}.json"
        command = [python, "-m", "benchmarks.gpu", workload, *every, "--result", result, *more]
        return Stage(name, [[*command, "--seconds", str(seconds)]], seconds + 30, result)

    junit = work / "tests.xml"
    tests = ["-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "--junitxml", junit, *given.tests]
    picture, picture_result = pictures("pictures")
    build, library, missing = cpp_build(work, given.headers)
    if given.library is not None:
        build, library, missing = [], given.library.resolve(), ""
    cpp, cpp_result = pictures("cpp", "--library", library)
    fewer = ["--kinds", "unet", "--precisions", "fp32"] if device == "cpu" else []
    return [
        Stage("tests", [[python, "-m", "pytest", "-q", *tests]], 150, junit, junit_counts),
        Stage("pictures", [picture], 150, picture_result),
        latency("latency", small, 120, *fewer),
        Stage("cpp", [*build, cpp], 120, cpp_result, needs=missing),
        latency("large", large, 240, "--kinds", "unet", "--precisions", "fp16,fp32" if device == "cuda" else "fp32"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One visit to a machine with an NVIDIA GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workloads", type=lambda text: tuple(text.split(",")), default=("emoji64", "sd15"))
    parser.add_argument("--folder", type=Path, default=Path("build/gpu-day/work"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--library", type=Path, help="a built libldm.so, instead of building one")
    parser.add_argument("--headers", type=Path, default=Path("build/gpu-day/include"), help="of the C++ SDK")
    parser.add_argument("--tests", nargs="+", default=["tests/runtime/test_gpu.py"])
    given = parser.parse_args(arguments)
    if len(given.workloads) != 2:
        parser.error(f"--workloads {','.join(given.workloads)}: give two, the small one first, such as emoji64,sd15")
    for path in ("folder", "results", "headers"):
        setattr(given, path, getattr(given, path).resolve())
    day = Day(given.results, given.device, given.seconds)
    missing = [name for name in NEEDED if not _installed(name)]
    if missing:
        day.say(f"missing, so that some of it will be left out: {', '.join(missing)}")
    for stage in stages_of(given):
        day.run(stage)
    return day.summary()


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
