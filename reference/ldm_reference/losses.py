"""What the two stages minimise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm_reference.autoencoder import AutoencoderKL, sample_posterior
from ldm_reference.schedules import velocity


def autoencoder_loss(vae: AutoencoderKL, pictures: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean squared error plus ``kl_weight`` times the KL divergence to N(0, I), per latent value (1312.6114, eq. 10).

    Parameters
    ----------
    pictures : (B, 3, H, W), [-1, 1]
    noise : (B, C, h, w), standard normal
    """
    parameters = vae.encode(pictures)
    reconstruction = vae.decode(sample_posterior(parameters, noise))
    mean, logvar = parameters.chunk(2, dim=1)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return F.mse_loss(reconstruction, pictures) + kl_weight * divergence


def diffusion_target(
    prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Tensor:
    """What the UNet is asked for: the noise (2006.11239, eq. 14), the velocity (2202.00512, appendix D) or x0."""
    targets = {"epsilon": noise, "sample": latents}
    return (
        targets[prediction_type] if prediction_type in targets else velocity(latents, noise, alphas_cumprod, timesteps)
    )
