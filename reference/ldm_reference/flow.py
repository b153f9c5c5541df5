"""Flow matching (2210.02747) along straight lines, rectified flow (2209.03003): the formulas, as SD3 trains by them.

    x = (1 - sigma) x0 + sigma eps,  and the network predicts dx / dsigma = eps - x0, given sigma num_train_timesteps

The names of configs are those of diffusers' ``FlowMatchEulerDiscreteScheduler``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
FLOW_CLASSES = (FLOW_CLASS, "FlowMatchHeunDiscreteScheduler")
"""Classes of diffusers for flow matching alone."""
FLOW_PREDICTION = "flow_prediction"
"""What ``prediction_type`` says of such networks in the classes of diffusers that have the key."""


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved up by ``shift``, down where it is below 1 (SD3, 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels to train at, (count,) float32 in (0, 1): logit-normal of mean 0 and deviation 1, which has most of
    them half-way (SD3, 2403.03206, section 3.1, rf/lognorm(0.00, 1.00)), then `shifted`."""
    return shifted(torch.randn(count, generator=generator).sigmoid(), shift)


def euler_sigmas(steps: int, num_train_timesteps: int, shift: float = 1.0, shift_terminal: float = 0.0) -> list[float]:
    """Noise levels of ``FlowMatchEulerDiscreteScheduler``: steps + 1, descending, the last 0.

    They are even between 1 and the least trained level, which is shifted, and then shifted in their turn, so a
    ``shift`` counts twice. A ``shift_terminal`` above 0 stretches them below 1, so that the last but one is this.
    """
    least = shifted(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift).item()
    sigmas = shifted(torch.linspace(1.0, least, steps, dtype=torch.float64), shift)
    if shift_terminal:
        sigmas = 1 - (1 - sigmas) * (1 - shift_terminal) / (1 - sigmas[-1])
    return [*sigmas.tolist(), 0.0]


@torch.no_grad()
def euler(
    denoise: Callable[[Tensor, float], Tensor], latents: Tensor, sigmas: Sequence[float], num_train_timesteps: int
) -> Tensor:
    """Euler's method on dx / dsigma = ``denoise(x, timestep)``, the (guided) network, from the first of the noise
    levels ``sigmas`` to the last; latents (B, C, h, w) in and out."""
    x = latents
    for here, there in pairwise(sigmas):
        x = x + (there - here) * denoise(x, here * num_train_timesteps)
    return x
