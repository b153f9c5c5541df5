"""What drawing gives: pictures and latents, the state after each step, and where the time went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Timings:
    """Wall-clock milliseconds of one generation, by stage.

    ``load_ms`` is what opening the graphs took, in a pipeline's first generation, and what engines need to be prepared
    for a size that is new to them; it is not part of the total. ``text_ms`` is the prompts, up to the first call of the
    denoiser, with what of it depends on them alone.
    ``denoiser_ms`` has one entry a network call; ``loop_ms`` is what the sampling loop spent outside the network.
    ``whole_ms`` is the one call of a loop graph, from the text encoder to the pictures, which has no network calls.
    """

    load_ms: float = 0.0
    text_ms: float = 0.0
    encode_ms: float = 0.0
    denoiser_ms: list[float] = field(default_factory=list)
    loop_ms: float = 0.0
    decode_ms: float = 0.0
    whole_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.text_ms + self.encode_ms + sum(self.denoiser_ms) + self.loop_ms + self.decode_ms + self.whole_ms


@dataclass(frozen=True)
class Step:
    """The state after one network call.

    Attributes
    ----------
    index, count : 0-based number of the call, and how many there are
    timestep : what the network was given
    latents : float32 (B, C, h, w), the live buffer: copy it to keep it
    """

    index: int
    count: int
    timestep: float
    latents: Array
    _decode: Callable[[Array], Array] = field(repr=False)

    def decode(self) -> Array:
        """The latents as pictures, uint8 (B, H, W, C): a preview, and after the last step the result.

        Raises
        ------
        NumericalError
            If what is decoded has values that are no finite numbers.
        """
        return self._decode(self.latents)


@dataclass(frozen=True)
class Generation:
    """What :meth:`Pipeline.generate` gives.

    Attributes
    ----------
    images : uint8 (B, H, W, C), C being 3, or 1 for grey models
    latents : float32 (B, C, h, w), as the sampler has them
    seeds : one a picture
    timings : by stage
    backend : what ran the graphs
    """

    images: Array
    latents: Array
    seeds: tuple[int, ...]
    timings: Timings
    backend: str


def pixels_of(sample: Array) -> Array:
    """Pictures (B, C, H, W) in [-1, 1], clipped to that, as uint8 (B, H, W, C), as diffusers rounds them."""
    pixels = np.clip(sample / 2 + 0.5, 0.0, 1.0) * 255
    images: Array = pixels.round().astype(np.uint8).transpose(0, 2, 3, 1)
    return images
