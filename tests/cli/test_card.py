"""``ldm-export card``: the page, the document, the exit codes, and refusals before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ldm_export.bench import card as card_module
from ldm_export.bench.card import Card, read_card
from ldm_export.cli import main
from ldm_export.verify import latency

QUICK = ["--prompt", "a <b>red</b> circle", "--pictures", "2", "--steps", "4", "--truth-steps", "4"]
NEEDS = {"cold_start_ms": 900.0, "cold_starts_ms": [900.0], "peak_rss_bytes": 10_000_000, "device_bytes": None}

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ldm-export card` in this process, without new processes and pauses."""
    monkeypatch.setattr(card_module, "processes_in_turn", lambda rows, rounds, progress: dict.fromkeys(rows, NEEDS))
    monkeypatch.setattr(card_module, "ROUNDS", 1)
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: None)
    return lambda *arguments: CliRunner().invoke(main, ["card", *map(str, arguments)])


def test_the_page_and_the_document(run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "card.html"
    gates = ["--fail-under", "psnr=40", "--fail-under", "memory_mb=10"]
    done = run(tiny_bundle, "--against", tiny_checkpoint, "-o", output, *QUICK, *gates, "--json")
    assert done.exit_code == 0, done.output
    table, last = done.stdout.rstrip("\n").rsplit("\n", 1)
    document, kept = json.loads(last), read_card(output.with_suffix(".json"))
    assert "tiny ddim 4" in table
    assert "No real pictures were given" in table
    assert all("png" not in row for row in document["rows"])
    assert [gate["key"] for gate in document["gates"]] == ["psnr", "memory_mb"]
    assert kept is not None
    assert kept["complete"] is True
    assert kept["gates"] == document["gates"]
    assert kept["rows"][1]["png"]
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in output.read_text(encoding="utf-8")
    assert document["command"].startswith(f"ldm-export card {tiny_bundle} --against {tiny_checkpoint} -o {output}")
    assert document["command"].endswith("--fail-under psnr=40 --fail-under memory_mb=10 --json")


def test_what_falls_short_is_one_sentence_that_names_the_row(
    run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    measured = [tiny_bundle, "--against", tiny_checkpoint, "-o", tmp_path / "card.html", *QUICK]
    done = run(*measured, "--fail-under", "memory_mb=9.5")
    assert done.exit_code == 1
    assert done.stderr == ("error: a process that draws tiny ddim 4 takes 10 MB; at most 9.5 MB is asked for.\n")
    assert (tmp_path / "card.html").is_file()
    again = run(*measured, "--fail-under", "psnr=20", "--resume")
    assert again.exit_code == 0, again.output


def test_an_interrupted_card_says_how_it_resumes(
    run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "_latency", interrupt)
    done = run(tiny_bundle, "--against", tiny_checkpoint, "-o", tmp_path / "card.html", *QUICK)
    assert done.exit_code == 1
    assert "keeps the rows that were measured; the same command resumes there." in done.stderr
    assert not (tmp_path / "card.html").exists()


def test_a_document_that_lost_figures_is_refused(
    run: Run, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    measured = [tiny_bundle, "--against", tiny_checkpoint, "-o", tmp_path / "card.html", *QUICK]
    assert run(*measured).exit_code == 0
    document = read_card(tmp_path / "card.json")
    assert document is not None
    document["rows"][1]["figures"] = {"psnr_db": "<script>"}
    (tmp_path / "card.json").write_text(json.dumps(document))
    done = run(*measured, "--resume")
    assert done.exit_code == 2
    assert "lacks figures that a card has, or has other ones. Delete it, and measure anew." in done.stderr


# --- wrong input: exit code 2, one sentence, nothing drawn ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "0"], "pictures is 0; at least 1 is needed"),
        (["--steps", "0"], "steps is 0; at least 1 is needed"),
        (["--steps", "1001"], "no plan for 'ddim' with 1001 steps"),
        (["--steps", "4", "--steps", "4"], "The steps 4, 4 were given. Name each once."),
        (["--sampler", "magic"], "no plan for 'magic'"),
        (["--size", "big"], "--size big is not a size; it is HEIGHTxWIDTH in pixels, such as 64x64."),
        (["--size", "15x16"], "15"),
        (["--fail-under", "speed=2"], "speed=2 cannot be judged; it is KEY=NUMBER with a KEY of psnr, psnr_worst"),
        (["--fail-under", "psnr=nan"], "such as psnr=45 or psnr_worst=38."),
        (["--against", "absent"], "There is no checkpoint 'absent'"),
        (["--prompts", "absent.txt"], "absent.txt cannot be read as text"),
        (["--prompts", "absent.txt", "--prompt", "red"], "were both given"),
        (["--held-out", "absent"], "held_out pictures were given without data"),
        (["--data", "absent"], "absent"),
        (["--backend", "cuda"], "cuda was asked for"),
        (["-o", "card.json"], "is where the figures go; the card is a page. Name a .html."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_options(
    run: Run,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(Card, "run", lambda *_, **__: pytest.fail("something was measured"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    done = run(tiny_bundle, "--against", tiny_checkpoint, "-o", tmp_path / "card.html", *options)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_must_be_named(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_bundle, "-o", tmp_path / "card.html")
    assert done.exit_code == 2
    assert "Missing option '--against'" in done.stderr
