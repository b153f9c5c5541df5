"""``make gpu-day`` tried on the CPU: every stage runs or says why not, the visit resumes, and its bounds hold."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_day, gpu_pictures
from benchmarks.gpu_day import Day, Stage, junit_counts
from ldm_export.errors import BackendError


@pytest.fixture(scope="module")
def visit(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Arguments of a visit to the CPU with the tiny model, and its results folder."""
    folder = tmp_path_factory.mktemp("gpu-day")
    shutil.copytree(tiny_checkpoint, folder / "work" / "tiny" / "checkpoint")
    shutil.copytree(tiny_bundle, folder / "work" / "tiny" / "bundle")
    arguments = ["--device", "cpu", "--rounds", "1", "--workloads", "tiny,tiny", "--folder", str(folder / "work")]
    results = folder / "results"
    return [*arguments, "--results", str(results)], results


@pytest.mark.slow
def test_the_dry_run(
    visit: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, results = visit
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torch.compile as eager: compiling takes a minute
    monkeypatch.setattr(gpu_day.shutil, "which", lambda tool: None)  # the C++ runtime is built by its own tests
    assert gpu_day.main(arguments) == 0
    stages = json.loads((results / "gpu_day.json").read_text())["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "tests": "passed", "pictures": "passed", "latency": "passed", "cpp": "skipped", "large": "passed",
    }  # fmt: skip
    tests = stages["tests"]["result"]
    assert (tests["failed"], tests["passed"]) == ([], 0)
    assert sum(tests["skipped"].values()) > 50
    pictures = stages["pictures"]["result"]["rows"]
    assert pictures["fp32"]["worst_psnr_db"] == {"ddim": gpu_pictures.LARGEST_DB}
    assert 40 < pictures["fp16"]["worst_psnr_db"]["ddim"] < gpu_pictures.LARGEST_DB
    rows = stages["latency"]["result"]["rows"]
    assert rows["tiny unet fp32 cpu"]["error"] < 1e-4
    assert rows["tiny unet fp32 diffusers eager"]["median_ms"] > 0
    said = capsys.readouterr().out
    assert "skipped: cpp: cmake and c++ cannot be found; building the C++ runtime takes them" in said
    assert "nothing that ran failed" in said
    log = (results / "gpu_day.log").read_text()
    assert "benchmarks.gpu_pictures" in log

    before = json.loads((results / "gpu_day.json").read_text())
    began = time.monotonic()
    assert gpu_day.main(arguments) == 0  # resumes: only what was skipped is tried again
    assert time.monotonic() - began < 10
    assert json.loads((results / "gpu_day.json").read_text()) == before


def stage(tmp_path: Path, code: str, seconds: float = 60.0) -> Stage:
    return Stage("a", [[sys.executable, "-c", code, tmp_path / "a.json"]], seconds, tmp_path / "a.json")


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"rows\": {}}')"
LEAVES_OUT = WRITES.replace("{}}", '{"x": {"left_out": "no time was left"}}}')


@pytest.mark.parametrize(
    ("code", "seconds", "state", "why"),
    [
        (WRITES, 60, "passed", None),
        (WRITES + "; sys.exit(3)", 60, "failed", "exit code 3; gpu_day.log has what it said"),
        ("pass", 60, "failed", "it left no readable a.json ([Errno 2]"),
        (WRITES + "; import time; time.sleep(60)", 2, "cut short", "it took longer than 2 s"),
        (
            WRITES.replace("{}}", '{\\"x\\": {\\"left_out\\": \\"no time was left\\"}}}'),
            60,
            "cut short",
            "of some of its",
        ),
    ],
    ids=["passes", "fails", "leaves nothing", "takes too long", "rows left"],
)
def test_what_becomes_of_a_stage(tmp_path: Path, code: str, seconds: float, state: str, why: str | None) -> None:
    day = Day(tmp_path / "results", "cpu", 60)
    day.run(stage(tmp_path, code, seconds))
    outcome = day.document["stages"]["a"]
    assert outcome["state"] == state
    assert outcome.get("why", "").startswith(why or "")
    assert day.summary() == (state == "failed")
    again = Day(tmp_path / "results", "cpu", 60)
    again.run(Stage("a", [], 60, tmp_path / "a.json", needs="it is not wanted"))
    assert again.document["stages"]["a"]["state"] == ("passed" if state == "passed" else "skipped")


def test_no_stage_is_begun_after_the_visit_s_time(tmp_path: Path) -> None:
    day = Day(tmp_path, "cpu", 4.0)
    day.run(stage(tmp_path, WRITES))
    assert day.document["stages"]["a"] == {"state": "skipped", "why": "no time was left of 4 s"}


def test_a_result_of_another_device_is_not_resumed(tmp_path: Path) -> None:
    day = Day(tmp_path, "cpu", 60)
    day.run(stage(tmp_path, WRITES))
    assert Day(tmp_path, "cuda", 60).document["stages"] == {}
    (tmp_path / "gpu_day.json").write_text("[")
    assert Day(tmp_path, "cpu", 60).document["stages"] == {}


def test_the_time_limits_of_all_stages_fit_the_visit() -> None:
    small = sum(stage.seconds for stage in gpu_day.stages_of(parsed()) if stage.name in ("tests", "pictures"))
    assert small < gpu_day.SECONDS


def parsed() -> Any:
    class Given:
        device, rounds, workloads, library, tests = "cuda", 12, ("emoji64", "sd15"), None, ["tests"]
        folder, headers = Path("work"), Path("include")

    return Given()


def test_the_stages_on_a_gpu() -> None:
    stages = {
        stage.name: [" ".join(map(str, command)) for command in stage.commands] for stage in gpu_day.stages_of(parsed())
    }
    assert list(stages) == ["tests", "pictures", "latency", "cpp", "large"]
    assert "-m pytest -q -m gpu" in stages["tests"][0]
    assert "--backend cuda" in stages["pictures"][0]
    assert "--library" in stages["cpp"][-1]
    assert "benchmarks.gpu emoji64 --rounds 12 --device cuda" in stages["latency"][0]
    assert "benchmarks.gpu sd15" in stages["large"][0]
    assert "--precisions fp16,fp32" in stages["large"][0]


def test_junit(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/><testcase classname="t" name="b">'
        '<skipped message="Skipped: no driver"/></testcase><testcase classname="t" name="c"><failure/></testcase>'
        "</testsuite></testsuites>"
    )
    assert junit_counts(tmp_path / "a.xml") == {"passed": 1, "failed": ["t::c"], "skipped": {"no driver": 1}}


def test_pictures_that_differ_and_a_backend_that_does_not_start() -> None:
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 1, np.uint8)

    def fails() -> Any:
        raise BackendError("no CUDA\nhere")

    sides = {
        "cpu": lambda: (lambda *_: black, "cpu"),
        "fp32": lambda: (lambda *_: grey, "gpu"),
        "fp16": lambda: (lambda *_: grey, "gpu"),
        "fp32, C++": fails,
    }
    rows = gpu_pictures.compare(sides, ("ddim",))  # type: ignore[arg-type]
    assert rows["fp32"] == {"runs_on": "gpu", "worst_psnr_db": {"ddim": pytest.approx(48.13, abs=0.01)}}
    assert rows["fp32, C++"] == {"left_out": "no CUDA here"}
    assert gpu_pictures.faults_of(rows) == ["fp32 ddim: 48.1 dB, at least 60.0 wanted"]
