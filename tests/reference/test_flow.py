"""Flow matching, judged by diffusers' ``FlowMatchEulerDiscreteScheduler``."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.flow import draw_sigma, euler_sigmas, shifted
from ldm_reference.noise import DiffusionNoise, FlowNoise, noise_from_config
from ldm_reference.samplers import PREDICTIONS
from torch import Tensor

CONFIGS: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"shift": 0.5, "num_train_timesteps": 250},
    {"shift_terminal": 0.25},
    {"shift": 2.0, "shift_terminal": 0.1},
]


def randn(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def scheduler_of(config: dict[str, Any], steps: int) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [2, 4, 7, 50])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_levels_and_steps(config: dict[str, Any], steps: int) -> None:
    judge = scheduler_of(config, steps)
    process = noise_from_config(dict(judge.config, _class_name="FlowMatchEulerDiscreteScheduler"))
    levels = process.levels(process.sampled_timesteps(steps))  # type: ignore[arg-type]
    torch.testing.assert_close(levels.timesteps, judge.timesteps)
    torch.testing.assert_close(levels.sigma, judge.sigmas)
    torch.testing.assert_close(levels.alpha, 1 - judge.sigmas)

    def denoise(x: Tensor, timestep: float) -> Tensor:
        return torch.tanh(x + timestep / 500)

    latents = randn(0)
    given = process.sample(denoise, latents, steps)
    for timestep in judge.timesteps:
        latents = judge.step(denoise(latents, timestep.item()), timestep, latents).prev_sample
    torch.testing.assert_close(given, latents, rtol=1e-5, atol=1e-5)


def test_forms_of_what_the_network_predicts() -> None:
    latents, noise, sigma = randn(1), randn(2), torch.tensor([0.3, 1.0])[:, None, None, None]
    process = noise_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500})
    timesteps = sigma.flatten() * 500
    x, out = process.add(latents, noise, timesteps), process.target(latents, noise, timesteps)
    judge = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    judge.set_timesteps(timesteps=timesteps.tolist(), sigmas=sigma.flatten().tolist())
    torch.testing.assert_close(x, judge.scale_noise(latents, timesteps, noise))
    x0, eps = PREDICTIONS[process.prediction_type](x, out, 1 - sigma, sigma)
    torch.testing.assert_close(x0, latents)
    torch.testing.assert_close(eps, noise)


def test_a_shift_moves_levels_up_and_keeps_the_ends() -> None:
    sigma = torch.linspace(0, 1, 11)
    moved = shifted(sigma, 3.0)
    assert (moved[1:-1] > sigma[1:-1]).all()
    assert moved[[0, -1]].tolist() == [0.0, 1.0]
    snr = (1 - sigma[5]) / sigma[5], (1 - moved[5]) / moved[5]
    assert (snr[0] / snr[1]).item() == pytest.approx(3.0)  # the root of the SNR falls by the shift


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_to_train_at_are_logit_normal(shift: float) -> None:
    sigma = draw_sigma(20000, shift, torch.Generator().manual_seed(0))
    assert 0 < sigma.min().item() < sigma.max().item() < 1
    logits = (sigma / (1 - sigma)).log()
    assert logits.mean().item() == pytest.approx(torch.tensor(shift).log().item(), abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_the_noise_is_chosen_by_the_scheduler() -> None:
    by_class = noise_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    by_prediction = noise_from_config({"prediction_type": "flow_prediction", "flow_shift": 3.0})
    assert isinstance(by_class, FlowNoise)
    assert isinstance(by_prediction, FlowNoise)
    assert by_class.sampled_timesteps(5) == by_prediction.sampled_timesteps(5)
    assert isinstance(noise_from_config({"prediction_type": "v_prediction"}), DiffusionNoise)


def test_a_consistency_model_is_not_sampled_by_euler() -> None:
    process = noise_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True})
    with pytest.raises(ConfigError, match=r"^stochastic_sampling = true is of a consistency model"):
        process.sample(lambda x, timestep: x, randn(0), 4)


def test_one_step_is_from_noise_alone() -> None:
    assert euler_sigmas(1, 1000) == [1.0, 0.0]
