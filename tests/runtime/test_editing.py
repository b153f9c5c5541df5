"""Editing a picture as a prompt says, with diffusers' InstructPix2Pix pipelines as the judge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.export.adapters import make_adapter
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.runtime import Pipeline
from ldm_export.verify.loops import add_loop
from tests.adapters.peft_files import as_diffusers, fused, lora_factors
from tests.diffusers_pipelines import LATENT_TOLERANCE, assert_same, judged, opened
from tests.runtime.host_gpu import add_engines, host_gpu
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Array = np.ndarray[Any, Any]
Kinds = Callable[[str], tuple[Path, Path]]
PROMPTS = ["make it winter", "two green triangles on white"]
NEGATIVES = ["a blue square", "smiling eyes"]
SEEDS = [7, 11]
STEPS = 8
SIZE = (16, 24)
GUIDED: dict[str, Any] = {"steps": STEPS, "guidance": 7.5, "image_guidance": 1.6}
SAMPLERS = ["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis"]


@pytest.fixture(scope="module")
def pictures() -> Array:
    """Two pictures of noise, uint8 (2, 16, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def edited(kinds: Kinds) -> tuple[Any, Pipeline]:
    """diffusers' pipeline, and the bundle's."""
    checkpoint, bundle = kinds("instruct-pix2pix")
    pipe = opened(diffusers.StableDiffusionInstructPix2PixPipeline, checkpoint)
    return pipe, Pipeline.open(bundle, backend="cpu")


def expected(pipe: Any, sampler: str, images: Array, prompts: Any = PROMPTS, seeds: Any = SEEDS, **options: Any) -> Any:
    """Latents of diffusers, from our options."""
    options["image_guidance_scale"] = options.pop("image_guidance", 1.5)
    return judged(pipe, sampler, prompts, seeds, image=list(map(Image.fromarray, images)), **options)


# --- the same pictures as diffusers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler(edited: tuple[Any, Pipeline], pictures: Array, sampler: str) -> None:
    pipe, pipeline = edited
    options = {**GUIDED, "negative_prompt": NEGATIVES}
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, image=pictures, **options)
    assert_same(result, expected(pipe, sampler, pictures, **options), pipe.vae)


@pytest.mark.parametrize(
    ("guidance", "image_guidance"),
    [(7.5, 1.0), (1.01, 3.0), (1.0, 1.5), (0.5, 1.5), (7.5, 0.99), (7.5, 0.0), (0.0, 0.0)],
)
def test_guidances_of_one_and_less(
    edited: tuple[Any, Pipeline], pictures: Array, guidance: float, image_guidance: float
) -> None:
    pipe, pipeline = edited
    options = {"steps": STEPS, "guidance": guidance, "image_guidance": image_guidance}
    result = pipeline.generate(PROMPTS, sampler="euler", seed=SEEDS, image=pictures, **options)
    assert_same(result, expected(pipe, "euler", pictures, **options), pipe.vae)


def test_the_guidances_that_it_has_by_default(edited: tuple[Any, Pipeline], pictures: Array) -> None:
    pipe, pipeline = edited
    result = pipeline.generate(PROMPTS, steps=STEPS, seed=SEEDS, image=pictures)
    assert_same(result, expected(pipe, "ddim", pictures, steps=STEPS), pipe.vae)  # 7.5 and 1.5


def test_another_image_guidance_is_seen(edited: tuple[Any, Pipeline], pictures: Array) -> None:
    pipe, pipeline = edited
    result = pipeline.generate(PROMPTS, seed=SEEDS, image=pictures, **{**GUIDED, "image_guidance": 1.7})
    latents = expected(pipe, "ddim", pictures, **GUIDED)
    assert relative_error(result.latents, latents.numpy()) > 100 * LATENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("negative", [None, "a blue square"])
def test_sdxl_whose_pictures_latents_are_scaled(kinds: Kinds, pictures: Array, negative: str | None) -> None:
    checkpoint, bundle = kinds("instruct-pix2pix xl")
    pipe = opened(diffusers.StableDiffusionXLInstructPix2PixPipeline, checkpoint)
    assert pipe.is_cosxl_edit
    result = Pipeline.open(bundle, backend="cpu").generate(
        PROMPTS, sampler="euler", seed=SEEDS, image=pictures, negative_prompt=negative, **GUIDED
    )
    given = {"height": SIZE[0], "width": SIZE[1], "negative_prompt": negative and [negative], **GUIDED}
    for k, seed in enumerate(SEEDS):  # of several at once diffusers makes too few sizes
        one = expected(pipe, "euler", pictures[k : k + 1], PROMPTS[k : k + 1], [seed], **given)
        assert relative_error(result.latents[k : k + 1], one.numpy()) < LATENT_TOLERANCE


# --- batches, targets, engines --------------------------------------------------------------------------------------


def test_a_batch_is_its_pictures_edited_singly(edited: tuple[Any, Pipeline], pictures: Array) -> None:
    options: dict[str, Any] = {"sampler": "euler-ancestral", **GUIDED}
    batch = edited[1].generate(PROMPTS, seed=SEEDS, image=pictures, negative_prompt=NEGATIVES, **options)
    for k, seed in enumerate(SEEDS):
        one = edited[1].generate(PROMPTS[k], seed=seed, image=pictures[k], negative_prompt=NEGATIVES[k], **options)
        assert relative_error(batch.latents[k], one.latents[0]) < LATENT_TOLERANCE


def test_the_target_for_cpus_edits_the_same_and_skips_blocks(kinds: Kinds, tmp_path: Path, pictures: Array) -> None:
    made = Path(shutil.copytree(kinds("instruct-pix2pix")[1], tmp_path / "bundle"))
    shutil.rmtree(made / "targets", ignore_errors=True)
    plain = Pipeline.open(made, backend="cpu")
    wishes: dict[str, Any] = {"seed": SEEDS, "image": pictures, **GUIDED}
    latents = plain.generate(PROMPTS, **wishes).latents
    build_ort_cpu(Bundle.open(made))
    target = Pipeline.open(made, backend="cpu")
    assert relative_error(target.generate(PROMPTS, **wishes).latents, latents) < LATENT_TOLERANCE
    skipping = target.generate(PROMPTS, deepcache=2, **wishes).latents
    assert LATENT_TOLERANCE < relative_error(skipping, latents) < 1.0
    one = target.generate(PROMPTS[1], deepcache=2, **{**wishes, "seed": SEEDS[1], "image": pictures[1]}).latents
    assert relative_error(skipping[1:], one) < LATENT_TOLERANCE


def test_the_loop_is_the_hosts_with_engines(kinds: Kinds, tmp_path: Path, pictures: Array) -> None:
    made = Bundle.open(shutil.copytree(kinds("instruct-pix2pix")[1], tmp_path / "bundle"))
    shutil.rmtree(made.path / "targets", ignore_errors=True)
    add_engines(made, "tensorrt", largest=16)
    wishes: dict[str, Any] = {"seed": SEEDS, "image": pictures, **GUIDED}
    with host_gpu("tensorrt"):
        one, two = (Pipeline(made, name).generate(PROMPTS, **wishes) for name in ("cpu", "tensorrt"))
    assert relative_error(two.latents, one.latents) < LATENT_TOLERANCE


@pytest.mark.filterwarnings("ignore:::peft", "ignore:__array__ implementation doesn't accept a copy")
def test_adapters_change_all_three_predictions(kinds: Kinds, tmp_path: Path, pictures: Array) -> None:
    """One picture of a batch has an adapter, the other none; diffusers fuses it."""
    checkpoint, bundle = kinds("instruct-pix2pix")
    made = Bundle.open(shutil.copytree(bundle, tmp_path / "bundle"))
    save_file(as_diffusers(lora_factors("sd", checkpoint)), tmp_path / "style.safetensors")
    make_adapter(made, tmp_path / "style.safetensors", tmp_path / "style.ldma")
    adapters = [[(tmp_path / "style.ldma", 0.7)], []]
    latents = (
        Pipeline.open(made.path, backend="cpu")
        .generate(PROMPTS, seed=SEEDS, image=pictures, adapters=adapters, **GUIDED)
        .latents
    )
    parts = fused("sd", checkpoint, (tmp_path / "style.safetensors", 0.7)).components
    judge = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    judge.set_progress_bar_config(disable=True)
    bare = opened(diffusers.StableDiffusionInstructPix2PixPipeline, checkpoint)
    for k, pipe in enumerate((judge, bare)):
        one = expected(pipe, "ddim", pictures[k : k + 1], PROMPTS[k : k + 1], SEEDS[k : k + 1], **GUIDED)
        assert relative_error(latents[k : k + 1], one.numpy()) < LATENT_TOLERANCE
    without = expected(bare, "ddim", pictures[:1], PROMPTS[:1], SEEDS[:1], **GUIDED)
    assert relative_error(latents[:1], without.numpy()) > 0.01


# --- what cannot be edited ------------------------------------------------------------------------------------------

GREY, WHITE = np.full((16, 16, 3), 127, np.uint8), np.full((16, 16), 255, np.uint8)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({}, "This model edits a picture as the prompt says, and none was given. Give the image"),
    "a mask": ({"image": GREY, "mask": WHITE}, "A mask was given; this model edits the whole picture"),
    "a strength": ({"image": GREY, "strength": 0.5}, "A strength was given; this model edits the whole picture"),
    "below 0": ({"image": GREY, "image_guidance": -1}, "image_guidance is -1"),
    "no number": ({"image": GREY, "image_guidance": float("nan")}, "image_guidance is nan"),
    "text": ({"image": GREY, "image_guidance": "1.5"}, "image_guidance is '1.5'"),
    "off": (
        {"image": GREY, "image_guidance": 0.5, "negative_prompt": "red"},
        "image_guidance is 0.5, below 1 of which both guidances are off, so it would do nothing",
    ),
    "whole": ({"image": GREY, "whole": True}, "The whole loop was asked for at once, with an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_wishes_are_one_sentence_before_the_first_step(edited: tuple[Any, Pipeline], case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message) as raised:
        edited[1].steps(PROMPTS, **options)
    assert "\n" not in str(raised.value)


def test_other_models_take_no_image_guidance(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="image_guidance was given, and this model edits no picture"):
        Pipeline.open(tiny_bundle).steps(PROMPTS, image=GREY, image_guidance=1.5)


def test_there_is_no_loop_graph(kinds: Kinds) -> None:
    with pytest.raises(InputError, match="reads another picture's latents beside its own"):
        add_loop(Bundle.open(kinds("instruct-pix2pix")[1]), "ddim-4")
