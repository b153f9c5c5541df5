"""AutoencoderKL: pictures to latents and back (Rombach et al., 2112.10752, section 3.1).

The encoder gives the mean and log-variance of a diagonal normal distribution over latents; the decoder draws a picture
from a latent. Pictures are in [-1, 1]; every block but the last halves the resolution, so the factor is
2 ** (blocks - 1). The UNet works on ``scaling_factor * latents``, which has about unit variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.blocks import Attention, Downsample2D, ResnetBlock2D, Upsample2D
from ldm_reference.config import ConfigError, check_choice, check_groups, check_layers, check_positive, config_from_dict

INERT = {
    "act_fn": {"silu", "swish"},  # two names of one function
    "shift_factor": {None, 0},
    "latents_mean": None,
    "latents_std": None,
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Keys of diffusers' ``AutoencoderKL``."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            latent_channels=self.latent_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
        )
        for kinds, kind in ((self.down_block_types, "DownEncoderBlock2D"), (self.up_block_types, "UpDecoderBlock2D")):
            if len(kinds) != len(self.block_out_channels):
                raise ConfigError(f"{len(kinds)} block types {kinds!r} for {len(self.block_out_channels)} block widths")
            for name in kinds:
                check_choice("block type of the autoencoder", name, (kind,))
        check_groups(self.norm_num_groups, self.block_out_channels)
        check_layers(len(self.block_out_channels) * (2 * self.layers_per_block + 1))
        if not self.scaling_factor > 0:
            raise ConfigError(f"scaling_factor = {self.scaling_factor!r} must be above 0")

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList(
            [Attention(channels, 1, bias=True, groups=groups, eps=1e-6)] if attention else []
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, temb_channels=None, groups=groups, eps=1e-6) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels if i == 0 else out_channels, out_channels, temb_channels=None, groups=groups, eps=1e-6
            )
            for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels if i == 0 else out_channels, out_channels, temb_channels=None, groups=groups, eps=1e-6
            )
            for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, out_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(
                widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < len(widths) - 1
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The pair. Latents here are *unscaled*: multiply by ``config.scaling_factor`` before the UNet, divide after."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_config(cls, values: Mapping[str, Any], *, strict: bool = True) -> AutoencoderKL:
        return cls(config_from_dict(AutoencoderConfig, values, INERT, strict=strict))

    def encode(self, sample: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log-variance on the channel axis, (B, 2 C, h, w)."""
        moments = self.encoder(sample)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


def sample_posterior(latent_parameters: Tensor, noise: Tensor) -> Tensor:
    """mean + exp(logvar / 2) * noise, the log-variance clamped to [-30, 20] as in diffusers."""
    mean, logvar = latent_parameters.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
