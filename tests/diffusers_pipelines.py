"""Pictures of diffusers' own pipelines, and how ours are compared with them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import pytest
import torch

from ldm_export.verify.metrics import psnr_db
from tests.scheduler_configs import diffusers_scheduler, relative_error

LATENT_TOLERANCE = 2e-5
"""Of the largest value; 1.6e-6 is what was seen. Noise alone may differ by 4e-6 from processor to processor."""
SAME_PICTURE_DB = 45.0
AS_ASKED = {
    "PixArt": {"use_resolution_binning": False, "clean_caption": False},
    "PRX": {"use_resolution_binning": False},
}
"""Options by which pipelines draw what is asked for, by how their names begin."""
KEYWORDS = {"guidance": "guidance_scale", "steps": "num_inference_steps"}
"""Our options that diffusers has under another name."""


class Made(Protocol):
    """What one of our sides has generated: ``latents`` (B, C, h, w) float32, ``images`` (B, H, W, C) uint8."""

    @property
    def latents(self) -> Any: ...

    @property
    def images(self) -> Any: ...


def opened(pipeline_class: type, checkpoint: Path) -> Any:
    """A diffusers pipeline that shows no progress."""
    parts = inspect.signature(pipeline_class.__init__).parameters
    optional = [name for name in ("text_encoder_3", "tokenizer_3") if name in parts]
    absent = {name: None for name in optional if not (checkpoint / name).is_dir()}  # as whoever has none says
    pipe = pipeline_class.from_pretrained(checkpoint, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judged(pipe: Any, sampler: str, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> torch.Tensor:
    """The final latents of a diffusers pipeline, for once with another scheduler, from our options."""
    pipeline = type(pipe).__name__
    if pipeline == "PRXPipeline" and len(prompts) > 1:  # with guidance it fails on several
        negatives = options.pop("negative_prompt", [""] * len(prompts))
        alone = zip(prompts, negatives, seeds, strict=True)
        return torch.cat(
            [judged(pipe, sampler, [one], [seed], negative_prompt=[no], **options) for one, no, seed in alone]
        )
    scheduler = diffusers_scheduler({**pipe.scheduler.config, "skip_prk_steps": True}, sampler)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    keywords = {KEYWORDS.get(name, name): value for name, value in options.items()}
    keywords |= next((more for start, more in AS_ASKED.items() if pipeline.startswith(start)), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "scheduler", scheduler)
        patch.setattr(pipe, "check_inputs", lambda *_, **__: None)  # it wants multiples of 8, whatever the autoencoder
        return pipe(list(prompts), generator=generators, output_type="latent", **keywords).images


@torch.no_grad()
def assert_same(result: Made, latents: torch.Tensor, vae: Any) -> None:
    """Compare latents and pictures of ours with diffusers' latents, decoded by diffusers."""
    error = relative_error(result.latents, latents.numpy())
    assert error < LATENT_TOLERANCE, error
    decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).sample
    pixels = diffusers.image_processor.VaeImageProcessor().postprocess(decoded, output_type="np")
    assert len(result.images) == len(latents)
    for ours, theirs in zip(result.images, (pixels * 255).round().astype(np.uint8), strict=True):
        assert psnr_db(ours, theirs) > SAME_PICTURE_DB
