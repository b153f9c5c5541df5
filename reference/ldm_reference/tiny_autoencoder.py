"""AutoencoderTiny: a small autoencoder distilled from a large one (TAESD), without norms or attention.

Its latents are those that the UNet works on, already scaled, so ``scaling_factor`` is 1. The encoder gives no
distribution but the latents themselves; so that it can take the place of ``AutoencoderKL``, ``encode`` adds a
log-variance of -30, by which nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.config import (
    ANY,
    ConfigError,
    check_choice,
    check_counts,
    check_layers,
    check_positive,
    config_from_dict,
)

INERT = {"upsample_fn": "nearest", "upsampling_scaling_factor": 2, "shift_factor": {None, 0}, "force_upcast": ANY}
CERTAIN = -30.0
"""The log-variance of latents that are known: the least that is ever used."""


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Keys of diffusers' ``AutoencoderTiny``.

    ``latent_magnitude`` and ``latent_shift`` only tell how to draw latents as pictures; ``block_out_channels`` is
    written for pipelines, which count its entries, and is the decoder's.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    block_out_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive(in_channels=self.in_channels, out_channels=self.out_channels)
        check_positive(latent_channels=self.latent_channels)
        check_choice("act_fn", self.act_fn, ("relu",))
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            check_positive(**{f"{side}_block_out_channels": widths})
            check_counts(**{f"num_{side}_blocks": blocks})
            check_layers(sum(blocks))
            if len(widths) != len(blocks) or len(widths) != len(self.encoder_block_out_channels):
                raise ConfigError(
                    f"{side}_block_out_channels = {widths!r} and num_{side}_blocks = {blocks!r} must be as long as "
                    f"encoder_block_out_channels = {self.encoder_block_out_channels!r}"
                )
            if len({*widths}) != 1:
                raise ConfigError(f"{side}_block_out_channels = {widths!r} must all be one number")
        if not self.scaling_factor > 0:
            raise ConfigError(f"scaling_factor = {self.scaling_factor!r} must be above 0")
        object.__setattr__(self, "block_out_channels", self.decoder_block_out_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))


class TinyBlock(nn.Module):
    """relu(x + f(x)), f being three 3x3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """(B, in_channels, H, W) in [-1, 1] -> latents (B, latent_channels, h, w)."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            down = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
            layers.append(down if level else nn.Conv2d(config.in_channels, width, 3, padding=1))
            layers += [TinyBlock(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents (B, latent_channels, h, w), softly held within [-3, 3] -> (B, out_channels, H, W), about [-1, 1]."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        width = config.decoder_block_out_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < len(config.num_decoder_blocks) - 1:
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(x / 3) * 3) * 2 - 1


class AutoencoderTiny(nn.Module):
    """The pair, with the methods of :class:`ldm_reference.autoencoder.AutoencoderKL`."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    @classmethod
    def from_config(cls, values: Mapping[str, Any], *, strict: bool = True) -> AutoencoderTiny:
        return cls(config_from_dict(TinyAutoencoderConfig, values, INERT, strict=strict))

    def encode(self, sample: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> latents and a log-variance of -30, (B, 2 c, h, w)."""
        latents = self.encoder(sample)
        return torch.cat([latents, torch.full_like(latents, CERTAIN)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> pictures (B, C, H, W), about [-1, 1]."""
        return self.decoder(latents)
