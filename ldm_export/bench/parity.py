"""How much two sets of pictures differ, and how much a bundle's graphs from PyTorch's networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bench.calibration import calibration_calls
from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.export.chain import Progress, compare_bundle
from ldm_export.export.graphs import CALIBRATION
from ldm_export.export.parity import Parity


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


def compare_with_checkpoint(bundle: Bundle, checkpoint: LatentDiffusion, progress: Progress) -> list[Parity]:
    """Every graph of a bundle against the checkpoint's networks; graphs that a pass has quantized on what they are
    given while pictures are drawn.

    Raises
    ------
    InputError
        If the checkpoint is of another shape than the bundle.
    """
    calls = None
    if CALIBRATION in bundle.manifest.source:
        progress("calibration pictures")
        calls = calibration_calls(bundle, bundle.manifest.source[CALIBRATION])
    return compare_bundle(bundle, checkpoint, progress, calls)
