"""The same conditions and seeds drawn by every variant: how far latents drift from the baseline's, step by step, and
how much the pictures differ.

    drift of step i  =  |x_i - y_i| / |y_i|        Euclidean, over the latents x of a variant and y of the baseline

Rounding alone gives about 1e-6 and grows little; what is quantized starts near 1e-2 and grows. Sides that are drawn
otherwise than the baseline (sampler, steps, guidance) meet other latents and have no drift.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_export.verify.image_generators import Sample
from ldm_export.verify.metrics import psnr_db

LARGEST = 999.0
"""JSON has no infinity: the decibels of equal pictures, and the drift of latents that are no numbers."""

Draw = Callable[[int], Sample]
"""Draws picture k, and that alone."""


def compare_pictures(
    variants: Mapping[str, Draw],
    count: int,
    baseline: str | None,
    comparable: Sequence[str],
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Draw ``count`` pictures with every variant.

    Parameters
    ----------
    baseline : the variant that the others are compared with; None compares nothing
    comparable : the variants that are drawn as the baseline is, step by step

    Returns
    -------
    variant -> ``png``, one a picture in base64; and beside the baseline ``psnr_db``, one a picture, :data:`LARGEST` for
    equal ones; and ``drift``, the ``median`` and ``worst`` of the pictures after each step, or None
    """
    found: dict[str, dict[str, Any]] = {name: {"png": []} for name in variants}
    drifts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in comparable}
    for k in range(count):
        samples = {}
        for name, draw in variants.items():
            progress(f"picture {k + 1} of {count}, {name}")
            samples[name] = draw(k)
            found[name]["png"].append(png_from_pixels(samples[name].images[0]))
        for name in variants.keys() - {baseline} if baseline else ():
            ours, theirs = samples[name], samples[baseline or ""]
            psnr = min(psnr_db(ours.images[0], theirs.images[0]), LARGEST)
            found[name].setdefault("psnr_db", []).append(psnr)
            if name in drifts:
                drifts[name].append(drift(ours.trajectory, theirs.trajectory))
    for name, result in found.items():
        if "psnr_db" in result:
            each = np.stack(drifts[name]) if name in drifts else None  # (pictures, steps)
            result["drift"] = None if each is None else _over_pictures(each)
    return found


def drift(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Relative error of latents (steps, B, C, h, w) after each step: (steps,)."""
    flat, reference = (x.astype(np.float64).reshape(len(x), -1) for x in (ours, theirs))
    error = np.linalg.norm(flat - reference, axis=1) / np.maximum(np.linalg.norm(reference, axis=1), 1e-12)
    return np.asarray(np.minimum(np.nan_to_num(error, nan=LARGEST), LARGEST))


def _over_pictures(drifts: npt.NDArray[Any]) -> dict[str, list[float]]:
    return {"median": np.median(drifts, axis=0).tolist(), "worst": drifts.max(axis=0).tolist()}


def png_from_pixels(pixels: npt.NDArray[Any]) -> str:
    """A PNG in base64 of a picture uint8 (H, W, C)."""
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def pictures_of(pngs: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Pictures in base64, as :func:`compare_pictures` keeps them: uint8 (N, H, W, C)."""
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pngs]
    return np.stack([image.reshape(*image.shape[:2], -1) for image in images])
