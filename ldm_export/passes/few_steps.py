"""How students of few steps are drawn, and the noise levels that they are taught at, of either kind of noise.

Whatever a student is taught, it is drawn at: the levels are those of the scheduler config that comes with them.

DDPM's noise: with trailing timesteps, those for N steps are every second of those for 2 N. A consistency model is drawn
with ``LCMScheduler``, which chooses among the timesteps of its ``original_inference_steps``.

Flow matching: diffusers' Euler has its last but one level at 1 / num_train_timesteps for every number of steps, so that
levels for N steps are not among those for 2 N, and one step of the few would do next to nothing. ``shift_terminal``
puts that level where N even steps have it, at 1 / N before the shift; those N levels are the student's. Levels on the
way, of 2 N steps, 4 N ..., lie evenly in sigma between them, for a network that knows every level. A consistency model
is drawn with ``stochastic_sampling``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from ldm_reference.flow import FLOW_CLASS, shifted
from ldm_reference.noise import DiffusionNoise, FlowNoise, Levels, noise_from_config
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5
"""Boundary scalings of the sampler ``lcm``: a factor of timesteps, and the deviation of the data."""
Scalings = Callable[[Tensor], tuple[Tensor, Tensor]]
"""c_skip and c_out of a consistency model, c_skip x + c_out x0, at timesteps; (B,) each (2303.01469, eq. 5)."""


def lcm_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings of the sampler ``lcm`` (2303.01469, appendix C)."""
    time = timesteps.float() * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (time.square() + SIGMA_DATA**2), time / (time.square() + SIGMA_DATA**2).sqrt()


def unscaled(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings of flow matching, where x0 = x - sigma out is x at sigma 0 as it is."""
    return torch.zeros_like(timesteps), torch.ones_like(timesteps)


@dataclass(frozen=True)
class FewSteps:
    """How a student is drawn.

    Attributes
    ----------
    scheduler : the content of its ``scheduler_config.json``
    sampler : that of the bundle
    levels : a function from a number of steps that it is taught with to their levels
    scalings : of its guesses of x0, for a consistency model
    """

    scheduler: dict[str, Any]
    sampler: str
    levels: Callable[[int], Levels]
    scalings: Scalings = unscaled


def progressive(model: LatentDiffusion, to: int) -> FewSteps:
    """Levels for ``to`` steps and, for what leads there, ``to`` times powers of 2.

    Raises
    ------
    InputError
        If the model is a consistency model.
    """
    if model.scheduler.get("_class_name") == "LCMScheduler" or model.scheduler.get("stochastic_sampling"):
        raise InputError(f"distill-steps: {model.name} is a consistency model already; leave this pass out.")
    process = noise_from_config(model.scheduler)
    if isinstance(process, FlowNoise):
        return _of_flow(process, to)
    scheduler = {**model.scheduler, "timestep_spacing": "trailing"}
    trailing = DiffusionNoise(scheduler)
    return FewSteps(scheduler, "ddim", lambda steps: trailing.levels(trailing.sampled_timesteps(steps)))


def consistency(model: LatentDiffusion, start: int, to: int) -> FewSteps:
    """Levels for ``start`` steps, among which are those of ``to``.

    Raises
    ------
    InputError
        If ``start`` does not fit.
    """
    process = noise_from_config(model.scheduler)
    if isinstance(process, FlowNoise):
        if start % to:
            raise InputError(f"distill-steps: start = {start} must be a multiple of to = {to} for {model.name}.")
        return _of_flow(process, to, stochastic_sampling=True)
    count = len(process.exact)
    if count % start:
        raise InputError(f"distill-steps: start = {start} must divide the {count} timesteps of {model.name}.")
    scheduler = {
        **model.scheduler,
        "_class_name": "LCMScheduler",
        "original_inference_steps": start,
        "timestep_scaling": TIMESTEP_SCALING,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }

    def levels(steps: int) -> Levels:
        hop = count // steps
        return process.levels([hop * (k + 1) - 1 for k in reversed(range(steps))])

    return FewSteps(scheduler, "lcm", levels, lcm_scalings)


def _of_flow(process: FlowNoise, to: int, **drawing: bool) -> FewSteps:
    scheduler: dict[str, Any] = {
        "_class_name": FLOW_CLASS,
        "num_train_timesteps": process.count,
        "shift": process.shift,
    }
    if to > 1:
        scheduler["shift_terminal"] = shifted(torch.tensor(1 / to, dtype=torch.float64), process.shift).item()
    few = FlowNoise(scheduler).sampled_timesteps(to)

    def levels(steps: int) -> Levels:
        return process.levels(between(few, steps // to))

    return FewSteps({**scheduler, **drawing}, "euler", levels)


def between(timesteps: Sequence[float], parts: int) -> list[float]:
    """Descending timesteps, each with parts - 1 more, evenly on the way to the next, or to 0 after the last."""
    return [
        here + (there - here) * part / parts for here, there in pairwise([*timesteps, 0.0]) for part in range(parts)
    ]
