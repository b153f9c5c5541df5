"""Results that a shipped checkpoint has already are taken, if its keys are those of the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ldm_export.checkpoint import PASSES
from ldm_export.checkpoint import folder as checkpoints
from ldm_export.cli.passes import print_passes
from ldm_export.families import open_checkpoint
from ldm_export.passes.distill_decoder import DistillDecoder
from ldm_export.passes.distill_guidance import DistillGuidance
from ldm_export.recipe import change as recipe_change
from ldm_export.recipe import run_recipe, score
from ldm_export.recipe.run import teacher_of
from ldm_export.recipe.score import Score
from ldm_export.recipe.settings import read_recipe
from ldm_export.verify.latency import Latency
from tests.recipe.conftest import Make
from tests.recipe.tiny import DECODER, GUIDANCE, WEIGHTS, Interrupt, files_of, judge_cheaply, plain, recipe_of

TRAINED = DECODER + GUIDANCE


def test_cpu_fast_takes_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe needs no training on emoji64, and what it reads of emoji64-fast are scores, which can be shown."""
    recipe = read_recipe("cpu-fast")
    _, _, key = teacher_of(open_checkpoint("emoji64"), recipe, None)
    adopted = recipe_change.adoptable(key, list(recipe.torch_passes))
    assert adopted is not None
    assert [record["name"] for record in adopted.passes] == ["teacher", "distill-guidance", "distill-steps"]
    scores = [Score.from_dict(record["score"]) for record in adopted.passes]
    assert [found.latency.calls for found in scores] == [50, 50, 4]
    assert all(0 < found.latency.denoiser_ms < found.latency.total_ms for found in scores)
    print_passes(adopted.passes)
    shown = capsys.readouterr().out
    assert all(f"{found.latency.denoiser_ms:.2f}" in shown for found in scores)


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What passes left of `tiny_checkpoint`, after one and after two of them. Read-only."""
    folder = tmp_path_factory.mktemp("results")
    work = Path(shutil.copytree(begun, folder / "work"))
    with pytest.MonkeyPatch.context() as patch:
        judge_cheaply(patch)
        checkpoint = open_checkpoint(tiny_checkpoint)
        run_recipe(checkpoint, recipe_of(folder, TRAINED), folder / "bundle", work)
    return {
        "one": next(work.glob("01-*")) / "checkpoint",
        "two": next(work.glob("02-*")) / "checkpoint",
        "bundle": folder / "bundle",
    }


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let these be the shipped checkpoints."""

    def shipped(**folders: Path) -> None:
        for module in (checkpoints, recipe_change):
            monkeypatch.setattr(module, "shipped_checkpoints", lambda: folders)

    return shipped


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the passes that were trained."""
    names: list[str] = []
    for kind in (DistillGuidance, DistillDecoder):

        def apply(self: Any, setting: Any, kind: Any = kind, apply: Any = kind.apply) -> Any:
            names.append(kind.name)
            return apply(self, setting)

        monkeypatch.setattr(kind, "apply", apply)
    return names


def graphs_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.endswith(".onnx")}


def test_a_result_is_taken(make: Make, ship: Any, trained: list[str], results: dict[str, Path]) -> None:
    ship(one=results["one"])
    bundle, records = make(DECODER)
    assert trained == []
    assert [record["kept"] for record in records] == [True, True]
    assert records[1]["faster"] > 1  # measured here, not copied
    assert graphs_of(bundle.path)["vae_decoder/model.onnx"] == graphs_of(results["bundle"])["vae_decoder/model.onnx"]


def test_results_of_two_passes_are_taken(make: Make, ship: Any, trained: list[str], results: dict[str, Path]) -> None:
    ship(two=results["two"])
    bundle, records = make(TRAINED)
    assert trained == []
    assert [record["name"] for record in records] == ["teacher", "distill-decoder", "distill-guidance"]
    taken = json.loads((results["two"] / PASSES).read_text(encoding="utf-8"))["passes"]
    assert [record["key"] for record in records] == [record["key"] for record in taken]
    assert [record["report"] for record in plain(records[1:])] == [record["report"] for record in taken[1:]]
    assert list(bundle.manifest.passes) == plain(records)
    assert bundle.roles.guidance.kind == "none"
    assert graphs_of(bundle.path) == graphs_of(results["bundle"])


def test_a_result_is_timed_against_the_one_before_it(
    make: Make, ship: Any, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two results has no bundle to be timed beside; how fast it was is known."""
    shipped = Path(shutil.copytree(results["two"], tmp_path / "shipped"))
    told = json.loads((shipped / PASSES).read_text(encoding="utf-8"))
    told["passes"][1]["faster"] = 2.5
    (shipped / PASSES).write_text(json.dumps(told))
    ship(two=shipped)
    spent = {"this": Latency(10.0, 1.0, 1.0, 1.0, 1), "beside": Latency(60.0, 1.0, 1.0, 1.0, 1)}
    monkeypatch.setattr(score, "time_in_turn", lambda sides, rounds: {name: spent[name] for name in sides})
    _, records = make(TRAINED)
    assert [record["faster"] for record in records[1:]] == [2.5, pytest.approx(60 / 10 / 2.5)]


def test_the_recipe_goes_on_from_a_result(make: Make, ship: Any, trained: list[str], results: dict[str, Path]) -> None:
    ship(one=results["one"])
    bundle, records = make(TRAINED + WEIGHTS)
    assert trained == ["distill-guidance"]
    assert [record["name"] for record in records[1:]] == ["distill-decoder", "distill-guidance", "quantize-weights"]
    assert all(record["kept"] for record in records)
    assert bundle.roles.guidance.kind == "none"
    source = bundle.manifest.source["sha256"]
    assert source["vae"] == open_checkpoint(results["one"]).sha256("vae")
    assert source["unet"] == open_checkpoint(results["two"]).sha256("unet")


def test_of_several_results_the_farthest_is_taken(
    make: Make, ship: Any, trained: list[str], results: dict[str, Path], tiny_checkpoint: Path
) -> None:
    ship(a=results["one"], b=results["two"], c=tiny_checkpoint)
    bundle, _ = make(TRAINED)
    assert trained == []
    assert graphs_of(bundle.path) == graphs_of(results["bundle"])


def test_a_result_that_is_taken_is_not_taken_apart(make: Make, ship: Any, results: dict[str, Path], work: Path) -> None:
    before = files_of(results["two"])
    ship(two=results["two"])
    make(TRAINED)
    make(TRAINED)
    assert files_of(results["two"]) == before


def test_from_scratch_takes_nothing(make: Make, ship: Any, trained: list[str], results: dict[str, Path]) -> None:
    ship(two=results["two"])
    bundle, _ = make(TRAINED, from_scratch=True)
    assert trained == ["distill-decoder", "distill-guidance"]
    assert graphs_of(bundle.path) == graphs_of(results["bundle"])  # the same, since all is seeded


@pytest.mark.parametrize(
    "passes",
    [DECODER.replace("width = 4", "width = 5"), GUIDANCE, WEIGHTS],
    ids=["other options", "another pass", "no networks"],
)
def test_results_of_another_recipe_are_not_taken(
    make: Make, ship: Any, trained: list[str], results: dict[str, Path], passes: str
) -> None:
    ship(one=results["one"], two=results["two"])
    bundle, _ = make(passes)
    assert trained == [name for name in ("distill-decoder", "distill-guidance") if name in passes]
    assert (bundle.roles.guidance.kind == "none") is ("distill-guidance" in passes)


def test_results_of_another_teacher_are_not_taken(
    make: Make, ship: Any, trained: list[str], results: dict[str, Path], tmp_path: Path
) -> None:
    ship(one=results["one"])
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, teacher="steps = 3", work=tmp_path / "other", progress=Interrupt("distill-decoder: loss"))
    assert trained == ["distill-decoder"]


@pytest.mark.parametrize("passes", [[], None], ids=["no passes", "no file"])
def test_a_shipped_checkpoint_without_results(
    make: Make,
    ship: Any,
    trained: list[str],
    results: dict[str, Path],
    tmp_path: Path,
    passes: list[object] | None,
) -> None:
    shipped = Path(shutil.copytree(results["one"], tmp_path / "shipped"))
    (shipped / PASSES).unlink()
    if passes is not None:
        drawing = {"sampler": "ddim", "steps": 2, "guidance": 4.0, "guidance_distilled": False}
        (shipped / PASSES).write_text(json.dumps({"drawing": drawing, "passes": passes}))
    ship(shipped=shipped)
    make(DECODER)
    assert trained == ["distill-decoder"]
