"""How far a bundle's graphs are from PyTorch's networks."""

from __future__ import annotations

from ldm_export.bundle import Bundle
from ldm_export.bundle.parity import Parity
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.export.chain import Progress, compare_bundle
from ldm_export.export.graphs import CALIBRATION
from ldm_export.verify.calibration import calibration_calls


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
