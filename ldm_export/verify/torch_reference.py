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
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import conditions_of, labels_of
from ldm_export.errors import InputError
from ldm_export.families import family_of
from ldm_export.families.base import Family, GraphModule
from ldm_export.plan import Stepper, compile_plan, picture_tokens
from ldm_export.runtime.conditioning import request_sources

Ids = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass
class Drawn:
    """Pictures, and how they came about.

    Attributes
    ----------
    images : uint8 (B, H, W, C)
    trajectory : float32 (rows, B, C, h, w), the latents after each row of the plan
    denoiser_ms : milliseconds of each call of the denoiser
    text_ms, loop_ms, decode_ms : milliseconds of the text encoders, of the loop outside it, of the decoder
    """

    images: Pixels
    trajectory: npt.NDArray[np.float32]
    denoiser_ms: list[float] = field(default_factory=list)
    text_ms: float = 0.0
    loop_ms: float = 0.0
    decode_ms: float = 0.0


class TorchReference:
    """A checkpoint in plain PyTorch: the networks that its graphs are made of, and noise of ``torch.Generator("cpu")``.

    The samplers are the plans that bundles have, too; that those, and these pictures, are diffusers', tests show.
    Pictures are uint8 (B, H, W, C), latents (B, C, h, w).

    Raises
    ------
    InputError
        For a model that is given more than text or a class number, naming what.
    """

    def __init__(self, checkpoint: LatentDiffusion):
        family = family_of(checkpoint)
        self._checkpoint, self._roles = checkpoint, family.roles
        self._facts = family.facts
        self._specs = {graph.spec.name: graph.spec for graph in family.graphs}
        self._read = self._roles.sources(self._specs)
        if more := more_than_text_or_class(family):
            raise InputError(
                f"{checkpoint.path}: the denoiser reads {more}, which the PyTorch side of a comparison does not give "
                "it. Use `ldm-export export`, whose graphs are compared with the networks one by one."
            )
        self._modules = {graph.spec.name: graph.load() for graph in family.graphs}

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
        guidance : the scale; no second row where it is 1 or less, or where the denoiser is given it
        size : height and width in pixels
        ids, empty_ids : of the prompts and of the empty prompt, (B, L) for each text encoder
        labels : classes (B,), of models that have them
        """
        spent = _Clock()
        tokens = picture_tokens(self._facts, *size)
        rows = compile_plan(self._checkpoint.scheduler, sampler, steps, tokens=tokens).from_noise()
        guided = self._roles.guidance.takes_two_rows(guidance)
        conditions = self.conditions(
            len(seeds), guidance=guidance, size=size, ids=ids, empty_ids=empty_ids if guided else None, labels=labels
        )
        text_ms = spent.lap()
        draw = self._noise(seeds, size)
        latents = draw() * np.float32(rows.noise_scale)
        stepper, sample = Stepper(rows.rows, latents), np.empty_like(latents)
        trajectory, denoiser_ms = [], []
        loop_ms = spent.lap()
        for row in rows.rows:
            stepper.network_input(out=sample)
            loop_ms += spent.lap()
            out = self._denoised(torch.from_numpy(sample), row.timestep, conditions, guidance, guided)
            denoiser_ms.append(spent.lap())
            stepper.advance(out.numpy(), draw)
            trajectory.append(latents.copy())
            loop_ms += spent.lap()
        (decoded,) = self._modules[self._roles.vae_decoder](torch.from_numpy(latents))
        images = pixels_from_sample(decoded).numpy()
        return Drawn(images, np.stack(trajectory), denoiser_ms, text_ms, loop_ms, spent.lap())

    @torch.no_grad()
    def conditions(
        self,
        count: int,
        *,
        guidance: float,
        size: tuple[int, int],
        ids: Sequence[Ids] = (),
        empty_ids: Sequence[Ids] | None = None,
        labels: Ids | None = None,
    ) -> dict[str, Tensor]:
        """What the denoiser reads beside ``sample`` and ``timestep``, for ``count`` pictures.

        Parameters are those of :meth:`draw`. With ``empty_ids`` the rows of the empty prompt come first; None leaves
        them out.
        """
        given = request_sources(
            self._read,
            count,
            height=size[0],
            width=size[1],
            guidance=guidance,
            has_negative_prompt=None if empty_ids is None else [False] * count,
            class_labels=labels,
        )
        sources = {name: torch.from_numpy(value) for name, value in given.items()}
        return self._conditions(sources, ids, empty_ids or ())

    @property
    def denoiser(self) -> GraphModule:
        """The denoiser behind the inputs of its graph: ``sample``, ``timestep``, and `denoiser_reads`."""
        return self._modules[self._roles.denoiser]

    @property
    def denoiser_reads(self) -> tuple[str, ...]:
        """Names of the denoiser's conditions, in the order of its inputs."""
        return tuple(tensor.name for tensor in self._specs[self._roles.denoiser].inputs[2:])

    @torch.no_grad()
    def latent_parameters(self, images: Pixels) -> Tensor:
        """Latents of pictures as the sampler has them: (B, 2 C, h, w), mean and log-variance; the latter is very low
        where an autoencoder's latents are certain."""
        encoded: Tensor
        (encoded,) = self._modules[self._roles.vae_encoder](_sample(images))
        if not self._certain:
            return encoded
        return torch.cat([encoded, torch.full_like(encoded, -30.0)], dim=1)

    @property
    def _certain(self) -> bool:
        """Whether the autoencoder gives latents and no distribution of them."""
        return self._specs[self._roles.vae_encoder].outputs[0].name == "latent_sample"

    def _conditions(
        self, sources: dict[str, Tensor], ids: Sequence[Ids], empty_ids: Sequence[Ids]
    ) -> dict[str, Tensor]:
        """The denoiser's conditions; with guidance first the rows of the empty prompt."""

        def run(name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            spec = self._specs[name]
            results = self._modules[name](*(inputs[tensor.name] for tensor in spec.inputs))
            return {tensor.name: value for tensor, value in zip(spec.outputs, results, strict=True)}

        for number, encoder in enumerate(self._roles.text_encoders):
            encoded = [
                run(encoder.graph, {"input_ids": torch.from_numpy(rows[number])}) for rows in (empty_ids, ids) if rows
            ]
            for name in encoded[0]:
                sources[f"{encoder.graph}.{name}"] = torch.cat([each[name] for each in encoded])
        return conditions_of(self._roles, self._specs, sources, run)

    def _denoised(
        self, sample: Tensor, timestep: float, conditions: Mapping[str, Tensor], guidance: float, guided: bool
    ) -> Tensor:
        """The denoiser's output, of two rows a picture combined (classifier-free guidance, 2207.12598, eq. 6)."""
        sample = torch.cat([sample, sample]) if guided else sample
        out: Tensor
        (out,) = self.denoiser(sample, torch.full((len(sample),), timestep), *self._in_order(conditions))
        if guided:
            negative, positive = out.chunk(2)
            out = negative + guidance * (positive - negative)
        return out

    def _in_order(self, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        return [conditions[name] for name in self.denoiser_reads]

    def _noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Callable[[], npt.NDArray[np.float32]]:
        """Draws of N(0, I) for all pictures, each from a generator of its own."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        factor = self._checkpoint.pixels_per_latent
        channels = int(self._specs[self._roles.vae_decoder].inputs[0].shape[1])
        shape = (1, channels, size[0] // factor, size[1] // factor)
        return lambda: torch.cat([torch.randn(shape, generator=generator) for generator in generators]).numpy()

    @torch.no_grad()
    def reconstruct(self, images: Pixels) -> Pixels:
        """Pictures uint8 (B, H, W, C), through the autoencoder and back, by the mean of its latents."""
        mean = self.latent_parameters(images).chunk(2, dim=1)[0]
        redrawn: Pixels = pixels_from_sample(self._modules[self._roles.vae_decoder](mean)[0]).numpy()
        return redrawn


def more_than_text_or_class(family: Family) -> str | None:
    """What a denoiser reads beyond latents, text, class numbers, picture sizes and guidance; the first such."""
    specs = {graph.spec.name: graph.spec for graph in family.graphs}
    read = family.roles.sources(specs)
    if "image_latents" in read:
        return "the latents of a picture beside its own (inpainting)"
    if "class_labels" not in read:
        return None
    if labels_of(specs, family.roles).dtype != "int64":
        return "class labels as features"
    if not family.facts["class_count"]:
        return "class numbers of which there may be any"
    return "class numbers beside text" if family.roles.text_encoders else None


def _sample(images: Pixels) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        last, self._last = self._last, time.perf_counter()
        return (self._last - last) * 1000.0
