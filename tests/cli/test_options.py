"""Every option of a command is honoured, or refused with a sentence; none is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ldm_export.cli import main


def run(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def draw(bundle: Path, *words: object) -> Result:
    return run("generate", bundle, "--steps", 10, "--backend", "cpu", *words)


def test_count_draws_as_many_pictures_of_one_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    done = draw(tiny_bundle, "red", "--count", 3, "--seed", 5, "-o", tmp_path / "a.png", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seeds"] == [5, 6, 7]
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (32, 32)
    done = draw(tiny_bundle, "red", "blue", "--count", 2, "-o", tmp_path / "a.png", "--json")
    assert json.loads(done.stdout)["seeds"] == [0, 1, 2, 3]


def test_latents_are_written_under_the_name_that_was_given(tiny_bundle: Path, tmp_path: Path) -> None:
    done = draw(tiny_bundle, "red", "-o", tmp_path / "a.png", "--latents", tmp_path / "new" / "latents.bin")
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "new" / "latents.bin").shape == (1, 4, 8, 8)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "latents.bin", "new"]


WRONG: dict[str, tuple[list[str], str]] = {
    "too great a count": (["--count", "1000000000000"], "not in the range 1<=x<=4096"),
    "strength alone": (["--strength", "0.5"], "strength was given without an image"),
    "image guidance": (["--image-guidance", "1.5"], "this model edits no picture"),
    "negative without guidance": (["--negative", "x", "--guidance", "1"], "guidance is 1, which is off"),
    "class of a text model": (["--class-label", "1"], "2 prompts and 1 class labels"),
    "guidance of no number": (["--guidance", "nan"], "guidance is nan"),
    "guidance too great": (["--guidance", "1e308"], "give a number from 0 to 1e+06"),
    "seed too great": (["--seed", str(2**64)], "seed is 18446744073709551616"),
    "size of many digits": (["--size", "9" * 5000 + "x64"], "is not a size"),
    "size of other digits": (["--size", "\u0661\u0662x64"], "is not a size"),
    "size beyond memory": (["--size", "1000000x1000000"], "GB of memory; this process may have"),
    "many threads": (["--threads", "1000000"], "not in the range"),
    "a name too long": (["-o", "a" * 300 + ".png"], "File name too long"),
    "latents in the picture": (["--latents", "p.png"], "--latents and --output both name p.png"),
    "a folder as latents": (["--latents", "."], "it is a folder"),
    "a folder as the picture": (["-o", ".png"], "is not the name of a picture file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_honoured_is_said(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, sentence = WRONG[case]
    done = draw(tiny_bundle, "red", "blue", "-o", "p.png", *words)
    assert done.exit_code == 2
    assert sentence in done.output
    assert list(tmp_path.iterdir()) == []


def test_options_of_what_was_not_asked_for(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for option in ("--prompts", "--work", "--data", "--held-out"):
        done = run("export", tiny_checkpoint, "-o", tmp_path / "b", option, tmp_path)
        assert (done.exit_code, f"{option} is about the passes of a recipe" in done.output) == (2, True)
    assert "--from-scratch is about" in run("export", tiny_checkpoint, "-o", tmp_path / "b", "--from-scratch").output
    done = run("bench", tiny_bundle, "-o", tmp_path / "r.html", "--pictures", 3)
    assert (done.exit_code, "--pictures is how many are drawn for --data" in done.output) == (2, True)
    assert list(tmp_path.iterdir()) == []
