"""Keeping a part of a picture: masks, what of the latents stays the picture's, and what of the pixels.

After each row of the plan, with m the mask at the latents' size, 1 where the picture is drawn anew::

    latents <- (1 - m) (image_scale image_latents + noise_scale z) + m latents

The scales are of the level that the next row expects (`ldm_export.plan.row_levels`), and 1 and 0 after the last; z is
the noise that the latents started from. So diffusers' inpainting pipelines do it for models that read latents alone
(RePaint, 2201.09865, eq. 8, without resampling). A model that was trained to inpaint is given the mask and the latents
of the picture without what the mask covers instead, beside its own latents (2112.10752, section 4.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.roles import LARGEST_SIZE
from ldm_export.errors import InputError
from ldm_export.plan import Scales
from ldm_export.runtime.graph import Array
from ldm_export.runtime.values import shown

Margins = tuple[int, int, int, int]
"""Pixels on the left, at the top, on the right and at the bottom."""
HARD = np.float32(0.5)
"""Least value of a mask that is 1 to models that were trained with masks of 0 and 1 alone."""


@dataclass(frozen=True)
class KeptArea:
    """The part of the latents that stays a picture's.

    Attributes
    ----------
    image_latents, noise : float32 (B, C, h, w), of the picture, and what its latents are noised by
    mask : float32 (B, 1, h, w) in [0, 1], 1 where latents are drawn anew
    levels : of the latents before each row of the trajectory
    """

    image_latents: Array
    noise: Array
    mask: Array
    levels: Sequence[Scales]

    def restore(self, latents: Array, done: int) -> None:
        """Put the picture's latents back in the kept area, in place, after ``done`` rows."""
        image_scale, noise_scale = self.levels[done] if done < len(self.levels) else (1.0, 0.0)
        kept = self.image_latents * np.float32(image_scale)
        kept += self.noise * np.float32(noise_scale)
        kept *= 1 - self.mask
        latents *= self.mask
        latents += kept


def check_reads_mask(bundle: Bundle, *, given: bool) -> None:
    """Raise InputError unless a denoiser that reads a picture's latents beside its own reads a mask before them, and
    image and mask are ``given``."""
    roles = bundle.roles
    inputs = bundle.manifest.graphs[roles.denoiser].inputs
    channels = [tensor.shape[1] for tensor in inputs if roles.conditions.get(tensor.name) == "image_latents"]
    if channels != [bundle.manifest.model["latent_channels"] + 1]:
        raise InputError(
            "This bundle's denoiser reads the latents of another picture without a mask, as for editing it, and its "
            "manifest says no guidance of three rows, by which this runtime edits. Run its graphs yourself."
        )
    if not given:
        raise InputError(
            "This model was trained to inpaint, so it reads a picture and a mask of what is drawn anew in it. Give "
            "both: image and mask."
        )


def checked_mask(mask: Array, image: Array, factor: int, *, hard: bool = False) -> Array:
    """A mask as float32 (B, H, W) in [0, 1], for pictures (B, C, H, W); one serves the whole batch.

    Parameters
    ----------
    mask : uint8 (H, W) or (B, H, W), 255 where the picture is drawn anew, 0 where it is kept
    factor : pixels a side of what one latent stands for
    hard : whether 127 and less is taken for 0, and 128 and more for 255, by what reads it

    Raises
    ------
    InputError
        If it is of another kind or size, or leaves nothing to be drawn anew.
    """
    try:
        given = np.asarray(mask)
    except Exception as error:  # lists of unequal lengths, tensors on a GPU: what a stranger's type raises
        raise InputError(f"mask is {shown(mask)}; uint8 (H, W) is needed. Convert it.") from error
    batch, _, height, width = image.shape
    masks = given[None] if given.ndim == 2 else given
    coloured = masks.shape[:2] == (height, width) and masks.shape[1:] != (height, width)
    if masks.dtype != np.uint8 or masks.ndim != 3 or coloured:
        raise InputError(
            f"mask has shape {given.shape} and dtype {given.dtype}; uint8 (H, W), or one of those a picture, is "
            "needed: 255 where the picture is drawn anew, 0 where it is kept. Convert it to grey."
        )
    if masks.shape[1:] != (height, width):
        raise InputError(_sizes(masks.shape[1:], (height, width)))
    if len(masks) not in (1, batch):
        raise InputError(f"{len(masks)} masks were given for {batch} pictures. Give one, or one each.")
    for number, one in enumerate(masks):
        white = one >= (128 if hard else 1)
        if not white.any():
            dark = "darker than 128" if one.any() else "black"
            raise InputError(f"Mask {number} is {dark} everywhere, so nothing would be drawn anew. Make a part white.")
        if not white[::factor, ::factor].any():
            raise InputError(
                f"Mask {number} is white between the latents only, of which each reads one of {factor}x{factor} "
                "pixels, its top left one; nothing would be drawn anew. Make the white part larger."
            )
    sample = masks.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(np.broadcast_to(sample, (batch, height, width)))


def _sizes(mask: Sequence[int], image: Sequence[int]) -> str:
    return (
        f"The mask is {mask[0]}x{mask[1]} and the image {image[0]}x{image[1]}; a mask has the size of its image. "
        "Resize the mask."
    )


def latents_mask(mask: Array, factor: int) -> Array:
    """A mask (B, H, W) at the latents' size, (B, 1, h, w): each latent's top left pixel, the nearest one, as torch's
    ``interpolate`` chooses it for diffusers."""
    return np.ascontiguousarray(mask[:, None, ::factor, ::factor])


def blended(drawn: Array, image: Array, mask: Array) -> Array:
    """Pictures uint8 (B, H, W, C): ``drawn`` where the mask (B, H, W) is 1, ``image`` where it is 0, each to the bit,
    and their mean so weighed between."""
    share = mask[..., None].astype(np.float64)
    pixels = image * (1 - share) + drawn * share
    return np.asarray(pixels.round().astype(np.uint8))


def outpainted(image: Array, mask: Array | None, margins: Margins, multiple: int) -> tuple[Array, Array]:
    """A picture with room around it, and the mask for `Pipeline.generate` to fill that room.

    The room has the colours of the picture's edge, which the encoder takes for more of the same: noise there would
    spill into the latents along the edge, which are kept.

    Parameters
    ----------
    image : uint8 (H, W, C)
    mask : uint8 (H, W) of what else is drawn anew, or None
    margins : pixels on the left, at the top, on the right and at the bottom
    multiple : what margins are multiples of, so that no latent is partly of the picture

    Returns
    -------
    The picture, uint8 (H', W', C), and the mask, uint8 (H', W')

    Raises
    ------
    InputError
        If a margin is no such multiple or beyond `LARGEST_SIZE`, or the mask of another size.
    """
    for side, margin in zip(("left", "top", "right", "bottom"), margins, strict=True):
        if margin % multiple or not 0 <= margin <= LARGEST_SIZE:
            raise InputError(
                f"{margin} pixels were asked for ({side}) around the image; each side takes a multiple of {multiple}, "
                f"up to {LARGEST_SIZE}. Use {min(max(multiple, round(margin / multiple) * multiple), LARGEST_SIZE)}."
            )
    if mask is not None and mask.shape != image.shape[:2]:
        raise InputError(_sizes(mask.shape, image.shape))
    left, top, right, bottom = margins
    around = ((top, bottom), (left, right))
    own = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
    return np.pad(image, (*around, (0, 0)), mode="edge"), np.pad(own, around, constant_values=255)
