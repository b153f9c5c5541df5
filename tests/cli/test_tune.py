"""``ldm-export tune``: what it writes and prints, its exit codes, and refusals before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.tune import candidates, measure
from ldm_export.tune.search import Search
from ldm_export.verify import latency

QUICK = ["--prompt", "a <b>red</b> circle", "--prompt", "[red]two[/red]", "--pictures", "2", "--steps", "6"]
NEEDS = {"cold_start_ms": 900.0, "cold_starts_ms": [900.0], "peak_rss_bytes": 10_000_000, "device_bytes": None}

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ldm-export tune` in this process, without new processes and pauses, over few choices."""
    monkeypatch.setattr(measure, "processes_in_turn", lambda rows, rounds, progress: dict.fromkeys(rows, NEEDS))
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(candidates, "FORECAST_CALLS", (3,))
    monkeypatch.setattr(candidates, "FEWER_STEPS", {})
    monkeypatch.setattr(candidates, "DEEPCACHE", ())
    return lambda *arguments: CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_what_it_writes_and_prints(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "new" / "tuned.bundle", tmp_path / "front.html"
    done = run(tiny_bundle, "-o", output, *QUICK, "--rounds", "1", "--budget", "psnr=10", "--page", page, "--json")
    assert done.exit_code == 0, done.output
    text, last = done.stdout.rstrip("\n").rsplit("\n", 1)
    document = json.loads(last)
    assert all("png" not in point for point in document["points"])
    chosen = next(point for point in document["points"] if point["chosen"])
    bundle = Bundle.open(output, verify=True)
    assert bundle.manifest.model["default_sampler"] == chosen["configuration"]["sampler"]
    assert {file.name for file in output.parent.iterdir()} == {
        *("tuned.bundle", "tuned.bundle.work", "tuned.recipe.toml", "tuned.prompts.txt"),
    }
    assert document["generate"] in text
    assert "int8 decoder is left out: it is compared with PyTorch, and no checkpoint was given" in text
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page.read_text(encoding="utf-8")


def test_not_even_the_untouched_bundle_is_exit_code_1(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    limits = ["--budget", "psnr=100", "--max-memory", "9"]
    done = run(tiny_bundle, "-o", tmp_path / "tuned.bundle", *QUICK, *limits)
    assert done.exit_code == 1
    assert "error: not even the untouched bundle keeps it: a process that draws untouched takes 10 MB" in done.stderr


def test_latency_only(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_bundle, "-o", tmp_path / "tuned.bundle", *QUICK, "--latency-only", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.rstrip("\n").rsplit("\n", 1)[1])
    assert document["judged"] is False
    assert "ddim, 6 steps, 3 calls" in done.stdout
    assert Bundle.open(tmp_path / "tuned.bundle").manifest.model["default_steps"] == 6


def test_an_interruption_says_how_it_resumes(
    run: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_combined", interrupt)
    done = run(tiny_bundle, "-o", tmp_path / "tuned.bundle", *QUICK, "--budget", "psnr=20")
    assert done.exit_code == 1
    assert "keeps what was measured; the same command resumes there." in done.stderr
    assert not (tmp_path / "tuned.bundle").exists()


# --- wrong input: exit code 2, one sentence, nothing drawn ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "No budget says how much the pictures may change"),
        (["--budget", "speed=2"], "--budget speed=2 cannot be judged; it is KEY=NUMBER with a KEY of psnr"),
        (["--budget", "psnr=nan"], "such as psnr=45 or psnr_worst=38."),
        (["--budget", "psnr=30", "--latency-only"], "was given with latency_only, which judges no pictures"),
        (["--budget", "psnr=30", "--pictures", "1"], "pictures is 1; at least 2 are needed"),
        (["--budget", "psnr=30", "--steps", "1001"], "no plan for 'ddim' with 1001 steps"),
        (["--budget", "psnr=30", "--against", "absent"], "There is no checkpoint 'absent'"),
        (["--budget", "psnr=30", "--candidate", "absent"], "absent: there is no such folder"),
        (["--budget", "psnr=30", "--data", "absent"], "absent"),
        (["--budget", "psnr=30", "--held-out", "absent"], "held_out pictures were given without data"),
        (["--budget", "psnr=30", "--max-memory", "nan"], "--max-memory memory_mb=nan cannot be judged"),
        (["--budget", "psnr=30", "--fit", "0"], "calls is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_options(
    run: Run, tiny_bundle: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(measure.Measure, "draw", refuse)
    done = run(tiny_bundle, "-o", tmp_path / "tuned.bundle", *QUICK, *options)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not (tmp_path / "tuned.bundle").exists()


def test_a_bundle_that_is_there_is_not_replaced(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_bundle, "-o", tmp_path, *QUICK, "--budget", "psnr=20")
    assert done.exit_code == 2
    assert "exists; use --force to replace it" in done.stderr
