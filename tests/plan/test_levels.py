"""Noise levels read off a plan's table, with diffusers' ``add_noise`` as the judge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_export.errors import InputError
from ldm_export.plan import SAMPLERS, Plan, compile_plan, row_levels
from ldm_export.plan.scheduler_classes import samplers_for
from tests.scheduler_configs import base_config, diffusers_scheduler

pytestmark = [  # diffusers hands tensors to numpy functions, and torch speaks an older array protocol than numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

STEPS = 8
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
CONFIGS = {"noise of DDPM": base_config(), "flow matching": FLOW}
CASES = [(name, sampler) for name, config in CONFIGS.items() for sampler in samplers_for(config)]


@pytest.mark.parametrize("from_file", [False, True], ids=["compiled", "read"])
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_levels_are_those_that_diffusers_noises_to(name: str, sampler: str, from_file: bool) -> None:
    plan = compile_plan(CONFIGS[name], sampler, STEPS)
    plan = Plan.from_json(plan.to_json()) if from_file else plan
    scheduler = diffusers_scheduler(CONFIGS[name], sampler)
    scheduler.set_timesteps(STEPS)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    expected = []
    for timestep in scheduler.timesteps:
        scheduler._step_index = None  # flow matching's Heun remembers where it was first
        expected.append([float(scheduler.add_noise(*pair, timestep[None])) for pair in ((one, zero), (zero, one))])
    np.testing.assert_allclose(row_levels(plan, 0), expected, rtol=1e-5, atol=1e-6)
    start = STEPS // 2
    whole = row_levels(plan, start)
    assert whole[0] == (plan.entries[start].image_scale, plan.entries[start].noise_scale)
    assert len(whole) == len(plan.starting_at(start).rows)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m", "unipc"])
def test_levels_of_a_forecast_are_those_of_the_calls_that_are_made(sampler: str) -> None:
    whole, some = (compile_plan(base_config(), f"{sampler}{calls}", 20) for calls in ("", "-calls7"))
    known = dict(zip([row.timestep for row in whole.rows], row_levels(whole, 0), strict=True))
    assert len(some.rows) == 7
    assert list(row_levels(some, 0)) == [known[row.timestep] for row in some.rows]


def test_a_level_that_the_table_does_not_tell() -> None:
    plan = compile_plan(base_config(), "ddim", 4)
    own = tuple(
        replace(entry, warmup=(row,), resume=k + 1)
        for k, (entry, row) in enumerate(zip(plan.entries, plan.rows, strict=True))
    )
    odd = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], timestep=7.5)), entries=own)
    with pytest.raises(
        InputError, match=r"plan ddim with 4 steps has no noise levels at timestep 7\.5; .* Use another"
    ):
        row_levels(odd, 0)
    karras = compile_plan(base_config(use_karras_sigmas=True), "dpmpp-2m-calls30", 60)
    with pytest.raises(InputError, match="has 2 noise levels at timestep 0; "):
        row_levels(karras, 0)
    assert len(row_levels(compile_plan(base_config(use_karras_sigmas=True), "dpmpp-2m", 60), 0)) == 60


def test_every_sampler_has_levels() -> None:
    assert {sampler for _, sampler in CASES} == set(SAMPLERS)
