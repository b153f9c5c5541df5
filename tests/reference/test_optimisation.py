"""The learning rate of every step, against torch's own schedulers, and how a batch is cut up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.optimisation import Optimisation


def settings(**changes: Any) -> Optimisation:
    return Optimisation(**{"steps": 100, "batch_size": 8, "learning_rate": 2.0, "warmup_steps": 10, **changes})


def rates(scheduler: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimiser(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "cyclic"])
def test_warm_up_is_linear(schedule: str) -> None:
    ours = settings(schedule=schedule)
    assert [ours.learning_rate_at(step) for step in range(10)] == pytest.approx(
        [0.2 * (step + 1) for step in range(10)]
    )
    assert ours.learning_rate_at(10) == pytest.approx(2.0)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_cosine_is_torch_s(floor: float) -> None:
    ours = settings(learning_rate_floor=floor)
    judge = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser(2.0), T_max=90, eta_min=2.0 * floor)
    given = [ours.learning_rate_at(step) for step in range(10, 101)]
    assert given == pytest.approx(rates(judge, 91), rel=1e-6, abs=1e-9)


def test_cyclic_is_torch_s() -> None:
    ours = settings(schedule="cyclic", cycle_steps=20, learning_rate_floor=0.25)
    judge = torch.optim.lr_scheduler.CyclicLR(
        optimiser(0.5), base_lr=0.5, max_lr=2.0, step_size_up=10, mode="triangular", cycle_momentum=False
    )
    expected = rates(judge, 100)[10:]  # torch begins at the bottom, ours at the top
    given = [ours.learning_rate_at(step) for step in range(10, 100)]
    assert given == pytest.approx(expected, rel=1e-6)
    assert given[0] == given[20] == given[40] == 2.0
    assert given[10] == given[30] == pytest.approx(0.5)


def test_constant_stays() -> None:
    ours = settings(schedule="constant")
    assert {ours.learning_rate_at(step) for step in range(10, 1000)} == {2.0}


def test_fewer_steps_than_the_warm_up() -> None:
    short = settings(steps=5)
    assert [short.learning_rate_at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_parts_share_a_batch_without_rest(processes: int, parts: int) -> None:
    ours = settings(gradient_accumulation=parts)
    rows = [row for p in range(processes) for k in range(parts) for row in range(8)[ours.rows(processes, p, k)]]
    assert sorted(rows) == list(range(8))


def test_a_batch_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="batch_size = 8 cannot be cut into 3 equal parts"):
        settings().rows(3, 0, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps = 0 must hold integers of at least 1"),
        ({"warmup_steps": 0}, "warmup_steps = 0 must hold integers of at least 1"),
        ({"cycle_steps": 0}, "cycle_steps = 0 must hold integers of at least 1"),
        ({"save_every": 0}, "save_every = 0 must hold integers of at least 1"),
        ({"gradient_accumulation": 0}, "gradient_accumulation = 0 must hold integers of at least 1"),
        ({"sample_every": -1}, "sample_every = -1 must be a number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan must be a number above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0 must be a number above 0"),
        ({"weight_decay": math.inf}, "weight_decay = inf must be a number of at least 0"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0 must be in [0, 1)"),
        ({"learning_rate_floor": 1.5}, "learning_rate_floor = 1.5 must be in [0, 1]"),
    ],
)
def test_an_optimisation_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert str(caught.value) == sentence
