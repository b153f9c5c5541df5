"""Sampler, steps and guidance that a model is sampled with by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FEW = 4
"""Steps that consistency models (LCM) are drawn with by default."""


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampler, steps and guidance that a model is sampled with by default.

    Attributes
    ----------
    guidance : the scale
    guidance_distilled : whether that scale is in the UNet's weights: it is called once a step and takes no other
    """

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 4.0
    guidance_distilled: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """Raise TypeError for anything that is no drawing."""
        drawing = cls(**values)
        kinds: dict[str, tuple[type, ...]] = {
            "sampler": (str,),
            "steps": (int,),
            "guidance": (int, float),
            "guidance_distilled": (bool,),
        }
        for key, value in asdict(drawing).items():
            if type(value) not in kinds[key]:
                raise TypeError(f"{key} = {value!r}")
        return drawing
