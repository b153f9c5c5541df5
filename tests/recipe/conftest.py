"""Work folders in which the teacher is drawn and judged already, and a judge that takes no time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.families import open_checkpoint
from ldm_export.passes.base import Training
from ldm_export.recipe import run_recipe, settings
from tests.recipe.tiny import FAKE_PASSES, Interrupt, judge_cheaply, recipe_of

Made = tuple[Bundle, list[dict[str, Any]]]
Make = Callable[..., Made]


@pytest.fixture
def cheap_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_cheaply(monkeypatch)


@pytest.fixture(scope="session")
def begun(tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder where the teacher of `tiny_checkpoint` has been drawn and judged, with 2 steps."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = recipe_of(folder, '[[pass]]\nname = "quantize-weights"')
    checkpoint, stop = open_checkpoint(tiny_checkpoint), Interrupt("calibration pictures")
    with pytest.MonkeyPatch.context() as patch:
        judge_cheaply(patch)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(checkpoint, recipe, folder / "out", folder / "work", progress=stop)
    return folder / "work"


@pytest.fixture
def work(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun` that a test may change."""
    return Path(shutil.copytree(begun, tmp_path / "work"))


@pytest.fixture
def make(tiny_checkpoint: Path, cheap_judge: None, work: Path, tmp_path: Path) -> Make:
    """Run a recipe of these passes on `tiny_checkpoint`, by default in `work` and to ``bundle``."""

    def made(passes: str, *, budget: str | None = None, teacher: str | None = None, **options: Any) -> Made:
        tables = {name: text for name, text in (("budget", budget), ("teacher", teacher)) if text is not None}
        given: dict[str, Any] = {"output": tmp_path / "bundle", "work": work, "force": True, **options}
        return run_recipe(open_checkpoint(tiny_checkpoint), recipe_of(tmp_path, passes, **tables), **given)

    return made


@pytest.fixture
def fake_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may name those of `tests.recipe.tiny`."""
    for kind in FAKE_PASSES:
        monkeypatch.setitem(settings.GRAPH_PASSES, kind.name, kind)


@pytest.fixture
def saved_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings write their state after every second update."""
    optimisation = Training.optimisation
    monkeypatch.setattr(Training, "optimisation", lambda self: replace(optimisation(self), save_every=2))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums of several threads differ in the last bit from run to run; trainings are compared to the bit here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
