"""A small text model whose UNet trains in seconds, and latents to teach from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference.layout import save_checkpoint
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.families import open_checkpoint
from ldm_export.families.tokenizers import open_tokenizer
from ldm_export.passes.base import PassContext
from ldm_export.passes.teacher import Conditions, TeacherData, encode_conditions
from tests.bundle_fixture import TEXT_UNET, perturb
from tests.conftest import CAPTIONS
from tests.passes.unets import Errors, write_model

GUIDANCE = 4.0


@pytest.fixture(scope="session")
def write_small(tiny_checkpoint: Path) -> Callable[..., LatentDiffusion]:
    """A function that writes `tiny_checkpoint` with a smaller UNet, and changed keys of the scheduler, to a folder."""

    def write(folder: Path, **scheduler: Any) -> LatentDiffusion:
        tiny = open_checkpoint(tiny_checkpoint)
        torch.manual_seed(0)
        save_checkpoint(
            folder,
            vae=tiny.load("vae"),  # type: ignore[arg-type]
            unet=perturb(UNet2DConditionModel.from_config({**TEXT_UNET, "cross_attention_dim": 32})),  # type: ignore[arg-type]
            text_encoder=tiny.load("text_encoder"),  # type: ignore[arg-type]
            tokenizer=lambda path: shutil.copytree(tiny_checkpoint / "tokenizer", path),
            scheduler={**tiny.scheduler, **scheduler},
            dtype=torch.float32,
        )
        return open_checkpoint(folder)

    return write


@pytest.fixture(scope="session")
def model(write_small: Callable[..., LatentDiffusion], tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    """Predicts epsilon, with leading timesteps. Read-only."""
    return write_small(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def folded(model: LatentDiffusion) -> LatentDiffusion:
    """The same, as if guidance were distilled into its UNet."""
    return dataclasses.replace(model, drawn_with=SamplingDefaults("ddim", 8, GUIDANCE, guidance_distilled=True))


@pytest.fixture(scope="session")
def told(model: LatentDiffusion) -> tuple[Conditions, Conditions]:
    """The UNet's inputs for `CAPTIONS`, and for the empty prompt."""
    tokenize = open_tokenizer(model.tokenizer_folder("text_encoder"))
    return encode_conditions(model, CAPTIONS, lambda prompts: torch.from_numpy(tokenize(prompts)))


@pytest.fixture(scope="session")
def data(told: tuple[Conditions, Conditions]) -> TeacherData:
    """Latents of the size that a real model has them, eight of each caption."""
    latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return TeacherData(*told, latents, torch.arange(32) % len(CAPTIONS), GUIDANCE)


@pytest.fixture
def setting(data: TeacherData, tmp_path: Path) -> Callable[..., PassContext]:
    """A function from a model to what a pass is given; its data, folder and progress may be others."""

    def make(model: LatentDiffusion, **changes: Any) -> PassContext:
        plain = PassContext(model, model, data, tmp_path / "work", lambda what, done, of: None)
        return dataclasses.replace(plain, **changes)

    return make


@pytest.fixture(scope="module")
def layered(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    """A model of two layers a stage."""
    return write_model(tmp_path_factory.mktemp("layered") / "layered", tiny_checkpoint)


@pytest.fixture(scope="module")
def teacher(layered: LatentDiffusion) -> UNet2DConditionModel:
    return layered.load("unet")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def errors(layered: LatentDiffusion, data: TeacherData) -> Errors:
    return Errors(layered, data)
