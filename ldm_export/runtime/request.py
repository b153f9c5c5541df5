"""What a caller asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import TensorSpec
from ldm_export.errors import InputError
from ldm_export.plan import Plan, Trajectory
from ldm_export.runtime.backends import Array
from ldm_export.runtime.noise import Generator


@dataclass(frozen=True)
class Request:
    """One call of the pipeline.

    Attributes
    ----------
    prompts, negative_prompts : one a picture; empty tuples for models that read no text
    class_labels : (B,) int64, or None
    seeds : one a picture
    height, width : pixels
    guidance : the scale; 1 is off
    image : (B, 3, H, W) float32 in [-1, 1] to start from, or None
    trajectory : where the latents start and the rows that they run through
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    class_labels: Array | None
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: float
    image: Array | None
    trajectory: Trajectory

    @property
    def batch(self) -> int:
        return len(self.seeds)


def read_plan(bundle: Bundle, sampler: str, steps: int) -> Plan:
    """The bundle's plan of that sampler and number of steps.

    Raises
    ------
    InputError
        If there is none; the message says which there are and how to add one.
    """
    path = f"plans/{sampler}-{steps}.json"
    if path not in bundle.manifest.files:
        there = sorted(
            name[len("plans/") : -len(".json")] for name in bundle.manifest.files if name.startswith("plans/")
        )
        raise InputError(
            f"This bundle has no plan for {sampler!r} with {steps} steps; it has {', '.join(there) or 'none'}. "
            f"Use one of those, or run: ldm-export plan {bundle.path} --sampler {sampler} --steps {steps}"
        )
    return Plan.from_json(bundle.file(path).read_text(encoding="utf-8"))


def seeds_for(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    """A list as it is; one number gives picture k the seed + k. Each is one that `Generator` takes."""
    given: Any = seed
    if np.ndim(given) == 0:
        Generator(given)
        given = [int(given) + k for k in range(batch)]
    if len(given) != batch or not batch:
        raise InputError(
            f"{len(given)} seeds were given for {batch or 'no'} pictures. Give one number, or one seed a picture."
        )
    for value in given:
        Generator(value)
    return tuple(map(int, given))


def labels_for(class_labels: Sequence[int], accepted: TensorSpec, model: Mapping[str, Any]) -> Array:
    """Class labels as the UNet takes them: (B,) whole numbers below ``num_class_embeds``, or (B, F) features."""
    labels = np.asarray(class_labels)
    count = model.get("num_class_embeds")
    if accepted.dtype != "int64":
        labels = labels.astype(accepted.dtype)
    elif labels.dtype.kind not in "iu" or (count and labels.size and not 0 <= labels.min() <= labels.max() < count):
        wrong = [value for value in labels.ravel().tolist() if type(value) is not int or not 0 <= value < (count or 1)]
        allowed = f"0 to {count - 1}" if count else "whole numbers"
        raise InputError(f"class label {wrong[0] if wrong else class_labels!r} is none; this model has {allowed}.")
    if labels.ndim != len(accepted.shape) or not len(labels):
        raise InputError(f"class labels have shape {labels.shape}; {accepted.shape} is needed. Give one a picture.")
    return labels.astype(accepted.dtype)


def negatives_for(negative_prompt: str | Sequence[str] | None, batch: int) -> tuple[str, ...]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return (negative_prompt or "",) * batch
    if len(negative_prompt) != batch:
        raise InputError(
            f"{len(negative_prompt)} negative prompts were given for {batch} pictures. Give one, or one each."
        )
    return tuple(negative_prompt)


def check_size(height: int, width: int, multiple: int) -> None:
    """Both sides must be positive multiples of the pixels that one latent stands for."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise InputError(
            f"The size {height}x{width} does not fit; height and width must be multiples of {multiple}. "
            f"Use {nearest[0]}x{nearest[1]}."
        )


def latents_image(image: Array, batch: int) -> Array:
    """Pictures uint8 (H, W, 3) or (B, H, W, 3) as (B, 3, H, W) float32 in [-1, 1]; one serves the whole batch."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[0] not in (1, batch):
        raise InputError(
            f"image has shape {np.shape(image)} and dtype {pixels.dtype}; uint8 (H, W, 3), or one of those for each of "
            f"the {batch} pictures, is needed. Convert it to RGB."
        )
    sample = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(np.broadcast_to(sample, (batch, *sample.shape[1:])))
