"""Drawing a part of a picture anew, with diffusers' inpainting pipelines as the judge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.export import chain
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.inpainting import blended, latents_mask, outpainted
from tests.bundle_fixture import perturb
from tests.diffusers_pipelines import LATENT_TOLERANCE, assert_same, judged, opened
from tests.runtime.host_gpu import add_engines, host_gpu
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Array = np.ndarray[Any, Any]
PROMPTS = ["a red circle", "two green triangles on white"]
NEGATIVES = ["a blue square", "smiling eyes"]
SEEDS = [7, 11]
STEPS = 8
SIZE = (16, 24)
GUIDED: dict[str, Any] = {"steps": STEPS, "guidance": 4.0, "negative_prompt": NEGATIVES}
SAMPLERS = ["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis"]


@pytest.fixture(scope="module")
def pictures() -> Array:
    """Two pictures of noise, uint8 (2, 16, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def masks() -> Array:
    """A half, and a frame with a hole, uint8 (2, 16, 24); their edges are not at latents' edges."""
    made = np.zeros((2, *SIZE), np.uint8)
    made[0, :, 13:] = 255
    made[1] = 255
    made[1, 5:11, 3:9] = 0
    return made


def for_diffusers(images: Array, masks: Array) -> dict[str, Any]:
    """Both as its pipelines take them."""
    given = {"image": list(map(Image.fromarray, images)), "mask_image": list(map(Image.fromarray, masks))}
    return {**given, "height": images.shape[1], "width": images.shape[2]}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


@pytest.fixture(scope="module")
def judge(tiny_checkpoint: Path) -> Any:
    parts = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint).components
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def of_nine_channels(
    tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Pipeline]:
    """A Stable Diffusion whose UNet reads mask and masked picture: diffusers' pipeline, and the bundle's."""
    folder = tmp_path_factory.mktemp("nine")
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    unet = diffusers.UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 9})
    parts = {**base.components, "unet": perturb(unet)}
    diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "model")
    chain.export_bundle(open_checkpoint(folder / "model"), folder / "bundle")
    pipe = opened(diffusers.StableDiffusionInpaintPipeline, folder / "model")
    return pipe, Pipeline.open(folder / "bundle", backend="cpu")


# --- the same pictures as diffusers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_of_latents_alone(
    pipeline: Pipeline, judge: Any, pictures: Array, masks: Array, sampler: str, strength: float
) -> None:
    options = {**GUIDED, "strength": strength}
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, image=pictures, mask=masks, **options)
    given = for_diffusers(pictures, masks)
    assert_same(result, judged(judge, sampler, PROMPTS, SEEDS, **given, **options), judge.vae)


@pytest.mark.parametrize("sampler", ["plms", "lcm"])
def test_samplers_that_differ_from_diffusers_from_an_image(
    pipeline: Pipeline, judge: Any, pictures: Array, masks: Array, sampler: str
) -> None:
    options = {**GUIDED, "strength": 1.0}
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, image=pictures, mask=masks, **options)
    given = for_diffusers(pictures, masks)
    assert_same(result, judged(judge, sampler, PROMPTS, SEEDS, **given, **options), judge.vae)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-ancestral", "dpmpp-2m"])
def test_a_model_that_was_trained_to_inpaint(
    of_nine_channels: tuple[Any, Pipeline], pictures: Array, masks: Array, sampler: str, strength: float
) -> None:
    pipe, pipeline = of_nine_channels
    options, given = {**GUIDED, "strength": strength}, for_diffusers(pictures, masks)
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, image=pictures, mask=masks, **options)
    assert_same(result, judged(pipe, sampler, PROMPTS, SEEDS, **given, **options), pipe.vae)


def test_a_model_that_was_trained_to_inpaint_takes_soft_masks_as_diffusers_does(
    of_nine_channels: tuple[Any, Pipeline], pictures: Array
) -> None:
    pipe, pipeline = of_nine_channels
    soft = np.broadcast_to(np.linspace(100, 160, SIZE[1]).astype(np.uint8), (2, *SIZE)).copy()
    result = pipeline.generate(PROMPTS, seed=SEEDS, image=pictures, mask=soft, **GUIDED)
    expected = judged(pipe, "ddim", PROMPTS, SEEDS, **for_diffusers(pictures, soft), **GUIDED, strength=1.0)
    assert_same(result, expected, pipe.vae)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_flow_matching(
    kinds: Callable[[str], tuple[Path, Path]], pictures: Array, masks: Array, sampler: str, strength: float
) -> None:
    checkpoint, bundle = kinds("sd3")
    pipe = opened(diffusers.StableDiffusion3InpaintPipeline, checkpoint)
    options = {"steps": STEPS, "guidance": 5.0, "negative_prompt": NEGATIVES, "strength": strength}
    images, white = pictures[:, :, :16], masks[:, :, :16]
    result = Pipeline.open(bundle, backend="cpu").generate(
        PROMPTS, sampler=sampler, seed=SEEDS, image=images, mask=white, **options
    )
    expected = judged(pipe, sampler, PROMPTS, SEEDS, **for_diffusers(images, white), **options)
    assert_same(result, expected, pipe.vae)


def test_another_mask_is_seen(pipeline: Pipeline, judge: Any, pictures: Array, masks: Array) -> None:
    result = pipeline.generate(PROMPTS, seed=SEEDS, image=pictures, mask=masks[[0, 0]], **GUIDED)
    expected = judged(judge, "ddim", PROMPTS, SEEDS, **for_diffusers(pictures, masks), **GUIDED, strength=1.0)
    assert relative_error(result.latents, expected.numpy()) > 100 * LATENT_TOLERANCE


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nine", [False, True], ids=["any model", "trained to inpaint"])
def test_a_batch_of_masks_is_its_pictures_drawn_singly(
    pipeline: Pipeline, of_nine_channels: tuple[Any, Pipeline], pictures: Array, masks: Array, nine: bool
) -> None:
    pipeline = of_nine_channels[1] if nine else pipeline
    options: dict[str, Any] = {"sampler": "euler-ancestral", "steps": STEPS, "guidance": 4.0, "keep_pixels": True}
    batch = pipeline.generate(PROMPTS, seed=SEEDS, image=pictures, mask=masks, **options)
    for k, seed in enumerate(SEEDS):
        one = pipeline.generate(PROMPTS[k], seed=seed, image=pictures[k], mask=masks[k], **options)
        assert relative_error(batch.latents[k], one.latents[0]) < LATENT_TOLERANCE
        assert np.abs(batch.images[k].astype(int) - one.images[0]).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_the_latents_that_are_kept_are_the_pictures(
    pipeline: Pipeline, pictures: Array, masks: Array, sampler: str
) -> None:
    """Two prompts differ where the mask is white, and nowhere else."""
    one, two = (
        pipeline.generate(prompt, sampler=sampler, steps=STEPS, seed=3, image=pictures[0], mask=masks[0]).latents
        for prompt in PROMPTS
    )
    kept = np.broadcast_to(latents_mask(masks[:1].astype(np.float32), 2) == 0, one.shape)
    np.testing.assert_array_equal(one[kept], two[kept])
    assert (one != two)[~kept].all()


def test_pixels_that_are_kept_are_the_pictures_to_the_bit(pipeline: Pipeline, masks: Array) -> None:
    image = np.arange(16 * 24 * 3).reshape(*SIZE, 3).astype(np.uint8)  # every value
    mask = masks[0].copy()
    mask[:, 12] = 128
    options: dict[str, Any] = {"steps": STEPS, "image": image, "mask": mask}
    plain, kept = (pipeline.generate(PROMPTS[0], keep_pixels=keep, **options).images[0] for keep in (False, True))
    np.testing.assert_array_equal(kept[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(kept[mask == 255], plain[mask == 255])
    assert (plain[mask == 0] != image[mask == 0]).any()
    half = image[mask == 128] * (127 / 255) + plain[mask == 128] * (128 / 255)
    assert np.abs(kept[mask == 128] - half).max() <= 0.5 + 1e-9
    preview = next(iter(pipeline.steps(PROMPTS[0], keep_pixels=True, **options))).decode()[0]
    np.testing.assert_array_equal(preview[mask == 0], image[mask == 0])


def test_a_white_mask_draws_all_anew(pipeline: Pipeline, pictures: Array) -> None:
    """As without an image, but that an image's own noise was drawn before."""
    white = np.full(SIZE, 255, np.uint8)
    one, two = (pipeline.generate(PROMPTS[0], steps=STEPS, image=image, mask=white).latents for image in pictures)
    np.testing.assert_array_equal(one, two)


def test_blended_pixels() -> None:
    drawn, image = np.full((1, 1, 3, 1), 200, np.uint8), np.full((1, 1, 3, 1), 100, np.uint8)
    mask = np.array([[[0.0, 0.25, 1.0]]], np.float32)
    assert blended(drawn, image, mask).ravel().tolist() == [100, 125, 200]


def test_the_gpus_loop_keeps_the_same(tiny_bundle: Path, tmp_path: Path, pictures: Array, masks: Array) -> None:
    made = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("targets")))
    add_engines(made, "tensorrt", largest=16)
    wishes: dict[str, Any] = {"steps": STEPS, "seed": SEEDS, "image": pictures, "mask": masks, "guidance": 4.0}
    with host_gpu("tensorrt"):
        expected, drawn = (Pipeline(made, name).generate(PROMPTS, **wishes) for name in ("cpu", "tensorrt"))
        without = Pipeline(made, "tensorrt").generate(PROMPTS, **{**wishes, "mask": None, "strength": 1.0})
    assert relative_error(drawn.latents, expected.latents) < LATENT_TOLERANCE
    assert relative_error(without.latents, expected.latents) > 100 * LATENT_TOLERANCE


# --- more room ------------------------------------------------------------------------------------------------------


def test_room_around_a_picture(pictures: Array, masks: Array) -> None:
    image, mask = outpainted(pictures[0], None, (4, 0, 2, 6), 2)
    assert image.shape == (22, 30, 3)
    np.testing.assert_array_equal(image[:16, 4:28], pictures[0])
    np.testing.assert_array_equal(image[:16, :4], np.repeat(pictures[0][:, :1], 4, axis=1))  # the edge's colours
    assert (mask[:16, 4:28] == 0).all()
    assert (mask == 255).sum() == 22 * 30 - 16 * 24
    _, mask = outpainted(pictures[0], masks[0], (4, 0, 2, 6), 2)
    np.testing.assert_array_equal(mask[:16, 4:28], masks[0])
    with pytest.raises(InputError, match=r"5 pixels were asked for \(top\) .* a multiple of 2, up to .* Use 4"):
        outpainted(pictures[0], None, (4, 5, 0, 0), 2)
    with pytest.raises(InputError, match="The mask is 16x12 and the image 16x24"):
        outpainted(pictures[0], masks[0][:, :12], (4, 0, 0, 0), 2)


# --- what cannot be drawn -------------------------------------------------------------------------------------------

GREY, WHITE = np.full((16, 16, 3), 127, np.uint8), np.full((16, 16), 255, np.uint8)
THIN = np.zeros((16, 16), np.uint8)
THIN[1::2] = 255
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"mask": WHITE}, "A mask was given without an image"),
    "no mask": ({"image": GREY, "keep_pixels": True}, "keep_pixels was given without a mask"),
    "no flag": ({"image": GREY, "mask": WHITE, "keep_pixels": 1}, "keep_pixels is 1; give True or False"),
    "another size": ({"image": GREY, "mask": WHITE[:8]}, "The mask is 8x16 and the image 16x16; .* Resize the mask"),
    "three channels": ({"image": GREY, "mask": GREY}, r"mask has shape \(16, 16, 3\) .* Convert it to grey"),
    "floats": ({"image": GREY, "mask": WHITE / 255}, r"mask has shape \(16, 16\) and dtype float64; uint8"),
    "too many": ({"image": GREY, "mask": np.stack([WHITE] * 3)}, "3 masks were given for 2 pictures"),
    "none": ({"image": GREY, "mask": np.zeros((0, 16, 16), np.uint8)}, "0 masks were given for 2 pictures"),
    "black": ({"image": GREY, "mask": WHITE * 0}, "Mask 0 is black everywhere"),
    "one black": ({"image": GREY, "mask": np.stack([WHITE, WHITE * 0])}, "Mask 1 is black everywhere"),
    "thin": ({"image": GREY, "mask": THIN}, "Mask 0 is white between the latents only, .* one of 2x2 pixels"),
    "whole": ({"image": GREY, "mask": WHITE, "whole": True}, "asked for at once, with an image and a mask or "),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_masks_are_one_sentence_before_the_first_step(pipeline: Pipeline, case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message) as raised:
        pipeline.steps(PROMPTS, **options)
    assert "\n" not in str(raised.value)


def test_models_that_read_pictures_say_what_they_take(
    kinds: Callable[[str], tuple[Path, Path]], of_nine_channels: tuple[Any, Pipeline]
) -> None:
    with pytest.raises(InputError, match=r"without a mask, as for editing it, and .* Run its graphs"):
        Pipeline.open(kinds("8 channels")[1]).steps(PROMPTS, image=GREY, mask=WHITE)
    for given in ({}, {"image": GREY}, {"mask": WHITE}):
        with pytest.raises(InputError, match=r"trained to inpaint, .* Give both: image and mask"):
            of_nine_channels[1].steps(PROMPTS, **given)
    with pytest.raises(InputError, match="Mask 0 is darker than 128 everywhere"):
        of_nine_channels[1].steps(PROMPTS, image=GREY, mask=WHITE // 2)


def test_a_model_without_text_inpaints(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    made = Pipeline.open(kinds("inpainting")[1], backend="cpu").generate(
        seed=SEEDS, steps=STEPS, image=GREY, mask=WHITE
    )
    assert made.images.shape == (2, 16, 16, 3)
