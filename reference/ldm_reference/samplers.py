"""Textbook samplers: DDPM, DDIM and PLMS as plain loops, the truth that compiled plans are compared with.

Each walks down a list of timesteps and from the last to ``final_alpha_cumprod``. ``denoise(x, timestep)`` is the
(guided) network; what it predicts enters through an adapter that gives the predicted image and noise, and randomness
through ``noise(x)``, which returns N(0, I) of the shape of x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int], Tensor]

PREDICTIONS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda x, eps, alpha, sigma: ((x - sigma * eps) / alpha, eps),
    "v_prediction": lambda x, v, alpha, sigma: (alpha * x - sigma * v, alpha * v + sigma * x),
    "sample": lambda x, x0, alpha, sigma: (x0, (x - alpha * x0) / sigma),
    "flow_prediction": lambda x, out, alpha, sigma: (x - sigma * out, x + alpha * out),
}
"""(x, network output, alpha, sigma) -> (predicted x0, predicted eps), where x = alpha x0 + sigma eps; by flow matching
alpha = 1 - sigma."""


def _hops(
    timesteps: Sequence[int], alphas_cumprod: Tensor, final_alpha_cumprod: float
) -> list[tuple[int, Tensor, Tensor]]:
    """Each timestep with the alphas_cumprod that its step leaves from and arrives at."""
    kept = [alphas_cumprod[timestep] for timestep in timesteps] + [alphas_cumprod.new_tensor(final_alpha_cumprod)]
    return list(zip(timesteps, kept[:-1], kept[1:], strict=True))


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    latents: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    *,
    prediction_type: str = "epsilon",
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2) with the posterior's variance, eq. 7.

    Parameters
    ----------
    latents : (B, C, h, w), N(0, I) at ``timesteps[0]``
    alphas_cumprod : (num_train_timesteps,) float64
    timesteps : descending; consecutive ones of a subset are treated as one step of a shorter chain

    Returns
    -------
    (B, C, h, w), the latents at no noise
    """
    x = latents
    for timestep, kept_t, kept_s in _hops(timesteps, alphas_cumprod, final_alpha_cumprod=1.0):
        x0, _ = PREDICTIONS[prediction_type](x, denoise(x, timestep), kept_t.sqrt(), (1 - kept_t).sqrt())
        beta = 1 - kept_t / kept_s
        x = (kept_s.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - kept_s) * x) / (1 - kept_t)
        if timestep != timesteps[-1]:
            x = x + (beta * (1 - kept_s) / (1 - kept_t)).sqrt() * noise(x)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    latents: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    *,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    final_alpha_cumprod: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """DDIM (2010.02502, eq. 12 with sigma from eq. 16): eta 0 is deterministic, 1 adds DDPM's noise.

    Parameters and result as in `ddpm`; ``final_alpha_cumprod`` is 1, or ``alphas_cumprod[0]`` for
    ``set_alpha_to_one=False``.
    """
    x = latents
    for timestep, kept_t, kept_s in _hops(timesteps, alphas_cumprod, final_alpha_cumprod):
        x0, eps = PREDICTIONS[prediction_type](x, denoise(x, timestep), kept_t.sqrt(), (1 - kept_t).sqrt())
        spread = eta * ((1 - kept_s) / (1 - kept_t) * (1 - kept_t / kept_s)).sqrt()
        x = kept_s.sqrt() * x0 + (1 - kept_s - spread**2).sqrt() * eps
        if spread > 0:
            x = x + spread * noise(x)
    return x


@torch.no_grad()
def plms(
    denoise: Denoiser,
    latents: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    *,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float = 1.0,
) -> Tensor:
    """Pseudo linear multistep (PNDM, 2202.09778, eq. 9 and 11) with Stable Diffusion's doubled first step.

    A step is DDIM's with a linear multistep mixture of outputs for the output. The network is asked again at the end
    of the first step, which is then repeated with the mean of both outputs. The mixture is of what the network
    predicts, whatever that is, as in diffusers. Parameters and result as in `ddim`.
    """

    def transfer(x: Tensor, output: Tensor, kept_t: Tensor, kept_s: Tensor) -> Tensor:
        x0, eps = PREDICTIONS[prediction_type](x, output, kept_t.sqrt(), (1 - kept_t).sqrt())
        return kept_s.sqrt() * x0 + (1 - kept_s).sqrt() * eps

    x = latents
    outputs: list[Tensor] = []
    for timestep, kept_t, kept_s in _hops(timesteps, alphas_cumprod, final_alpha_cumprod):
        outputs = [denoise(x, timestep), *outputs[:3]]
        match outputs:
            case [e0]:
                mixture = e0
                if timestep != timesteps[-1]:
                    mixture = (e0 + denoise(transfer(x, e0, kept_t, kept_s), timesteps[1])) / 2
            case [e0, e1]:
                mixture = (3 * e0 - e1) / 2
            case [e0, e1, e2]:
                mixture = (23 * e0 - 16 * e1 + 5 * e2) / 12
            case [e0, e1, e2, e3]:
                mixture = (55 * e0 - 59 * e1 + 37 * e2 - 9 * e3) / 24
        x = transfer(x, mixture, kept_t, kept_s)
    return x
