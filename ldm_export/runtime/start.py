"""Where the latents of a generation start: noise, a picture's latents, and what of a picture stays.

The noise of each picture is drawn from its own seed in the order of diffusers' pipelines: the latents of the image,
the start, the latents of the image without what a mask covers, the rows that add noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm_export.errors import NumericalError
from ldm_export.runtime.facts import check_pictures
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.inpainting import HARD, KeptArea, latents_mask
from ldm_export.runtime.request import Request

REMEDY = (
    "The bundle's graphs overflow or are damaged: compare them with `ldm-export verify BUNDLE --against CHECKPOINT`, "
    "and where they are in half precision (fp16) use the bundle without that."
)


@dataclass(frozen=True)
class Start:
    """What a sampling loop begins with.

    Attributes
    ----------
    latents : float32 (B, C, h, w)
    beside : float32 (B, n, h, w), what the denoiser reads beside its latents: the mask and the latents of what it
        keeps, or the latents of the picture that is edited; None where it reads none
    kept : what of a picture is put back after each row, or None
    """

    latents: Array
    beside: Array | None
    kept: KeptArea | None


class PictureEncoder:
    """The VAE encoder of a bundle.

    Parameters
    ----------
    factor : pixels a side of what one latent stands for

    Attributes
    ----------
    is_certain : whether a picture has one latents, not a distribution of some
    spent_ms : what encoding has taken
    """

    def __init__(self, graph: Graph, factor: int):
        self._graph, self.factor = graph, factor
        self.is_certain = any(tensor.name == "latent_sample" for tensor in graph.spec.outputs)
        self.spent_ms = 0.0

    def distribution(self, image: Array) -> tuple[Array, Array | None]:
        """Mean and log variance of the latents of pictures (B, C, H, W) in [-1, 1]; no variance where they are certain.

        Raises
        ------
        NumericalError
            If they are no finite numbers.
        """
        results = self._graph.run({"sample": image})
        latents = results["latent_sample" if self.is_certain else "latent_parameters"]
        check_pictures(image.shape, latents.shape, self.factor, self._graph.spec)
        if not np.isfinite(latents).all():
            raise NumericalError(f"The VAE encoder gives values that are no finite numbers. {REMEDY}")
        if self.is_certain:
            return latents, None
        mean, logvar = np.split(latents, 2, axis=1)
        return mean, logvar

    def mean(self, image: Array) -> Array:
        """Mean, which is the mode, of the latents of pictures."""
        started = time.perf_counter()
        latents, _ = self.distribution(image)
        self.spent_ms += (time.perf_counter() - started) * 1000.0
        return latents

    def drawn(self, image: Array, draw: Callable[[], Array]) -> Array:
        """Latents of pictures, drawn from their distribution with the pictures' own noise."""
        started = time.perf_counter()
        latents, logvar = self.distribution(image)
        if logvar is not None:
            deviation = np.exp(0.5 * logvar.astype(np.float64))  # the same on every processor
            latents = latents + deviation.astype(np.float32) * draw()
        self.spent_ms += (time.perf_counter() - started) * 1000.0
        return latents


def start_of(request: Request, encoder: PictureEncoder | None, draw: Callable[[], Array]) -> Start:
    """The start of what a request asks for; there is an encoder where it has an image."""
    trajectory, image, mask = request.trajectory, request.image, request.mask
    if request.image_guidance is not None:
        assert encoder is not None
        assert image is not None
        return Start(draw() * np.float32(trajectory.noise_scale), encoder.mean(image), None)
    image_latents = None
    if image is not None and (mask is None or request.levels or trajectory.image_scale):
        assert encoder is not None
        image_latents = encoder.drawn(image, draw)
    noise = draw()
    latents = noise * np.float32(trajectory.noise_scale)
    if image_latents is not None:
        latents += image_latents * np.float32(trajectory.image_scale)
    if mask is None:
        return Start(latents, None, None)
    assert encoder is not None
    assert image is not None
    if request.levels:
        assert image_latents is not None
        if not encoder.is_certain:
            draw()  # of the latents without what the mask covers, which diffusers' pipelines make for no use
        kept = KeptArea(image_latents, noise, latents_mask(mask, encoder.factor), request.levels)
        return Start(latents, None, kept)
    covered = (mask >= HARD)[:, None]  # (B, 1, H, W)
    hard = latents_mask(covered[:, 0].astype(np.float32), encoder.factor)
    return Start(latents, np.concatenate([hard, encoder.drawn(image * ~covered, draw)], axis=1), None)
