"""Scheduler configs for the tests of plans, and the loops that run a plan and a diffusers scheduler side by side."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm_export.plan import Stepper, Trajectory
from ldm_export.plan.scheduler_classes import is_flow, samplers_for
from ldm_export.plan.table import Latents

SHAPE = (2, 4, 4, 4)

ALGORITHMS = {"dpmpp-2m": {"algorithm_type": "dpmsolver++"}, "dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"}}
"""Keys of a diffusers config that a sampler's name stands for."""


def base_config(**changes: Any) -> dict[str, Any]:
    """A Stable Diffusion-like ``scheduler_config.json`` with some keys changed."""
    stable_diffusion = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    return stable_diffusion | changes


class Doubled:
    """A stand-in for the name ``torch`` or ``np`` inside a module, where float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


def diffusers_scheduler(config: dict[str, Any], sampler: str, patch: pytest.MonkeyPatch | None = None) -> Any:
    """diffusers' scheduler for the same config; with ``patch``, all of its arithmetic in float64 while that lasts."""
    scheduler_class = getattr(diffusers, samplers_for(config)[sampler].diffusers_class)
    if patch is not None:
        module = sys.modules[scheduler_class.__module__]
        patch.setattr(module, "torch", Doubled(torch))
        patch.setattr(module, "np", Doubled(np))
    config = config | ALGORITHMS.get(sampler, {})
    if is_flow(config) and not scheduler_class.__name__.startswith("FlowMatch"):  # as its users are told to
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        config |= {"flow_shift": config.get("flow_shift", config.get("shift", 1.0))}
    scheduler = scheduler_class.from_config(config)
    if not hasattr(scheduler, "init_noise_sigma"):  # which pipelines with a UNet ask for, and these classes have not
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = lambda sample, timestep=None: sample
        scheduler.add_noise = lambda sample, noise, timestep: scheduler.scale_noise(sample, timestep, noise)
    if not hasattr(scheduler, "scale_noise"):  # which pipelines with a transformer ask for, and these classes have not
        scheduler.scale_noise = lambda sample, timestep, noise: scheduler.add_noise(sample, noise, timestep)
    return scheduler


def network(sample: Latents, timestep: float) -> Latents:
    """A fixed nonlinear stand-in for the UNet, depending on both arguments and mixing neighbours."""
    mixed = np.roll(sample, 1, axis=1) - 0.5 * np.roll(sample, 1, axis=3)
    return np.tanh(0.7 * sample + 0.3 * mixed + np.cos(timestep / 150.0))


def noises(seed: int, dtype: torch.dtype = torch.float64) -> Callable[[], Latents]:
    """A source of N(0, I) draws, in float64 holding the stream that a ``torch.Generator`` gives in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=dtype).double().numpy()


Model = Callable[[Latents, float], Latents]


def run_plan(
    trajectory: Trajectory, draw: Callable[[], Latents], image: Latents | None = None, model: Model = network
) -> Latents:
    """The final latents of a plan in float64, its noise and its steps' drawn from one stream, as in a pipeline."""
    latents = trajectory.noise_scale * draw()
    if image is not None:
        latents += trajectory.image_scale * image
    stepper, buffer = Stepper(trajectory.rows, latents), np.empty_like(latents)
    for row in trajectory.rows:
        stepper.network_input(out=buffer)
        stepper.advance(model(buffer, row.timestep), draw)
    return latents


def run_diffusers(
    scheduler: Any,
    steps: int,
    seed: int,
    image: Latents | None = None,
    start: int = 0,
    eta: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Latents:
    """The final latents of diffusers' pipelines around the scheduler, from noise or from ``image`` at a start step;
    ``options`` are ``set_timesteps``'s."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps, **options)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
    if image is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(torch.from_numpy(image).to(dtype), noise, timesteps[:1])
    accepted = inspect.signature(scheduler.step).parameters
    extras = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in accepted}
    for timestep in timesteps:
        sample = scheduler.scale_model_input(latents, timestep)
        output = torch.from_numpy(network(sample.double().numpy(), float(timestep))).to(dtype)
        latents = scheduler.step(output, timestep, latents, **extras).prev_sample
    return latents.double().numpy()


def relative_error(given: Latents, expected: Latents) -> float:
    """The largest difference over the largest expected value."""
    return float(np.abs(given - expected).max() / np.abs(expected).max())
