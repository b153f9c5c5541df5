"""Pictures in plain PyTorch: what training shows as it goes.

DDIM, or Euler's method for flow matching; for text with classifier-free guidance, as in ``StableDiffusionPipeline``:
negative prompts and prompts in one call of the UNet, starting noise from ``torch.Generator("cpu")``, one generator a
picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_reference.layout import Autoencoder
from ldm_reference.noise import noise_from_config
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel


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
) -> Tensor:
    """Draw one picture a row of token ids.

    Parameters
    ----------
    scheduler : the content of ``scheduler_config.json``
    input_ids, negative_ids : (B, L), int64
    seeds : one a picture
    guidance : scale; without guidance where it is 1 or less
    latent_size : height and width of the latents

    Returns
    -------
    uint8 (B, H, W, C)
    """
    ids = torch.cat([negative_ids, input_ids]) if guidance > 1 else input_ids
    context = text_encoder(ids.to(unet.conv_in.weight.device)).last_hidden_state

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if guidance > 1:
            negative, positive = unet(torch.cat([x, x]), t, context).chunk(2)
            return negative + guidance * (positive - negative)
        return unet(x, t, context)

    return _drawn(vae, unet, scheduler, denoise, seeds, steps, latent_size)


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
    """Draw one picture a seed, uint8 (B, H, W, C), with a model that reads no text. ``labels`` are classes (B,)."""
    classes = {} if labels is None else {"class_labels": labels.to(unet.conv_in.weight.device)}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, **classes)

    return _drawn(vae, unet, scheduler, denoise, seeds, steps, latent_size)


def _drawn(
    vae: Autoencoder,
    unet: UNet2DConditionModel,
    scheduler: Mapping[str, Any],
    denoise: Callable[[Tensor, Tensor], Tensor],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int],
) -> Tensor:
    """Latents from the noise of the seeds, decoded; ``denoise`` takes latents and a timestep of shape (1,)."""
    device = unet.conv_in.weight.device
    shape = (1, vae.config.latent_channels, *size)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
    latents = noise_from_config(scheduler).sample(
        lambda x, timestep: denoise(x, torch.tensor([timestep], device=device)), noise.to(device), steps
    )
    return pixels_from_sample(vae.decode(latents / vae.config.scaling_factor))


def pixels_from_sample(sample: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
