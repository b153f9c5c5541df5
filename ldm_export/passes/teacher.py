"""The latents that students learn from: drawn by the teacher, from prompts or classes alone, or those of pictures.

A recipe needs no training pictures: DDIM, or Euler's method for flow matching, with guidance turns every condition
into latents, and noise added to those
gives the inputs on which a student is taught, as the forward process of the paper's data would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from ldm_reference.config import ConfigError
from ldm_reference.noise import noise_from_config
from ldm_reference.state import write_tensors
from ldm_reference.unet import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_export.checkpoint import Autoencoder, LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError

Conditions = dict[str, Tensor]
"""Inputs of the UNet beside latents and timestep, by name, a row a sample."""

CHUNK = 64
SAVE_EVERY = 8


@dataclass(frozen=True)
class TeacherData:
    """Conditions and what the teacher drew under them.

    Attributes
    ----------
    conditions : (P, ...) each, of every prompt or class; empty for an unconditional model
    empty : what the same inputs are without a prompt, to guide away from; empty where there is no guidance
    latents : (N, C, h, w), scaled as the UNet sees them
    owner : (N,), the condition that each was drawn under
    guidance : the scale that they were drawn with
    """

    conditions: Conditions
    empty: Conditions
    latents: Tensor
    owner: Tensor
    guidance: float

    @classmethod
    def nothing(cls) -> TeacherData:
        """What passes are given that learn nothing."""
        return cls({}, {}, torch.empty(0), torch.empty(0, dtype=torch.int64), 1.0)

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        """Some latents and the conditions that they were drawn under."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        return self.latents[chosen], {name: rows[self.owner[chosen]] for name, rows in self.conditions.items()}


def autocast(mixed_precision: str) -> torch.autocast:
    """Mixed precision on the processor, where the teacher draws; "no" computes in float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def predict(unet: UNet2DConditionModel, x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    prediction: Tensor = unet(x, timesteps, **conditions)
    return prediction


def predict_guided(
    unet: UNet2DConditionModel,
    x: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
    empty: Conditions,
    guidance: float | Tensor,
) -> Tensor:
    """Away from the empty condition by ``guidance``, a number or (B, 1, 1, 1) (Ho & Salimans, 2207.12598, eq. 6)."""
    if not empty:
        return predict(unet, x, timesteps, conditions)
    both = {name: torch.cat([empty[name].expand_as(rows), rows]) for name, rows in conditions.items()}
    negative, positive = predict(unet, torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
    return negative + guidance * (positive - negative)


def encode_conditions(
    model: LatentDiffusion, prompts: Sequence[str | int], tokenize: Callable[[Sequence[str]], Tensor] | None
) -> tuple[Conditions, Conditions]:
    """The UNet's inputs for prompts, classes or, where ``prompts`` is empty, nothing; and those of the empty prompt.

    Raises
    ------
    InputError
        If the model takes anything else (two text encoders, sizes, an embedded guidance scale).
    """
    components = [name for name in model.components if name.startswith("text_encoder")]
    config = model.configs["unet"]
    if len(components) > 1 or config["addition_embed_type"] or config["time_cond_proj_dim"]:
        raise InputError(
            f"{model.name} has more conditions than one text encoder's output; models with one text encoder, "
            "classes or nothing can be taught from. Leave the trained passes out of the recipe."
        )
    if components and tokenize is not None:
        encoder = model.load("text_encoder")
        with torch.no_grad():
            ids = tokenize(["", *map(str, prompts)])
            states = torch.cat([encoder(part).last_hidden_state for part in torch.split(ids, 256)])
        return {"encoder_hidden_states": states[1:]}, {"encoder_hidden_states": states[0]}
    if config["num_class_embeds"]:
        return {"class_labels": torch.tensor([int(label) for label in prompts])}, {}
    return {}, {}


def draw_latents(
    model: LatentDiffusion,
    conditions: Conditions,
    empty: Conditions,
    drawing: SamplingDefaults,
    count: int,
    seed: int,
    file: Path,
    progress: Callable[[str, int, int], None],
    mixed_precision: str = "no",
) -> TeacherData:
    """``count`` latents, condition after condition, in ``file``; goes on where an interrupted run stopped.

    Raises
    ------
    InputError
        If the file is damaged or was drawn otherwise.
    """
    shape = (model.configs["vae"]["latent_channels"], *model.latent_size)
    choices = max((len(rows) for rows in conditions.values()), default=1)
    owner = torch.arange(count) % choices
    made = json.dumps([model.sha256("unet"), choices, drawing.steps, drawing.guidance, count, seed, mixed_precision])
    latents = _read(file, made, shape)
    if len(latents) < count:
        unet = model.load("unet")
        assert isinstance(unet, UNet2DConditionModel)
        parts = [latents]
        for start in range(len(latents), count, CHUNK):
            progress("teacher draws", start, count)
            chosen = range(start, min(start + CHUNK, count))
            rows = {name: values[owner[list(chosen)]] for name, values in conditions.items()}
            with autocast(mixed_precision):
                parts.append(_draw(model, unet, rows, empty, drawing, [seed + k for k in chosen], shape))
            if len(parts) % SAVE_EVERY == 0 or chosen.stop == count:
                write_tensors(file, {"latents": torch.cat(parts)}, {"made": made})
        latents = torch.cat(parts)
    return TeacherData(conditions, empty, latents, owner, drawing.guidance)


@torch.no_grad()
def encode_pictures(model: LatentDiffusion, images: npt.NDArray[np.uint8]) -> Tensor:
    """Pictures uint8 (N, H, W, C) as the means of their latents, (N, C, h, w), scaled as the UNet sees them."""
    vae = model.load("vae")
    assert isinstance(vae, Autoencoder)
    parts = []
    for start in range(0, len(images), CHUNK):
        sample = torch.from_numpy(images[start : start + CHUNK]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        parts.append(vae.encode(sample).chunk(2, dim=1)[0] * vae.config.scaling_factor)
    return torch.cat(parts)


def _draw(
    model: LatentDiffusion,
    unet: UNet2DConditionModel,
    rows: Conditions,
    empty: Conditions,
    drawing: SamplingDefaults,
    seeds: Sequence[int],
    shape: tuple[int, ...],
) -> Tensor:
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def denoise(x: Tensor, timestep: float) -> Tensor:
        return predict_guided(unet, x, torch.full((len(x),), timestep), rows, empty, drawing.guidance).float()

    try:
        return noise_from_config(model.scheduler).sample(denoise, noise, drawing.steps)
    except ConfigError as error:
        raise InputError(f"{model.name}: {error}.") from error


def _read(file: Path, made: str, shape: tuple[int, ...]) -> Tensor:
    """What is there already, (n, C, h, w); none if there is no file."""
    if not file.is_file():
        return torch.empty(0, *shape)
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            latents: Tensor = opened.get_tensor("latents")
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}). Delete it, and it is drawn anew.") from error
    if metadata.get("made") != made or latents.shape[1:] != shape:
        raise InputError(f"{file} was drawn by another teacher or another recipe. Use another --work folder.")
    if not torch.isfinite(latents).all():
        raise InputError(f"{file} holds values that are no numbers. Delete it, and it is drawn anew.")
    return latents
