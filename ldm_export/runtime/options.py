"""How to draw: what callers may ask for, beside the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from ldm_export.runtime.graph import Array

if TYPE_CHECKING:
    from ldm_export.runtime.control import Control


class Options(TypedDict, total=False):
    """How to draw; every key may be left out.

    Attributes
    ----------
    sampler, steps : such as ``ddim`` and 20; by default the bundle's own choice. A plan that the bundle has no file of
        is compiled from its scheduler config (`ldm_export.plan.SAMPLERS` are the samplers)
    calls : network calls; the outputs of the other steps are forecast from those of earlier ones: 16 of 50 take a third
        of the time and change the picture little (`ldm_export.plan.forecast`); by default there are no others
    guidance : how far to go from the negative prompt's prediction to the prompt's, from 0 to 1e6; 1 or less is off;
        the bundle's own choice. A model that was distilled with guidance takes no other, and no negative prompt
    negative_prompt : one for all pictures, or one each; none. The empty text is a prompt, too: of models
        that have zeros for none, it makes another picture. Needs guidance above 1
    seed : picture k uses seed + k; or a list, one a picture; 0
    height, width : pixels, multiples of what one latent stands for; the model's own size
    image : uint8 (H, W, C), or (B, H, W, C), to start from, or to edit by a model that does; C is 3, or 1 for grey
        models; its size is the picture's
    mask : uint8 (H, W), or (B, H, W), of the size of ``image``, which must be given: 255 (white) is drawn anew, 0 is
        kept, and what is between is a blend of both; models that were trained to inpaint take 128 and more for white
    strength : in (0, 1], the share of the steps that is redone on ``image``, which must be given; 0.6, and with a mask
        1, which starts from noise
    image_guidance : of a model that edits a picture, how far to go from the prediction without the picture to that with
        it, from 0 to 1e6; below 1 both guidances are off, as in diffusers; 1.5
    keep_pixels : whether pixels where ``mask`` is 0 are those of ``image`` to the bit, and blended where it is between
    controls : pictures that control what is generated, uint8 (H, W, 3) or `ldm_export.runtime.control.Control`, by
        the names of the bundle's ControlNets; their size is the picture's where no other is said
    ip_adapter_image : a picture to be alike, for the bundle's IP-Adapter: uint8 (H, W, 3), or (B, H, W, 3), of any size
    ip_adapter_scale : how much, from 0 to 1000; 1
    class_labels : one a picture, for class-conditional models
    adapters : (adapter or its file, strength) pairs, such as ``[("style.ldma", 0.8)]``, for all pictures, or a list of
        such lists, one a picture (:class:`ldm_export.runtime.adapters.Adapter`); none
    deepcache : run the whole denoiser in every so many steps only, and between them its outermost blocks (DeepCache,
        2312.00858): faster, and the picture changes; 1 is off. Needs the bundle's target for this machine
    whole : draw with the plan's loop graph, everything in one call, which cannot be watched or cancelled in between;
        the bundle, or the engines that run, must have that loop
    prompt_weights : whether brackets in prompts and negative prompts are weights, ``(word:1.2)``
        (`ldm_export.runtime.prompts`), and not text like any other
    long_prompts : whether prompts of more tokens than the model reads are read in chunks, and not cut off
    """

    sampler: str | None
    steps: int | None
    calls: int | None
    guidance: float | None
    negative_prompt: str | Sequence[str] | None
    seed: int | Sequence[int]
    height: int | None
    width: int | None
    image: Array | None
    mask: Array | None
    strength: float | None
    image_guidance: float | None
    keep_pixels: bool
    controls: Mapping[str, Control | Array] | None
    ip_adapter_image: Array | None
    ip_adapter_scale: float | None
    class_labels: Sequence[int] | None
    adapters: Sequence[Any] | None
    deepcache: int
    whole: bool
    prompt_weights: bool
    long_prompts: bool
