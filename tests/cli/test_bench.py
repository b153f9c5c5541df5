"""``ldm-export bench``: the page, the document, the exit codes, and refusals before anything is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ldm_export.bench import harness
from ldm_export.bench.harness import Bench, read_document
from ldm_export.cli import main
from ldm_export.verify import latency

QUICK = ["--prompt", "a <b>red</b> circle", "--steps", "10", "--repeats", "1", "--warm-up", "0", "--backend", "cpu"]

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ldm-export bench` in this process, without new processes and pauses."""
    found = {"cold_start_ms": 900.0, "cold_starts_ms": [900.0], "peak_rss_bytes": 10_000_000, "device_bytes": None}
    monkeypatch.setattr(harness, "processes_in_turn", lambda variants, rounds, progress: dict.fromkeys(variants, found))
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: None)
    return lambda *arguments: CliRunner().invoke(main, ["bench", *map(str, arguments)])


def assert_refused(done: Result, message: str, folder: Path) -> None:
    """One line on stderr, nothing on stdout, nothing measured or written."""
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not [file for file in folder.rglob("*") if file.is_file() and file.name.startswith("report")]


def test_the_page_and_the_document(run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.html"
    gates = ["--fail-under", "psnr=40", "--fail-under", "drift=1e-3"]
    done = run(tiny_bundle, "--against", tiny_checkpoint, "-o", output, *QUICK, *gates, "--json")
    assert done.exit_code == 0, done.output
    table, last = done.stdout.rstrip("\n").rsplit("\n", 1)
    document, kept = json.loads(last), read_document(output.with_suffix(".json"))
    assert "ok    tiny: unet out_sample" in table
    assert "PyTorch tiny" in table
    assert "png" not in document["results"]["pictures"]["tiny"]
    assert [gate["key"] for gate in document["gates"]] == ["psnr", "drift", "parity"]
    assert kept is not None
    assert kept["complete"] is True
    assert kept["results"]["latency"] == document["results"]["latency"]
    assert kept["results"]["pictures"]["tiny"]["png"]
    html = output.read_text(encoding="utf-8")
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in html
    assert f"{max(document['results']['pictures']['tiny']['drift']['worst']):.3g}" in html
    assert document["command"].startswith(f"ldm-export bench {tiny_bundle} --against {tiny_checkpoint} -o {output}")
    assert document["command"].endswith("--fail-under psnr=40 --fail-under drift=1e-3 --json")


def test_what_falls_short_is_one_sentence(run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    measured = ["--against", tiny_checkpoint, "-o", tmp_path / "report.html", *QUICK]
    done = run(tiny_bundle, *measured, "--fail-under", "faster=1e6", "--fail-under", "psnr=20")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: tiny is ")
    assert done.stderr.endswith("x as fast as PyTorch tiny; at least 1e+06x is asked for.\n")
    assert (tmp_path / "report.html").is_file()
    again = run(tiny_bundle, *measured, "--fail-under", "smaller=1e-9", "--resume")
    assert again.exit_code == 0, again.output


def test_two_bundles_without_pytorch(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other.bundle")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\n\n green \n", encoding="utf-8")
    told = ["--prompts", prompts, "--fail-under", "psnr=90", "--fail-under", "drift=0"]
    done = run(tiny_bundle, other, "-o", tmp_path / "report.html", *QUICK[2:], *told, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["conditions"] == ["red", "green"]
    assert document["baseline"] == "tiny"
    assert document["results"]["pictures"]["other"]["psnr_db"] == [999.0, 999.0]
    assert not any(part.startswith("parity") for part in document["results"])


def test_an_interrupted_bench_keeps_what_it_has(
    run: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "report.html"
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_pictures", interrupt)
        done = run(tiny_bundle, "-o", output, *QUICK)
    assert done.exit_code == 1
    assert "keeps what was measured; the same command goes on from there." in done.stderr
    assert done.stderr.endswith("Aborted!\n")
    kept = read_document(output.with_suffix(".json"))
    assert kept is not None
    assert kept["results"].keys() == {"bytes", "latency"}
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_latency", interrupt)  # is not measured again
        assert run(tiny_bundle, "-o", output, *QUICK).exit_code == 0
    assert output.is_file()


def test_resume_of_another_bench(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert run(tiny_bundle, "-o", output, *QUICK).exit_code == 0
    before = output.with_suffix(".json").read_bytes()
    done = run(tiny_bundle, "-o", output, *QUICK, "--seed", "7", "--resume")
    assert done.exit_code == 2
    assert "holds a bench of other bundles, options, versions or another machine" in done.stderr
    assert output.with_suffix(".json").read_bytes() == before


# --- wrong input: exit code 2, one sentence, nothing measured -------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "refused" in request.node.name:
        monkeypatch.setattr(Bench, "run", lambda *_, **__: pytest.fail("something was measured"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "repeats is 0; at least 1 is needed"),
        (["--repeats", "-2"], "repeats is -2; at least 1 is needed"),
        (["--warm-up", "-1"], "warm_up is -1"),
        (["--steps", "1001"], "no plan for 'ddim' with 1001 steps"),
        (["--sampler", "magic"], "no plan for 'magic'"),
        (["--fail-under", "speed=2"], "--fail-under speed=2 cannot be judged; it is KEY=NUMBER with a KEY of psnr"),
        (["--fail-under", "drift=inf"], "--fail-under drift=inf cannot be judged"),
        (["--fail-under", "psnr=nan"], "--fail-under psnr=nan cannot be judged"),
        (["--fail-under", "psnr=40"], "psnr=40 compares, and there is one bundle alone"),
        (["--against", "absent"], "There is no checkpoint 'absent'"),
        (["--prompts", "absent.txt"], "absent.txt cannot be read as text"),
        (["--prompts", "absent.txt", "--prompt", "red"], "were both given"),
        (["--held-out", "absent"], "held_out pictures were given without data"),
        (["--data", "absent"], "absent"),
        (["--backend", "cuda"], "cuda was asked for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_options(
    run: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert_refused(run(tiny_bundle, "-o", tmp_path / "report.html", *options), message, tmp_path)


def test_refused_empty_prompts(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n  \n")
    told = ["--prompts", tmp_path / "prompts.txt"]
    assert_refused(run(tiny_bundle, "-o", tmp_path / "report.html", *told), "has no prompts", tmp_path)


def test_refused_bundle_that_was_altered(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    content = bytearray((bundle / "unet" / "model.onnx").read_bytes())
    content[-100] ^= 1
    (bundle / "unet" / "model.onnx").write_bytes(content)
    assert_refused(run(bundle, "-o", tmp_path / "report.html"), "unet/model.onnx has been altered", tmp_path)


def test_refused_checkpoint_of_another_shape(
    run: Run, tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    told = ["--against", kinds("class-conditional")[0], "-o", tmp_path / "report.html"]
    assert_refused(run(tiny_bundle, *told), "has other inputs or outputs than the bundle", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/report.html", "cannot be written"),
        ("folder", "cannot be written: it is a folder"),
        ("report.json", "is where the figures go; the report is a page. Name a .html."),
    ],
)
def test_refused_output(run: Run, tiny_bundle: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert_refused(run(tiny_bundle, "-o", tmp_path / name), message, tmp_path)


def test_no_bundle_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    done: Any = run("-o", tmp_path / "report.html")
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
