"""Step distillation: the student reaches in few steps where the teacher arrives in many.

Progressive (Salimans & Ho, 2202.00512, algorithm 2): a student of N steps learns to do in one DDIM step what its
teacher, a student of 2 N steps, does in two; then N halves. From x at t the teacher goes to x' half-way and to x'' at
s, and the x0 that takes DDIM from x to x'' in one step is

    x0* = (x'' - (sigma_s / sigma_t) x) / (alpha_s - (sigma_s / sigma_t) alpha_t).

Consistency (LCM, 2310.04378, algorithm 1): the student's guess of x0 at t agrees with its own, held fixed, one DDIM
step of the teacher further down. The target network is the student itself without an average (Song & Dhariwal,
2310.14189, section 3.2).

By flow matching alpha = 1 - sigma: DDIM's step is Euler's, x0* is x - sigma_t v* of the velocity between the two ends,
v* = (x'' - x) / (sigma_s - sigma_t), and both losses hold as they are. Which levels, and which sampler then draws, is
:mod:`ldm_export.passes.few_steps`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from ldm_reference.fit import Rows
from ldm_reference.noise import Levels, noise_from_config
from ldm_reference.samplers import PREDICTIONS
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn

from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose, Training
from ldm_export.passes.few_steps import Scalings, consistency, progressive
from ldm_export.passes.teacher import Conditions, predict
from ldm_export.reading.options import check_least, check_one_of

HIGHEST_WEIGHT = 100.0
"""Largest weight of an error in x0, where next to no noise is left: 1 / sigma^2 has no bound."""
HUBER = 0.00054
"""Constant of the pseudo-Huber distance, times the root of the dimension (2310.14189, section 3.3)."""


@dataclass(frozen=True)
class DistillSteps(Training):
    """Options; ``updates`` are those of each halving, or all of them for consistency.

    Attributes
    ----------
    method : progressive or consistency
    start : steps that the teacher is drawn with at first (progressive), or of its grid (consistency)
    to : steps of the student
    """

    name: ClassVar[str] = "distill-steps"
    purpose: ClassVar[Purpose] = "speed"

    method: str = "progressive"
    start: int = 32
    to: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("method", self.method, ("progressive", "consistency"))
        check_least("to", self.to, 1)
        check_least("start", self.start, self.to + 1)
        if self.method == "progressive":
            steps = self.start
            while steps > self.to and steps % 2 == 0:
                steps //= 2
            if steps != self.to:
                raise InputError(
                    f"start = {self.start} cannot be halved to {self.to} steps; use {self.to} times a power of 2."
                )

    def apply(self, setting: PassContext) -> Change:
        model, data = setting.model, setting.data
        if data.empty and not model.drawing.guidance_distilled:
            raise InputError(
                f"{self.name}: {model.name} is drawn with guidance; put distill-guidance, with the method fixed, "
                "before this pass."
            )
        unet = model.load("unet")
        assert isinstance(unet, UNet2DConditionModel)
        prediction_type = noise_from_config(model.scheduler).prediction_type
        losses: float | dict[int, float]
        if self.method == "consistency":
            few = consistency(model, self.start, self.to)
            agreeing = ConsistencyObjective(unet, few.levels(self.start), prediction_type, few.scalings)
            unet, losses = self._taught(setting, f"{self.name}-consistency", agreeing, self.start)
        else:
            few, losses, steps = progressive(model, self.to), {}, self.start
            while steps > self.to:
                steps //= 2
                halved = ProgressiveObjective(unet, few.levels(steps), few.levels(2 * steps), prediction_type)
                unet, losses[steps] = self._taught(setting, f"{self.name}-{steps}", halved, steps)
        drawing = replace(model.drawing, sampler=few.sampler, steps=self.to)
        report = {"method": self.method, "steps": self.to, "loss": losses}
        return Change({"unet": unet}, drawing, None if few.scheduler == model.scheduler else few.scheduler, report)

    def _taught(
        self, setting: PassContext, name: str, objective: ProgressiveObjective | ConsistencyObjective, steps: int
    ) -> tuple[UNet2DConditionModel, float]:
        """The averaged student, and its loss at the end of training, on a batch of its own."""

        def rows_at(generator: torch.Generator) -> Rows:
            latents, conditions = setting.data.rows(self.batch_size, generator)
            noise = torch.randn(latents.shape, generator=generator)
            index = torch.randint(steps, (len(latents),), generator=generator)
            return {"latents": latents, "noise": noise, "index": index, **conditions}

        weights = self.train(name, objective, rows_at, setting)
        student = objective.student
        student.load_state_dict({key.removeprefix("student."): value for key, value in weights.items()})
        student.requires_grad_(False).eval()
        with torch.no_grad():
            loss = objective(**rows_at(torch.Generator().manual_seed(self.seed)))["loss"].item()
        return student, loss


def _spread(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


class StepObjective(nn.Module):
    """A student that begins as its teacher."""

    def __init__(self, teacher: UNet2DConditionModel, prediction_type: str):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.prediction_type = prediction_type

    def train(self, mode: bool = True) -> StepObjective:
        super().train(mode)
        self.teacher.eval()
        return self

    def denoise(
        self, unet: UNet2DConditionModel, x: Tensor, level: tuple[Tensor, Tensor, Tensor], conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """The predicted x0 and eps at (timestep, alpha, sigma), each (B,)."""
        timestep, alpha, sigma = level
        out = predict(unet, x, timestep, conditions).float()
        return PREDICTIONS[self.prediction_type](x, out, _spread(alpha), _spread(sigma))

    def ddim(
        self, x: Tensor, level: tuple[Tensor, Tensor, Tensor], to: tuple[Tensor, Tensor], conditions: Conditions
    ) -> Tensor:
        """One step of the teacher, to (alpha, sigma)."""
        x0, eps = self.denoise(self.teacher, x, level, conditions)
        return _spread(to[0]) * x0 + _spread(to[1]) * eps


class ProgressiveObjective(StepObjective):
    """1 / sigma^2 times the squared error of the student's x0 against x0*: the squared error in v."""

    def __init__(self, teacher: UNet2DConditionModel, few: Levels, many: Levels, prediction_type: str):
        super().__init__(teacher, prediction_type)
        self.few, self.many = few, many

    def forward(self, latents: Tensor, noise: Tensor, index: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """Latents and noise (B, C, h, w), the student's step (B,), and the conditions, (B, ...) each."""
        few, many = self.few, self.many
        timestep, (alpha, sigma) = few.timesteps[index], (few.alpha[index], few.sigma[index])
        middle = many.timesteps[2 * index + 1], many.alpha[2 * index + 1], many.sigma[2 * index + 1]
        end = few.alpha[index + 1], few.sigma[index + 1]
        x = _spread(alpha) * latents + _spread(sigma) * noise
        with torch.no_grad():
            half_way = self.ddim(x, (timestep, alpha, sigma), (middle[1], middle[2]), conditions)
            arrived = self.ddim(half_way, middle, end, conditions)
            ratio = end[1] / sigma
            goal = (arrived - _spread(ratio) * x) / _spread(end[0] - ratio * alpha)
        x0, _ = self.denoise(self.student, x, (timestep, alpha, sigma), conditions)
        weight = _spread((1 / sigma.square()).clamp(max=HIGHEST_WEIGHT))
        return {"loss": (weight * (x0 - goal).square()).mean()}


class ConsistencyObjective(StepObjective):
    """Pseudo-Huber distance between the student's x0 here and, fixed, one teacher's step on (2310.14189, eq. 8)."""

    def __init__(self, teacher: UNet2DConditionModel, levels: Levels, prediction_type: str, scalings: Scalings):
        super().__init__(teacher, prediction_type)
        self.levels, self.scalings = levels, scalings

    def forward(self, latents: Tensor, noise: Tensor, index: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """Give the loss, of inputs as :meth:`ProgressiveObjective.forward` takes them."""
        levels = self.levels
        here = levels.timesteps[index], levels.alpha[index], levels.sigma[index]
        last = index + 1 == len(levels.timesteps)
        below = (index + 1).clamp(max=len(levels.timesteps) - 1)
        there = levels.timesteps[below], levels.alpha[index + 1], levels.sigma[index + 1]
        x = _spread(here[1]) * latents + _spread(here[2]) * noise
        with torch.no_grad():
            moved = self.ddim(x, here, (there[1], there[2]), conditions)
            goal = torch.where(_spread(last), moved / _spread(there[1]), self._consistent(moved, there, conditions))
        difference = self._consistent(x, here, conditions) - goal
        scale = HUBER * difference[0].numel() ** 0.5
        return {"loss": (difference.square().sum(dim=(1, 2, 3)) + scale**2).sqrt().sub(scale).mean()}

    def _consistent(self, x: Tensor, level: tuple[Tensor, Tensor, Tensor], conditions: Conditions) -> Tensor:
        """The student's x0 with the boundary scalings of its sampler."""
        x0, _ = self.denoise(self.student, x, level, conditions)
        c_skip, c_out = self.scalings(level[0])
        return _spread(c_skip) * x + _spread(c_out) * x0
