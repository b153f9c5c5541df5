"""What a caller asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import TensorSpec
from ldm_export.errors import BundleError, InputError
from ldm_export.plan import Plan, Trajectory
from ldm_export.runtime.backends import Array
from ldm_export.runtime.noise import Generator

DEFAULT_GUIDANCE = 4.0
DRAWN_WITH = ("unet", "vae_decoder", "vae_encoder")
MODEL_FACTS: dict[str, tuple[type, ...]] = {
    "height": (int,),
    "width": (int,),
    "latent_channels": (int,),
    "pixels_per_latent": (int,),
    "scaling_factor": (int, float),
    "default_sampler": (str,),
    "default_steps": (int,),
}
"""What the manifest's ``model`` must say of a bundle that is drawn with."""
GUIDANCE_FACTS: dict[str, tuple[type, ...]] = {"default_guidance": (int, float), "guidance_folded": (bool,)}
"""What it may say."""


def check_drawable(bundle: Bundle) -> None:
    """Raise BundleError unless the bundle has the graphs and says the facts that drawing needs."""
    for name in DRAWN_WITH:
        if name not in bundle.manifest.graphs:
            raise BundleError(f"Bundle {bundle.path} has no graph {name}, so nothing can be drawn. Export it anew.")
    for key, kinds in MODEL_FACTS.items():
        value: Any = bundle.manifest.model.get(key)
        if type(value) not in kinds or (not isinstance(value, str) and not value > 0):
            raise BundleError(f"Bundle {bundle.path}: manifest.json has model.{key} = {value!r}. Export it anew.")
    for key, kinds in GUIDANCE_FACTS.items():
        if key in bundle.manifest.model and type(value := bundle.manifest.model[key]) not in kinds:
            raise BundleError(f"Bundle {bundle.path}: manifest.json has model.{key} = {value!r}. Export it anew.")


class Options(TypedDict, total=False):
    """How to draw; every key may be left out.

    Attributes
    ----------
    sampler, steps : a plan of the bundle, such as ``ddim`` and 20; by default the bundle's own choice
    guidance : how far to go from the negative prompt's prediction to the prompt's, >= 0; 1 or less is off; the
        bundle's own choice. A model that was distilled with guidance takes no other, and no negative prompt
    negative_prompt : one for all pictures, or one each; none. The empty text is a prompt, too: of SDXL, which has zeros
        for none, it makes another picture
    seed : picture k uses seed + k; or a list, one a picture; 0
    height, width : pixels, multiples of what one latent stands for; the model's own size
    image : uint8 (H, W, C), or (B, H, W, C), to start from, C being 3, or 1 for grey models; its size is the picture's
    strength : in (0, 1], the share of the steps that is redone on ``image``; 0.6
    class_labels : one a picture, for class-conditional models
    deepcache : run the whole UNet in every so many steps only, and between them its outermost blocks (DeepCache,
        2312.00858): faster, and the picture changes; 1 is off. Needs the bundle's target for this machine
    whole : draw with the plan's loop graph, everything in one call, which cannot be watched or cancelled in between;
        the bundle, or the engines that run, must have that loop
    """

    sampler: str | None
    steps: int | None
    guidance: float | None
    negative_prompt: str | Sequence[str] | None
    seed: int | Sequence[int]
    height: int | None
    width: int | None
    image: Array | None
    strength: float
    class_labels: Sequence[int] | None
    deepcache: int
    whole: bool


@dataclass(frozen=True)
class Request:
    """One call of the pipeline.

    Attributes
    ----------
    prompts, negative_prompts : one a picture; empty tuples for models that read no text. No negative prompt is None,
        which is not the empty text: SDXL has zeros for it
    class_labels : (B,) int64, or None
    seeds : one a picture
    height, width : pixels
    guidance : the scale; 1 is off
    image : (B, C, H, W) float32 in [-1, 1] to start from, or None
    trajectory : where the latents start and the rows that they run through
    deepcache : the whole UNet runs in every so many steps
    loop : the plan whose loop graph draws all in one call, such as ``ddim-20``, or None
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    class_labels: Array | None
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: float
    image: Array | None
    trajectory: Trajectory
    deepcache: int
    loop: str | None

    @property
    def batch(self) -> int:
        return len(self.seeds)

    def latents_shape(self, bundle: Bundle) -> tuple[int, int, int]:
        """Of one picture: (C, h, w)."""
        facts = bundle.manifest.model
        factor = facts["pixels_per_latent"]
        return (facts["latent_channels"], self.height // factor, self.width // factor)

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
    guidance: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
    height: int | None = None,
    width: int | None = None,
    image: Array | None = None,
    strength: float = 0.6,
    class_labels: Sequence[int] | None = None,
    deepcache: int = 1,
    whole: bool = False,
) -> Request:
    """Check what is asked for whole, before anything runs; the parameters are those of :class:`Options`.

    Raises
    ------
    InputError
        For anything that this bundle cannot draw; the message says what it can.
    """
    if type(deepcache) is not int or deepcache < 1:
        raise InputError(f"deepcache is {deepcache!r}; give a whole number from 1 (off) on, such as 3.")
    model = bundle.manifest.model
    unet_inputs = {tensor.name: tensor for tensor in bundle.manifest.graphs["unet"].inputs}
    if unet_inputs["sample"].shape[1] != model["latent_channels"]:
        raise InputError(
            f"This bundle's UNet takes {unet_inputs['sample'].shape[1]} channels for {model['latent_channels']} of "
            "latents (an inpainting model); this runtime draws text-to-image and image-to-image. "
            "Run its graphs yourself."
        )
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"A prompt is {text!r}, of type {type(text).__name__}; prompts are of type str.")
    reads_text = "encoder_hidden_states" in unet_inputs
    has_classes = "class_labels" in unet_inputs
    if reads_text != bool(texts) or has_classes != (class_labels is not None):
        count = model.get("num_class_embeds")
        labels_it_takes = f"class_labels from 0 to {count - 1}" if count else "class_labels"
        wants = " and ".join(
            [*(["a prompt a picture"] if reads_text else []), *([labels_it_takes] if has_classes else [])]
        )
        given = "no" if class_labels is None else len(class_labels)
        raise InputError(
            f"{len(texts)} prompts and {given} class labels were given; "
            f"this model takes {wants or 'neither: give seed a list, one a picture'}."
        )
    labels = None if class_labels is None else labels_for(class_labels, unet_inputs["class_labels"], model)
    batch = len(texts) if reads_text else np.size(seed) if labels is None else len(labels)
    if labels is not None and len(labels) != batch:
        raise InputError(f"{len(labels)} class labels were given for {batch} pictures. Give one each.")
    scale = guidance_for(guidance, negative_prompt, model, conditioned="timestep_cond" in unet_inputs)
    sampler, steps = sampler or model["default_sampler"], model["default_steps"] if steps is None else steps
    plan = read_plan(bundle, sampler, steps)
    if whole and (image is not None or deepcache > 1):
        raise InputError(
            "The whole loop was asked for at once, with an image or with deepcache; a loop graph draws from noise, and "
            "all of the UNet each time. Leave one of them out."
        )
    sample = None if image is None else latents_image(image, batch, picture_channels(bundle))
    if sample is not None:
        sides = sample.shape[2:]
        if height not in (None, sides[0]) or width not in (None, sides[1]):
            raise InputError(
                f"The size {height}x{width} was asked for with an image of {sides[0]}x{sides[1]}; "
                "the picture has the image's size. Resize the image."
            )
        height, width = sides
    height = model["height"] if height is None else height
    width = model["width"] if width is None else width
    check_size(height, width, model["pixels_per_latent"])
    return Request(
        prompts=texts,
        negative_prompts=negatives_for(negative_prompt, batch) if reads_text else (),
        class_labels=labels,
        seeds=seeds_for(seed, batch),
        height=int(height),
        width=int(width),
        guidance=scale,
        image=sample,
        trajectory=plan.from_noise() if sample is None else plan.for_strength(strength),
        deepcache=deepcache,
        loop=f"{sampler}-{steps}" if whole else None,
    )


def read_plan(bundle: Bundle, sampler: str, steps: int) -> Plan:
    """The bundle's plan of that sampler and number of steps.

    Raises
    ------
    InputError
        If there is none; the message says which there are and how to add one.
    """
    path = f"plans/{sampler}-{steps}.json"
    if path not in bundle.manifest.files:
        there = [name[len("plans/") : -len(".json")] for name in bundle.manifest.files if name.startswith("plans/")]
        kin = sorted((name for name in there if name.rpartition("-")[0] == sampler), key=len)
        samplers = sorted({name.rpartition("-")[0] for name in there})
        has = f"{', '.join(kin)}" if kin else f"plans for {', '.join(samplers) or 'no sampler'}"
        raise InputError(
            f"This bundle has no plan for {sampler!r} with {steps} steps; it has {has}. "
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


def guidance_for(
    guidance: float | None,
    negative_prompt: str | Sequence[str] | None,
    model: Mapping[str, Any],
    *,
    conditioned: bool = False,
) -> float:
    """The scale with which the UNet's two predictions are combined; 1 where the UNet has guidance in itself. A
    ``conditioned`` UNet is told the scale and, as one that has it in itself, is called without a negative prompt."""
    own = float(model.get("default_guidance", DEFAULT_GUIDANCE))
    scale = own if guidance is None else guidance
    if not np.isfinite(scale) or scale < 0:
        raise InputError(f"guidance is {scale}; it must be a number from 0 on, 1 being off.")
    negative = bool(negative_prompt and any(negatives_for(negative_prompt, len(negative_prompt))))
    if conditioned and negative:
        raise InputError(
            "A negative prompt was given; this model was distilled to be told a guidance scale and takes none. "
            "Leave it out, or use the bundle of the model that it was distilled from."
        )
    if not model.get("guidance_folded"):
        return scale
    if scale != own or negative:
        asked = f"guidance {scale:g}" if scale != own else "a negative prompt"
        raise InputError(
            f"{asked[0].upper()}{asked[1:]} was asked for; this model was distilled with guidance {own:g} and takes no "
            "other, and no negative prompt. Leave it out, or use the bundle of the model that it was distilled from."
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


def check_size(height: int, width: int, multiple: int) -> None:
    """Both sides must be positive multiples of the pixels that one latent stands for."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise InputError(
            f"The size {height}x{width} does not fit; height and width must be multiples of {multiple}. "
            f"Use {nearest[0]}x{nearest[1]}."
        )


def picture_channels(bundle: Bundle) -> int:
    """Of the pictures that the model reads: 3, or 1 for grey ones."""
    return int(bundle.manifest.graphs["vae_encoder"].inputs[0].shape[1])


def latents_image(image: Array, batch: int, channels: int) -> Array:
    """Pictures uint8 (H, W, C) or (B, H, W, C) as (B, C, H, W) float32 in [-1, 1]; one serves the whole batch."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    shaped = pixels.ndim == 4 and pixels.shape[3] == channels and pixels.shape[0] in (1, batch)
    if pixels.dtype != np.uint8 or not shaped:
        raise InputError(
            f"image has shape {np.shape(image)} and dtype {pixels.dtype}; uint8 (H, W, {channels}), or one of those "
            f"for each of the {batch} pictures, is needed. Convert it to {'grey' if channels == 1 else 'RGB'}."
        )
    sample = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(np.broadcast_to(sample, (batch, *sample.shape[1:])))
