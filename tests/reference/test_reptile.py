"""Reptile against the algorithm written out, on a task whose best start is known, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.fit import Rows, Run
from ldm_reference.reptile import Reptile, descend, reptile
from torch import Tensor, nn

OPTIONS = Reptile(rounds=30, inner_steps=4, learning_rate=0.1, weight_decay=0.0)


class Point(nn.Module):
    """Squared distance of a point to a task's goal."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([3.0, -2.0]))

    def forward(self, goal: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.at - goal).square().sum(dim=1).mean()}


def goals(number: int, step: int) -> Rows:
    """Tasks in turn: goals at (1, 0) and (-1, 0), each batch a little off."""
    generator = torch.Generator().manual_seed(100 * number + step)
    centre = torch.tensor([1.0 if number % 2 else -1.0, 0.0])
    return {"goal": centre + 0.1 * torch.randn(3, 2, generator=generator)}


def quiet(folder: Path, progress: Callable[[str, int, int, float], None] = lambda *_: None) -> Run:
    return Run.begin(folder, "no", progress)


def test_it_is_the_algorithm(tmp_path: Path) -> None:
    found = reptile(quiet(tmp_path), Point(), goals, OPTIONS, "recipe", seed=0)["at"]
    phi = Point().at.detach().clone()
    for number in range(OPTIONS.rounds):
        point = Point()
        point.at.data.copy_(phi)
        optimiser = torch.optim.AdamW(point.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(OPTIONS.inner_steps):
            optimiser.zero_grad()
            point(**goals(number, step))["loss"].backward()
            torch.nn.utils.clip_grad_norm_(point.parameters(), 1.0)
            optimiser.step()
        phi += (1 - number / OPTIONS.rounds) * (point.at.detach() - phi)
    assert torch.allclose(found, phi, atol=1e-6)


def test_the_start_lies_between_the_tasks(tmp_path: Path) -> None:
    options = Reptile(rounds=200, inner_steps=4, learning_rate=0.1, weight_decay=0.0)
    found = reptile(quiet(tmp_path), Point(), goals, options, "recipe", seed=0)["at"]
    assert abs(float(found[0])) < 1.0  # where their pulls are opposite: AdamW's steps are of one length
    assert abs(float(found[1])) < 0.1  # where both pull


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path) -> None:
    def interrupt(name: str, done: int, of: int, loss: float) -> None:
        if done == 27:
            raise KeyboardInterrupt

    whole = reptile(quiet(tmp_path / "whole"), Point(), goals, OPTIONS, "recipe", seed=0)
    with pytest.raises(KeyboardInterrupt):
        reptile(quiet(tmp_path / "broken", interrupt), Point(), goals, OPTIONS, "recipe", seed=0)
    begun: list[int] = []
    run = quiet(tmp_path / "broken", lambda name, done, of, loss: begun.append(done))
    broken = reptile(run, Point(), goals, OPTIONS, "recipe", seed=0)
    assert begun[0] == 21
    assert torch.equal(whole["at"], broken["at"])
    with pytest.raises(ConfigError, match="was made with other data or options"):
        reptile(quiet(tmp_path / "broken"), Point(), goals, OPTIONS, "another", seed=0)
    (tmp_path / "broken" / "training" / "reptile.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is damaged"):
        reptile(quiet(tmp_path / "broken"), Point(), goals, OPTIONS, "recipe", seed=0)


def test_what_is_no_number_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a number"):
        list(descend(quiet(tmp_path), Point(), [{"goal": torch.full((1, 2), torch.nan)}], OPTIONS))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"inner_steps": 0}, {"learning_rate": 0.0}, {"outer_rate": -1.0}])
def test_bad_options(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Reptile(**wrong)  # type: ignore[arg-type]
