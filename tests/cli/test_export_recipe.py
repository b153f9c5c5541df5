"""`ldm-export export --recipe`: what it prints and writes, its exit codes, and errors of one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.cli.options import console
from ldm_export.recipe import settings
from tests.recipe.tiny import FAKE_PASSES, WEIGHTS, judge_cheaply, write_recipe

Run = Callable[..., Result]
UNDONE = '[[pass]]\nname = "change"\nwhat = "refuse"\n'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ldm-export export` in this process, with a judge that takes no time."""
    judge_cheaply(monkeypatch)
    monkeypatch.setattr(console, "width", 80)  # of which nothing is cut off
    for kind in FAKE_PASSES:
        monkeypatch.setitem(settings.GRAPH_PASSES, kind.name, kind)
    return lambda *arguments: CliRunner().invoke(main, ["export", *map(str, arguments)])


def assert_refused(done: Result, message: str) -> None:
    """Exit code 2, one line on stderr that begins with ``error:``, nothing on stdout."""
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- on good input --------------------------------------------------------------------------------------------------


def test_passes_are_shown(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, UNDONE + WEIGHTS)
    done = run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", recipe)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line[1:2] in (["kept"], ["undone"])}
    assert [rows[name][0] for name in ("teacher", "change", "quantize-weights")] == ["kept", "undone", "kept"]
    assert rows["teacher"][1] == "2"  # steps
    megabytes = float(rows["teacher"][4]), float(rows["quantize-weights"][5])  # a teacher is faster than nothing
    assert megabytes[1] < megabytes[0] / 2
    assert rows["change"] == ["undone"]
    assert re.search(r"^change was undone: This graph has an operator", done.stdout, re.MULTILINE)
    assert re.search(r"^unet +out_sample +differs from PyTorch by \S+ \(allowed 3e-01\)$", done.stdout, re.MULTILINE)
    assert done.stderr == ""
    assert (tmp_path / "bundle.work" / "00-teacher" / "stage.json").is_file()  # beside the bundle, for the next run
    assert Bundle.open(tmp_path / "bundle", verify=True).manifest.passes[2]["kept"] is True


def test_as_json_and_again(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WEIGHTS)
    options = ["--recipe", recipe, "--work", tmp_path / "stages", "--json"]
    done = run(tiny_checkpoint, "-o", tmp_path / "new" / "bundle", *options)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["bundle"] == str(tmp_path / "new" / "bundle")
    assert [record["name"] for record in document["passes"]] == ["teacher", "quantize-weights"]
    assert {record["graph"] for record in document["parity"]} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert not (tmp_path / "new" / "bundle.work").exists()
    again = run(tiny_checkpoint, "-o", tmp_path / "new" / "bundle", *options, "--force")
    assert json.loads(again.stdout) == document


def test_a_bundle_of_a_recipe_verifies(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", write_recipe(tmp_path, WEIGHTS))
    assert done.exit_code == 0, done.output
    checked = CliRunner().invoke(main, ["verify", str(tmp_path / "bundle"), "--against", str(tiny_checkpoint)])
    assert checked.exit_code == 0, checked.output


def test_prompts_take_the_place_of_the_recipes_own(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a grey cube\n\n a white cube \n")
    recipe = write_recipe(tmp_path, WEIGHTS)
    done = run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", recipe, "--prompts", prompts)
    assert done.exit_code == 0, done.output
    gallery = tmp_path / "bundle.work" / "pictures" / "gallery" / "metadata.jsonl"
    captions = {json.loads(line)["text"] for line in gallery.read_text().splitlines()}
    assert captions == {"a grey cube", "a white cube"}
    calibrated = Bundle.open(tmp_path / "bundle").manifest.source["calibration"]
    assert set(calibrated) == captions


# --- wrong input: exit code 2, one sentence, nothing written --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target = ", "is no readable TOML"),
        ('target = "cpu"', r"recipe\.toml has no \[\[pass\]\]"),
        ('[[pass]]\nname = "magic"', "there is no pass 'magic'"),
        ('[[pass]]\nname = "half"\nbits = 4', "has the unknown key 'bits'"),
        ('[[pass]]\nname = "distill-decoder"\nupdates = "many"', "updates = 'many' must be a whole number"),
        ("[budget]\nfrechet_ratio = 0.5", "frechet_ratio = 0.5 must be at least 1|has no"),
        ('[[pass]]\nname = "distill-steps"\nstart = 20', "start = 20 cannot be halved to 4 steps"),
        (WEIGHTS * 2, "has quantize-weights 2 times"),
        (WEIGHTS + '[[pass]]\nname = "distill-decoder"', "distill-decoder changes networks .* put it first"),
        ('target = "gpu"\n[[pass]]\nname = "quantize-dynamic"', "runs on cpu, not on gpu"),
        (f'prompts = "absent.txt"\n{WEIGHTS}', "prompts = 'absent.txt' cannot be read"),
        (WEIGHTS, "reads text and the recipe recipe has no prompts"),
    ],
)
def test_a_bad_recipe(run: Run, tiny_checkpoint: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    done = run(tiny_checkpoint, "-o", tmp_path / "new" / "bundle", "--recipe", tmp_path / "recipe.toml")
    assert_refused(done, message)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_recipe_that_is_not_there(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", "cpu-fats")
    assert_refused(done, "There is no recipe 'cpu-fats'; give a TOML file or one of cpu-fast, cpu-small, .*gpu")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_there(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    recipe = write_recipe(tmp_path / "recipes", WEIGHTS)
    assert_refused(run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", recipe), "exists; use --force")
    assert not (tmp_path / "bundle.work").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--work", "cannot be written"), ("--data", r"has no metadata\.jsonl; one line a picture is needed")],
)
def test_folders_that_cannot_be_used(
    run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, option: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path, WEIGHTS)
    done = run(tiny_checkpoint, "-o", tmp_path / "bundle", "--recipe", recipe, option, tmp_path / "file")
    assert_refused(done, message)
    assert not (tmp_path / "bundle").exists()
