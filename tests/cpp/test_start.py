"""Masks and pictures that are edited: the C++ runtime draws what the Python one draws, which diffusers judges."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import MANIFEST
from ldm_export.bundle.plans import read_plan
from ldm_export.errors import BundleError, InputError
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.runtime import Pipeline
from tests.cpp.test_same import assert_same, drawn, seeds

Array = np.ndarray[Any, Any]
Kinds = Callable[[str], tuple[Path, Path]]
OpenCpp = Callable[..., Any]
PROMPTS = ["a red circle", "grinning face"]
SEEDS = (7, -3)
STEPS = 8
SIZE = (16, 24)
NEGATIVES = {"negative_prompts": (ctypes.c_char_p * 1)(b"blue"), "negative_prompt_count": 1}
SAMPLERS = ["ddim", "euler", "euler-ancestral", "heun", "plms", "dpmpp-2m", "dpmpp-2m-sde", "unipc"]


@pytest.fixture(scope="module")
def pictures() -> Array:
    """Two pictures of noise, uint8 (2, 16, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def masks() -> Array:
    """A soft slope, and a frame with a hole, uint8 (2, 16, 24); edges are not at latents' edges."""
    made = np.zeros((2, *SIZE), np.uint8)
    made[0] = np.linspace(0, 255, SIZE[1]).astype(np.uint8)
    made[1] = 255
    made[1, 5:11, 3:9] = 0
    return made


def both(
    open_cpp: OpenCpp,
    folder: Path,
    prompts: list[str] | None,
    images: Array,
    masks: Array | None = None,
    for_cpp: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[tuple[Array, Array], Any]:
    """What C++ and Python draw with the same options; ``for_cpp`` are those that are given to C++ otherwise."""
    python = Pipeline.open(folder, backend="cpu").generate(
        prompts, seed=SEEDS, image=images, **({} if masks is None else {"mask": masks}), **options
    )
    given = {name: value.encode() if isinstance(value, str) else value for name, value in options.items()}
    given.pop("negative_prompt", None)
    given |= {"image": images.tobytes(), "image_count": len(images), "height": SIZE[0], "width": SIZE[1]}
    if masks is not None:
        given |= {"mask": masks.tobytes(), "mask_count": len(masks)}
    return drawn(open_cpp(folder), prompts, count=2, seeds=seeds(SEEDS), **given, **(for_cpp or {})), python


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, 1.0, 0.6])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_of_latents_alone(
    open_cpp: OpenCpp, bundle: Path, pictures: Array, masks: Array, sampler: str, strength: float | None
) -> None:
    options = {"sampler": sampler, "steps": STEPS} | ({} if strength is None else {"strength": strength})
    assert_same(*both(open_cpp, bundle, PROMPTS, pictures, masks, **options))


def test_one_picture_and_mask_for_all(open_cpp: OpenCpp, bundle: Path, pictures: Array, masks: Array) -> None:
    assert_same(*both(open_cpp, bundle, PROMPTS, pictures[:1], masks[:1], steps=STEPS))


@pytest.mark.parametrize("deepcache", [1, 3])
def test_fewer_calls_than_steps(open_cpp: OpenCpp, bundle: Path, pictures: Array, masks: Array, deepcache: int) -> None:
    options = {"sampler": "ddim", "steps": 20, "calls": 8, "deepcache": deepcache}
    assert_same(*both(open_cpp, bundle, PROMPTS, pictures, masks, **options))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_flow_matching(open_cpp: OpenCpp, kinds: Kinds, pictures: Array, masks: Array, sampler: str) -> None:
    options = {"sampler": sampler, "steps": STEPS, "strength": 0.7}
    assert_same(*both(open_cpp, kinds("sd3")[1], PROMPTS, pictures, masks, **options))


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_a_model_that_was_trained_to_inpaint(
    open_cpp: OpenCpp, kinds: Kinds, pictures: Array, masks: Array, sampler: str, strength: float | None
) -> None:
    options = {"sampler": sampler, "steps": STEPS} | ({} if strength is None else {"strength": strength})
    assert_same(*both(open_cpp, kinds("inpainting")[1], None, pictures, masks, **options))


def test_pixels_that_are_kept_are_the_pictures_to_the_bit(
    open_cpp: OpenCpp, ldm: Any, bundle: Path, masks: Array
) -> None:
    image = np.arange(2 * 16 * 24 * 3).reshape(2, *SIZE, 3).astype(np.uint8)  # every value
    result, expected = both(open_cpp, bundle, PROMPTS, image, masks, steps=STEPS, keep_pixels=True)
    assert_same(result, expected)
    pixels = result[0].reshape(image.shape)
    np.testing.assert_array_equal(pixels[masks == 0], image[masks == 0])
    assert (pixels[masks == 255] != image[masks == 255]).any()
    seen: list[Array] = []

    def preview(step: Any) -> None:
        buffer, size = (ctypes.c_uint8 * image.size)(), ctypes.c_size_t(image.size)
        assert ldm.ldm_step_preview(ctypes.byref(step), buffer, ctypes.byref(size)) == 0
        seen.append(np.ctypeslib.as_array(buffer).reshape(image.shape).copy())

    given = {"image": image.tobytes(), "image_count": 2, "mask": masks.tobytes(), "mask_count": 2, "keep_pixels": 1}
    open_cpp(bundle).draw(PROMPTS, callback=preview, steps=STEPS, height=SIZE[0], width=SIZE[1], **given)
    assert len(seen) == STEPS
    for pixels in seen:
        np.testing.assert_array_equal(pixels[masks == 0], image[masks == 0])


# --- editing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_that_is_edited(open_cpp: OpenCpp, kinds: Kinds, pictures: Array, sampler: str) -> None:
    options = {"sampler": sampler, "steps": STEPS, "guidance": 6.0, "image_guidance": 1.7, "negative_prompt": "blue"}
    result, expected = both(open_cpp, kinds("instruct-pix2pix")[1], PROMPTS, pictures, for_cpp=NEGATIVES, **options)
    assert_same(result, expected)


@pytest.mark.parametrize(
    ("guidance", "image_guidance"), [(None, None), (7.5, 1.0), (1.0, 1.5), (7.5, 0.99), (7.5, 0.0)]
)
def test_its_guidances(
    open_cpp: OpenCpp, kinds: Kinds, pictures: Array, guidance: float | None, image_guidance: float | None
) -> None:
    given = {"guidance": guidance, "image_guidance": image_guidance}
    options = {name: value for name, value in given.items() if value is not None}
    assert_same(*both(open_cpp, kinds("instruct-pix2pix")[1], PROMPTS, pictures, steps=STEPS, **options))


@pytest.mark.slow
@pytest.mark.parametrize("negative", [False, True])
def test_sdxl_that_edits(open_cpp: OpenCpp, kinds: Kinds, pictures: Array, negative: bool) -> None:
    options: dict[str, Any] = {"negative_prompt": "blue"} if negative else {}
    for_cpp = NEGATIVES if negative else {}
    assert_same(
        *both(open_cpp, kinds("instruct-pix2pix xl")[1], PROMPTS, pictures, for_cpp=for_cpp, steps=STEPS, **options)
    )


@pytest.mark.parametrize("deepcache", [1, 2])
def test_the_target_for_cpus(open_cpp: OpenCpp, kinds: Kinds, tmp_path: Path, pictures: Array, deepcache: int) -> None:
    made = shutil.copytree(kinds("instruct-pix2pix")[1], tmp_path / "bundle")
    shutil.rmtree(made / "targets", ignore_errors=True)
    build_ort_cpu(Bundle.open(made))
    assert_same(*both(open_cpp, made, PROMPTS, pictures, steps=STEPS, deepcache=deepcache))


# --- what cannot be drawn, in the same words ------------------------------------------------------------------------

GREY, WHITE = np.full((16, 16, 3), 127, np.uint8), np.full((16, 16), 255, np.uint8)
THIN = np.zeros((16, 16), np.uint8)
THIN[1::2] = 255
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no image": ("text", {"mask": WHITE}),
    "no mask": ("text", {"image": GREY, "keep_pixels": True}),
    "black": ("text", {"image": GREY, "mask": WHITE * 0}),
    "one black": ("text", {"image": GREY, "mask": np.stack([WHITE, WHITE * 0])}),
    "too many": ("text", {"image": GREY, "mask": np.stack([WHITE] * 3)}),
    "thin": ("text", {"image": GREY, "mask": THIN}),
    "edits none": ("text", {"image": GREY, "image_guidance": 1.5}),
    "inpaints, nothing": ("inpainting", {}),
    "inpaints, no mask": ("inpainting", {"image": GREY}),
    "inpaints, no image": ("inpainting", {"mask": WHITE}),
    "inpaints, dark": ("inpainting", {"image": GREY, "mask": WHITE // 2}),
    "edits, nothing": ("instruct-pix2pix", {}),
    "edits, a mask": ("instruct-pix2pix", {"image": GREY, "mask": WHITE}),
    "edits, a strength": ("instruct-pix2pix", {"image": GREY, "strength": 0.5}),
    "edits, below 0": ("instruct-pix2pix", {"image": GREY, "image_guidance": -0.5}),
    "edits, too much": ("instruct-pix2pix", {"image": GREY, "image_guidance": 1e7}),
    "edits by no guidance": ("8 channels", {"image": GREY}),
}


@pytest.mark.parametrize("case", BAD)
def test_both_refuse_it(open_cpp: OpenCpp, binding: ModuleType, kinds: Kinds, tiny_bundle: Path, case: str) -> None:
    kind, options = BAD[case]
    folder = tiny_bundle if kind == "text" else kinds(kind)[1]
    prompts = None if kind in ("inpainting", "8 channels") else PROMPTS
    with pytest.raises(InputError) as expected:
        Pipeline.open(folder, backend="cpu").steps(prompts, seed=SEEDS, **options)
    given = {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in options.items()}
    if "mask" in options:
        given["mask_count"] = 1 if options["mask"].ndim == 2 else len(options["mask"])
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(folder).draw(prompts, count=2, height=16, width=16, **given)
    assert caught.value.status == 1
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("change", ["no picture", "a mask, too"])
def test_a_manifest_that_says_three_rows_of_another_model(
    open_cpp: OpenCpp, binding: ModuleType, kinds: Kinds, tiny_bundle: Path, tmp_path: Path, change: str
) -> None:
    folder = tiny_bundle if change == "no picture" else kinds("inpainting")[1]
    made = shutil.copytree(folder, tmp_path / "bundle")
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["roles"]["guidance"]["kind"] = "three_rows"
    (made / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="image_latents"):
        Pipeline.open(made)
    with pytest.raises(binding.LdmError, match="image_latents") as caught:
        open_cpp(made)
    assert caught.value.status == 2


def test_a_plan_that_does_not_tell_its_levels(
    open_cpp: OpenCpp, binding: ModuleType, tiny_bundle: Path, tmp_path: Path
) -> None:
    made = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    plan = read_plan(made, "ddim", 4)
    own = tuple(
        replace(entry, warmup=(row,), resume=k + 1)
        for k, (entry, row) in enumerate(zip(plan.entries, plan.rows, strict=True))
    )
    odd = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], timestep=7.5)), entries=own)
    made.add_file("plans/ddim-4.json", odd.to_json().encode())
    with pytest.raises(InputError, match=r"has no noise levels at timestep 7\.5; ") as expected:
        Pipeline.open(made.path, backend="cpu").steps("red", steps=4, image=GREY, mask=WHITE)
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(made.path).draw(["red"], steps=4, height=16, width=16, image=GREY.tobytes(), mask=WHITE.tobytes())
    assert str(caught.value) == str(expected.value)
