"""Generates with a checkpoint in plain PyTorch: what a bundle's pictures are compared with.

With ``checkpoint``, a seam to ``ldm_reference``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ldm_reference.generate import pixels_from_sample
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.checkpoint import Autoencoder, LatentDiffusion
from ldm_export.checkpoint.pipelines import option
from ldm_export.contract import takes_two_rows, unet_spec
from ldm_export.errors import InputError
from ldm_export.plan import Stepper, compile_plan
from ldm_export.plan.guidance import guidance_embedding

Ids = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass
class Drawn:
    """Pictures, and how they came about.

    Attributes
    ----------
    images : uint8 (B, H, W, C)
    trajectory : float32 (rows, B, C, h, w), the latents after each row of the plan
    unet_ms : milliseconds of each call of the UNet
    text_ms, loop_ms, decode_ms : milliseconds of the text encoders, of the loop outside the UNet, of the decoder
    """

    images: Pixels
    trajectory: npt.NDArray[np.float32]
    unet_ms: list[float] = field(default_factory=list)
    text_ms: float = 0.0
    loop_ms: float = 0.0
    decode_ms: float = 0.0


class TorchReference:
    """A checkpoint in plain PyTorch, with the networks of ``ldm_reference`` and noise of ``torch.Generator("cpu")``.

    The samplers are the plans that bundles have, too; that those, and these pictures, are diffusers', tests show.
    Pictures are uint8 (B, H, W, C), latents (B, C, h, w).

    Raises
    ------
    InputError
        For a model that is given more than text or a class number, naming what.
    """

    def __init__(self, checkpoint: LatentDiffusion):
        self._checkpoint = checkpoint
        self._spec = unet_spec(checkpoint.configs["unet"])
        self._unet_inputs = {tensor.name: tensor for tensor in self._spec.inputs}
        if more := _more_than_it_gives(checkpoint, self._unet_inputs):
            raise InputError(
                f"{checkpoint.path}: the UNet takes {more}, which the PyTorch side of a comparison does not give it. "
                "Use `ldm-export export`, whose graphs are compared with the networks one by one."
            )
        vae, unet = checkpoint.load("vae"), checkpoint.load("unet")
        assert isinstance(vae, Autoencoder)
        assert isinstance(unet, UNet2DConditionModel)
        self._vae, self._unet = vae, unet
        self._text_encoders = []
        for name in checkpoint.text_encoders:
            encoder = checkpoint.load(name)
            assert isinstance(encoder, CLIPTextModel)
            self._text_encoders.append(encoder)

    def draw_as(self, given: Mapping[str, Any]) -> Drawn:
        """Generate with the arguments of :meth:`draw`, of which JSON holds arrays as lists."""
        arrays = {
            "ids": [np.asarray(rows, np.int64) for rows in given.get("ids", ())],
            "empty_ids": [np.asarray(rows, np.int64) for rows in given.get("empty_ids", ())],
            "labels": np.asarray(given["labels"], np.int64) if "labels" in given else None,
        }
        return self.draw(**{**given, **arrays})

    @torch.no_grad()
    def draw(
        self,
        seeds: Sequence[int],
        *,
        sampler: str,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        ids: Sequence[Ids] = (),
        empty_ids: Sequence[Ids] = (),
        labels: Ids | None = None,
    ) -> Drawn:
        """Generate one picture a seed.

        Parameters
        ----------
        sampler, steps : the plan, of the checkpoint's own scheduler config
        guidance : the scale; no second row where it is 1 or less, or where the UNet is told it
        size : height and width in pixels
        ids, empty_ids : of the prompts and of the empty prompt, (B, L) for each text encoder
        labels : classes (B,), of models that have them
        """
        spent = _Clock()
        rows = compile_plan(self._checkpoint.scheduler, sampler, steps).from_noise()
        guided = takes_two_rows(self._spec, {}, guidance)
        conditions = self._text(ids, empty_ids, guided=guided)
        text_ms = spent.lap()
        count = len(seeds) * (1 + guided)
        if labels is not None:
            conditions["class_labels"] = torch.from_numpy(labels)
        if "time_ids" in self._unet_inputs:
            conditions["time_ids"] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(count, -1)
        if "timestep_cond" in self._unet_inputs:
            told = guidance_embedding(guidance, self._unet.config.time_cond_proj_dim or 0)
            conditions["timestep_cond"] = torch.from_numpy(told).expand(count, -1)
        draw = self._noise(seeds, size)
        latents = draw() * np.float32(rows.noise_scale)
        stepper, sample = Stepper(rows.rows, latents), np.empty_like(latents)
        trajectory, unet_ms = [], []
        loop_ms = spent.lap()
        for row in rows.rows:
            stepper.network_input(out=sample)
            loop_ms += spent.lap()
            out = self._denoised(torch.from_numpy(sample), torch.tensor([row.timestep]), conditions, guidance, guided)
            unet_ms.append(spent.lap())
            stepper.advance(out.numpy(), draw)
            trajectory.append(latents.copy())
            loop_ms += spent.lap()
        images = pixels_from_sample(self._vae.decode(torch.from_numpy(latents) / self._vae.config.scaling_factor))
        return Drawn(images.numpy(), np.stack(trajectory), unet_ms, text_ms, loop_ms, spent.lap())

    def _text(self, ids: Sequence[Ids], empty_ids: Sequence[Ids], *, guided: bool) -> dict[str, Tensor]:
        """The UNet's inputs from token ids; with guidance first the rows of the empty prompt."""
        if not ids:
            return {}
        encoded = self._encoded(ids)
        if guided:
            empty = self._encoded(empty_ids)
            if option(self._checkpoint.index, "force_zeros_for_empty_prompt"):
                empty = {name: torch.zeros_like(states) for name, states in empty.items()}
            encoded = {name: torch.cat([empty[name], states]) for name, states in encoded.items()}
        return encoded

    def _encoded(self, ids: Sequence[Ids]) -> dict[str, Tensor]:
        found = [encoder(torch.from_numpy(rows)) for encoder, rows in zip(self._text_encoders, ids, strict=True)]
        if "text_embeds" not in self._unet_inputs:
            return {"encoder_hidden_states": found[0].last_hidden_state}
        # SDXL reads the input of the last layer of both encoders (2307.01952, section 2.1)
        states = torch.cat([encoding.hidden_states[-2] for encoding in found], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": found[-1].pooled}

    def _denoised(
        self, sample: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor], guidance: float, guided: bool
    ) -> Tensor:
        """The UNet's output, of two rows a picture combined (classifier-free guidance, 2207.12598, eq. 6)."""
        out: Tensor = self._unet(torch.cat([sample, sample]) if guided else sample, timestep, **conditions)
        if guided:
            negative, positive = out.chunk(2)
            out = negative + guidance * (positive - negative)
        return out

    def _noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Callable[[], npt.NDArray[np.float32]]:
        """Draws of N(0, I) for all pictures, each from a generator of its own."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        factor = self._vae.config.factor
        shape = (1, self._vae.config.latent_channels, size[0] // factor, size[1] // factor)
        return lambda: torch.cat([torch.randn(shape, generator=generator) for generator in generators]).numpy()

    @torch.no_grad()
    def reconstruct(self, images: Pixels) -> Pixels:
        """Pictures uint8 (B, H, W, C), through the autoencoder and back, by the mean of its latents."""
        sample = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mean = self._vae.encode(sample).chunk(2, dim=1)[0]
        redrawn: Pixels = pixels_from_sample(self._vae.decode(mean)).numpy()
        return redrawn


def _more_than_it_gives(checkpoint: LatentDiffusion, unet_inputs: Mapping[str, Any]) -> str | None:
    """What a UNet takes beyond latents, text, class numbers, picture sizes and guidance; the first such thing."""
    unet, latents = checkpoint.configs["unet"], checkpoint.configs["vae"]["latent_channels"]
    if unet["in_channels"] != latents:
        return f"{unet['in_channels']} channels, {latents} of which are latents (inpainting)"
    if unet["class_embed_type"]:
        return f"class_labels by an embedding of type {unet['class_embed_type']!r}"
    if "class_labels" in unet_inputs and "encoder_hidden_states" in unet_inputs:
        return "class numbers beside text"
    return None


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        last, self._last = self._last, time.perf_counter()
        return (self._last - last) * 1000.0
