"""A tuning of the tiny bundle: real graphs, plans and pictures; latency and memory by a formula, without noise."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from ldm_export.bench.image_similarity import pictures_of
from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.cli import main
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import GraphChange, Inputs, Purpose
from ldm_export.graph.integers import array
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.plan import Plan, Row
from ldm_export.recipe import read_recipe
from ldm_export.runtime import Pipeline
from ldm_export.tune import candidates, search
from ldm_export.tune.candidates import Configuration
from ldm_export.tune.measure import RECORDS, Measure
from ldm_export.tune.page import tune_page
from ldm_export.tune.result import write_result
from ldm_export.tune.search import Found
from ldm_export.tune.session import Document, TuneOptions, Tuning
from ldm_export.tune.variants import Variants
from ldm_export.verify.fidelity import KINDS
from ldm_export.verify.gates import gate_from_text
from ldm_export.verify.metrics import psnr

Tuned = tuple[Found, Variants, Document]
BLANK, COARSE = "blank decoder", "2 bits of everything"


@dataclass(frozen=True)
class Blank:
    """Sets the weights of a graph to zero, claims to be for speed, and lets any parity pass."""

    name: ClassVar[str] = "blank"
    purpose: ClassVar[Purpose] = "speed"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    tolerance: ClassVar[float] = 1e6

    graphs: tuple[str, ...] = ("vae_decoder",)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(array(tensor)), tensor.name))
        return GraphChange(model)


@dataclass(frozen=True)
class Coarse(Blank):
    """Rounds all weights to 2 bits of the largest of each, and claims to be for bytes."""

    name: ClassVar[str] = "coarse"
    purpose: ClassVar[Purpose] = "bytes"

    graphs: tuple[str, ...] = ("denoiser",)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        for tensor in model.graph.initializer:
            if len(tensor.dims) in (2, 4):
                weight = array(tensor)
                scale = np.abs(weight).max() / 1.5
                tensor.CopyFrom(numpy_helper.from_array(np.float32(np.rint(weight / scale) * scale), tensor.name))
        return GraphChange(model)


def milliseconds(self: Measure, configuration: Configuration) -> float:
    """Calls, each a tenth less for a pass, a fifth less with the target; DeepCache takes half of what it skips."""
    calls: int = self.made(configuration)["calls"]
    calls *= 0.5 + 0.5 / configuration.deepcache  # type: ignore[assignment]
    return (
        calls * 0.9 ** len(configuration.passes) * (0.8 if configuration.target else 1.0) * (configuration.threads or 2)
    )


def latency(self: Measure, configuration: Configuration, beside: Configuration) -> dict[str, Any]:
    self._variant(configuration, 0)
    ours, theirs = (milliseconds(self, each) for each in (configuration, beside))
    return {"ms": ours, "faster": theirs / ours}


def memory(self: Measure, configuration: Configuration) -> dict[str, Any]:
    return {"peak_rss_bytes": 300_000_000 if configuration.target else 200_000_000}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """No clock and no new processes; few plans; one pass that is good and two that ruin pictures."""
    passes = {BLANK: Blank(), "weights of 8 bits": QuantizeWeights(bits=8, smallest=64), COARSE: Coarse()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measure, "_latency", latency)
        patch.setattr(Measure, "_memory", memory)
        patch.setattr(candidates, "PASSES", passes)
        patch.setattr(candidates, "STORED", ("weights of 8 bits", COARSE))
        patch.setattr(candidates, "FORECAST_CALLS", (8, 1))
        patch.setattr(candidates, "FEWER_STEPS", {"dpmpp-2m": (10,)})
        patch.setattr(candidates, "DEEPCACHE", (2,))
        patch.setattr(search, "MOST_COMBINATIONS", 4)
        patch.setattr(search, "MOST_ON_FRONT", 4)
        yield


def options(*budgets: str, **given: Any) -> TuneOptions:
    gates = tuple(gate_from_text(text, KINDS, "--budget") for text in budgets)
    prompts = () if "prompts" in given else ("a red circle", "a <b>blue</b> square", "two green triangles", "-1")
    return TuneOptions(gates, **{"prompts": prompts, "pictures": 4, "steps": 16, **given})


def tuned(bundle: Path, checkpoint: Path | None, asked: TuneOptions, work: Path) -> Tuned:
    opened = None if checkpoint is None else open_checkpoint(checkpoint)
    return Tuning(bundle, opened, asked, work).run("ldm-export tune <tiny>", lambda what, done, of: None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all tests of this file have measured."""
    return tmp_path_factory.mktemp("tune") / "work"


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tiny_checkpoint: Path, work: Path) -> Tuned:
    return tuned(tiny_bundle, tiny_checkpoint, options("psnr=30", goal="smallest"), work)


@pytest.fixture(scope="module")
def fastest(made: Tuned, tiny_bundle: Path, tiny_checkpoint: Path, work: Path) -> Tuned:
    return tuned(tiny_bundle, tiny_checkpoint, options("psnr=30"), work)


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_what_ruins_pictures_is_never_chosen(made: Tuned, fastest: Tuned) -> None:
    for found, _, _ in (made, fastest):
        ruined = [point for point in found.points if {BLANK, COARSE} & {*point.configuration.passes}]
        assert any(BLANK in point.configuration.passes for point in ruined)
        assert all(point.why or point.failed for point in ruined)
        assert not {BLANK, COARSE} & {*found.chosen.configuration.passes}
        assert found.chosen.held_out["psnr_db"]["value"] >= 30
    assert made[0].chosen.configuration.passes == ("weights of 8 bits",)
    assert made[0].chosen.bytes < 0.5 * made[0].points[0].bytes


def test_a_plan_of_too_few_calls_is_never_chosen(fastest: Tuned) -> None:
    found = fastest[0]
    one = [point for point in found.points if point.configuration.sampler == "ddim-calls1"]
    assert one
    assert all(point.why for point in one)
    assert found.chosen.faster > 1.5
    assert found.chosen.calls < 16


def test_a_plan_of_nonsense_is_never_chosen(
    tiny_bundle: Path, work: Path, fastest: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(Bundle.open(tiny_bundle), "ddim", 16)
    row = plan.rows[-1]
    rows: tuple[Row, ...] = (replace(row, keep=0.3, direct=2.0), replace(row, keep=-1.0))
    nonsense = Plan("fitted", 2, plan.init_scale, rows, (plan.entries[0], plan.entries[0]))
    nonsense = replace(nonsense, entries=tuple(replace(entry, warmup=(), resume=0) for entry in nonsense.entries))

    def fit(self: Tuning, calls: int, variants: Variants, progress: object) -> tuple[str, int]:
        variants.keep_plan(nonsense)
        return "fitted", 2

    monkeypatch.setattr(Tuning, "_fit", fit)
    found, _, _ = tuned(tiny_bundle, None, options("psnr=30", fitted=(2,)), work)
    tried = [point for point in found.points if point.configuration.sampler == "fitted"]
    assert tried
    assert all(point.calls == 2 and point.faster > found.chosen.faster for point in tried)
    assert all(point.why for point in tried)
    assert found.chosen.held_out["psnr_db"]["value"] >= 30


def test_a_fitted_plan_is_fitted_to_the_tuning_half_and_drawn(tiny_bundle: Path, tmp_path: Path, work: Path) -> None:
    tuning = Tuning(tiny_bundle, None, options("psnr=30", fitted=(6,)), work)
    found, variants, document = tuning.run("tune", lambda what, done, of: None)
    fitted = [point for point in found.points if point.configuration.sampler.startswith("fitted")]
    assert fitted, document["left_out"]
    assert fitted[0].calls == 6
    assert fitted[0].tuning["psnr_db"]["value"] > 20
    written = write_result(replace(found, chosen=fitted[0]), variants, document, tmp_path / "f.bundle", force=False)
    assert written.bundle.manifest.model["default_sampler"] == fitted[0].configuration.sampler
    recipe = read_recipe(written.recipe)
    assert recipe.plan is not None
    assert recipe.plan[1] == variants.kept_plan(fitted[0].configuration)


def test_where_nothing_keeps_it_the_untouched_bundle_is_written(
    tiny_bundle: Path, work: Path, made: Tuned, tmp_path: Path
) -> None:
    found, variants, document = tuned(tiny_bundle, None, options("psnr=100", "latency_ms=1e6"), work)
    if found.chosen is found.points[0]:
        assert found.chosen.why == []
    else:  # the target may happen to round to the same bytes
        assert found.chosen.held_out["psnr_db"]["value"] == 100.0
    bundle = write_result(found, variants, document, tmp_path / "out.bundle", force=False).bundle
    for name in ("unet/model.onnx", "vae_decoder/model.onnx"):
        assert bundle.manifest.files[name] == Bundle.open(tiny_bundle).manifest.files[name]


def test_latency_only(tiny_bundle: Path, tiny_checkpoint: Path, work: Path, made: Tuned) -> None:
    found, _, document = tuned(tiny_bundle, tiny_checkpoint, options(latency_only=True), work)
    chosen = found.chosen.configuration
    assert (chosen.passes, chosen.deepcache, chosen.sampler, chosen.steps) == ((), 1, "ddim", 16)
    assert chosen.target
    assert all(not point.tuning and not point.held_out for point in found.points)
    assert any(point.calls == 1 and point.faster > 10 for point in found.points)
    assert "changes pictures by more than rounding" in tune_page(document)


def test_a_candidate_is_judged_by_the_same_truth(
    tiny_bundle: Path, variants: Callable[[str], Path], work: Path, made: Tuned, tmp_path: Path
) -> None:
    other = variants("target")
    before = Bundle.open(other).manifest
    found, all_variants, document = tuned(tiny_bundle, None, options("psnr=60", candidates=(other,), steps=10), work)
    point = next(point for point in found.points if point.configuration.bundle)
    assert point.configuration == Configuration("ddim", 20, bundle=str(other))
    assert point.tuning["psnr_db"]["value"] < 60
    assert point.why[0].startswith(f"the median PSNR of {other} is ")
    written = write_result(replace(found, chosen=point), all_variants, document, tmp_path / "c.bundle", force=False)
    assert written.bundle.manifest.model["default_steps"] == 20
    assert Bundle.open(other).manifest == before


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional"])
def test_models_without_text(kinds: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path) -> None:
    _, bundle = kinds(kind)
    found, variants, document = tuned(bundle, None, options("psnr=20", prompts=(), steps=12), tmp_path / "work")
    assert found.chosen.held_out["psnr_db"]["value"] >= 20
    assert found.chosen.faster > 1
    assert document["left_out"][BLANK].startswith("it is compared with PyTorch, and no checkpoint was given")
    written = write_result(found, variants, document, tmp_path / "tuned.bundle", force=False)
    words = shlex.split(written.command)[1:]
    words[words.index("picture.png")] = str(tmp_path / "picture.png")
    assert CliRunner().invoke(main, words).exit_code == 0


# --- it resumes -----------------------------------------------------------------------------------------------------


def test_nothing_is_measured_twice(
    fastest: Tuned, tiny_bundle: Path, tiny_checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    for name in ("draw", "_latency", "_memory", "_made"):
        monkeypatch.setattr(Measure, name, refuse)
    again = tuned(tiny_bundle, tiny_checkpoint, options("psnr=30"), work)
    assert [point.to_dict() for point in again[0].points] == [point.to_dict() for point in fastest[0].points]


def test_what_was_measured_before_an_interruption_stays(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Configuration] = []
    draw = Measure.draw

    def interrupted(self: Measure, configuration: Configuration, *given: Any) -> Any:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(configuration)
        return draw(self, configuration, *given)

    monkeypatch.setattr(Measure, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(tiny_bundle, None, options("psnr=30"), tmp_path)
    first, drawn = drawn, []
    assert json.loads((tmp_path / RECORDS).read_text())["records"]
    with pytest.raises(KeyboardInterrupt):
        tuned(tiny_bundle, None, options("psnr=30"), tmp_path)
    assert len(drawn) == 5
    assert not {*first} & {*drawn}


def test_another_model_is_measured_anew(made: Tuned, variants: Callable[[str], Path], work: Path) -> None:
    """The records are by what a bundle holds."""
    records = json.loads((work / RECORDS).read_text())["records"]
    tuned(variants("loop"), None, options(latency_only=True), work)
    assert len(json.loads((work / RECORDS).read_text())["records"]) > len(records)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_bundle_generates_what_was_judged(fastest: Tuned, tmp_path: Path) -> None:
    found, variants, document = fastest
    written = write_result(found, variants, document, tmp_path / "tuned.bundle", force=False)
    point, model = found.chosen, written.bundle.manifest.model
    assert (model["default_sampler"], model["default_steps"]) == (
        point.configuration.sampler,
        point.configuration.steps,
    )
    shown = document["pictures"]["held_out"][: len(point.png)]
    with Pipeline.open(tmp_path / "tuned.bundle", backend=point.configuration.backend) as pipeline:
        made = pipeline.generate(shown, seed=document["seed"], deepcache=point.configuration.deepcache)
    assert psnr(made.images, pictures_of(point.png)).min() > 60
    assert made.backend.endswith("ort-cpu") is point.configuration.target
    words = shlex.split(written.command)[1:]
    words[words.index("picture.png")] = str(tmp_path / "picture.png")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert np.asarray(Image.open(tmp_path / "picture.png")).shape == (16, 16, 3)


def test_the_recipe_is_what_was_done(made: Tuned, tmp_path: Path) -> None:
    found, variants, document = made
    written = write_result(found, variants, document, tmp_path / "tuned.bundle", force=False)
    assert {file.name for file in tmp_path.iterdir()} >= {"tuned.bundle", "tuned.recipe.toml", "tuned.prompts.txt"}
    recipe = read_recipe(written.recipe)
    assert [step.name for step in recipe.graph_passes] == ["quantize-weights"]
    assert recipe.graph_passes[0] == candidates.PASSES["weights of 8 bits"]
    assert recipe.teacher.steps == 16
    assert recipe.plan is not None
    assert (recipe.plan[0].sampler, recipe.plan[0].steps) == (
        found.chosen.configuration.sampler,
        found.chosen.configuration.steps,
    )
    assert {*recipe.prompts} == {*document["pictures"]["tuning"]}
    records = written.bundle.manifest.passes
    assert [record["name"] for record in records] == ["untouched", "quantize-weights", "tune"]
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "tuned.bundle")])
    assert done.exit_code == 0, done.output


def test_the_halves_share_no_prompt_and_no_seed(made: Tuned) -> None:
    document = made[2]
    tuning, held_out = document["pictures"]["tuning"], document["pictures"]["held_out"]
    assert not {*tuning} & {*held_out}
    assert document["seed"] == len(tuning) == 2


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        assert all(not str(value).startswith("http") for _, value in attrs)


def test_the_page_shows_the_front_and_escapes(fastest: Tuned) -> None:
    found, _, document = fastest
    tags, text = Tags(), tune_page(document)
    tags.feed(text)
    on_front = [point for point in found.points if point.on_front]
    assert tags.found.count("img") >= sum(len(point.png) for point in on_front)
    assert "script" not in tags.found
    assert "<tiny>" not in text
    assert tags.found.count("polyline") == 1
    assert all(point.name in text for point in found.points)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "No budget says how much the pictures may change"),
        ({"budgets": ("memory_mb=100",)}, "No budget says how much the pictures may change"),
        ({"budgets": ("psnr=30",), "latency_only": True}, "The budget psnr=30 was given with latency_only"),
        ({"budgets": ("psnr=30",), "pictures": 1}, "pictures is 1; at least 2 are needed"),
        ({"budgets": ("psnr=30",), "rounds": 0}, "rounds is 0; at least 1 is needed"),
        ({"budgets": ("psnr=30",), "held_out": Path("x")}, "held_out pictures were given without data"),
    ],
)
def test_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(*given.pop("budgets", ()), **given)


def test_what_cannot_be_judged_is_refused_before_the_search(tiny_bundle: Path, work: Path) -> None:
    with pytest.raises(InputError, match=r"The budget frechet_ratio=1.05 cannot be judged. Sets of 2 and 2 pictures"):
        tuned(tiny_bundle, None, options("frechet_ratio=1.05"), work)
    with pytest.raises(InputError, match=r"The budget alignment=0.3 cannot be judged"):
        tuned(tiny_bundle, None, options("alignment=0.3"), work)


def test_another_checkpoint_is_refused(
    tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], work: Path
) -> None:
    with pytest.raises(InputError, match=r"unet of .* was exported from another network than"):
        tuned(tiny_bundle, kinds("sd2")[0], options("psnr=30"), work)


def test_candidates_of_other_pictures_are_refused(
    tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], work: Path
) -> None:
    with pytest.raises(InputError, match="draws other pictures"):
        Tuning(tiny_bundle, None, options("psnr=30", candidates=(kinds("unconditional")[1],)), work)
    with pytest.raises(InputError, match=r"4 prompts were given; bundle .* reads no text"):
        Tuning(kinds("unconditional")[1], None, options("psnr=30"), work)
