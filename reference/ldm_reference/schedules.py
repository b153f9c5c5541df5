"""Noise schedules and the forward process (DDPM, 2006.11239).

    q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I)
    alphas_cumprod_t = prod_{s <= t} (1 - beta_s)

Schedules carry diffusers' names; `ALIASES` has the papers'. Everything is float64 until it meets the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def linear(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Evenly spaced betas (DDPM, 2006.11239, section 4)."""
    return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)


def scaled_linear(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Evenly spaced square roots, squared, so that beta is quadratic in t and meets both ends (2112.10752).

    The quadratic schedule is this one; squaring a linear schedule would miss beta_start and beta_end.
    """
    return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64) ** 2


def squaredcos_cap_v2(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Cosine alphas_cumprod with betas capped at 0.999 (2102.09672, eq. 17); beta_start and beta_end play no part."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def sigmoid(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas on a sigmoid over [-6, 6] (GeoDiff, 2203.02923)."""
    return beta_start + (beta_end - beta_start) * torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))


SCHEDULES: Mapping[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
    "sigmoid": sigmoid,
}
ALIASES: Mapping[str, str] = {"cosine": "squaredcos_cap_v2", "quadratic": "scaled_linear"}
"""What the papers call two of them; a ``scheduler_config.json`` must have diffusers' name."""


def make_betas(
    beta_schedule: str = "scaled_linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    rescale_betas_zero_snr: bool = False,
) -> Tensor:
    """The variances of the forward process, (num_train_timesteps,) float64 in (0, 1], by name or alias.

    Raises
    ------
    ValueError
        For a schedule that does not exist.
    """
    name = ALIASES.get(beta_schedule, beta_schedule)
    if name not in SCHEDULES:
        raise ValueError(f"beta_schedule {beta_schedule!r} is not known; known are {', '.join([*SCHEDULES, *ALIASES])}")
    betas = SCHEDULES[name](num_train_timesteps, beta_start, beta_end)
    return zero_terminal_snr(betas) if rescale_betas_zero_snr else betas


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at exactly 0 (2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Tensor:
    """That of a ``scheduler_config.json``, (num_train_timesteps,) float64; other keys are not read."""
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "rescale_betas_zero_snr")
    return alphas_cumprod_from_betas(make_betas(**{key: config[key] for key in keys if key in config}))


def alphas_cumprod_from_betas(betas: Tensor) -> Tensor:
    """How much of the image's variance is left at each timestep: decreasing, in [0, 1)."""
    return torch.cumprod(1 - betas, dim=0)


def _levels(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of each timestep in ``like``'s dtype, (B,) -> (B, 1, 1, ...)."""
    kept = alphas_cumprod.to(like.device)[timesteps].reshape(-1, *[1] * (like.dim() - 1))
    return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Sample q(x_t | x_0) with the given noise (DDPM, eq. 4).

    Parameters
    ----------
    x0, noise : (B, C, h, w), floating
    alphas_cumprod : (num_train_timesteps,) float64
    timesteps : (B,) int64 in [0, num_train_timesteps)
    """
    alpha, sigma = _levels(alphas_cumprod, timesteps, x0)
    return alpha * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """The target of v_prediction, alpha * noise - sigma * x0 (2202.00512, appendix D); shapes as in `add_noise`."""
    alpha, sigma = _levels(alphas_cumprod, timesteps, x0)
    return alpha * noise - sigma * x0


def leading_timesteps(num_train_timesteps: int, steps: int, steps_offset: int = 0) -> list[int]:
    """Evenly spaced timesteps, descending, that leave the gap at the noisy end (2305.08891, table 2, "leading")."""
    stride = num_train_timesteps // steps
    return [index * stride + steps_offset for index in reversed(range(steps))]


def trailing_timesteps(num_train_timesteps: int, steps: int) -> list[int]:
    """Evenly spaced timesteps, descending, that start at the noisiest (2305.08891, table 2, "trailing")."""
    return [round(num_train_timesteps * (steps - index) / steps) - 1 for index in range(steps)]
