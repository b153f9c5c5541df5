"""Small random UNets of every kind that can be narrowed, their inputs, and diffusers' word on what they compute."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from ldm_reference.layout import save_checkpoint, save_component
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.families import open_checkpoint
from ldm_export.passes.channels import Channels
from ldm_export.passes.teacher import TeacherData
from tests.bundle_fixture import perturb

Kept = dict[str, Tensor]
"""The channels that stay, by the name of their space."""
TOLERANCE = 2e-5
"""Allowed max |ours - theirs| / max |theirs|, float32."""
SMALL: dict[str, Any] = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
CONVOLUTIONS = {
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"] * 3,
}
ATTENTIVE = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "transformer_layers_per_block": [1, 2, 1],
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd": {},
    "two-layers": {"layers_per_block": 2},
    "layers-per-block": {"layers_per_block": [1, 3, 2], "attention_head_dim": [2, 4, 8]},
    "no-middle-block": {"mid_block_type": None},
    "sdxl": SDXL,
    "only-cross-attention": {"only_cross_attention": [True, False, False], "use_linear_projection": True},
    "lcm": {"time_cond_proj_dim": 12},
    "inpainting": {"in_channels": 9},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "class-and-text": {"num_class_embeds": 10},
    "unconditional": CONVOLUTIONS,
    "class-conditional": {**CONVOLUTIONS, "num_class_embeds": 10},
    "unconditional-scale-shift": {**CONVOLUTIONS, "resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
    "attentive": ATTENTIVE,
    "attentive-two-layers": {**ATTENTIVE, "layers_per_block": 2, "num_class_embeds": 10},
    "one-level": {
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
}


def random_unet(**changes: Any) -> UNet2DConditionModel:
    """In evaluation mode, without gradients, as a checkpoint gives it."""
    torch.manual_seed(0)
    unet = perturb(UNet2DConditionModel.from_config({**SMALL, **changes}))
    return unet.requires_grad_(False)  # type: ignore[return-value]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(unet: UNet2DConditionModel, batch: int = 3, size: int = 8) -> dict[str, Tensor]:
    """Everything that it is given, by the names of its ``forward``."""
    config = unet.config
    inputs = {
        "sample": randn(1, batch, config.in_channels, size, size),
        "timestep": torch.linspace(1, 998, batch).long(),
    }
    if config.reads_text:
        inputs["encoder_hidden_states"] = randn(2, batch, 7, int(config.cross_attention_dim))  # type: ignore[arg-type]
    if config.num_class_embeds:
        inputs["class_labels"] = torch.arange(batch) + 3
    if config.addition_embed_type:
        inputs["text_embeds"] = randn(3, batch, 20)
        inputs["time_ids"] = torch.tensor([[512.0, 640.0, 0.0, 8.0, 512.0, 768.0]] * batch)
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = randn(4, batch, config.time_cond_proj_dim)
    return inputs


@torch.no_grad()
def output_of(unet: UNet2DConditionModel, **inputs: Tensor) -> Tensor:
    output: Tensor = unet(**inputs)
    return output


def diffusers_unet(unet: UNet2DConditionModel, folder: Path) -> Any:
    """The same network, as diffusers opens what is saved of it."""
    save_component(unet, folder)
    theirs, info = diffusers.UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs.eval()


@torch.no_grad()
def diffusers_output(theirs: Any, **inputs: Tensor) -> Tensor:
    inputs = {"encoder_hidden_states": torch.zeros(len(inputs["sample"]), 1, 1), **inputs}
    conditions = {key: inputs.pop(key) for key in ("text_embeds", "time_ids") if key in inputs}
    output: Tensor = theirs(**inputs, added_cond_kwargs=conditions).sample
    return output


def off_by(given: Tensor, expected: Tensor) -> float:
    assert given.shape == expected.shape
    return float((given - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def make_useless(unet: UNet2DConditionModel, channels: Channels, kept: Kept) -> None:
    """Zero whatever reads or writes the channels that are not kept."""
    for name, tensor in unet.state_dict().items():
        for number, axis in enumerate(channels.axes[name]):
            goes = [torch.ones(channels.spaces[space].size, dtype=torch.bool) for space in axis]
            for mask, space in zip(goes, axis, strict=True):
                mask[kept[space]] = False
            if goes:
                tensor.movedim(number, 0)[torch.cat(goes)] = 0


LAYERED = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 32,
}
"""Two layers a level, for the text encoder and the latents of ``tiny_checkpoint``."""


def write_model(folder: Path, tiny: Path, **unet: Any) -> LatentDiffusion:
    """``tiny_checkpoint`` with a random UNet in place of its own."""
    checkpoint = open_checkpoint(tiny)
    save_checkpoint(
        folder,
        vae=checkpoint.load("vae"),  # type: ignore[arg-type]
        unet=random_unet(**{**LAYERED, **unet}),
        text_encoder=checkpoint.load("text_encoder"),  # type: ignore[arg-type]
        tokenizer=lambda path: shutil.copytree(tiny / "tokenizer", path),
        scheduler=checkpoint.scheduler,
        dtype=torch.float32,
    )
    return open_checkpoint(folder)


def hooks_of(network: torch.nn.Module) -> int:
    """How many are left on any of its modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in network.modules()
    )


class Errors:
    """How far a UNet is from diffusers' network of a checkpoint: on rows that no training sees, or on given ones."""

    def __init__(self, model: LatentDiffusion, data: TeacherData, rows: Mapping[str, Tensor] | None = None):
        if rows is None:
            latents, told = data.rows(32, torch.Generator().manual_seed(99))
            noise = randn(98, *latents.shape)
            timesteps = torch.randint(1000, (32,), generator=torch.Generator().manual_seed(97))
            rows = {"latents": latents, "noise": noise, "timesteps": timesteps, **told}
        self.told = dict(rows)
        self.latents, self.noise, self.timesteps = map(self.told.pop, ("latents", "noise", "timesteps"))
        scheduler = diffusers.DDIMScheduler.from_pretrained(model.path / "scheduler")
        self.x = scheduler.add_noise(self.latents, self.noise, self.timesteps)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(model.path / "unet").eval()
        self.goal = diffusers_output(theirs, **self.inputs)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"sample": self.x, "timestep": self.timesteps, **self.told}

    def of(self, unet: Any) -> float:
        """Root mean square, as a share of the goal's."""
        off = output_of(unet, **self.inputs) - self.goal
        return float((off.square().mean() / self.goal.square().mean()).sqrt())


def diffusers_sizes(theirs: Any, **inputs: Tensor) -> tuple[int, int]:
    """Parameters of diffusers' network, and what torch counts of operations in a call of it."""
    with FlopCounterMode(display=False) as counter:
        diffusers_output(theirs, **inputs)
    return sum(parameter.numel() for parameter in theirs.parameters()), counter.get_total_flops()
