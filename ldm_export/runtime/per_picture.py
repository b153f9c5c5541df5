"""What a caller gives for all pictures or for each: texts, seeds, class labels, and the guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_export.contract import INPUT, THREE_ROWS, TWO_ROWS, Guidance, TensorSpec
from ldm_export.errors import InputError
from ldm_export.runtime.graph import Array
from ldm_export.runtime.noise import Generator
from ldm_export.runtime.values import listed, shown, text_of

LARGEST_GUIDANCE = 1e6


def texts_for(name: str, value: Any) -> tuple[str, ...]:
    """One text, or several, or None for none, as a tuple."""
    if value is None:
        return ()
    return tuple(text_of(name, text) for text in ([value] if isinstance(value, str) else listed(f"{name}s", value)))


def seeds_for(seed: int | list[int], batch: int) -> tuple[int, ...]:
    """A list as it is; one number gives picture k the seed + k. Each is one that `Generator` takes."""
    given: Any = seed
    if not isinstance(seed, list):
        Generator(seed)
        given = [int(seed) + k for k in range(batch)]
    if len(given) != batch or not batch:
        raise InputError(
            f"{len(given)} seeds were given for {batch or 'no'} pictures. Give one number, or one seed a picture."
        )
    for value in given:
        Generator(value)
    return tuple(map(int, given))


def labels_for(class_labels: Sequence[int], accepted: TensorSpec, model: Mapping[str, Any]) -> Array:
    """Class labels as the model takes them: (B,) whole numbers below ``class_count``, or (B, F) features."""
    count = model.get("class_count")
    try:
        labels = np.asarray(class_labels)
        if accepted.dtype != "int64":
            labels = labels.astype(accepted.dtype)
    except (TypeError, ValueError, OverflowError):  # lists of unequal lengths, text, numbers that are none
        raise InputError(f"class_labels is {shown(class_labels)}; give numbers, one row a picture.") from None
    if accepted.dtype != "int64":
        if not np.isfinite(labels).all():
            raise InputError("class_labels has values that are no finite numbers. Give finite ones.")
    elif labels.dtype.kind not in "iu" or (count and labels.size and not 0 <= labels.min() <= labels.max() < count):
        wrong = [value for value in labels.ravel().tolist() if type(value) is not int or not 0 <= value < (count or 1)]
        allowed = f"0 to {count - 1}" if count else "whole numbers"
        raise InputError(f"class label {shown(wrong[0] if wrong else class_labels)} is none; this model has {allowed}.")
    if labels.ndim != len(accepted.shape) or not len(labels):
        raise InputError(f"class labels have shape {labels.shape}; {accepted.shape} is needed. Give one a picture.")
    return labels.astype(accepted.dtype)


def guidance_for(
    guidance: float | None, negative_prompt: str | Sequence[str] | None, model: Guidance, *, reads_text: bool
) -> float:
    """The scale with which predictions are combined, or that the denoiser is given; 1 where it has its own inside."""
    scale = model.scale if guidance is None else guidance
    if not np.isfinite(scale) or scale < 0:
        raise InputError(f"guidance is {scale}; it must be a number from 0 on, 1 being off.")
    negative = bool(negative_prompt and any(negatives_for(negative_prompt, len(negative_prompt))))
    if model.kind in (THREE_ROWS, TWO_ROWS):
        return scale
    remedy = "Leave it out, or use the bundle of the model that it was distilled from."
    if model.kind == INPUT:
        if negative:
            raise InputError(
                "A negative prompt was given; this model was distilled to be given a guidance scale and takes none. "
                f"{remedy}"
            )
        return scale
    if scale != model.scale or (negative and reads_text):
        asked = f"Guidance {scale:g}" if scale != model.scale else "A negative prompt"
        if model.scale <= 1:
            raise InputError(f"{asked} was asked for; this model makes one prediction, without guidance. Leave it out.")
        raise InputError(
            f"{asked} was asked for; this model was distilled with guidance {model.scale:g} and takes no other, and no "
            f"negative prompt. {remedy}"
        )
    return 1.0


def negatives_for(negative_prompt: str | Sequence[str] | None, batch: int) -> tuple[str | None, ...]:
    """One a picture: a text, which may be empty, or None where none was given."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return (negative_prompt,) * batch
    if len(negative_prompt) != batch:
        raise InputError(
            f"{len(negative_prompt)} negative prompts were given for {batch} pictures. Give one, or one each."
        )
    return tuple(negative_prompt)
