"""Reptile (Nichol et al., 1803.02999, algorithm 1): a start from which a few steps of training suffice.

    phi <- phi + eps (W - phi),  W = phi after k steps of AdamW on a task,  eps falls linearly to 0

A batch is a function of the round and the step, so a resumed run gives what an unbroken one gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from ldm_reference.config import ConfigError, check_positive
from ldm_reference.fit import Rows, Run
from ldm_reference.state import write_tensors

SAVE_EVERY = 20
"""Rounds between states on disk."""


@dataclass(frozen=True)
class Reptile:
    """Options of meta-learning.

    Attributes
    ----------
    rounds : tasks that are learnt, one after another
    inner_steps : k, steps on each
    learning_rate : of those, constant
    outer_rate : eps of the first round
    weight_decay, max_grad_norm : as in `ldm_reference.optimisation.Optimisation`
    """

    rounds: int = 200
    inner_steps: int = 10
    learning_rate: float = 1e-3
    outer_rate: float = 1.0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(rounds=self.rounds, inner_steps=self.inner_steps)
        for name in ("learning_rate", "outer_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)!r} must be a number above 0")

    def outer_rate_at(self, number: int) -> float:
        return self.outer_rate * (1 - number / self.rounds)


def descend(run: Run, objective: nn.Module, batches: Iterable[Rows], options: Reptile) -> Iterator[float]:
    """Steps of a new AdamW on the objective's parameters that have a gradient, one a batch; gives the losses.

    Raises
    ------
    ConfigError
        If a loss is not a number.
    """
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=options.weight_decay
    )
    for batch in batches:
        with run.accelerator.autocast():
            loss: Tensor = objective(**{key: value.to(run.device) for key, value in batch.items()})["loss"]
        if not np.isfinite(loss.item()):
            raise ConfigError("the loss is not a number; lower learning_rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield loss.item()


def reptile(
    run: Run, objective: nn.Module, batch_at: Callable[[int, int], Rows], options: Reptile, recipe: str, seed: int
) -> dict[str, Tensor]:
    """Meta-learn the objective's parameters that have a gradient; gives them, on the CPU, by name.

    Parameters
    ----------
    batch_at : the batch of a round's task at one of its steps; a pure function
    recipe : all that the run depends on, as text; a state that was made with another one is refused

    Raises
    ------
    ConfigError
        If the state belongs to another recipe, or a loss is not a number.
    """
    objective.to(run.device).train()
    parameters = {key: value for key, value in objective.named_parameters() if value.requires_grad}
    file = run.state_folder / "reptile.safetensors"
    for number in range(_restore(file, recipe, parameters), options.rounds):
        before = {key: value.detach().clone() for key, value in parameters.items()}
        torch.manual_seed(seed * 1_000_003 + number)  # for dropout
        batches = (batch_at(number, step) for step in range(options.inner_steps))
        losses = list(descend(run, objective, batches, options))
        with torch.no_grad():
            for key, value in parameters.items():
                value.copy_(torch.lerp(before[key], value, options.outer_rate_at(number)))
        done = number + 1
        if done % SAVE_EVERY == 0 or done == options.rounds:
            tensors = {key: value.detach().cpu().contiguous() for key, value in parameters.items()}
            write_tensors(file, tensors, {"rounds": json.dumps(done), "recipe": recipe})
        run.progress("reptile", done, options.rounds, float(np.mean(losses)))
    return {key: value.detach().cpu().clone() for key, value in parameters.items()}


def _restore(file: Path, recipe: str, parameters: Mapping[str, Tensor]) -> int:
    """Rounds already done, 0 if there is no file."""
    if not file.is_file():
        return 0
    try:
        opened = safetensors.safe_open(file, "pt")
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete it to begin again") from error
    with opened as state, torch.no_grad():
        metadata = state.metadata() or {}
        if metadata.get("recipe") != recipe:
            raise ConfigError(f"{file} was made with other data or options; use those, or another folder")
        for key, parameter in parameters.items():
            parameter.copy_(state.get_tensor(key))
        return int(json.loads(metadata["rounds"]))
