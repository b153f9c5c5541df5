"""``adapt`` and ``train --meta``: from pictures to a bundle, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from tests.adapt.pictures import checkpoint_of, write_few

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def ran(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_few(tmp_path / "few", captioned=True)


def test_from_pictures_to_a_bundle(few: Path, tiny_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:
    file, bundle = tmp_path / "it.safetensors", tmp_path / "bundle"
    options = ["--prompt", "a zorp", "--steps", 2, "--rank", 2, "--class-prompt", "a red circle", "--class-count", 1]
    done = ran("adapt", tiny_checkpoint, "--pictures", few, *options, "-o", file, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["pictures"], report["class_pictures"], report["steps"]) == (5, 1, 2)
    done = ran("export", tiny_checkpoint, "-o", bundle, "--lora", f"{file}=1", "--target", "none")
    assert done.exit_code == 0, done.output
    assert "left out" not in done.output
    (adapter,) = Bundle.open(bundle).manifest.source["adapters"]
    assert adapter["name"] == "it.safetensors"
    done = ran("verify", bundle, "--against", tiny_checkpoint, "--lora", f"{file}=1")
    assert done.exit_code == 0, done.output


def test_from_tasks_to_a_start(few: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(few, tmp_path / "tasks" / name)
    (tmp_path / "meta.toml").write_text("rank = 2\nrounds = 2\ninner_steps = 1\nbatch_size = 2\n")
    start = tmp_path / "start.safetensors"
    meta = ["--meta", "reptile", "--checkpoint", tiny_checkpoint, "--prompt", "a {task}"]
    done = ran("train", "--data", tmp_path / "tasks", "-o", start, "--config", tmp_path / "meta.toml", *meta)
    assert done.exit_code == 0, done.output
    assert "learnt over 2 tasks" in done.output
    adapt = [
        "adapt",
        tiny_checkpoint,
        "--pictures",
        few,
        "--prompt",
        "zorp",
        "--steps",
        1,
        "-o",
        tmp_path / "it.safetensors",
    ]
    assert ran(*adapt, "--start", start, "--rank", 2).exit_code == 0
    done = ran(*adapt, "--start", start, "--rank", 3)
    assert done.exit_code == 2
    assert "Give --rank 2" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is asked for pictures with a text, --prompt, and nothing was given"),
        (["--label", "1"], "is asked for pictures with a text, --prompt, and the number of a class, --label was given"),
        (["--prompt", "x", "--label", "1"], "--prompt and --label were both given"),
        (["--prompt", "x", "--class-label", "1"], "with a text, --class-prompt"),
        (["--prompt", "x", "--class-count", "3"], "--class-count is about class pictures. Give --class-prompt, too"),
        (["--prompt", "x", "--class-prompt", "y", "--class-pictures", "{empty}"], "has no pictures"),
        (["--prompt", "x", "--pictures", "{empty}"], "has no pictures"),
        (["--prompt", "x", "--pictures", "nowhere"], "nowhere is no folder"),
        (["--prompt", "x", "--pictures", "{broken}"], "Replace or remove it"),
        (["--prompt", "x", "--pictures", "{untold}"], "is empty. Write what"),
        (["--prompt", "x", "-o", "it.bin"], "does not end with .safetensors"),
        (["--prompt", "x", "--alpha", "-1"], "alpha = -1.0 is no number above 0"),
        (["--prompt", "x", "--ema", "1"], "ema_decay = 1.0 must be in [0, 1)"),
        (["--prompt", "x", "--learning-rate", "nan"], "learning_rate = nan must be a number above 0"),
        (["--prompt", "x", "--start", "nowhere.safetensors"], "There is no adapter 'nowhere.safetensors'"),
        (["--prompt", "x", "--start", "{pickle}"], "is a pickle"),
    ],
)
def test_what_is_refused(few: Path, tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {name: tmp_path / name for name in ("empty", "broken", "untold")}
    for name in places:
        places[name].mkdir()
    (places["broken"] / "a.png").write_bytes(b"no picture")
    shutil.copy(few / "red.png", places["untold"])
    (places["untold"] / "red.txt").write_text(" \n")
    places["pickle"] = tmp_path / "start.bin"
    places["pickle"].write_bytes(b"\x80\x02.")
    given = [text.format(**places) for text in arguments]
    file = tmp_path / "it.safetensors"
    done = ran("adapt", tiny_checkpoint, "--pictures", few, "-o", file, "--steps", 1, *given)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not file.exists()


def test_another_run_is_not_resumed(few: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ["adapt", tiny_checkpoint, "--pictures", few, "--prompt", "x", "-o", tmp_path / "it.safetensors"]
    assert ran(*command, "--steps", 1).exit_code == 0
    state = tmp_path / "it.work" / "training" / "adapt.safetensors"
    state.parent.mkdir()
    shutil.copy(tmp_path / "it.safetensors", state)
    done = ran(*command, "--steps", 1)
    assert done.exit_code == 2
    assert "was made with another config" in " ".join(done.output.split())


def test_models_that_read_pictures_are_refused(few: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint_of("inpainting", tmp_path, tiny_checkpoint)
    done = ran("adapt", folder, "--pictures", few, "--prompt", "x", "-o", tmp_path / "it.safetensors")
    assert done.exit_code == 2
    assert "the latents of a picture beside its own (inpainting). Models that" in " ".join(done.output.split())


def test_without_peft(few: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = ran("adapt", tiny_checkpoint, "--pictures", few, "--prompt", "x", "-o", tmp_path / "it.safetensors")
    assert done.exit_code == 2
    assert "pip install 'ldm_export[adapt]'" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meta", "reptile"], "--meta was given without --checkpoint"),
        (["--checkpoint", "emoji64"], "--checkpoint is an option of meta-learning"),
        (["--meta", "reptile", "--checkpoint", "emoji64", "--resume"], "resumes by itself"),
        (["--meta", "reptile", "--checkpoint", "emoji64", "--config", "{toml}"], "has the unknown key 'ranks'"),
    ],
)
def test_what_meta_learning_refuses(few: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "meta.toml").write_text("ranks = 2\n")
    given = [text.format(toml=tmp_path / "meta.toml") for text in arguments]
    done = ran("train", "--data", few, "-o", tmp_path / "start.safetensors", *given)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
