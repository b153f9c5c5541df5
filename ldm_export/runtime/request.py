"""What a caller asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.adapters import Mixture
from ldm_export.bundle.plans import check_loop_size, read_plan
from ldm_export.bundle.roles import LARGEST_SIZE
from ldm_export.contract import labels_of
from ldm_export.errors import InputError
from ldm_export.plan import CALLS, Scales, Trajectory, row_levels
from ldm_export.runtime.adapters import mixtures_for
from ldm_export.runtime.control import (
    CheckedControl,
    Control,
    check_with_controls,
    checked_controls,
    size_with_controls,
)
from ldm_export.runtime.editing import image_guidance_for
from ldm_export.runtime.facts import size_step
from ldm_export.runtime.graph import Array
from ldm_export.runtime.image_prompt import ImagePrompt, checked_image_prompt
from ldm_export.runtime.inpainting import check_reads_mask, checked_mask
from ldm_export.runtime.memory import check_memory
from ldm_export.runtime.noise import Generator
from ldm_export.runtime.per_picture import (
    LARGEST_GUIDANCE,
    guidance_for,
    labels_for,
    negatives_for,
    seeds_for,
    texts_for,
)
from ldm_export.runtime.prompts import Reading, check_reading, weighted_parts
from ldm_export.runtime.values import flag, listed, real_number, shown, text_of, whole_number

MOST_STEPS = LARGEST_SIZE


@dataclass(frozen=True)
class Request:
    """One call of the pipeline.

    Attributes
    ----------
    prompts, negative_prompts : one a picture; empty tuples for models that read no text. No negative prompt is None,
        which is not the empty text: some models have zeros for it
    class_labels : (B,) int64, or None
    seeds : one a picture
    height, width : pixels
    guidance : the scale; 1 is off
    image_guidance : of a model that edits ``image``, the scale towards it; else None
    image : (B, C, H, W) float32 in [-1, 1] to start from or to edit, or None
    mask : (B, H, W) float32 in [0, 1], 1 where the image is drawn anew, or None
    levels : of the latents before each row, where the image's are put back after it; else none
    strength : share of the steps that is redone on the image; None without one
    keep_pixels : whether pixels that are not drawn anew are the image's
    mixtures : what adapters each picture is drawn with, and how strongly
    trajectory : where the latents start and the rows that they run through
    deepcache : the whole denoiser runs in every so many steps
    loop : the plan whose loop graph draws all in one call, such as ``ddim-20``, or None
    controls : by pictures
    image_prompt : an IP-Adapter's picture, or None
    reading : how the prompts are read
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    class_labels: Array | None
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: float
    image_guidance: float | None
    image: Array | None
    mask: Array | None
    levels: tuple[Scales, ...]
    strength: float | None
    keep_pixels: bool
    mixtures: tuple[Mixture, ...]
    trajectory: Trajectory
    deepcache: int
    loop: str | None
    reading: Reading
    controls: tuple[CheckedControl, ...] = ()
    image_prompt: ImagePrompt | None = None

    @property
    def batch(self) -> int:
        return len(self.seeds)

    def latents_shape(self, bundle: Bundle) -> tuple[int, int, int]:
        """Shape of one picture's latents: (C, h, w)."""
        facts = bundle.manifest.model
        factor = facts["pixels_per_latent"]
        return (facts["latent_channels"], self.height // factor, self.width // factor)

    def least_bytes(self, bundle: Bundle) -> int:
        """Memory that arrays of one generation surely take at once, whatever the networks need: the latents with their
        noise, the denoiser's input and output, and what one decoding makes of them."""
        channels, height, width = self.latents_shape(bundle)
        latents = self.batch * channels * height * width * 4
        pixels = self.batch * picture_channels(bundle) * self.height * self.width
        return max(6 * latents, latents + 9 * pixels)  # pixels: the decoder's float32, their copy in [0, 255], uint8

    def noise(self, shape: tuple[int, ...]) -> Callable[[], Array]:
        """A function that draws N(0, I), float32 (B, *shape), anew at each call; each picture by its own seed."""
        generators = [Generator(seed) for seed in self.seeds]
        return lambda: np.stack([generator.randn(shape) for generator in generators])


def checked_request(
    bundle: Bundle,
    prompts: str | Sequence[str] | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    calls: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
    height: int | None = None,
    width: int | None = None,
    image: Array | None = None,
    mask: Array | None = None,
    strength: float | None = None,
    image_guidance: float | None = None,
    keep_pixels: bool = False,
    controls: Mapping[str, Control | Array] | None = None,
    ip_adapter_image: Array | None = None,
    ip_adapter_scale: float | None = None,
    class_labels: Sequence[int] | None = None,
    adapters: Sequence[Any] | None = None,
    deepcache: int = 1,
    whole: bool = False,
    prompt_weights: bool = False,
    long_prompts: bool = False,
) -> Request:
    """Check what is asked for whole, before anything runs; the parameters are those of
    :class:`ldm_export.runtime.options.Options`.

    Raises
    ------
    InputError
        For anything that this bundle cannot draw; the message says what it can.
    """
    model = bundle.manifest.model
    roles, graphs = bundle.roles, bundle.manifest.graphs
    sources = roles.sources(graphs)
    towards_image = image_guidance_for(
        image_guidance,
        roles.guidance,
        largest=LARGEST_GUIDANCE,
        image=image is not None,
        mask=mask is not None,
        strength=strength is not None,
    )
    inpaints = "image_latents" in sources and towards_image is None
    if inpaints:
        check_reads_mask(bundle, given=image is not None and mask is not None)
    reads_text, has_classes = bool(roles.text_encoders), "class_labels" in sources
    texts = texts_for("prompt", prompts)
    given_labels = None if class_labels is None else listed("class_labels", class_labels)
    if reads_text != bool(texts) or has_classes != (given_labels is not None):
        count = model.get("class_count")
        labels_it_takes = f"class_labels from 0 to {count - 1}" if count else "class_labels"
        wants = " and ".join(
            [*(["a prompt a picture"] if reads_text else []), *([labels_it_takes] if has_classes else [])]
        )
        given = "no" if given_labels is None else len(given_labels)
        raise InputError(
            f"{len(texts)} prompts and {given} class labels were given; "
            f"this model takes {wants or 'neither: give seed a list, one a picture'}."
        )
    labels = None if given_labels is None else labels_for(given_labels, labels_of(graphs, roles), model)
    several = hasattr(type(seed), "__iter__") and not isinstance(seed, str) and getattr(seed, "shape", None) != ()
    seeds: Any = listed("seed", seed) if several else seed
    batch = len(texts) if reads_text else np.size(seeds) if labels is None else len(labels)
    if labels is not None and len(labels) != batch:
        raise InputError(f"{len(labels)} class labels were given for {batch} pictures. Give one each.")
    negatives: Any = None if negative_prompt is None else texts_for("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        negatives = negative_prompt
    scale = None if guidance is None else real_number("guidance", guidance, 0.0, LARGEST_GUIDANCE)
    scale = guidance_for(scale, negatives, roles.guidance, reads_text=reads_text)
    guided = reads_text and roles.guidance.rows(scale, towards_image or 0.0) > 1
    if negatives is not None and any(negatives) and not guided:
        why = f"guidance is {scale:g}, which is off" if reads_text else "this model reads no text"
        if reads_text and scale > 1:
            why = f"image_guidance is {towards_image:g}, below 1 of which both guidances are off"
        raise InputError(f"A negative prompt was given, and {why}, so it would do nothing. Leave it out.")
    sampler = model["default_sampler"] if sampler is None else text_of("sampler", sampler)
    steps = model["default_steps"] if steps is None else whole_number("steps", steps, 1, MOST_STEPS)
    if calls is not None:
        sampler += f"{CALLS}{whole_number('calls', calls, 1, MOST_STEPS)}"
    if image is None and mask is not None:
        raise InputError("A mask was given without an image, of which it says what is drawn anew. Give the image, too.")
    if flag("keep_pixels", keep_pixels) and mask is None:
        raise InputError("keep_pixels was given without a mask, which says what is kept. Leave it out, or give a mask.")
    deepcache, whole = whole_number("deepcache", deepcache, 1, MOST_STEPS), flag("whole", whole)
    if whole and (image is not None or deepcache > 1):
        raise InputError(
            f"The whole loop was asked for at once, with {'an image' if mask is None else 'an image and a mask'} or "
            "with deepcache; a loop graph draws all of it from noise, by all of the denoiser. Leave one of them out."
        )
    if whole and adapters:
        raise InputError(
            "The whole loop was asked for at once, and a loop graph takes no adapters. Leave whole out, or merge them: "
            "ldm-export export CHECKPOINT -o BUNDLE --lora ADAPTER.safetensors"
        )
    reading = Reading(flag("prompt_weights", prompt_weights), flag("long_prompts", long_prompts))
    check_reading(reading, roles, graphs, whole=whole)
    if reading.weights:
        for text in (*texts, *(([negatives] if isinstance(negatives, str) else negatives) or ())):
            weighted_parts(text or "")
    if strength is not None:
        strength = real_number("strength", strength, 0.0, 1.0)
        if image is None:
            raise InputError("A strength was given without an image, of which it is a share. Leave it out.")
    height = None if height is None else whole_number("height", height, 1, LARGEST_SIZE)
    width = None if width is None else whole_number("width", width, 1, LARGEST_SIZE)
    sample = None if image is None else latents_image(image, batch, picture_channels(bundle))
    if sample is not None:
        sides = sample.shape[2:]
        if height not in (None, sides[0]) or width not in (None, sides[1]):
            asked = "x".join("any" if side is None else str(side) for side in (height, width))
            raise InputError(
                f"The size {asked} was asked for with an image of {sides[0]}x{sides[1]}; "
                "the picture has the image's size. Resize the image."
            )
        height, width = sides
    controlled = checked_controls(bundle, controls, batch)
    check_with_controls(controlled, deepcache=deepcache, whole=whole, forecast=calls is not None)
    height, width = size_with_controls(controlled, height, width)
    height = model["height"] if height is None else height
    width = model["width"] if width is None else width
    check_size(height, width, size_step(model))
    largest = model.get("largest_size", LARGEST_SIZE)
    if max(height, width) > largest:
        raise InputError(
            f"The size {height}x{width} does not fit; this model makes pictures of at most {largest} pixels a side. "
            f"Use {min(height, largest)}x{min(width, largest)}."
        )
    size = int(height), int(width)
    masks, levels, plan = None, tuple[Scales, ...](), read_plan(bundle, sampler, steps, size)
    trajectory = plan.from_noise()
    if sample is not None and mask is not None:
        masks = checked_mask(mask, sample, model["pixels_per_latent"], hard=inpaints)
    if sample is not None and towards_image is None:
        strength = (0.6 if masks is None else 1.0) if strength is None else strength
        start = plan.first_step(strength, rounds_up=model.get("strength_rounds_up", False))
        if masks is None or strength < 1:
            trajectory = plan.starting_at(start)
        levels = () if masks is None or inpaints else row_levels(plan, start)
    if whole:  # by the plan's own name: one of all calls is that of its sampler
        check_loop_size(bundle, plan.sampler, steps, size)
    request = Request(
        prompts=texts,
        negative_prompts=negatives_for(negatives, batch) if reads_text else (),
        class_labels=labels,
        seeds=seeds_for(seeds, batch),
        height=size[0],
        width=size[1],
        guidance=scale,
        image_guidance=towards_image,
        image=sample,
        mask=masks,
        levels=levels,
        strength=strength,
        keep_pixels=bool(keep_pixels),
        mixtures=mixtures_for(bundle, adapters, batch),
        trajectory=trajectory,
        deepcache=deepcache,
        loop=f"{plan.sampler}-{steps}" if whole else None,
        controls=tuple(controlled),
        image_prompt=checked_image_prompt(bundle, ip_adapter_image, ip_adapter_scale, batch),
        reading=reading,
    )
    check_memory(request.least_bytes(bundle), f"{batch} pictures of {height}x{width}")
    return request


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise InputError unless both are positive multiples."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise InputError(
            f"The size {height}x{width} does not fit; height and width must be multiples of {multiple}. "
            f"Use {nearest[0]}x{nearest[1]}."
        )


def picture_channels(bundle: Bundle) -> int:
    """Channels of the pictures that the model reads: 3, or 1 for grey ones."""
    return int(bundle.manifest.graphs[bundle.roles.vae_encoder].inputs[0].shape[1])


def latents_image(image: Array, batch: int | None, channels: int) -> Array:
    """Pictures uint8 (H, W, C) or (B, H, W, C) as (B, C, H, W) float32 in [-1, 1]; one serves the whole batch. Where
    ``batch`` is None, as many as there are."""
    try:
        pixels = np.asarray(image)
    except Exception as error:  # lists of unequal lengths, tensors on a GPU: what a stranger's type raises
        raise InputError(f"image is {shown(image)}; uint8 (H, W, {channels}) is needed. Convert it.") from error
    given, pixels = pixels.shape, pixels[None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != channels:
        raise InputError(
            f"image has shape {given} and dtype {pixels.dtype}; uint8 (H, W, {channels}), or one of those a picture, "
            f"is needed. Convert it to {'grey' if channels == 1 else 'RGB'}."
        )
    batch = len(pixels) if batch is None else batch
    if not batch or len(pixels) not in (1, batch):
        raise InputError(f"{len(pixels)} images were given for {batch or 'no'} pictures. Give one, or one each.")
    sample = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(np.broadcast_to(sample, (batch, *sample.shape[1:])))
