"""A checkpoint drawn in plain PyTorch: what a bundle's pictures are held against. With ``checkpoint``, a seam to
``ldm_reference``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from ldm_reference.generate import class_to_image, pixels_from_sample, text_to_image
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.checkpoint import Autoencoder, LatentDiffusion
from ldm_export.contract import unet_spec
from ldm_export.errors import InputError

Ids = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class TorchReference:
    """A checkpoint in plain PyTorch: the pictures that a bundle's are held against. The sampler is DDIM.

    ``draw`` takes token ids (B, L) of prompts and negative prompts and gives uint8 (B, H, W, 3) with milliseconds by
    stage (text, unet, loop, decode). Models that read no text are opened with ``text=False``.
    """

    def __init__(self, checkpoint: LatentDiffusion, *, text: bool = True):
        self._scheduler = checkpoint.scheduler
        spacing = self._scheduler.get("timestep_spacing", "leading")
        clips = self._scheduler.get("clip_sample", True)
        config, channels = checkpoint.configs["unet"], checkpoint.configs["vae"]["latent_channels"]
        inputs = [(tensor.name, tensor.dtype) for tensor in unet_spec(config).inputs[2:]]
        allowed = [[("encoder_hidden_states", "float32")]] if text else [[], [("class_labels", "int64")]]
        components = ("text_encoder", "unet", "vae") if text else ("unet", "vae")
        fits = checkpoint.components == components and inputs in allowed and config["in_channels"] == channels
        if not fits or config["class_embed_type"] or spacing == "linspace" or clips:
            told = "one text encoder" if text else "class numbers or nothing"
            raise InputError(
                f"{checkpoint.path} has {', '.join(checkpoint.components)}, a UNet of {config['in_channels']} channels "
                f"that is told {', '.join(name for name, _ in inputs) or 'nothing'}, timestep_spacing {spacing} and "
                f"clip_sample {clips}; the PyTorch reference draws with {told}, {channels} channels, leading or "
                "trailing spacing, no clip. Use `ldm-export export`, its bundle, and `ldm-export verify --against`."
            )
        vae, unet = checkpoint.load("vae"), checkpoint.load("unet")
        assert isinstance(vae, Autoencoder)
        assert isinstance(unet, UNet2DConditionModel)
        self._vae, self._unet = vae, unet
        self._text_encoder = checkpoint.load("text_encoder") if text else None

    def draw(
        self,
        input_ids: Ids,
        negative_ids: Ids,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: tuple[int, int],
    ) -> tuple[Pixels, dict[str, float]]:
        assert isinstance(self._text_encoder, CLIPTextModel)
        drawn = text_to_image(
            self._vae,
            self._unet,
            self._text_encoder,
            self._scheduler,
            torch.from_numpy(input_ids),
            torch.from_numpy(negative_ids),
            seeds,
            steps=steps,
            guidance=guidance,
            latent_size=(size[0] // self._vae.config.factor, size[1] // self._vae.config.factor),
        )
        return drawn.images.numpy(), drawn.timings_ms

    def draw_without_text(self, labels: Ids | None, seeds: Sequence[int], *, steps: int, side: int) -> Pixels:
        """Square pictures uint8 (B, H, W, C) of classes (B,), or of nothing."""
        classes, latent_side = None if labels is None else torch.from_numpy(labels), side // self._vae.config.factor
        size, networks = (latent_side, latent_side), (self._vae, self._unet)
        drawn: Pixels = class_to_image(
            *networks, self._scheduler, classes, seeds, steps=steps, latent_size=size
        ).numpy()
        return drawn

    @torch.no_grad()
    def reconstruct(self, images: Pixels) -> Pixels:
        """Pictures uint8 (B, H, W, C), through the autoencoder and back, by the mean of its latents."""
        sample = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        redrawn: Pixels = pixels_from_sample(self._vae.decode(self._vae.encode(sample).chunk(2, dim=1)[0])).numpy()
        return redrawn
