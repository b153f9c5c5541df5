"""Pictures in plain PyTorch: what an exported model is held against, and what training shows as it goes.

DDIM; for text with classifier-free guidance, as in ``StableDiffusionPipeline``: negative prompts and prompts in one
call of the UNet, starting noise from ``torch.Generator("cpu")``, one generator a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_reference.config import check_choice
from ldm_reference.layout import Autoencoder
from ldm_reference.samplers import ddim
from ldm_reference.schedules import alphas_cumprod_from_config, leading_timesteps, trailing_timesteps
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel


class Drawn(NamedTuple):
    """Pictures uint8 (B, H, W, 3), final latents (B, C, h, w) and milliseconds by stage (text, unet, loop, decode)."""

    images: Tensor
    latents: Tensor
    timings_ms: dict[str, float]


@torch.no_grad()
def text_to_image(
    vae: Autoencoder,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: Mapping[str, Any],
    input_ids: Tensor,
    negative_ids: Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    latent_size: tuple[int, int],
) -> Drawn:
    """Draw one picture a row of token ids.

    Parameters
    ----------
    scheduler : the content of ``scheduler_config.json``
    input_ids, negative_ids : (B, L), int64
    seeds : one a picture
    guidance : scale; without guidance where it is 1 or less
    latent_size : height and width of the latents
    """
    device = unet.conv_in.weight.device
    started = time.perf_counter()
    ids = torch.cat([negative_ids, input_ids]) if guidance > 1 else input_ids
    context = text_encoder(ids.to(device)).last_hidden_state
    text_ms = (time.perf_counter() - started) * 1000

    unet_ms = 0.0

    def denoise(x: Tensor, timestep: int) -> Tensor:
        nonlocal unet_ms
        called = time.perf_counter()
        t = torch.tensor([timestep], device=device)
        if guidance > 1:
            negative, positive = unet(torch.cat([x, x]), t, context).chunk(2)
            out = negative + guidance * (positive - negative)
        else:
            out = unet(x, t, context)
        unet_ms += (time.perf_counter() - called) * 1000
        return out

    started = time.perf_counter()
    latents = _latents(unet, vae.config.latent_channels, scheduler, denoise, seeds, steps, latent_size)
    loop_ms = (time.perf_counter() - started) * 1000 - unet_ms

    started = time.perf_counter()
    sample = vae.decode(latents / vae.config.scaling_factor)
    images = pixels_from_sample(sample)
    decode_ms = (time.perf_counter() - started) * 1000
    return Drawn(images, latents, {"text": text_ms, "unet": unet_ms, "loop": loop_ms, "decode": decode_ms})


@torch.no_grad()
def class_to_image(
    vae: Autoencoder,
    unet: UNet2DConditionModel,
    scheduler: Mapping[str, Any],
    labels: Tensor | None,
    seeds: Sequence[int],
    *,
    steps: int,
    latent_size: tuple[int, int],
) -> Tensor:
    """Draw one picture a seed with a model that reads no text: uint8 (B, H, W, C). ``labels`` are classes (B,)."""
    device = unet.conv_in.weight.device
    classes = {} if labels is None else {"class_labels": labels.to(device)}

    def denoise(x: Tensor, timestep: int) -> Tensor:
        return unet(x, torch.tensor([timestep], device=device), **classes)

    latents = _latents(unet, vae.config.latent_channels, scheduler, denoise, seeds, steps, latent_size)
    return pixels_from_sample(vae.decode(latents / vae.config.scaling_factor))


def _latents(
    unet: UNet2DConditionModel,
    channels: int,
    scheduler: Mapping[str, Any],
    denoise: Callable[[Tensor, int], Tensor],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int],
) -> Tensor:
    """DDIM from the noise of the seeds: (B, C, h, w)."""
    shape = (1, channels, *size)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
    alphas_cumprod = alphas_cumprod_from_config(scheduler)
    return ddim(
        denoise,
        noise.to(unet.conv_in.weight.device),
        alphas_cumprod,
        timesteps_from_config(scheduler, steps),
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        final_alpha_cumprod=1.0 if scheduler.get("set_alpha_to_one", True) else alphas_cumprod[0].item(),
    )


def pixels_from_sample(sample: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def timesteps_from_config(scheduler: Mapping[str, Any], steps: int) -> list[int]:
    """The descending timesteps of DDIM, as ``scheduler_config.json`` spaces them."""
    spacing, count = scheduler.get("timestep_spacing", "leading"), scheduler.get("num_train_timesteps", 1000)
    check_choice("timestep_spacing", spacing, ("leading", "trailing"))
    if spacing == "trailing":
        return trailing_timesteps(count, steps)
    return leading_timesteps(count, steps, scheduler.get("steps_offset", 0))
