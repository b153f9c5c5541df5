"""``ldm-export fit``, as it is typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ldm_export.cli import main
from ldm_export.tune import fit as fitting

SMALL = ("--calls", "3", "--teacher-steps", "12", "--pictures", "8", "--held-out", "8")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "my.bundle")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a {colour} ball\n" for colour in ("red", "blue", "green", "grey", "black", "white")))
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_fitted_plan_is_added_and_used(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    done = run("fit", bundle, *SMALL, "--prompts", prompts, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["added"]
    assert document["plan"] == "plans/fitted-guidance4-3.json"
    assert (tmp_path / "my.bundle.fit").is_dir()
    assert json.loads((bundle / "fits" / "fitted-guidance4-3.json").read_text())["psnr_db"] == document["psnr_db"]
    drawn = run(
        "generate", bundle, "a red ball", "-o", tmp_path / "x.png", "--sampler", "fitted-guidance4", "--steps", 3
    )
    assert drawn.exit_code == 0, drawn.output
    assert run("verify", bundle).exit_code == 0


def test_what_does_not_pay_is_not_added(bundle: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted_rows = fitting.fitted_rows

    def worse(*given: Any) -> Any:
        rows = fitted_rows(*given)
        return (*rows[:-1], replace(rows[-1], keep=rows[-1].keep * 3))

    monkeypatch.setattr(fitting, "fitted_rows", worse)
    done = run("fit", bundle, *SMALL, "--prompts", prompts)
    assert done.exit_code == 1
    assert "is as good as the fitted plan, which was not added" in done.output
    assert not (bundle / "plans").exists()
    assert not (bundle / "fits").exists()


def test_what_is_missing_or_too_much(bundle: Path, kinds: Callable[[str], tuple[Path, Path]], prompts: Path) -> None:
    done = run("fit", bundle, *SMALL)
    assert done.exit_code == 2
    assert "This model reads text, and no prompts were given" in done.output
    done = run("fit", kinds("class-conditional")[1], *SMALL, "--prompts", prompts)
    assert done.exit_code == 2
    assert "--prompts was given, and this model reads no text" in done.output
