"""The optimisation loop that both stages share: AdamW, warm-up and cosine decay, clipping, EMA, checkpoints, resume.

The loss of step i is a pure function of i and the weights (batches and noise are seeded by the step), so a resumed run
continues exactly where the interrupted one stopped. The state is safetensors, never pickle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ldm_reference.config import ConfigError, check_positive

SAVE_EVERY = 500

Progress = Callable[[str, int, int, float], None]
"""Called with the stage's name, the steps done, the steps in all and the loss."""


@dataclass(frozen=True)
class Optimisation:
    """How a stage is optimised. ``warmup_steps`` of linear warm-up, then a cosine to a tenth of ``learning_rate``."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, batch_size=self.batch_size, warmup_steps=self.warmup_steps)
        for name, value in (("learning_rate", self.learning_rate), ("max_grad_norm", self.max_grad_norm)):
            if not value > 0:
                raise ConfigError(f"{name} = {value!r} must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay!r} must be in [0, 1)")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


def fit(
    name: str,
    modules: Mapping[str, nn.Module],
    loss_at: Callable[[int], Tensor],
    settings: Optimisation,
    state_file: Path,
    recipe: str,
    progress: Progress,
) -> None:
    """Train ``modules`` in place and leave them with their averaged (EMA) weights.

    Parameters
    ----------
    modules : what is trained, by the name that its weights carry in the state file
    loss_at : the loss of a step, a scalar with a gradient
    state_file : read if it is there, written every 500 steps and at the end
    recipe : the configuration as text; a state file that was made with another one is refused

    Raises
    ------
    ConfigError
        If the state file belongs to another recipe, or the loss stops being a number.
    """
    parameters = {
        f"{prefix}.{key}": parameter
        for prefix, module in modules.items()
        for key, parameter in module.named_parameters()
    }
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    average = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    start = _restore(state_file, recipe, parameters, average, optimiser)

    for module in modules.values():
        module.train()
    for step in range(start, settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise ConfigError(
                f"the loss of stage {name!r} is {loss.item()} at step {step}; lower learning_rate and start again"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimiser.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1.0 - decay)
        progress(name, step + 1, settings.steps, loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps:
            _save(state_file, recipe, step + 1, parameters, average, optimiser)

    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(average[key])
    for module in modules.values():
        module.eval()


def _save(
    state_file: Path,
    recipe: str,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    tensors = {}
    for key, parameter in parameters.items():
        state = optimiser.state[parameter]
        tensors[f"weight.{key}"] = parameter.detach()
        tensors[f"average.{key}"] = average[key]
        tensors[f"first_moment.{key}"] = state["exp_avg"]
        tensors[f"second_moment.{key}"] = state["exp_avg_sq"]
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    state_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = state_file.with_suffix(".partial")
    try:
        safetensors.torch.save_file(tensors, temporary, {"step": json.dumps(step), "recipe": recipe})
        os.replace(temporary, state_file)
    finally:
        temporary.unlink(missing_ok=True)


def _restore(
    state_file: Path,
    recipe: str,
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> int:
    """Steps already done: 0 if there is no state file."""
    if not state_file.is_file():
        return 0
    try:
        opened = safetensors.safe_open(state_file, "pt")
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{state_file} is damaged ({error}); delete it to begin this stage again") from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("recipe") != recipe:
            raise ConfigError(f"{state_file} was made with another config; use that one, or train into another folder")
        step = int(json.loads(metadata["step"]))
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{key}"))
                average[key].copy_(file.get_tensor(f"average.{key}"))
                optimiser.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"first_moment.{key}"),
                    "exp_avg_sq": file.get_tensor(f"second_moment.{key}"),
                }
    return step
