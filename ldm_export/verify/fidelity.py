"""How near pictures are to the pictures that are the truth: the same prompts and seeds, so the same noise.

The truth is what the checkpoint generates in PyTorch, with as many steps as it needs. What else generates the same
pictures, a bundle with fewer steps, fewer calls, other precisions, is judged by

    psnr_db, psnr_worst_db, ssim     picture by picture: the median, and the worst picture
    perceptual_distance              likewise, the median: :func:`~ldm_export.verify.image_text_alignment.
                                     perceptual_distances`, of EfficientNet-Lite0; not comparable with published LPIPS
    frechet_distance                 of all of them to a set of other pictures; and frechet_ratio, to the truth's own
                                     distance from that set
    retrieval_at_5, alignment        whether a picture shows its prompt: :mod:`ldm_export.verify.quality`

The other pictures are real ones or, where there are none, the truth's with other seeds. Every figure has a 95 %
interval, :mod:`ldm_export.verify.metrics`; that of the ratio is a jackknife which leaves out the same pictures above
and below. The same pictures give the same figures to the last bit, on the same machine with the same libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError
from ldm_export.verify.gates import Kind
from ldm_export.verify.image_generators import ImageGenerator, SamplingSettings
from ldm_export.verify.image_text_alignment import (
    AlignmentJudge,
    Pictures,
    features_of,
    open_feature_network,
    open_pictures,
    perceptual_distances,
)
from ldm_export.verify.metrics import (
    WINDOW,
    Figure,
    frechet_distance,
    jackknifes,
    over_hits,
    over_jackknifes,
    over_pictures,
    psnr,
    recalled,
    ssim,
)
from ldm_export.verify.quality import FEWEST, Progress, choose_held_out, draw_pictures, pictures_of_own

Array = npt.NDArray[Any]

OTHER_SEEDS = 20_000_000
"""Added to the seeds of the truth for the pictures that sets are compared with."""
OF_FEATURES = ("perceptual_distance", "frechet_distance", "frechet_ratio", "retrieval_at_5", "alignment")
"""Figures that need EfficientNet-Lite0."""
NEAREST = 5
SMALLEST = 1e-12


@dataclass(frozen=True)
class FidelityKind(Kind):
    """``figure`` is the name of what is judged; the sentence has a place for ``row``, what was drawn how."""

    figure: str


KINDS = {
    "psnr": FidelityKind(True, " dB", "the median PSNR of {row} is {value}", 45, "psnr_db"),
    "psnr_worst": FidelityKind(True, " dB", "the worst picture of {row} has a PSNR of {value}", 38, "psnr_worst_db"),
    "ssim": FidelityKind(True, "", "the median SSIM of {row} is {value}", 0.98, "ssim"),
    "perceptual": FidelityKind(
        False, "", "the median perceptual distance of {row} is {value}", 0.05, "perceptual_distance"
    ),
    "frechet": FidelityKind(False, "", "the Fréchet distance of {row} is {value}", 160, "frechet_distance"),
    "frechet_ratio": FidelityKind(
        False, "", "the Fréchet distance of {row} is {value} times the truth's", 1.05, "frechet_ratio"
    ),
    "retrieval": FidelityKind(True, "", "the retrieval at 5 of {row} is {value}", 0.85, "retrieval_at_5"),
    "alignment": FidelityKind(True, "", "the image-text alignment of {row} is {value}", 0.3, "alignment"),
    "latency_ms": FidelityKind(False, " ms", "a picture of {row} takes {value}", 500, "latency_ms"),
    "memory_mb": FidelityKind(False, " MB", "a process that draws {row} takes {value}", 500, "memory_mb"),
}
"""What is asked for by which name, in budgets and ``--fail-under``. Latency and memory are measured elsewhere."""


@dataclass(frozen=True)
class Reference:
    """Pictures other than the truth's.

    Attributes
    ----------
    gallery : what retrieval looks in; None for an unconditional model
    images : uint8 (M, H, W, C), the set that sets are compared with
    says : what they are, a sentence
    """

    gallery: Pictures | None
    images: Array
    says: str

    @cached_property
    def features(self) -> Array:
        return features_of(self.images)

    @cached_property
    def gallery_features(self) -> Array:
        assert self.gallery is not None
        return features_of(self.gallery.images)


def real_pictures(
    data: Path, held_out: Path | None, size: tuple[int, int], channels: int, condition: str | None
) -> Reference:
    """Folders of training data: retrieval looks in ``data``, sets are compared with ``held_out``, or else ``data``.

    Raises
    ------
    InputError
        If a folder cannot be used, or pictures of that height and width are no squares.
    """
    if size[0] != size[1]:
        raise InputError(
            f"Pictures of {size[0]}x{size[1]} cannot be compared with a folder's, which are read as squares. Ask for a "
            "square size, or leave the folder out."
        )
    gallery, apart = (open_pictures(each, size[0], channels, condition) for each in (data, held_out or data))
    kept = choose_held_out(len(apart.images))
    kind = (
        "pictures of the data, which the model may have seen in training" if held_out is None else "held-out pictures"
    )
    says = f"Fréchet distances are to {len(kept)} {kind}."
    return Reference(None if condition is None else gallery, apart.images[kept], says)


def own_pictures(
    image_generator: ImageGenerator, conditions: Sequence[str | int], settings: SamplingSettings, progress: Progress
) -> Reference:
    """What the truth's generator draws of the same conditions with other seeds."""
    images = draw_pictures(image_generator, conditions, replace(settings, seed=settings.seed + OTHER_SEEDS), progress)
    return own_reference(images, conditions, image_generator.condition)


def own_reference(images: Array, conditions: Sequence[str | int], condition: str | None) -> Reference:
    """Pictures uint8 (N, H, W, C) that the truth's generator drew with other seeds, one of each condition."""
    gallery = None if condition is None else Pictures(images, tuple(enumerate(conditions)))
    says = (
        f"No real pictures were given: Fréchet distances are to {len(images)} pictures of the truth's own with other "
        "seeds, and retrieval looks among them."
    )
    return Reference(gallery, images, says)


@dataclass(frozen=True)
class FidelityJudge:
    """What pictures of the same conditions and seeds are compared with.

    Attributes
    ----------
    truth : uint8 (N, H, W, C)
    conditions : prompt, or class, of each; anything for an unconditional model
    reference : pictures that sets are compared with
    alignment : None where no checkpoint with alignment/ is known, or the model reads no text
    """

    truth: Array
    conditions: tuple[str | int, ...]
    reference: Reference
    alignment: AlignmentJudge | None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is not judged and why, a sentence each, after what the reference is."""
        return self.reference.says, *dict.fromkeys(self.missing.values())

    @cached_property
    def missing(self) -> dict[str, str]:
        """Figure -> why it cannot be judged, a sentence."""
        missing = {}
        count, (height, width) = len(self.truth), self.truth.shape[1:3]
        if min(height, width) < WINDOW:
            missing["ssim"] = f"Pictures of {height}x{width} are too small for SSIM; {WINDOW} pixels a side are needed."
        try:
            open_feature_network()
        except InputError as error:
            missing |= dict.fromkeys(OF_FEATURES, str(error))
            return missing
        if min(count, len(self.reference.images)) < FEWEST:
            missing["frechet_distance"] = missing["frechet_ratio"] = (
                f"Sets of {count} and {len(self.reference.images)} pictures are too small for a Fréchet distance; "
                f"{FEWEST} of each are needed."
            )
        if self.reference.gallery is None:
            missing["retrieval_at_5"] = "The model is unconditional: there is no retrieval and no alignment."
            missing["alignment"] = missing["retrieval_at_5"]
        elif not self._own.any(axis=1).all():
            lacking = self.conditions[int(np.argmin(self._own.any(axis=1)))]
            missing["retrieval_at_5"] = f"No picture to retrieve is of {str(lacking)!r}: there is no retrieval."
        if self.alignment is None and "alignment" not in missing:
            missing["alignment"] = (
                "No checkpoint with alignment/ is known for this model: alignment is left out."
                if isinstance(self.conditions[0], str)
                else "The model reads no text: there is no alignment."
            )
        return missing

    @cached_property
    def _own(self) -> Array:
        assert self.reference.gallery is not None
        return pictures_of_own(self.conditions, self.reference.gallery)

    @cached_property
    def _of_truth(self) -> tuple[float, Array]:
        """The truth's Fréchet distance to the reference, and without a fifth of either."""
        return self._distances(features_of(self.truth))

    def _distances(self, features: Array) -> tuple[float, Array]:
        sets = features, self.reference.features
        return frechet_distance(*sets), jackknifes(frechet_distance, *sets)

    def figures(self, images: Array) -> dict[str, Figure]:
        """Judge pictures of the truth's conditions and seeds, in its order.

        Parameters
        ----------
        images : uint8 (N, H, W, C)

        Raises
        ------
        InputError
            If they are not as many as the truth's, or of another size.
        """
        if images.shape != self.truth.shape or images.dtype != np.uint8:
            raise InputError(
                f"Pictures {images.shape} {images.dtype} were given; the truth's are {self.truth.shape} uint8. "
                "Draw the same conditions at the same size."
            )
        decibels = psnr(images, self.truth)
        found = {"psnr_db": over_pictures(decibels, np.median), "psnr_worst_db": Figure(*[float(decibels.min())] * 3)}
        missing = self.missing
        if "ssim" not in missing:
            found["ssim"] = over_pictures(ssim(images, self.truth), np.median)
        if "perceptual_distance" not in missing:
            found["perceptual_distance"] = over_pictures(perceptual_distances(images, self.truth), np.median)
            found |= self._of_features(features_of(images))
        return found

    def _of_features(self, features: Array) -> dict[str, Figure]:
        found = {}
        if "frechet_distance" not in self.missing:
            (value, without), (own, own_without) = self._distances(features), self._of_truth
            found["frechet_distance"] = over_jackknifes(value, without)
            ratio = value / max(own, SMALLEST)
            found["frechet_ratio"] = over_jackknifes(ratio, without / np.maximum(own_without, SMALLEST))
        if "retrieval_at_5" not in self.missing:
            found["retrieval_at_5"] = over_hits(recalled(features, self.reference.gallery_features, self._own, NEAREST))
        if self.alignment is not None:
            found["alignment"] = over_pictures(self.alignment.score(features, [str(said) for said in self.conditions]))
        return found
