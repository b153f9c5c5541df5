"""Models whose noise levels are by the size of the picture, in both runtimes, judged by diffusers' pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import SCHEDULER, read_plan
from ldm_export.errors import InputError
from ldm_export.runtime import Pipeline
from ldm_export.verify.loops import add_loop
from tests.bundle_fixture import SHIFTING
from tests.cpp.test_kinds import PROMPTS, SEEDS, STEPS, check, drawn_by_both, waves
from tests.diffusers_pipelines import judged, opened
from tests.hostile.base import sound

Shifting = Callable[[str], tuple[Path, Path]]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

SIZES = [(16, 16), (24, 40)]
"""The model's own, and another."""
CASES = [("exponential", "euler"), ("exponential", "dpmpp-2m"), ("linear", "euler"), ("linear", "unipc")]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_text_to_image(
    open_cpp: Callable[..., Any], shifting: Shifting, name: str, sampler: str, size: tuple[int, int]
) -> None:
    checkpoint, folder = shifting(name)
    given: dict[str, Any] = {"guidance": 5.0, "height": size[0], "width": size[1]}
    results = drawn_by_both(open_cpp, folder, "plain", prompts=PROMPTS, sampler=sampler, **given)
    pipe = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    check(results, judged(pipe, sampler, PROMPTS, SEEDS, steps=STEPS, **given), pipe.vae)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SHIFTING)
def test_image_to_image(open_cpp: Callable[..., Any], shifting: Shifting, name: str, size: tuple[int, int]) -> None:
    checkpoint, folder = shifting(name)
    image, given = waves(*size), {"guidance": 5.0, "strength": 0.6}
    results = drawn_by_both(open_cpp, folder, "plain", prompts=PROMPTS, sampler="euler", image=image, **given)
    pipe = opened(diffusers.StableDiffusion3Img2ImgPipeline, checkpoint)
    given |= {"image": [Image.fromarray(picture) for picture in image], "height": size[0], "width": size[1]}
    check(results, judged(pipe, "euler", PROMPTS, SEEDS, steps=STEPS, **given), pipe.vae)


def test_a_file_and_a_loop_are_of_one_size(
    open_cpp: Callable[..., Any], binding: ModuleType, shifting: Shifting, tmp_path: Path
) -> None:
    checkpoint, folder = shifting("exponential")
    bundle = add_loop(Bundle.open(shutil.copytree(folder, tmp_path / "bundle")), f"euler-{STEPS}")
    pipe = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    for size, form in ((SIZES[0], "loop"), (SIZES[0], "plain"), (SIZES[1], "plain")):
        given: dict[str, Any] = {"guidance": 5.0, "height": size[0], "width": size[1]}
        results = drawn_by_both(open_cpp, bundle.path, form, prompts=PROMPTS, sampler="euler", **given)
        check(results, judged(pipe, "euler", PROMPTS, SEEDS, steps=STEPS, **given), pipe.vae)
    wish: dict[str, Any] = {"steps": STEPS, "height": 24, "width": 40}
    for path in (bundle.path, folder):  # with the file of its plan, and with neither
        with pytest.raises(InputError, match="made for 16x16") as expected:
            Pipeline.open(path, backend="cpu").generate(["a cat"], whole=True, **wish)
        with pytest.raises(binding.LdmError) as caught:
            open_cpp(path).draw(["a cat"], whole=1, **wish)
        assert str(caught.value) == str(expected.value)


def test_a_loop_of_any_other_size(
    open_cpp: Callable[..., Any], binding: ModuleType, shifting: Shifting, tmp_path: Path
) -> None:
    """Whoever wrote the file: it says what the loop is made of."""
    bundle = Bundle.open(shutil.copytree(shifting("exponential")[1], tmp_path / "bundle"))
    plan = read_plan(bundle, "euler", STEPS, (24, 40))
    bundle = bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode())
    with pytest.raises(InputError, match="at 16x16; it is made for pictures of 60 tokens, since") as expected:
        Pipeline(bundle, "cpu").generate(["a cat"], whole=True, steps=STEPS)
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(bundle.path).draw(["a cat"], whole=1, steps=STEPS)
    assert str(caught.value) == str(expected.value)


def test_a_file_of_another_size_and_no_scheduler_config(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path
) -> None:
    draft, folder = sound(), tmp_path / "bundle"
    del draft.files[SCHEDULER]
    draft.put("plans/ddim-2.json", draft.document("plans/ddim-2.json") | {"tokens": 16})
    folder.mkdir()
    draft.write(folder)
    cpp, python = open_cpp(folder, backend=b"cpu"), Pipeline.open(folder, backend="cpu")
    python.generate("a cat", steps=2)
    cpp.draw(["a cat"], steps=2)
    with pytest.raises(InputError, match="and pictures of 24 tokens") as expected:
        python.generate("a cat", steps=2, height=8, width=12)
    with pytest.raises(binding.LdmError) as caught:
        cpp.draw(["a cat"], steps=2, height=8, width=12)
    assert str(caught.value) == str(expected.value)
