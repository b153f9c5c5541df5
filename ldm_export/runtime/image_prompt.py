"""The picture of an IP-Adapter (2308.06721), as its image encoder reads it.

Its shorter side is resized to the encoder's size and the middle is cut out. Resizing is Pillow's bicubic (Keys,
a = -1/2, stretched over the pixels that one of the smaller picture stands for), in Pillow's own fixed point, so that it
gives the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.runtime.graph import Array
from ldm_export.runtime.values import real_number, shown

LARGEST_SCALE = 1e3
SUPPORT, KEYS = 2.0, -0.5
BITS = 22
"""Binary digits of a weight's fraction in Pillow's fixed point."""


@dataclass(frozen=True)
class ImagePrompt:
    """A picture of an IP-Adapter.

    Attributes
    ----------
    pixels : float32 (B, 3, S, S) in [0, 1]
    scale : how much
    """

    pixels: Array
    scale: float


def checked_image_prompt(bundle: Bundle, image: Any, scale: Any, batch: int) -> ImagePrompt | None:
    """The picture of a request for ``batch`` pictures; None where there is none.

    Parameters
    ----------
    image : uint8 (H, W, 3), or (B, H, W, 3), of any size, or None
    scale : from 0 to 1000, or None for 1

    Raises
    ------
    InputError
        If the bundle has no IP-Adapter, or the picture is none.
    """
    if image is None:
        if scale is not None:
            raise InputError("ip_adapter_scale was given without ip_adapter_image. Give the picture, or leave it out.")
        return None
    encoder = bundle.roles.image_encoder
    if encoder is None:
        raise InputError(
            "A picture for an IP-Adapter was given; this bundle has none. Export the model with `--ip-adapter FILE`, "
            "or leave the picture out."
        )
    number = 1.0 if scale is None else real_number("ip_adapter_scale", scale, 0.0, LARGEST_SCALE)
    try:
        pixels = np.asarray(image)
    except Exception as error:  # lists of unequal lengths, tensors on a GPU: what a stranger's type raises
        raise InputError(f"ip_adapter_image is {shown(image)}; uint8 (H, W, 3) is needed. Convert it.") from error
    given, pixels = pixels.shape, pixels[None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise InputError(
            f"ip_adapter_image has shape {given} and dtype {pixels.dtype}; uint8 (H, W, 3), or one of those a picture, "
            "is needed. Convert it to RGB."
        )
    if len(pixels) not in (1, batch):
        raise InputError(f"{len(pixels)} IP-Adapter pictures were given for {batch} pictures. Give one, or one each.")
    size = bundle.manifest.graphs[encoder].inputs[0].shape[2]
    assert isinstance(size, int)
    made = np.stack([encoder_pixels(one, size) for one in pixels])
    return ImagePrompt(np.ascontiguousarray(np.broadcast_to(made, (batch, *made.shape[1:]))), number)


def encoder_pixels(image: Array, size: int) -> Array:
    """The middle of a picture uint8 (H, W, 3), as float32 (3, size, size) in [0, 1]."""
    height, width, _ = image.shape
    short = min(height, width)
    sides = [size if side == short else int(size * side / short) for side in (height, width)]
    resized = _resized(_resized(image, sides[1], 1), sides[0], 0)  # Pillow resizes rows first
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    cut: Array = resized[top : top + size, left : left + size].transpose(2, 0, 1)
    made: Array = cut.astype(np.float32) / np.float32(255)
    return made


def _resized(image: Array, size: int, axis: int) -> Array:
    """One axis of uint8 values resized, as uint8."""
    there = image.shape[axis]
    if there == size:
        return image
    values = np.moveaxis(image, axis, 0).astype(np.int64)
    made = np.empty((size, *values.shape[1:]), np.uint8)
    stretch = max(there / size, 1.0)
    for place in range(size):
        centre = (place + 0.5) * there / size
        first = max(int(centre - SUPPORT * stretch + 0.5), 0)
        last = min(int(centre + SUPPORT * stretch + 0.5), there)
        weights = [_bicubic((k + first - centre + 0.5) / stretch) for k in range(last - first)]
        total = sum(weights)
        fixed = np.array([math.floor(abs(w / total) * (1 << BITS) + 0.5) * (1 if w >= 0 else -1) for w in weights])
        summed = np.tensordot(fixed, values[first:last], 1) + (1 << (BITS - 1))
        made[place] = np.clip(summed >> BITS, 0, 255)
    return np.moveaxis(made, 0, axis)


def _bicubic(x: float) -> float:
    """Keys' cubic convolution (1981), eq. 15, with a = `KEYS`."""
    x = abs(x)
    if x < 1.0:
        return ((KEYS + 2.0) * x - (KEYS + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * KEYS
    return 0.0
