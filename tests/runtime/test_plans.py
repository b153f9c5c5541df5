"""Plans at draw time: a bundle's file where it has one, else what its scheduler config compiles to."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import SCHEDULER, add_plan, check_plans, read_plan, with_plan
from ldm_export.cli.main import main
from ldm_export.errors import BundleError, InputError
from ldm_export.plan import SAMPLERS, Forecast, compile_plan
from ldm_export.runtime import Pipeline
from tests.hostile.base import Draft, sound

PROMPT = "a red circle"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def opened(draft: Draft, folder: Path) -> Bundle:
    folder.mkdir()
    draft.write(folder)
    return Bundle.open(folder)


def test_an_exported_bundle_has_no_plan_files(tiny_bundle: Path) -> None:
    assert not (tiny_bundle / "plans").exists()
    assert SCHEDULER in Bundle.open(tiny_bundle).manifest.files


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps_is_compiled(tiny_bundle: Path, sampler: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    config = json.loads((tiny_bundle / SCHEDULER).read_text())
    for steps in (1, 3, 25, 49):
        assert read_plan(bundle, sampler, steps) == compile_plan(config, sampler, steps)


def test_steps_that_have_no_file_are_drawn_as_with_one(bundle: Bundle) -> None:
    options: dict[str, Any] = {"steps": 25, "seed": 3}
    image = {"image": np.full((16, 16, 3), 99, np.uint8), "strength": 0.3}
    pipeline = Pipeline(bundle, "cpu")
    drawn, from_image = pipeline.generate(PROMPT, **options), pipeline.generate(PROMPT, **options, **image)
    assert (len(drawn.timings.denoiser_ms), len(from_image.timings.denoiser_ms)) == (25, 7)
    with_file, _ = add_plan(bundle, "ddim", 25)
    assert "plans/ddim-25.json" in with_file.manifest.files
    pipeline = Pipeline(with_file, "cpu")
    np.testing.assert_array_equal(pipeline.generate(PROMPT, **options).latents, drawn.latents)
    np.testing.assert_array_equal(pipeline.generate(PROMPT, **options, **image).latents, from_image.latents)


def test_a_file_is_used_first(bundle: Bundle) -> None:
    plan = read_plan(bundle, "ddim", 5)
    other = replace(plan, init_scale=0.5)
    added = bundle.add_file("plans/ddim-5.json", other.to_json().encode())
    assert read_plan(added, "ddim", 5) == other
    assert read_plan(added, "ddim", 6).init_scale == plan.init_scale
    assert with_plan(added, "ddim", 5) == (added, other)


def test_a_bundle_gets_the_file_of_a_plan_once(bundle: Bundle) -> None:
    added, plan = with_plan(bundle, "plms", 9)
    assert json.loads(added.read("plans/plms-9.json"))["sampler"] == "plms"
    assert (plan, added.manifest.files.keys() - bundle.manifest.files.keys()) == (
        read_plan(bundle, "plms", 9),
        {"plans/plms-9.json"},
    )


REFUSALS = {
    "unknown sampler": (
        "magic",
        20,
        r"'magic' with 20 steps, and it cannot be compiled: sampler 'magic'",
    ),
    "too many steps": ("ddim", 1001, "num_inference_steps is 1001; it must be 1 to 1000, the number of timesteps"),
    "no integer steps": ("unipc", 1000, "1000 steps of .* do not fit into 1000 training timesteps.*Use fewer steps"),
    "more than distilled": ("lcm", 51, "original_inference_steps 50.*Use fewer steps"),
    "one with eta": (
        "ddim-eta1",
        7,
        r"with 7 steps \(it has ddim-eta1-6\), and it cannot be compiled: s",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compiled(bundle: Bundle, case: str) -> None:
    sampler, steps, message = REFUSALS[case]
    bundle, _ = add_plan(bundle, "ddim", 6, eta=1.0)
    with pytest.raises(InputError, match=f"^This bundle has no plan for .*{message}") as caught:
        read_plan(bundle, sampler, steps)
    assert str(caught.value).endswith(".")


def test_a_bundle_without_a_scheduler_config(tmp_path: Path) -> None:
    draft = sound()
    del draft.files[SCHEDULER]
    bundle = opened(draft, tmp_path / "bundle")
    assert read_plan(bundle, "ddim", 2).num_inference_steps == 2
    message = f"no plan for 'ddim' with 3 steps, and no {SCHEDULER} to compile one from; its plans: ddim-2, dpmpp"
    with pytest.raises(InputError, match=re.escape(message)):
        read_plan(bundle, "ddim", 3)
    check_plans(bundle)  # of the default there is a file


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"[]", BundleError, "is no JSON object. Export the bundle anew"),
        (b"{", BundleError, "is not JSON: "),
        (b'{"num_train_timesteps": 1e3}', InputError, r"num_train_timesteps = 1000.0; it must be a positive integer"),
        (b'{"beta_start": NaN}', InputError, "beta_start = nan; it must be a positive number"),
        (b'{"beta_end": 1e-20}', InputError, "alphas_cumprod go from .* each must be smaller"),
        (
            b'{"clip_sample_range": 1e99}',
            InputError,
            "3 steps of this scheduler config has numbers that float32",
        ),
        (b'{"num_train_timesteps": 1, "rescale_betas_zero_snr": true}', InputError, "1 to 1, the number"),
    ],
)
def test_a_scheduler_config_that_nothing_can_be_made_of(
    tmp_path: Path, text: bytes, error: type[Exception], message: str
) -> None:
    draft = sound()
    draft.files[SCHEDULER] = text
    bundle = opened(draft, tmp_path / "bundle")
    with pytest.raises(error, match=message):
        read_plan(bundle, "ddim", 3)
    if error is BundleError:
        with pytest.raises(error, match=message):
            add_plan(bundle, "ddim", 3)


def test_infinity_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    draft = sound()
    config = draft.document(SCHEDULER) | {"lambda_min_clipped": float("-inf")}
    draft.files[SCHEDULER] = json.dumps(config).encode()
    assert b"-Infinity" in draft.files[SCHEDULER]
    assert read_plan(opened(draft, tmp_path / "bundle"), "dpmpp-2m", 9) == compile_plan(config, "dpmpp-2m", 9)


def test_a_default_that_cannot_be_compiled_is_found_by_verifying(tmp_path: Path) -> None:
    draft = sound()
    draft.manifest["model"]["default_steps"] = 1001
    bundle = opened(draft, tmp_path / "bundle")
    message = "cannot be drawn with as it says of itself. This bundle has no plan for 'ddim' with 1001 steps"
    with pytest.raises(BundleError, match=message):
        check_plans(bundle)
    with pytest.raises(BundleError, match=message):
        Pipeline.open(bundle.path, backend="cpu", verify=True)
    Pipeline.open(bundle.path, backend="cpu").generate("a cat", steps=4)
    done = CliRunner().invoke(main, ["verify", str(bundle.path)])
    assert done.exit_code == 2
    assert message[:30] in done.stderr


def test_a_changed_scheduler_config_is_refused_where_hashes_are_checked(tmp_path: Path) -> None:
    bundle = opened(sound(), tmp_path / "bundle").verifying()
    file = bundle.path / SCHEDULER
    file.write_bytes(file.read_bytes().replace(b"0.012", b"0.013"))
    with pytest.raises(BundleError, match=r"scheduler_config\.json"):
        read_plan(bundle, "ddim", 3)


def test_fewer_calls_than_steps(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, "cpu")
    drawn = pipeline.generate(PROMPT, steps=25, calls=9, seed=3)
    assert len(drawn.timings.denoiser_ms) == 9
    added, plan = add_plan(bundle, "ddim", 25, forecast=Forecast(9))
    assert (plan.file_name, len(plan.rows)) == ("ddim-calls9-25.json", 9)
    again = Pipeline(added, "cpu").generate(PROMPT, sampler="ddim-calls9", steps=25, seed=3)
    np.testing.assert_array_equal(again.latents, drawn.latents)
    all_calls = pipeline.generate(PROMPT, steps=9, calls=9, seed=3).latents
    np.testing.assert_array_equal(all_calls, pipeline.generate(PROMPT, steps=9, seed=3).latents)
    with pytest.raises(InputError, match=r"cannot be compiled: calls is 26; the plan makes 25, of which 1 to 25"):
        pipeline.generate(PROMPT, steps=25, calls=26)


def test_a_file_with_other_calls_is_used_first(bundle: Bundle) -> None:
    at = (0, 1, 2, 3, 24)
    added, plan = add_plan(bundle, "ddim", 25, forecast=Forecast(5, 0, at))
    assert plan.file_name == "ddim-calls5-25.json"
    drawn = Pipeline(added, "cpu").generate(PROMPT, steps=25, calls=5, seed=3).latents
    assert np.abs(drawn - Pipeline(bundle, "cpu").generate(PROMPT, steps=25, calls=5, seed=3).latents).max() > 1e-3
