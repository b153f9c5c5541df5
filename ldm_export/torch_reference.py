"""A checkpoint drawn in plain PyTorch: what a bundle's pictures are held against. With ``checkpoint``, a seam to
``ldm_reference``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ldm_reference import generate
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.checkpoint import Autoencoder, LatentDiffusion
from ldm_export.contract import unet_spec
from ldm_export.errors import InputError

Ids = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Drawn:
    """Pictures of the reference.

    Attributes
    ----------
    images : uint8 (B, H, W, C)
    trajectory : float32 (steps, B, C, h, w), the latents after each step
    unet_ms : one entry a call of the UNet
    timings_ms : milliseconds by stage (text, unet, loop, decode)
    """

    images: Pixels
    trajectory: npt.NDArray[np.float32]
    unet_ms: list[float]
    timings_ms: dict[str, float]


class TorchReference:
    """A checkpoint in plain PyTorch: the pictures that a bundle's are held against. The sampler is DDIM.

    Pictures are uint8 (B, H, W, C), latents (B, C, h, w). Models that read no text are opened with ``text=False``.
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

    def draw_as(self, given: Mapping[str, Any]) -> Drawn:
        """The arguments of :meth:`draw` or :meth:`draw_without_text`, arrays as lists, as JSON holds them."""
        draw = self.draw if "input_ids" in given else self.draw_without_text
        arrays = {
            key: np.asarray(given[key], np.int64)
            for key in ("input_ids", "negative_ids", "labels")
            if given.get(key) is not None
        }
        return draw(**{**given, **arrays})

    def draw(
        self,
        input_ids: Ids,
        negative_ids: Ids,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: tuple[int, int],
    ) -> Drawn:
        """Pictures of token ids (B, L) of prompts and negative prompts; ``size`` is height and width in pixels."""
        assert isinstance(self._text_encoder, CLIPTextModel)
        drawn = generate.text_to_image(
            self._vae,
            self._unet,
            self._text_encoder,
            self._scheduler,
            torch.from_numpy(input_ids),
            torch.from_numpy(negative_ids),
            seeds,
            steps=steps,
            guidance=guidance,
            latent_size=self._latent_size(size),
        )
        return _as_arrays(drawn)

    def draw_without_text(
        self, labels: Ids | None, seeds: Sequence[int], *, steps: int, size: tuple[int, int]
    ) -> Drawn:
        """Pictures of classes (B,), or of nothing."""
        classes = None if labels is None else torch.from_numpy(labels)
        networks = (self._vae, self._unet)
        drawn = generate.class_to_image(
            *networks, self._scheduler, classes, seeds, steps=steps, latent_size=self._latent_size(size)
        )
        return _as_arrays(drawn)

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self._vae.config.factor, size[1] // self._vae.config.factor

    @torch.no_grad()
    def reconstruct(self, images: Pixels) -> Pixels:
        """Pictures uint8 (B, H, W, C), through the autoencoder and back, by the mean of its latents."""
        sample = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mean = self._vae.encode(sample).chunk(2, dim=1)[0]
        redrawn: Pixels = generate.pixels_from_sample(self._vae.decode(mean)).numpy()
        return redrawn


def _as_arrays(drawn: generate.Drawn) -> Drawn:
    return Drawn(drawn.images.numpy(), torch.stack(drawn.trajectory).numpy(), drawn.unet_ms, drawn.timings_ms)
