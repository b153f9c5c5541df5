"""What shapes an engine is built for: pictures at a time and their size, as shapes of every graph's inputs.

With guidance the denoiser, and what it is given, has two rows a picture; without it, which is always possible, one. So
where a model can be guided the range of rows goes from the least number of pictures to twice the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.bundle.targets.engines import ShapeRange
from ldm_export.contract import GraphSpec, Roles, tokens_read
from ldm_export.errors import InputError

Sizes = Mapping[str, tuple[int, int, int]]
"""The least, the best and the largest size of each free dimension, by its name in the contract."""


@dataclass(frozen=True)
class Range:
    """The least that an engine takes, what it is tuned for, and the most."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, name: str, text: str) -> Range:
        """Read ``2`` or ``1:2:8``; InputError unless they are whole numbers from 1 that do not fall."""
        parts = text.split(":")
        numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
        if len(numbers) != len(parts) or len(parts) not in (1, 3) or not 1 <= numbers[0] <= numbers[-1]:
            raise InputError(f"{name} {text!r} is no range; give one number from 1, or min:opt:max, such as 1:2:8.")
        low, best, high = numbers * 3 if len(numbers) == 1 else numbers
        if not low <= best <= high:
            raise InputError(f"{name} {text!r} does not rise; min, opt and max must be in this order.")
        return cls(low, best, high)


def check_pixels(pixels: Range, pixels_per_latent: int) -> None:
    """Raise InputError unless pictures of these sizes can be drawn."""
    for size in (pixels.min, pixels.opt, pixels.max):
        if size % pixels_per_latent:
            raise InputError(
                f"size {size} cannot be drawn by this model; sizes are multiples of {pixels_per_latent} pixels. "
                f"Use {max(size // pixels_per_latent, 1) * pixels_per_latent}."
            )


def profile_of(
    graph: GraphSpec,
    graphs: Mapping[str, GraphSpec],
    roles: Roles,
    facts: Mapping[str, Any],
    batch: Range,
    pixels: Range,
) -> dict[str, ShapeRange]:
    """The shapes of every input of a graph that has a free dimension.

    Parameters
    ----------
    graphs, roles, facts : of the bundle, and its manifest's ``model``
    batch, pixels : pictures at a time, and their height and width
    """
    per_latent = facts["pixels_per_latent"]
    each = roles.guidance.rows()
    rows = Range(batch.min, each * batch.opt, each * batch.max)
    given_both = {*roles.graphs} - {roles.vae_decoder, roles.vae_encoder}  # prompts and negative prompts at once
    count = rows if graph.name in given_both else batch
    images = (pixels.min, pixels.opt, pixels.max)
    latents = tuple(size // per_latent for size in images)
    sizes: dict[str, tuple[int, ...]] = {
        "batch": (count.min, count.opt, count.max),
        "rows": (rows.min, rows.opt, rows.max),
        "height": latents,
        "width": latents,
        "image_height": images,
        "image_width": images,
        "tokens": (tokens_read(roles, graphs),) * 3,
    }
    return {
        tensor.name: ShapeRange(
            *(tuple(sizes[size][k] if isinstance(size, str) else size for size in tensor.shape) for k in range(3))
        )
        for tensor in graph.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }
