"""The embedding of a guidance scale that a distilled UNet takes as an input (LCM, 2310.04378, section 4.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def guidance_frequencies(dim: int) -> npt.NDArray[np.float64]:
    """What the scale above 1 is multiplied by before its sines and cosines: (dim // 2,), radians.

    Parameters
    ----------
    dim : of the embedding; not 2 or 3, of which diffusers' formula makes NaN
    """
    half = dim // 2
    frequencies: npt.NDArray[np.float64] = 1000.0 * np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    return frequencies


def guidance_embedding(guidance: float, dim: int) -> npt.NDArray[np.floating[Any]]:
    """Sines, then cosines, of a guidance scale, and a zero where ``dim`` is odd: (dim,), float32."""
    angles = (guidance - 1.0) * guidance_frequencies(dim)
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, dim % 2)).astype(np.float32)
