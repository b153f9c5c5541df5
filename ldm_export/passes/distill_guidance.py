"""Guidance distillation: one call of the student gives what two calls of the teacher give.

Meng et al., 2210.03142, section 3.1: the student is the teacher's network, taught on noisy latents x_t to predict

    out(x_t, no prompt) + w (out(x_t, prompt) - out(x_t, no prompt)),

for one w that is then part of its weights ("fixed"), or for any w in a range, which it takes as an input, an embedding
added to the time embedding, as in LCM (2310.04378, section 4.2; diffusers' ``timestep_cond``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from ldm_reference.fit import Rows
from ldm_reference.noise import Noise, noise_from_config
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn

from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose, Training
from ldm_export.passes.teacher import Conditions, predict, predict_guided
from ldm_export.plan.guidance import guidance_frequencies
from ldm_export.reading.options import check_between, check_one_of

EMBEDDING = 64
"""Width of the guidance embedding, where there is one."""


@dataclass(frozen=True)
class DistillGuidance(Training):
    """Options.

    Attributes
    ----------
    guidance : the scale that is folded in ("fixed"), or the default of those that can be asked for ("conditioned")
    method : fixed or conditioned
    lowest, highest : of the scales, where conditioned
    """

    name: ClassVar[str] = "distill-guidance"
    purpose: ClassVar[Purpose] = "speed"

    guidance: float = 4.0
    method: str = "fixed"
    lowest: float = 1.0
    highest: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("method", self.method, ("fixed", "conditioned"))
        check_between("guidance", self.guidance, 1.0, 50.0)
        if self.method == "conditioned":
            check_between("lowest", self.lowest, 1.0, self.highest)
            check_between("guidance", self.guidance, self.lowest, self.highest)

    def apply(self, setting: PassContext) -> Change:
        model, data = setting.model, setting.data
        if not data.empty:
            raise InputError(f"{self.name}: {model.name} is drawn without guidance; leave this pass out.")
        if model.drawing.guidance_distilled or model.configs["unet"]["time_cond_proj_dim"]:
            raise InputError(f"{self.name}: {model.name} has guidance in its network already; leave this pass out.")
        teacher = model.load("unet")
        assert isinstance(teacher, UNet2DConditionModel)
        conditioned = self.method == "conditioned"
        student = conditioned_copy(teacher) if conditioned else copy.deepcopy(teacher)
        process = noise_from_config(model.scheduler)
        objective = GuidanceObjective(student.requires_grad_(True), teacher, data.empty, process)

        def rows_at(generator: torch.Generator) -> Rows:
            latents, conditions = data.rows(self.batch_size, generator)
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = process.draw_timesteps(len(latents), generator)
            scales = torch.full((len(latents),), self.guidance)
            if conditioned:
                scales = self.lowest + (self.highest - self.lowest) * torch.rand(len(latents), generator=generator)
            return {"latents": latents, "noise": noise, "timesteps": timesteps, "scales": scales, **conditions}

        weights = self.train(self.name, objective, rows_at, setting)
        student.load_state_dict({key.removeprefix("student."): value for key, value in weights.items()})
        drawing = replace(model.drawing, guidance=self.guidance, guidance_distilled=not conditioned)
        return Change(
            {"unet": student.requires_grad_(False).eval()}, drawing, report={"calls_a_step": {"before": 2, "after": 1}}
        )


class GuidanceObjective(nn.Module):
    """Mean squared difference, in whatever the network predicts, between the student and the guided teacher."""

    def __init__(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel, empty: Conditions, noise: Noise):
        super().__init__()
        self.student, self.teacher, self.empty, self.noise = student, teacher, empty, noise

    def train(self, mode: bool = True) -> GuidanceObjective:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, scales: Tensor, **conditions: Tensor
    ) -> dict[str, Tensor]:
        """Latents and noise (B, C, h, w), timesteps and scales (B,), and the conditions, (B, ...) each."""
        x = self.noise.add(latents, noise, timesteps)
        with torch.no_grad():
            empty = {name: rows.to(x.device) for name, rows in self.empty.items()}
            goal = predict_guided(self.teacher, x, timesteps, conditions, empty, scales[:, None, None, None])
        inputs = dict(conditions)
        if width := self.student.config.time_cond_proj_dim:
            inputs["timestep_cond"] = guidance_embedding(scales, width)
        return {"loss": (predict(self.student, x, timesteps, inputs).float() - goal.float()).square().mean()}


def conditioned_copy(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with an input for the guidance scale, which at first changes nothing."""
    student = UNet2DConditionModel(replace(teacher.config, time_cond_proj_dim=EMBEDDING))
    projection = student.time_embedding.cond_proj
    assert projection is not None
    nn.init.zeros_(projection.weight)
    student.load_state_dict({**teacher.state_dict(), "time_embedding.cond_proj.weight": projection.weight})
    return student


def guidance_embedding(scales: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 (w - 1), sines first: (B,) -> (B, dim) (2310.04378, section 4.2)."""
    angles = (scales[:, None] - 1.0) * torch.from_numpy(guidance_frequencies(dim)).to(scales)
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
