"""A tiny autoencoder in place of the large one (TAESD's idea), for when few steps make decoding the largest part.

The student is diffusers' ``AutoencoderTiny``. Its decoder learns the pictures that the teacher's decoder makes of the
latents that the teacher draws: mean absolute difference, and perceptual distance in EfficientNet-Lite0 features. Its
encoder learns to give those latents back from the pictures: mean squared difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from ldm_reference.config import ConfigError
from ldm_reference.features import EfficientNetLite0, feature_network
from ldm_reference.fit import Rows
from ldm_reference.losses import perceptual_distance
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from torch import Tensor, nn

from ldm_export.checkpoint import Autoencoder
from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose, Training
from ldm_export.passes.imitation import parameters
from ldm_export.reading.options import check_least

ENCODER_BLOCKS = 1
"""Blocks of the encoder at every resolution; it runs once a picture, and only from image to image."""


@dataclass(frozen=True)
class DistillDecoder(Training):
    """Options.

    Attributes
    ----------
    width : channels of every layer
    blocks : residual blocks of each resolution of the decoder, from the latents' on
    perceptual_weight : of the perceptual distance
    jitter : deviation of the noise that is added to the latents, since a student's are not quite the teacher's
    """

    name: ClassVar[str] = "distill-decoder"
    purpose: ClassVar[Purpose] = "speed"

    learning_rate: float = 1e-3
    batch_size: int = 16
    width: int = 32
    blocks: tuple[int, ...] = (2, 1, 1, 0)
    perceptual_weight: float = 0.05
    jitter: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("width", self.width, 1)
        check_least("perceptual_weight", self.perceptual_weight, 0)
        check_least("jitter", self.jitter, 0)
        if not self.blocks or not all(type(count) is int and count >= 0 for count in self.blocks):
            raise InputError(f"blocks = {list(self.blocks)!r} must be whole numbers of at least 0, one a resolution.")

    def apply(self, setting: PassContext) -> Change:
        model, data = setting.model, setting.data
        teacher = model.load("vae")
        assert isinstance(teacher, Autoencoder)
        levels = len(teacher.config.block_out_channels)
        if len(self.blocks) != levels:
            raise InputError(
                f"{self.name}: blocks = {list(self.blocks)!r}, and {model.name} has {levels} resolutions; give each."
            )
        torch.manual_seed(self.seed)
        student = AutoencoderTiny.from_config(
            {
                "in_channels": teacher.config.in_channels,
                "out_channels": teacher.config.out_channels,
                "latent_channels": teacher.config.latent_channels,
                "encoder_block_out_channels": [self.width] * levels,
                "decoder_block_out_channels": [self.width] * levels,
                "num_encoder_blocks": [ENCODER_BLOCKS] * levels,
                "num_decoder_blocks": list(self.blocks),
            }
        )
        try:
            network = feature_network() if self.perceptual_weight else None
        except ConfigError as error:
            raise InputError(f"{self.name}: {error}.") from error
        objective = DecoderObjective(student, teacher, network, self.perceptual_weight, self.jitter)

        def rows_at(generator: torch.Generator) -> Rows:
            latents, _ = data.rows(self.batch_size, generator)
            return {"latents": latents, "noise": torch.randn(latents.shape, generator=generator)}

        weights = self.train(self.name, objective, rows_at, setting)
        student.load_state_dict({key.removeprefix("student."): value for key, value in weights.items()})
        student.requires_grad_(False).eval()
        sizes = {"before": parameters(teacher), "after": parameters(student)}
        return Change({"vae": student}, report={"parameters": sizes, **_likeness(student, teacher, data.latents)})


@torch.no_grad()
def _likeness(student: AutoencoderTiny, teacher: Autoencoder, latents: Tensor) -> Mapping[str, float]:
    """How near the student's pictures are to the teacher's, and latents to those that they were made of."""
    some = latents[:64]
    pictures = teacher.decode(some / teacher.config.scaling_factor).clamp(-1, 1)
    error = (student.decode(some).clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3)) / 4  # of a range of 2
    encoded = student.encode(pictures).chunk(2, dim=1)[0]
    return {
        "psnr_to_teacher_db": (-10 * error.log10()).mean().item(),
        "latent_error": ((encoded - some).square().mean() / some.square().mean()).sqrt().item(),
    }


class DecoderObjective(nn.Module):
    def __init__(
        self,
        student: AutoencoderTiny,
        teacher: Autoencoder,
        perceptual: EfficientNetLite0 | None,
        perceptual_weight: float,
        jitter: float,
    ):
        super().__init__()
        self.student, self.teacher, self.perceptual = student, teacher.requires_grad_(False), perceptual
        self.perceptual_weight, self.jitter = perceptual_weight, jitter

    def train(self, mode: bool = True) -> DecoderObjective:
        super().train(mode)
        for network in (self.teacher, self.perceptual):
            if network is not None:
                network.eval()
        return self

    def forward(self, latents: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Scaled latents and noise (B, C, h, w)."""
        latents = latents + self.jitter * noise
        with torch.no_grad():
            pictures = self.teacher.decode(latents / self.teacher.config.scaling_factor).float().clamp(-1, 1)
        drawn = self.student.decode(latents).float()
        encoded = self.student.encode(pictures).chunk(2, dim=1)[0].float()
        terms = {"difference": F.l1_loss(drawn, pictures), "encoding": F.mse_loss(encoded, latents)}
        loss = terms["difference"] + terms["encoding"]
        if self.perceptual is not None:
            terms["perceptual"] = perceptual_distance(self.perceptual, drawn, pictures).float()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}
