"""Structured pruning: a share of the channels, heads and feed-forward width goes, the rest learns to do without.

The channels that the output needs least go first (``importance``), everything that depends on them with them
(``channels``), and the smaller network, which diffusers' config can say and which exports as any other, learns from the
one that it was (``imitation``). With a ratio r of the channels about 1 - (1 - r)^2 of the operations go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from ldm_reference.noise import noise_from_config
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose
from ldm_export.passes.channels import Channels, cut, nearest_share
from ldm_export.passes.imitation import DistillationOptions, PrunedStudent, noisy_rows, timesteps_drawn
from ldm_export.passes.importance import Sums, magnitude, taylor
from ldm_export.passes.teacher import Conditions
from ldm_export.reading.options import check_between, check_one_of

TIMESTEPS, ROWS = 16, 4
"""That the Taylor score is a sum over, and pictures at each."""


@dataclass(frozen=True)
class PruneChannels(DistillationOptions):
    """Options.

    Attributes
    ----------
    ratio : of the channels that go, rounded to what the model's heads and norm groups allow; 0 changes nothing
    importance : taylor or magnitude
    """

    name: ClassVar[str] = "prune-channels"
    purpose: ClassVar[Purpose] = "speed"

    ratio: float = 0.3
    importance: str = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("ratio", self.ratio, 0.0, 0.9)
        check_one_of("importance", self.importance, ("taylor", "magnitude"))

    def apply(self, setting: PassContext) -> Change:
        teacher = setting.model.load("unet")
        assert isinstance(teacher, UNet2DConditionModel)
        share = nearest_share(teacher.config, 1 - self.ratio)
        if share == 1 and self.ratio > 0.1:
            raise InputError(
                f"{self.name}: ratio = {self.ratio:g}, and the heads and norm groups of {setting.model.name} allow "
                "none but 0. Leave the pass out for this model."
            )
        if share == 1:
            return Change({}, report={"ratio": 0.0, "asked": self.ratio, "why": "nothing goes at the nearest ratio"})
        channels = Channels(teacher)
        if self.importance == "taylor":
            generator = torch.Generator().manual_seed(self.seed)
            calls = _calls(setting, generator)
            scores = taylor(
                teacher, channels, calls, generator, lambda done, of: setting.progress(f"{self.name}: scores", done, of)
            )
        else:
            scores = magnitude(teacher, channels)
        report = self.imitate(self.name, setting, smaller := narrowed(teacher, channels, scores, share))
        return Change({"unet": smaller.student}, report={"ratio": float(1 - share), "asked": self.ratio, **report})


def narrowed(teacher: UNet2DConditionModel, channels: Channels, scores: Sums, share: Fraction) -> PrunedStudent:
    """The UNet of the channels with the highest scores."""
    kept = channels.kept(scores, share)
    heads = {}
    for attention, space in channels.heads.items():
        each = channels.spaces[space].size // channels.spaces[space].blocks
        heads[attention] = attention, torch.unique(kept[space] // each)
    stages = {stage: kept[space] for stage, space in channels.streams.items()}
    return PrunedStudent(cut(teacher, kept, share), teacher, stages, heads)


def _calls(setting: PassContext, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor, Conditions]]:
    """Noisy latents at timesteps spread over all that the model may be asked at."""
    process = noise_from_config(setting.model.scheduler)
    timesteps = timesteps_drawn(setting.model)
    guided = bool(setting.data.empty) and not setting.model.drawing.guidance_distilled
    calls = []
    for index in torch.linspace(0, len(timesteps) - 1, min(TIMESTEPS, len(timesteps))).long():
        rows = noisy_rows(setting.data, ROWS, timesteps[index : index + 1], generator, guided=guided)
        latents, noise, times = rows.pop("latents"), rows.pop("noise"), rows.pop("timesteps")
        calls.append((process.add(latents, noise, times), times, rows))
    return calls
