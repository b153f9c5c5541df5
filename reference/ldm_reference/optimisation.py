"""How a stage is optimised: AdamW's settings, the learning rate of every step, and how a batch is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm_reference.config import ConfigError, check_choice, check_positive

SCHEDULES = ("cosine", "constant", "cyclic")


@dataclass(frozen=True)
class Optimisation:
    """Options of every stage of training.

    Attributes
    ----------
    steps : updates of the weights
    batch_size : samples an update, over all processes and all parts of an accumulated batch
    learning_rate : the highest; reached after ``warmup_steps`` of linear warm-up (1706.02677, section 2.2)
    schedule : from there "constant"; "cosine", one half wave down (1608.03983, eq. 5); or "cyclic", triangles of
        ``cycle_steps`` between the floor and ``learning_rate``, beginning at the top (1506.01186, section 3.1)
    learning_rate_floor : the lowest, as a share of ``learning_rate``
    gradient_accumulation : parts in which a process computes its share of the batch, one after another
    gradient_checkpointing : recompute the blocks' activations in the backward pass, for memory (1604.06174)
    compile : torch.compile the objective
    ema_decay : of the averaged weights, which are what a stage leaves
    save_every, sample_every : steps between states on disk, and between pictures in ``samples/`` (0 for none)
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    schedule: str = "cosine"
    cycle_steps: int = 1000
    learning_rate_floor: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = 500
    sample_every: int = 0

    def __post_init__(self) -> None:
        check_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            warmup_steps=self.warmup_steps,
            cycle_steps=self.cycle_steps,
            gradient_accumulation=self.gradient_accumulation,
            save_every=self.save_every,
        )
        check_choice("schedule", self.schedule, SCHEDULES)
        for name, value in (("learning_rate", self.learning_rate), ("max_grad_norm", self.max_grad_norm)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value!r} must be a number above 0")
        for name, value in (("weight_decay", self.weight_decay), ("sample_every", self.sample_every)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} = {value!r} must be a number of at least 0")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay!r} must be in [0, 1)")
        if not 0 <= self.learning_rate_floor <= 1:
            raise ConfigError(f"learning_rate_floor = {self.learning_rate_floor!r} must be in [0, 1]")
        self.rows(processes=1, process=0, part=0)

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = step - self.warmup_steps
        if self.schedule == "constant":
            height = 1.0
        elif self.schedule == "cosine":
            height = 0.5 * (1.0 + math.cos(math.pi * done / max(1, self.steps - self.warmup_steps)))
        else:
            height = abs(1.0 - 2.0 * (done % self.cycle_steps) / self.cycle_steps)
        return self.learning_rate * (self.learning_rate_floor + (1.0 - self.learning_rate_floor) * height)

    def rows(self, processes: int, process: int, part: int) -> slice:
        """The rows of a batch that a process computes in one part of its accumulated batch.

        Raises
        ------
        ConfigError
            If the batch cannot be cut into equal parts.
        """
        parts = processes * self.gradient_accumulation
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size = {self.batch_size} cannot be cut into {parts} equal parts "
                f"({processes} processes x gradient_accumulation {self.gradient_accumulation}); use a multiple"
            )
        size = self.batch_size // parts
        begin = (part * processes + process) * size
        return slice(begin, begin + size)
