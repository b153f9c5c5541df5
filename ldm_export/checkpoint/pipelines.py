"""Pipeline classes of diffusers: what each does with a checkpoint besides calling its networks.

``model_index.json`` names the class and the parts. What the file leaves out has the default of the class's constructor,
and some constructors overrule the scheduler's own config; `PIPELINES` has both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_export.errors import CheckpointError


@dataclass(frozen=True)
class PipelineClass:
    """What a class's constructor fills in.

    Attributes
    ----------
    scheduler : keys of the scheduler's config that have this value whatever the file says
    options : keys of ``model_index.json`` that are no parts, with their defaults
    sample_size : of the UNet's latents, where its config says none
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int = 64


STABLE_DIFFUSION = PipelineClass({"steps_offset": 1, "clip_sample": False}, {"requires_safety_checker": True})
XL_OPTIONS: Mapping[str, Any] = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
XL = PipelineClass(options=XL_OPTIONS, sample_size=128)
PIPELINES: Mapping[str, PipelineClass] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": PipelineClass(
        {"steps_offset": 1, "skip_prk_steps": True}, {"requires_safety_checker": True}
    ),
    "LatentConsistencyModelPipeline": PipelineClass(options={"requires_safety_checker": True}),
    "LatentConsistencyModelImg2ImgPipeline": PipelineClass(options={"requires_safety_checker": True}),
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": PipelineClass(
        options={**XL_OPTIONS, "requires_aesthetics_score": False}, sample_size=128
    ),
    "StableDiffusionXLInpaintPipeline": PipelineClass(
        options={**XL_OPTIONS, "requires_aesthetics_score": False}, sample_size=128
    ),
}
"""Classes that a bundle generates like, from text or from text and an image."""

OWN_PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
OPTIONAL_PARTS = {"safety_checker", "feature_extractor", "image_encoder", "watermark"}
"""Parts without which the same picture is made of the same prompt, before it is checked or marked."""


def class_name(index: Mapping[str, Any]) -> str:
    """Name of the pipeline's class; of a class in a file of its own, which has a list there, the last item."""
    name = index.get("_class_name", "StableDiffusionPipeline")
    return str(name[-1]) if isinstance(name, list) and name else str(name)


def pipeline_class(index: Mapping[str, Any]) -> PipelineClass:
    """What the checkpoint's pipeline class fills in; of a class that is not known, the one of its text encoders."""
    return PIPELINES.get(class_name(index), XL if _names(index, "text_encoder_2") else STABLE_DIFFUSION)


def option(index: Mapping[str, Any], key: str) -> Any:
    """Value of a key of ``model_index.json`` that is no part."""
    value = index.get(key)
    return pipeline_class(index).options.get(key) if value is None else value


def check_parts(file: Path, index: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the pipeline generates with parts that a bundle has not, such as a ControlNet."""
    others = [key for key in index if key not in OWN_PARTS | OPTIONAL_PARTS and _names(index, key)]
    if others:
        raise CheckpointError(
            f"{file} is of a {class_name(index)} with the part {others[0]}, which no bundle can have; without it other "
            "pictures are made. Save the model without it, as a StableDiffusionPipeline or StableDiffusionXLPipeline."
        )


def left_out(index: Mapping[str, Any]) -> list[str]:
    """Parts that the checkpoint has and a bundle of it will not have."""
    return sorted(key for key in OPTIONAL_PARTS if _names(index, key))


def scheduler_as_used(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config with the class that ``model_index.json`` names and what the pipeline's constructor sets."""
    named = index.get("scheduler")
    own = named[1] if isinstance(named, list) and len(named) == 2 and named[1] is not None else None
    return {**config, **({} if own is None else {"_class_name": own}), **pipeline_class(index).scheduler}


def latent_size(index: Mapping[str, Any], unet: Mapping[str, Any], version: Any) -> tuple[int, int]:
    """Height and width of the latents that a pipeline makes by default.

    Parameters
    ----------
    unet : the UNet's config
    version : ``_diffusers_version`` of its file: before 0.9, sizes below 64 were leftovers, which diffusers overrules
    """
    size = unet["sample_size"]
    if size is None:
        size = pipeline_class(index).sample_size
    old = re.match(r"0\.[0-8]\.", version) if isinstance(version, str) else None
    if isinstance(size, int) and size < 64 and old and pipeline_class(index) is STABLE_DIFFUSION:
        size = 64
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _names(index: Mapping[str, Any], key: str) -> bool:
    """Whether a key of ``model_index.json`` names a part, a library and a class."""
    value = index.get(key)
    return isinstance(value, list) and not key.startswith("_") and any(item is not None for item in value)
