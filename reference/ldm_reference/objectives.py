"""What each stage minimises, as a module: rows of a batch in, the terms of the loss out.

An objective holds the networks that it trains and everything else that the loss needs, so that one call is the whole
forward pass: that is what runs in mixed precision, is wrapped for several processes, and is compiled. Every argument
has one row a sample and ``terms["loss"]`` is a mean over rows, so equal parts of a batch may be computed apart and
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.alignment import AlignmentHeads
from ldm_reference.autoencoder import AutoencoderKL, sample_posterior
from ldm_reference.discriminator import PatchDiscriminator
from ldm_reference.features import EfficientNetLite0
from ldm_reference.losses import (
    contrastive_loss,
    discriminator_hinge,
    kl_divergence,
    perceptual_distance,
)
from ldm_reference.noise import Noise
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel

Terms = dict[str, Tensor]


class AutoencoderObjective(nn.Module):
    """Reconstruction + kl_weight KL + perceptual_weight perceptual distance + adversarial_weight generator loss
    (2112.10752, appendix G; the weight of the last is constant here).

    The discriminator learns in the same backward pass: it sees the reconstruction detached, and the generator sees the
    discriminator's weights detached, so each gets the gradient of its own loss alone.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        reconstruction: Literal["mse", "l1"],
        kl_weight: float,
        kl_warmup_steps: int,
        perceptual_weight: float,
        perceptual: EfficientNetLite0 | None,
        adversarial_weight: float,
        adversarial_start: int,
        discriminator: PatchDiscriminator | None,
    ):
        super().__init__()
        self.vae = vae
        self.discriminator = discriminator
        self.perceptual = perceptual
        self.distance = {"mse": F.mse_loss, "l1": F.l1_loss}[reconstruction]
        self.kl_weight, self.kl_warmup_steps = kl_weight, kl_warmup_steps
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start

    def train(self, mode: bool = True) -> AutoencoderObjective:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # its batch statistics are ImageNet's
        return self

    def forward(self, step: Tensor, pictures: Tensor, noise: Tensor) -> Terms:
        """``step`` (B,) all one number, pictures (B, C, H, W) in [-1, 1], standard normal noise (B, c, h, w)."""
        latent_parameters = self.vae.encode(pictures).float()
        drawn = self.vae.decode(sample_posterior(latent_parameters, noise)).float()
        terms = {"reconstruction": self.distance(drawn, pictures), "kl": kl_divergence(latent_parameters)}
        ramp = ((step[0] + 1) / max(1, self.kl_warmup_steps)).clamp(max=1.0)
        loss = terms["reconstruction"] + self.kl_weight * ramp * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = perceptual_distance(self.perceptual, drawn, pictures).float()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None:
            fixed = {key: parameter.detach() for key, parameter in self.discriminator.named_parameters()}
            fooled = torch.func.functional_call(self.discriminator, fixed, (drawn,)).float()
            real, fake = self.discriminator(pictures).float(), self.discriminator(drawn.detach()).float()
            terms["generator"] = -fooled.mean()
            terms["discriminator"] = discriminator_hinge(real, fake)
            on = (step[0] >= self.adversarial_start).float()
            loss = loss + on * (self.adversarial_weight * terms["generator"] + terms["discriminator"])
        return {"loss": loss, **terms}


class ContrastiveObjective(nn.Module):
    """CLIP's loss between captions and the pictures' fixed features. Sees the rows of all processes at once."""

    def __init__(self, text_encoder: CLIPTextModel, heads: AlignmentHeads):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = heads

    def forward(self, input_ids: Tensor, features: Tensor, picture: Tensor) -> Terms:
        """``input_ids`` (B, L), ``features`` (B, 1280), ``picture`` (B,): which picture a row is of."""
        text = self.heads.text(self.text_encoder(input_ids).pooled).float()
        pictures = self.heads.pictures(features).float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            text, pictures, picture = _gathered(text), _gathered(pictures), _gathered(picture)
        scale = self.heads.logit_scale.clamp(max=4.6052)  # a temperature of at least 0.01, as in CLIP
        best = (text @ pictures.T).argmax(dim=1)
        return {
            "loss": contrastive_loss(text, pictures, scale, picture),
            "accuracy": (picture[best] == picture).float().mean(),
        }


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, with a gradient to this process's own.

    Every process computes the whole loss, and gradients are averaged over processes afterwards; so that the average
    is the gradient of the whole, that of each process's own rows is multiplied by their number.
    """
    count = dist.get_world_size()
    parts = [torch.empty_like(rows) for _ in range(count)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows.detach() + count * (rows - rows.detach()) if rows.requires_grad else rows
    return torch.cat(parts)


class DenoiserObjective(nn.Module):
    """The squared error of the UNet's prediction, averaged over a sample and weighted by Min-SNR."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | None,
        *,
        noise: Noise,
        min_snr_gamma: float | None,
    ):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.noise = noise
        self.min_snr_gamma = min_snr_gamma

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, **conditions: Tensor) -> Terms:
        """Scaled latents and noise (B, c, h, w), timesteps (B,), and of these what the UNet reads: ``input_ids`` (B, L)
        or, of a frozen text encoder, ``encoder_hidden_states`` (B, L, D); ``class_labels`` (B,)."""
        inputs: Mapping[str, Tensor] = conditions
        if "input_ids" in conditions and self.text_encoder is not None:
            inputs = {"encoder_hidden_states": self.text_encoder(conditions["input_ids"]).last_hidden_state}
        noisy = self.noise.add(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, **inputs).float()
        errors = (prediction - self.noise.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
        weights = self.noise.weights(timesteps, self.min_snr_gamma)
        return {"loss": (weights * errors).mean(), "error": errors.mean()}
