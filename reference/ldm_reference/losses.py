"""What the stages minimise, term by term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_reference.features import EfficientNetLite0
from ldm_reference.schedules import velocity

PERCEPTUAL_STAGES = 4


def kl_divergence(latent_parameters: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) of (B, 2 C, h, w), averaged over latent values (1312.6114, eq. 10)."""
    mean, logvar = latent_parameters.chunk(2, dim=1)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def perceptual_distance(network: EfficientNetLite0, a: Tensor, b: Tensor) -> Tensor:
    """How different two batches of pictures (B, 3 or 1, H, W) look: 0 where they are equal.

    At every position of the first four stages' outputs, the squared distance between the two feature vectors after
    each was scaled to unit length; averaged over positions, summed over stages (LPIPS, 1801.03924, eq. 1, with all
    channel weights 1). Gradients reach ``a`` alone.
    """
    with torch.no_grad():
        goals = network.stages(b.expand(-1, 3, -1, -1), PERCEPTUAL_STAGES)
    features = network.stages(a.expand(-1, 3, -1, -1), PERCEPTUAL_STAGES)
    pairs = zip(features, goals, strict=True)
    distances = [(_unit(x) - _unit(goal)).square().sum(dim=1).mean() for x, goal in pairs]
    return torch.stack(distances).sum()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-6)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: scores of real patches above 1, of reconstructed ones below -1 (1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def diffusion_target(
    prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Tensor:
    """What the UNet is asked for: the noise (2006.11239, eq. 14), the velocity (2202.00512, appendix D) or x0."""
    targets = {"epsilon": noise, "sample": latents}
    return (
        targets[prediction_type] if prediction_type in targets else velocity(latents, noise, alphas_cumprod, timesteps)
    )


def min_snr_weight(prediction_type: str, alphas_cumprod: Tensor, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Weight of each sample's squared error (Hang et al., 2303.09556, section 3.4): (B,).

    min(SNR, gamma) is the weight of an error in x0; the same error measured in epsilon is SNR times larger, in v
    SNR + 1 times, hence min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1). All ones where ``gamma`` is None.
    That would be 0 in v at SNR 0, and leave the first step of sampling on a zero-terminal schedule untrained: there
    the weight is 1.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    alphas = alphas_cumprod[timesteps]
    snr = alphas / (1.0 - alphas)
    clipped = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "epsilon":
        return clipped / snr
    return torch.where(snr > 0, clipped / (snr + 1.0), torch.ones_like(snr))


def contrastive_loss(text: Tensor, pictures: Tensor, logit_scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al., 2103.00020, figure 3).

    Parameters
    ----------
    text, pictures : (B, D), each row of unit length
    logit_scale : (1,), the logarithm of the inverse temperature
    same : (B,) int64, which picture a row shows: rows that share one are all right answers to each other, in equal
    shares
    """
    logits = logit_scale.exp() * text @ pictures.T
    right = (same[:, None] == same[None, :]).float()
    right = right / right.sum(dim=1, keepdim=True)  # symmetric, since equal rows have equal sums
    return 0.5 * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right))
