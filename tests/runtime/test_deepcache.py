"""DeepCache from the target's two graphs, compared with diffusers' UNet whose last block is fed with old features."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import ORT_CPU, folder_of
from ldm_export.errors import InputError
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.runtime import Pipeline
from tests.runtime.test_pipeline import LATENT_TOLERANCE, PROMPTS, SEEDS, judged, opened
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("deepcache") / "bundle"))
    build_ort_cpu(bundle)
    return Pipeline(bundle, "cpu")


@pytest.fixture(scope="module")
def judge(tiny_checkpoint: Path) -> Any:
    return opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)


@contextmanager
def old_features(unet: Any, every: int) -> Iterator[list[int]]:
    """Let the last ResNet block read, but for every ``every``-th call, what the last whole call made below it.

    That block's input is what the blocks before it made, and behind it the output of the first convolution. Gives the
    numbers of the whole calls.
    """
    block, skips = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
    calls, whole, kept = [0], [], {}

    def feed(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        if calls[0] % every == 0:
            kept["deep"] = hidden[:, :-skips].clone()
            whole.append(calls[0])
        calls[0] += 1
        return (torch.cat([kept["deep"], hidden[:, -skips:]], dim=1), *rest)

    hook = block.register_forward_pre_hook(feed)
    yield whole
    hook.remove()


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "plms"])
def test_the_latents_are_those_of_diffusers_with_old_features(
    pipeline: Pipeline, judge: Any, sampler: str, every: int
) -> None:
    options: dict[str, Any] = {"steps": 10, "guidance": 4.0}
    drawn = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, deepcache=every, **options)
    with old_features(judge.unet, every) as whole:
        expected = judged(judge, sampler, PROMPTS, SEEDS, **options).numpy()
    calls = len(drawn.timings.denoiser_ms)
    assert whole == list(range(0, calls, every))
    assert relative_error(drawn.latents, expected) < LATENT_TOLERANCE
    plain = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, **options)
    assert (relative_error(drawn.latents, plain.latents) > 100 * LATENT_TOLERANCE) is (every > 1)


def test_every_picture_begins_with_a_whole_call(pipeline: Pipeline) -> None:
    first = pipeline.generate(PROMPTS, seed=SEEDS, steps=10, deepcache=3)
    second = pipeline.generate(PROMPTS, seed=SEEDS, steps=10, deepcache=3)
    np.testing.assert_array_equal(first.latents, second.latents)


def test_other_sizes_and_no_guidance(pipeline: Pipeline, judge: Any) -> None:
    size: dict[str, Any] = {"steps": 10, "guidance": 1.0, "height": 24, "width": 16}
    drawn = pipeline.generate(PROMPTS[:1], sampler="ddim", seed=[5], deepcache=2, **size)
    with old_features(judge.unet, 2):
        expected = judged(judge, "ddim", PROMPTS[:1], [5], **size).numpy()
    assert relative_error(drawn.latents, expected) < LATENT_TOLERANCE


@pytest.mark.parametrize("every", [0, -1, 1.5, "3", True])
def test_what_is_no_number_of_steps(pipeline: Pipeline, every: Any) -> None:
    with pytest.raises(InputError, match=r"^deepcache is .*; give a whole number from 1 to 1048576\.$"):
        pipeline.generate(PROMPTS, seed=SEEDS, deepcache=every)


def test_a_bundle_without_its_target(tiny_bundle: Path) -> None:
    assert not folder_of(Bundle.open(tiny_bundle), ORT_CPU).exists()
    with pytest.raises(InputError, match=r"deepcache 3 was asked for, .* Run: ldm-export build .* --target cpu"):
        Pipeline.open(tiny_bundle, backend="cpu").generate(PROMPTS, seed=SEEDS, steps=10, deepcache=3)
