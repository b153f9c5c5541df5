"""What a pass over a PyTorch model is given, what it gives back, and how the trained ones are trained.

A pass is a frozen dataclass whose fields are its options in a recipe, with a ``name``, a ``purpose`` and ``apply``. It
changes nothing in place: a checkpoint goes in, and the networks that differ come out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from ldm_reference.config import ConfigError
from ldm_reference.fit import Rows, Run, Stage, fit
from ldm_reference.optimisation import Optimisation
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion, Network, SamplingDefaults
from ldm_export.checkpoint.networks import UNET
from ldm_export.errors import InputError
from ldm_export.passes.teacher import TeacherData
from ldm_export.reading.options import check_least, check_one_of

PRECISIONS = ("no", "bf16", "fp16")
Purpose = Literal["speed", "bytes", "zeros"]
"""What a pass is for, and so what undoes it: not being faster, not being smaller, or neither."""
Progress = Callable[[str, int, int], None]
"""Called with what is done now, how much of it is done, and how much there is."""


def learns_from_noise(model: LatentDiffusion) -> bool:
    """Whether passes can teach the model's denoiser: a UNet."""
    return model.index[model.kind.denoiser][-1] in UNET.classes


@dataclass(frozen=True)
class PassContext:
    """What a pass works with.

    Attributes
    ----------
    model : the checkpoint as the passes before have left it
    teacher : the checkpoint that the recipe began with
    data : what the teacher draws; nothing for passes that learn nothing of it
    folder : for states of an interrupted training
    """

    model: LatentDiffusion
    teacher: LatentDiffusion
    data: TeacherData
    folder: Path
    progress: Progress


@dataclass(frozen=True)
class Change:
    """What a pass did.

    Attributes
    ----------
    networks : those that differ now, by component
    drawing : how the model is drawn with from now on, if that changed
    scheduler : the content of ``scheduler_config.json``, if that changed
    report : what was touched, what was left alone and why, what it cost
    """

    networks: Mapping[str, Network]
    drawing: SamplingDefaults | None = None
    scheduler: Mapping[str, Any] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


class TorchPass(Protocol):
    """A technique that changes the networks."""

    name: ClassVar[str]
    purpose: ClassVar[Purpose]

    def apply(self, setting: PassContext) -> Change: ...


@dataclass(frozen=True)
class Training:
    """Options of every pass that trains, ``fewest_updates`` at least.

    Attributes
    ----------
    updates : of the weights
    batch_size : latents an update
    learning_rate : the highest; linear warm-up over a twentieth of the updates, then cosine down to a tenth
    ema_decay : of the averaged weights, which are what is kept
    mixed_precision : no, bf16, or fp16 (on a GPU)
    """

    fewest_updates: ClassVar[int] = 1

    updates: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-4
    ema_decay: float = 0.995
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("updates", self.updates, self.fewest_updates)
        check_one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        self.optimisation()

    def optimisation(self) -> Optimisation:
        try:
            return Optimisation(
                steps=max(self.updates, 1),
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup_steps=max(1, self.updates // 20),
                ema_decay=self.ema_decay,
                save_every=200,
            )
        except ConfigError as error:
            raise InputError(f"{error}.") from error

    def train(
        self, name: str, objective: nn.Module, rows_at: Callable[[torch.Generator], Rows], setting: PassContext
    ) -> dict[str, Tensor]:
        """Minimise ``objective``; gives the averaged weights by parameter name. Goes on where it was interrupted.

        ``rows_at`` makes a batch from a generator of random numbers that is the step's own.
        """

        def batch_at(step: int) -> Rows:
            return rows_at(torch.Generator().manual_seed(self.seed * 1_000_000_007 + step))

        def progress(stage: str, done: int, of: int, loss: float) -> None:
            setting.progress(f"{stage}: loss {loss:.4f}", done, of)

        key = f"{dataclasses.astuple(self)} {setting.model.sha256('unet')} {setting.model.sha256('vae')}"
        try:
            run = Run.begin(setting.folder, self.mixed_precision, progress)
            return fit(run, Stage(name, objective, batch_at, self.optimisation(), key, self.seed))
        except ConfigError as error:
            raise InputError(f"{error}.") from error
