"""Models that edit a picture as a prompt says (InstructPix2Pix, 2211.09800): what a request gives them.

The denoiser reads the mean of the picture's latents beside its own, and each picture takes three rows of a call (see
`ldm_export.runtime.conditioning`), weighed by two scales (`ldm_export.runtime.sampling`).
"""

from __future__ import annotations

from ldm_export.contract import IMAGE_GUIDANCE, THREE_ROWS, Guidance
from ldm_export.errors import InputError
from ldm_export.runtime.values import real_number


def image_guidance_for(
    asked: float | None, model: Guidance, *, largest: float, image: bool, mask: bool, strength: bool
) -> float | None:
    """The scale of the guidance towards the picture that is edited; None for models that edit none.

    Parameters
    ----------
    asked : what was asked for, or None
    largest : that may be asked for
    image, mask, strength : whether these were given

    Raises
    ------
    InputError
        If it was asked of another model, or the model edits a picture and was given none, or more than that.
    """
    if model.kind != THREE_ROWS:
        if asked is not None:
            raise InputError(
                "image_guidance was given, and this model edits no picture, so it would do nothing. Leave it out."
            )
        return None
    if not image:
        raise InputError("This model edits a picture as the prompt says, and none was given. Give the image.")
    if mask or strength:
        raise InputError(
            f"A {'mask' if mask else 'strength'} was given; this model edits the whole picture, from noise, as the "
            "prompt and its two guidances say. Leave it out."
        )
    return IMAGE_GUIDANCE if asked is None else real_number("image_guidance", asked, 0.0, largest)
