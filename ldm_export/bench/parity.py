"""How much two sets of pictures differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError


def psnr_db(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two pictures, uint8 of one shape: 10 log10(255^2 / mean squared error), in dB.

    Infinite for equal pictures; 45 dB is beyond what an eye can tell, 30 dB is a visible difference.
    """
    if ours.shape != theirs.shape or ours.dtype != np.uint8 or theirs.dtype != np.uint8:
        raise InputError(
            f"pictures of shape {ours.shape} {ours.dtype} and {theirs.shape} {theirs.dtype} cannot be compared; "
            "both must be uint8 of one shape. Draw them at the same size."
        )
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
