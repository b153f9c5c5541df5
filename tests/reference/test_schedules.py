"""Noise schedules and the forward process against diffusers' schedulers and against their definitions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from ldm_reference.schedules import (
    ALIASES,
    SCHEDULES,
    add_noise,
    alphas_cumprod_from_betas,
    leading_timesteps,
    make_betas,
    velocity,
)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_betas_are_those_of_diffusers(beta_schedule: str, zero_snr: bool) -> None:
    config = {"beta_schedule": beta_schedule, "beta_start": 0.0008, "beta_end": 0.02, "num_train_timesteps": 200}
    expected = DDPMScheduler(**config, rescale_betas_zero_snr=zero_snr)
    betas = make_betas(**config, rescale_betas_zero_snr=zero_snr)
    torch.testing.assert_close(betas.float(), expected.betas, rtol=1e-5, atol=5e-7)  # 1 - alpha in float32
    torch.testing.assert_close(alphas_cumprod_from_betas(betas).float(), expected.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_quadratic_meets_both_ends_and_cosine_is_squaredcos() -> None:
    betas = make_betas("quadratic", 1000, 0.0001, 0.02)
    assert betas[[0, -1]].tolist() == pytest.approx([0.0001, 0.02])
    roots = betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(999))
    assert ALIASES["cosine"] == "squaredcos_cap_v2"


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first() -> None:
    before = alphas_cumprod_from_betas(make_betas())
    after = alphas_cumprod_from_betas(make_betas(rescale_betas_zero_snr=True))
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])
    assert bool((after.diff() < 0).all())


def test_forward_process_and_velocity_are_those_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas_cumprod = alphas_cumprod_from_betas(make_betas())
    given, expected = add_noise(x0, noise, alphas_cumprod, timesteps), scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    given, expected = velocity(x0, noise, alphas_cumprod, timesteps), scheduler.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_leading_timesteps_are_those_of_diffusers() -> None:
    scheduler = DDPMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(7)
    assert leading_timesteps(1000, 7, steps_offset=1) == scheduler.timesteps.tolist()


def test_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'exp' is not known; known are linear, .*cosine"):
        make_betas("exp")
