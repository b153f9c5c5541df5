"""The noise that a network is trained on, chosen by its scheduler's config: that of DDPM, or that of flow matching.

Either way x = alpha x0 + sigma eps, and from what the network predicts follow x0 and eps (`PREDICTIONS`), so that

    x' = alpha' x0 + sigma' eps

is DDIM's step to another noise level, and Euler's where alpha = 1 - sigma: then x' = x + (sigma' - sigma) (eps - x0).
Trainers, samplers and passes ask one object for all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_reference.config import ConfigError, check_choice
from ldm_reference.flow import FLOW_CLASSES, FLOW_PREDICTION, draw_sigma, euler, euler_sigmas
from ldm_reference.losses import diffusion_target, min_snr_weight
from ldm_reference.samplers import ddim
from ldm_reference.schedules import add_noise, alphas_cumprod_from_config, leading_timesteps, trailing_timesteps

Denoise = Callable[[Tensor, float], Tensor]
"""(latents, timestep) -> what the network predicts, guided or not."""


@dataclass(frozen=True)
class Levels:
    """Noise levels that a sampler passes, from the noisiest on: n timesteps, and n + 1 of alpha and sigma, float32."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor


class DiffusionNoise(nn.Module):
    """DDPM's noise; timesteps are int64 in [0, num_train_timesteps), sampling is DDIM's."""

    def __init__(self, scheduler: Mapping[str, Any]):
        super().__init__()
        self.scheduler = scheduler
        self.prediction_type = str(scheduler.get("prediction_type", "epsilon"))
        self.exact = alphas_cumprod_from_config(scheduler)  # float64, on the CPU
        self.final = 1.0 if scheduler.get("set_alpha_to_one", True) else self.exact[0].item()
        self.register_buffer("alphas_cumprod", self.exact.float(), persistent=False)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,)."""
        return torch.randint(len(self.exact), (count,), generator=generator)

    def trained_timesteps(self) -> Tensor:
        """All timesteps, evenly spread, ascending."""
        return torch.arange(len(self.exact))

    def nearest_timesteps(self, timesteps: Iterable[float]) -> Tensor:
        """Different ones of the timesteps that the network knows, ascending: the nearest to each of these."""
        return torch.tensor(sorted({round(timestep) for timestep in timesteps}))

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, (B, C, h, w) as latents and noise are; timesteps (B,)."""
        return add_noise(latents, noise, self.get_buffer("alphas_cumprod"), timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict of what `add` gives."""
        return diffusion_target(self.prediction_type, latents, noise, self.get_buffer("alphas_cumprod"), timesteps)

    def weights(self, timesteps: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Weights of squared errors, (B,)."""
        return min_snr_weight(self.prediction_type, self.get_buffer("alphas_cumprod"), timesteps, min_snr_gamma)

    def sampled_timesteps(self, steps: int) -> list[int]:
        """Timesteps of DDIM, descending, as ``scheduler_config.json`` spaces them."""
        spacing = self.scheduler.get("timestep_spacing", "leading")
        check_choice("timestep_spacing", spacing, ("leading", "trailing"))
        if spacing == "trailing":
            return trailing_timesteps(len(self.exact), steps)
        return leading_timesteps(len(self.exact), steps, self.scheduler.get("steps_offset", 0))

    def levels(self, timesteps: Sequence[int]) -> Levels:
        """Noise levels of a sampler with these descending timesteps."""
        kept = torch.cat([self.exact[list(timesteps)], self.exact.new_tensor([self.final])])
        return Levels(torch.tensor(timesteps), kept.sqrt().float(), (1 - kept).sqrt().float())

    def sample(self, denoise: Denoise, noise: Tensor, steps: int) -> Tensor:
        """Latents from N(0, I), both (B, C, h, w), in so many steps."""
        timesteps = self.sampled_timesteps(steps)
        options: dict[str, Any] = {"prediction_type": self.prediction_type, "final_alpha_cumprod": self.final}
        return ddim(denoise, noise, self.exact, timesteps, **options)


class FlowNoise(nn.Module):
    """Flow matching's noise; timesteps are sigma * num_train_timesteps, float32, sampling is Euler's.

    Methods are those of `DiffusionNoise`. Of the keys for other levels than those of `euler_sigmas`, such as
    ``use_karras_sigmas`` and ``use_dynamic_shifting``, none is read: any levels lead down the same path.
    """

    prediction_type = FLOW_PREDICTION

    def __init__(self, scheduler: Mapping[str, Any]):
        super().__init__()
        self.scheduler = scheduler
        self.count = int(scheduler.get("num_train_timesteps", 1000))
        self.shift = float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return draw_sigma(count, self.shift, generator) * self.count

    def trained_timesteps(self) -> Tensor:
        return torch.arange(1, self.count + 1, dtype=torch.float32)

    def nearest_timesteps(self, timesteps: Iterable[float]) -> Tensor:
        return torch.tensor(sorted(set(timesteps)), dtype=torch.float32)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.count)[:, None, None, None].to(latents.dtype)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def weights(self, timesteps: Tensor, min_snr_gamma: float | None) -> Tensor:
        return torch.ones(len(timesteps), device=timesteps.device)

    def sampled_timesteps(self, steps: int) -> list[float]:
        terminal = float(self.scheduler.get("shift_terminal") or 0.0)
        return [sigma * self.count for sigma in euler_sigmas(steps, self.count, self.shift, terminal)[:-1]]

    def levels(self, timesteps: Sequence[float]) -> Levels:
        sigma = torch.tensor([*timesteps, 0.0], dtype=torch.float64) / self.count
        return Levels(torch.tensor(timesteps, dtype=torch.float32), (1 - sigma).float(), sigma.float())

    def sample(self, denoise: Denoise, noise: Tensor, steps: int) -> Tensor:
        if self.scheduler.get("stochastic_sampling"):
            raise ConfigError("stochastic_sampling = true is of a consistency model, which Euler's method cannot draw")
        sigmas = [timestep / self.count for timestep in self.sampled_timesteps(steps)]
        return euler(denoise, noise, [*sigmas, 0.0], self.count)


Noise = DiffusionNoise | FlowNoise


def noise_from_config(scheduler: Mapping[str, Any]) -> Noise:
    """The noise that the content of a ``scheduler_config.json`` says a network was trained on."""
    flow = scheduler.get("_class_name") in FLOW_CLASSES or scheduler.get("prediction_type") == FLOW_PREDICTION
    return FlowNoise(scheduler) if flow else DiffusionNoise(scheduler)
