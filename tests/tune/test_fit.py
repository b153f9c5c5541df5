"""Fitted plans of tiny models: what they promise, and that the report is what the runtime gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import add_fitted, check_plans
from ldm_export.errors import InputError
from ldm_export.plan import Plan
from ldm_export.runtime import Pipeline
from ldm_export.tune import fit as fitting
from ldm_export.tune.fit import Fit, FitOptions, fit_plan
from ldm_export.verify.metrics import psnr

PROMPTS = tuple(f"{colour} {thing}" for colour in ("red", "blue", "green", "black") for thing in ("cat", "dog", "ball"))
OPTIONS = FitOptions(calls=4, conditions=PROMPTS, teacher_steps=16, guidance=3.0, pictures=8, held_out=8)


def quiet(what: str, done: int, of: int) -> None:
    assert 0 <= done < of, what


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def fit(tiny_bundle: Path, work: Path) -> Fit:
    return fit_plan(Bundle.open(tiny_bundle), OPTIONS, work, quiet)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_plan_of_the_calls_that_were_asked_for(fit: Fit) -> None:
    assert (fit.plan.sampler, fit.plan.num_inference_steps, len(fit.plan.rows)) == ("fitted-guidance3", 4, 4)
    assert fit.report["calls_of_teacher"][0] == 0
    assert [len(row.weights) for row in fit.plan.rows] == [0, 2, 3, 4]
    assert Plan.from_json(fit.plan.to_json()) == fit.plan
    assert fit.report["psnr_db"].keys() >= {"fitted-guidance3", "ddim", "dpmpp-2m", "unipc", "deis"}


def test_what_is_reported_is_what_the_runtime_generates(bundle: Bundle, fit: Fit) -> None:
    added = add_fitted(bundle, fit.plan, fit.report)
    check_plans(added)
    assert "fits/fitted-guidance3-4.json" in added.manifest.files
    _, judged = OPTIONS.drawn()
    pipeline = Pipeline(Bundle.open(added.path, verify=True), "cpu")
    given: dict[str, Any] = {"seed": list(judged.seeds), "guidance": 3.0}
    prompts = [str(prompt) for prompt in judged.conditions]
    truth = pipeline.generate(prompts, sampler="ddim", steps=16, **given).images
    for sampler, score in fit.report["psnr_db"].items():
        values = psnr(pipeline.generate(prompts, sampler=sampler, steps=4, **given).images, truth)
        assert score == pytest.approx({"median": float(np.median(values)), "worst": float(values.min())}, abs=0.01)


def test_what_judges_was_not_fitted_to() -> None:
    ours, theirs = OPTIONS.drawn()
    assert not set(ours.conditions) & set(theirs.conditions)
    assert not set(ours.seeds) & set(theirs.seeds)
    assert (len(ours.seeds), len(theirs.seeds)) == (8, 8)


def test_the_same_fit_goes_on(bundle: Bundle, work: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in work.iterdir()}
    assert len(before) == 3
    runs = []
    run = fitting.Batch.run
    monkeypatch.setattr(fitting.Batch, "run", lambda self, *given: runs.append(len(given)) or run(self, *given))
    again = fit_plan(add_fitted(bundle, fit.plan, fit.report), OPTIONS, work, quiet)
    assert again.plan == fit.plan
    assert again.report == fit.report
    assert {file: file.stat().st_mtime_ns for file in work.iterdir()} == before
    assert set(runs) == {2}  # what is judged; those that are watched, and gains, are what the files have
    assert len(runs) == len(again.report["psnr_db"])


def test_a_damaged_file_of_trajectories(tiny_bundle: Path, work: Path, fit: Fit, tmp_path: Path) -> None:
    copied = shutil.copytree(work, tmp_path / "work")
    file = min(copied.iterdir())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"is damaged .*Delete it, and it is made anew"):
        fit_plan(Bundle.open(tiny_bundle), OPTIONS, copied, quiet)


def test_a_fit_is_nearer_to_its_teacher_than_any_textbook_sampler(fit: Fit) -> None:
    scores = fit.report["psnr_db"]
    assert scores[fit.plan.sampler]["median"] > max(
        score["median"] for name, score in scores.items() if name != fit.plan.sampler
    )
    assert fit.pays


def test_from_an_image_it_is_near_to_its_teacher(bundle: Bundle, fit: Fit) -> None:
    pipeline = Pipeline(add_fitted(bundle, fit.plan, fit.report), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    given: dict[str, Any] = {"image": image, "guidance": 3.0, "seed": 5}
    ours = pipeline.generate("red cat", sampler=fit.plan.sampler, steps=4, strength=0.5, **given)
    call = fit.report["calls_of_teacher"][2]
    theirs = pipeline.generate("red cat", sampler="ddim", steps=16, strength=1 - call / 16, **given)
    plain = pipeline.generate("red cat", sampler="ddim", steps=4, strength=0.5, **given)
    ours_off, plain_off = (np.abs(drawn.latents - theirs.latents).max() for drawn in (ours, plain))
    assert len(ours.timings.denoiser_ms) == 2
    assert ours_off < plain_off


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "euler-ancestral"}, "euler-ancestral with 16 steps, which adds noise at each step"),
        ({"sampler": "heun"}, "heun with 16 steps, which makes 31 calls in 16 steps. Name another --sampler"),
        ({"sampler": "magic"}, "This bundle has no plan for 'magic'"),
    ],
)
def test_a_teacher_that_cannot_be_followed(
    tiny_bundle: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        fit_plan(Bundle.open(tiny_bundle), replace(OPTIONS, **options), tmp_path, quiet)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_as_many_calls_as_steps() -> None:
    with pytest.raises(InputError, match="calls is 16 and teacher_steps 16; a fitted plan has fewer calls"):
        replace(OPTIONS, calls=16)


@pytest.mark.parametrize("kind", ["class-conditional", "flow"])
def test_other_kinds(kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    bundle = Bundle.open(kinds(kind)[1])
    conditions: tuple[str | int, ...] = PROMPTS if bundle.roles.text_encoders else (0, 1)
    guidance = 3.0 if bundle.roles.text_encoders else None
    found = fit_plan(bundle, replace(OPTIONS, conditions=conditions, guidance=guidance), tmp_path, quiet)
    assert found.plan.sampler == ("fitted-guidance3" if bundle.roles.text_encoders else "fitted")
    assert len(found.plan.rows) == 4
    assert np.isfinite(found.report["psnr_db"][found.plan.sampler]["worst"])
