"""How a model is sampled from unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FEW = 4
"""Steps that consistency models (LCM) are drawn with by default."""


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is drawn with unless told otherwise.

    Attributes
    ----------
    guidance : the scale
    folded : whether that scale is in the UNet itself, which then is called once a step and takes no other
    """

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 4.0
    folded: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """Raise TypeError for anything that is no drawing."""
        drawing = cls(**values)
        kinds: dict[str, tuple[type, ...]] = {
            "sampler": (str,),
            "steps": (int,),
            "guidance": (int, float),
            "folded": (bool,),
        }
        for key, value in asdict(drawing).items():
            if type(value) not in kinds[key]:
                raise TypeError(f"{key} = {value!r}")
        return drawing
