"""The PyTorch side of comparisons, with diffusers' pipelines as the judge, for every kind of checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.plan import SAMPLERS
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings, TorchImageGenerator
from tests.diffusers_pipelines import LATENT_TOLERANCE, assert_same, judged, opened
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

PROMPTS = ["a red circle", "two green triangles on white"]
SEEDS = [7, 11]
Kinds = Callable[[str], tuple[Path, Path]]


def generated(checkpoint: Path, settings: SamplingSettings, conditions: Sequence[str | int] = PROMPTS) -> Any:
    """Latents and images of the PyTorch side."""
    sample = TorchImageGenerator(open_checkpoint(checkpoint)).sample(conditions, SEEDS, settings)
    assert len(sample.timings.denoiser_ms) == len(sample.trajectory)
    assert min(sample.timings.denoiser_ms) > 0
    assert sample.timings.decode_ms > 0
    return SimpleNamespace(images=sample.images, latents=sample.trajectory[-1])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stable_diffusion(tiny_checkpoint: Path, sampler: str, guidance: float) -> None:
    pipe = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)
    ours = generated(tiny_checkpoint, SamplingSettings(sampler=sampler, steps=8, guidance=guidance))
    assert_same(ours, judged(pipe, sampler, PROMPTS, SEEDS, steps=8, guidance=guidance), pipe.vae)


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({"timestep_spacing": "linspace"}, "ddim"),
        ({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "ddim"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "dpmpp-2m"),
    ],
    ids=str,
)
def test_other_schedules(tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], sampler: str) -> None:
    checkpoint = with_scheduler(tiny_checkpoint, tmp_path / "other", changes)
    pipe = opened(diffusers.StableDiffusionPipeline, checkpoint)
    ours = generated(checkpoint, SamplingSettings(sampler=sampler, steps=8))
    assert_same(ours, judged(pipe, sampler, PROMPTS, SEEDS, steps=8, guidance=4.0), pipe.vae)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sdxl(kinds: Kinds, tmp_path: Path, guidance: float, zeros: bool) -> None:
    checkpoint = shutil.copytree(kinds("sdxl")[0], tmp_path / "xl")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    ours = generated(checkpoint, SamplingSettings(sampler="euler", steps=8, guidance=guidance))
    assert_same(ours, judged(pipe, "euler", PROMPTS, SEEDS, steps=8, guidance=guidance), pipe.vae)


def test_clipping(kinds: Kinds, tmp_path: Path) -> None:
    """Without guidance, with which this clipped loop makes 2e-4 of a difference of 1e-7 in its noise."""
    checkpoint = with_scheduler(kinds("sdxl")[0], tmp_path / "xl", {"clip_sample": True})
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    ours = generated(checkpoint, SamplingSettings(sampler="ddim", steps=8, guidance=1.0))
    assert_same(ours, judged(pipe, "ddim", PROMPTS, SEEDS, steps=8, guidance=1.0), pipe.vae)


@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_latent_consistency(kinds: Kinds, guidance: float) -> None:
    checkpoint = kinds("lcm")[0]
    pipe = opened(diffusers.LatentConsistencyModelPipeline, checkpoint)
    ours = generated(checkpoint, SamplingSettings(sampler="lcm", steps=4, guidance=guidance))
    assert_same(ours, judged(pipe, "lcm", PROMPTS, SEEDS, steps=4, guidance=guidance), pipe.vae)


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional", "sd2", "sdxl", "lcm"])
def test_a_checkpoint_and_its_bundle_generate_the_same_by_default(kinds: Kinds, kind: str) -> None:
    checkpoint, bundle = kinds(kind)
    image_generators = TorchImageGenerator(open_checkpoint(checkpoint)), BundleImageGenerator(Bundle.open(bundle))
    assert image_generators[0].defaults == image_generators[1].defaults
    conditions = {"text": PROMPTS, "label": [2, 0], None: ["", ""]}[image_generators[0].condition]
    theirs, ours = (
        image_generator.sample(conditions, SEEDS, image_generator.defaults) for image_generator in image_generators
    )
    assert relative_error(ours.trajectory, theirs.trajectory) < LATENT_TOLERANCE
    assert [image_generator.guided(4.0) for image_generator in image_generators] == [kind in ("sd2", "sdxl")] * 2
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "unet", "what"),
    [
        ("inpainting", {}, r"the latents of a picture beside its own \(inpainting\)"),
        ("unconditional", {"class_embed_type": "timestep"}, "class numbers of which there may be any"),
        ("sd2", {"num_class_embeds": 5}, "class numbers beside text"),
    ],
)
def test_what_it_does_not_give_is_named_alone(
    kinds: Kinds, tmp_path: Path, kind: str, unet: dict[str, Any], what: str
) -> None:
    checkpoint = shutil.copytree(kinds(kind)[0], tmp_path / "changed")
    file = checkpoint / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **unet}))
    with pytest.raises(
        InputError, match=rf"changed: the denoiser reads {what}, which the PyTorch side .* does not give"
    ):
        TorchImageGenerator(open_checkpoint(checkpoint))


def with_scheduler(checkpoint: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy with other keys in its scheduler's config."""
    shutil.copytree(checkpoint, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder
