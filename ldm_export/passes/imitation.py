"""A smaller UNet learns from the one that it was made of.

On noisy latents x_t the student is taught the teacher's output, what each of its stages gives (BK-SDM, 2305.15798,
section 3.2), and where its cross-attentions look, which is a distribution over the prompt and so is compared as one, at
a temperature T (Hinton et al., 1503.02531, section 2):

    |out - out*|^2 / |out*|^2  +  w_f mean_k |f_k - f*_k|^2 / |f*_k|^2  +  w_a T^2 KL(softmax(l* / T) | softmax(l / T)).

Of a stage or of heads that were narrowed, the channels that are left are compared with the teacher's same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from ldm_reference.blocks import Attention
from ldm_reference.fit import Rows
from ldm_reference.noise import Noise, noise_from_config
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.passes.base import PassContext, Training
from ldm_export.passes.teacher import Conditions, TeacherData, predict
from ldm_export.plan import compile_plan
from ldm_export.reading.options import check_between, check_least

FEW_STEPS = 10
"""A model that is drawn with fewer is asked at the timesteps of its sampler alone."""
WITHOUT_PROMPT = 0.25
"""Share of a batch that is taught without a prompt, where the model is drawn with guidance."""
MEASURED = 64


@dataclass(frozen=True)
class PrunedStudent:
    """A student as it was cut out of its teacher.

    Attributes
    ----------
    stages : the teacher's channels that each stage of the student still has, by the stage's name
    heads : by the name of each cross-attention, what it is called in the teacher, and the heads of it that are left
    """

    student: UNet2DConditionModel
    teacher: UNet2DConditionModel
    stages: Mapping[str, Tensor]
    heads: Mapping[str, tuple[str, Tensor]]


@dataclass(frozen=True)
class DistillationOptions(Training):
    """Options of every pass that makes a UNet smaller; with 0 ``updates`` it is left as it was cut.

    Attributes
    ----------
    feature_weight : of what the stages give
    attention_weight, temperature : of where the cross-attentions look
    """

    fewest_updates: ClassVar[int] = 0

    feature_weight: float = 0.1
    attention_weight: float = 0.1
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("feature_weight", self.feature_weight, 0)
        check_least("attention_weight", self.attention_weight, 0)
        check_between("temperature", self.temperature, 0.0, 100.0, inclusive=False)

    def imitate(self, name: str, setting: PassContext, smaller: PrunedStudent) -> Mapping[str, Any]:
        """Teach the student, in place; gives the report: sizes, floating-point operations, errors."""
        model, data = setting.model, setting.data
        student, teacher = smaller.student, smaller.teacher
        timesteps = timesteps_drawn(model)
        guided = bool(data.empty) and not model.drawing.guidance_distilled

        def rows_at(generator: torch.Generator) -> Rows:
            return noisy_rows(data, self.batch_size, timesteps, generator, guided=guided)

        objective = Imitation(smaller, noise_from_config(model.scheduler), self)
        measured = noisy_rows(data, MEASURED, timesteps, torch.Generator().manual_seed(self.seed), guided=guided)
        cut = objective.error(**measured)
        if self.updates:
            objective.student.requires_grad_(True)
            weights = self.train(name, objective, rows_at, setting)
            learned = {key.removeprefix("student."): value for key, value in weights.items()}
            student.load_state_dict({**student.state_dict(), **learned})  # masks of pruned weights are not learned
            student.requires_grad_(False).eval()
        taught = objective.error(**measured)
        objective.close()
        one = {key: value[:1] for key, value in measured.items()}
        return {
            "parameters": {"before": parameters(teacher), "after": parameters(student)},
            "flops": {"before": flops(teacher, **one), "after": flops(student, **one)},
            "output_error": {"cut": cut, "taught": taught},
        }


def timesteps_drawn(model: LatentDiffusion) -> Tensor:
    """Those that the model may be asked at, ascending: all, or for few steps those of its sampler."""
    drawing, process = model.drawing, noise_from_config(model.scheduler)
    if drawing.steps >= FEW_STEPS:
        return process.trained_timesteps()
    rows = compile_plan(model.scheduler, drawing.sampler, drawing.steps, tokens=model.tokens).rows
    return process.nearest_timesteps(row.timestep for row in rows)


def noisy_rows(
    data: TeacherData, count: int, timesteps: Tensor, generator: torch.Generator, *, guided: bool = False
) -> dict[str, Tensor]:
    """``latents``, ``noise``, one of the ``timesteps`` each, and the conditions, (B, ...) each: now and then without a
    prompt where the model is drawn with guidance."""
    latents, conditions = data.rows(count, generator)
    noise = torch.randn(latents.shape, generator=generator)
    chosen = timesteps[torch.randint(len(timesteps), (count,), generator=generator)]
    if guided:
        without = torch.rand(count, generator=generator) < WITHOUT_PROMPT
        conditions = {
            name: torch.where(without.reshape(-1, *[1] * (rows.ndim - 1)), data.empty[name], rows)
            for name, rows in conditions.items()
        }
    return {"latents": latents, "noise": noise, "timesteps": chosen, **conditions}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def flops(unet: UNet2DConditionModel, latents: Tensor, noise: Tensor, timesteps: Tensor, **conditions: Tensor) -> int:
    """Floating-point operations of one call for one picture, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        predict(unet, latents, timesteps, conditions)
    return int(counter.get_total_flops())


class FeatureHooks:
    """What some modules of a network gave in its last call, by name."""

    def __init__(self, network: nn.Module, names: list[str]):
        self.given: dict[str, Tensor] = {}
        self._hooks = [network.get_submodule(name).register_forward_hook(self._keeper(name)) for name in names]

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.given[name] = output[-1] if isinstance(output, list) else output

        return keep

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.given.clear()


class Imitation(nn.Module):
    """The loss; ``student`` is trained, ``teacher`` is not."""

    def __init__(self, smaller: PrunedStudent, noise: Noise, options: DistillationOptions):
        super().__init__()
        self.student, self.teacher = smaller.student, smaller.teacher.requires_grad_(False)
        self.stages = smaller.stages if options.feature_weight else {}
        self.heads = smaller.heads if options.attention_weight else {}
        self.options, self.noise = options, noise
        self._ours = FeatureHooks(self.student, [*self.stages, *_projections(self.heads)])
        self._theirs = FeatureHooks(
            self.teacher, [*self.stages, *_projections(name for name, _ in self.heads.values())]
        )

    def train(self, mode: bool = True) -> Imitation:
        super().train(mode)
        self.teacher.eval()
        return self

    def close(self) -> None:
        """Let go of both networks."""
        self._ours.close()
        self._theirs.close()

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """Latents and noise (B, C, h, w), timesteps (B,), and the conditions, (B, ...) each."""
        out, goal = self._both(latents, noise, timesteps, conditions)
        terms = {"output": _relative(out, goal)}
        loss = terms["output"]
        ours, theirs = self._ours.given, self._theirs.given
        if self.stages:
            errors = [_relative(ours[name], theirs[name][:, kept]) for name, kept in self.stages.items()]
            terms["features"] = torch.stack(errors).mean()
            loss = loss + self.options.feature_weight * terms["features"]
        if self.heads:
            errors = [self._attention_distance(name) for name in self.heads]
            terms["attention"] = torch.stack(errors).mean()
            loss = loss + self.options.attention_weight * terms["attention"]
        return {"loss": loss, **terms}

    @torch.no_grad()
    def error(self, latents: Tensor, noise: Tensor, timesteps: Tensor, **conditions: Tensor) -> float:
        """Root mean square of the difference of the outputs, as a share of the teacher's."""
        return _relative(*self._both(latents, noise, timesteps, conditions)).sqrt().item()

    def _both(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        x = self.noise.add(latents, noise, timesteps)
        with torch.no_grad():
            goal = predict(self.teacher, x, timesteps, conditions)
        return predict(self.student, x, timesteps, conditions), goal

    def _attention_distance(self, name: str) -> Tensor:
        """T^2 KL over the tokens of the prompt, mean over pictures, heads and positions."""
        temperature = self.options.temperature
        origin, kept = self.heads[name]
        ours = _attention(self.student, name, self._ours.given, temperature)
        theirs = _attention(self.teacher, origin, self._theirs.given, temperature)[:, kept]
        return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1).mean()


def _projections(attentions: Iterable[str]) -> list[str]:
    return [f"{name}.{side}" for name in attentions for side in ("to_q", "to_k")]


def _attention(unet: UNet2DConditionModel, name: str, given: Mapping[str, Tensor], temperature: float) -> Tensor:
    """log softmax(q k^T / (T sqrt(d))) of an attention: (B, heads, N, M)."""
    attention = unet.get_submodule(name)
    assert isinstance(attention, Attention)
    projected = [given[side].float() for side in _projections([name])]
    q, k = (x.reshape(*x.shape[:2], attention.heads, -1).transpose(1, 2) for x in projected)
    return F.log_softmax(q @ k.transpose(2, 3) / (temperature * q.shape[-1] ** 0.5), dim=-1)


def _relative(values: Tensor, goal: Tensor) -> Tensor:
    goal = goal.float()
    return (values.float() - goal).square().mean() / goal.square().mean().clamp(min=1e-12)
