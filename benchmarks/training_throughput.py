"""Training steps a second of our UNet beside diffusers' own, same config, same weights, same loop, in turn.

training_throughput.py [--rounds 5] [--steps 6]

The loop is the trainer's: autocast as the recipe asks for it, squared error, backward, clipping, AdamW, EMA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import diffusers
import ldm_reference
import torch
from ldm_reference.losses import diffusion_target
from ldm_reference.schedules import add_noise, alphas_cumprod_from_config
from ldm_reference.train_config import TrainConfig
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn

RECIPE = Path(ldm_reference.__file__).parent / "recipes" / "emoji64.toml"


class Training:
    """One network and its loop."""

    def __init__(self, config: TrainConfig, unet: nn.Module, batch: dict[str, Tensor]):
        self.config, self.unet, self.batch = config, unet.train(), batch
        self.alphas_cumprod = alphas_cumprod_from_config(config.scheduler).float()
        self.parameters = list(unet.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-5)

    def step(self) -> float:
        latents, noise, timesteps, states = self.batch.values()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
            noisy = add_noise(latents, noise, self.alphas_cumprod, timesteps)
            out = self.unet(noisy, timesteps, states)
        prediction = (out if isinstance(out, Tensor) else out.sample).float()
        kind = self.config.scheduler["prediction_type"]
        target = diffusion_target(kind, latents, noise, self.alphas_cumprod, timesteps)
        loss = (prediction - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 0.001)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each network a round")
    arguments = parser.parse_args()
    config = TrainConfig.read(RECIPE)
    torch.manual_seed(0)
    ours = UNet2DConditionModel.from_config(config.unet)
    theirs = diffusers.UNet2DConditionModel.from_config(dict(config.unet))
    theirs.load_state_dict(ours.state_dict())
    size, batch_size = config.unet["sample_size"], config.unet_stage.batch_size
    shape = (batch_size, config.unet["in_channels"], size, size)
    assert config.tokenizer is not None
    batch = {
        "latents": torch.randn(shape),
        "noise": torch.randn(shape),
        "timesteps": torch.randint(1000, (batch_size,)),
        "states": torch.randn(batch_size, config.tokenizer["model_max_length"], config.unet["cross_attention_dim"]),
    }
    variants = {"ldm_reference": Training(config, ours, batch), "diffusers": Training(config, theirs, batch)}
    losses = {name: variant.step() for name, variant in variants.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            for _ in range(arguments.steps):
                variant.step()
            seconds[name].append((time.perf_counter() - started) / arguments.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    for name, value in medians.items():
        print(f"{name:14} {value:.3f} s a step of {batch_size}, {batch_size / value:.1f} samples/s")
    print(f"ours is {statistics.median(ratios):.2f} times as fast (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    row = {
        "torch": torch.__version__.partition("+")[0],
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "first_loss": losses,
        "seconds_a_step": seconds,
        "ratio": statistics.median(ratios),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
