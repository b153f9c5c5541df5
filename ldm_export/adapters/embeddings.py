"""Reads textual inversions (2208.01618): vectors of new tokens, for the text encoders of one model.

Files are safetensors as these tools write them:

    diffusers                    one tensor, which has the token's name
    AUTOMATIC1111's webui        one tensor ``emb_params``; the token is the file's name
    kohya, diffusers' SDXL       ``clip_l`` and ``clip_g``, one text encoder's each; the token is the file's name

A tensor is (width,), or (n, width) for a token of n vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.adapters.tensors import read_arrays
from ldm_export.errors import InputError
from ldm_export.reading.hashes import sha256_of

IN_A_FOLDER = "learned_embeds.safetensors"
"""Name that diffusers gives to the file where it saves a folder."""
COMPONENTS: Mapping[str, str] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
UNNAMED = "emb_params"
HOW_TO_CONVERT = "Load it where you trust it and save it with safetensors.torch.save_file({token: vectors}, file)."


@dataclass(frozen=True)
class Embedding:
    """A token and its vectors for one model.

    Attributes
    ----------
    file : where it is
    sha256 : of the file, hex
    token : what prompts call it
    vectors : float32 (n, width), by the text encoder that they are of
    unmatched : names in the file that are of no text encoder of the model
    """

    file: Path
    sha256: str
    token: str
    vectors: Mapping[str, npt.NDArray[np.float32]]
    unmatched: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What a bundle's manifest says of it."""
        counts = {component: len(rows) for component, rows in self.vectors.items()}
        return {"name": self.file.name, "sha256": self.sha256, "token": self.token, "vectors": counts}

    def names(self, component: str) -> tuple[str, ...]:
        """The tokens that it adds to a text encoder's tokenizer, as diffusers names them: ``<fox>``, ``<fox>_1``, …"""
        count = len(self.vectors.get(component, ()))
        return tuple(f"{self.token}_{k}" if k else self.token for k in range(count))


def read_embedding(path: Path, token: str | None, widths: Mapping[str, int]) -> Embedding:
    """Read a textual inversion from a safetensors file.

    Parameters
    ----------
    path : the file, or the folder in which diffusers has saved it
    token : what prompts are to call it; by default as the file says, or is called
    widths : of the model's text encoders that read tokens of CLIP's kind, by component

    Raises
    ------
    InputError
        If the file cannot be read, is none, or has vectors of another width or that are no finite numbers.
    """
    file = path / IN_A_FOLDER if (path / IN_A_FOLDER).is_file() else path
    if not widths:
        raise InputError(f"{file} was given for a model without a text encoder of CLIP's kind. Leave it out.")
    arrays, _ = read_arrays(file, "embedding", HOW_TO_CONVERT)
    named = {COMPONENTS[name]: array for name, array in arrays.items() if name in COMPONENTS}
    if named:
        own = {component: array for component, array in named.items() if component in widths}
        unmatched = tuple(sorted(name for name in arrays if COMPONENTS.get(name) not in own))
        if not own:
            raise InputError(
                f"{file} has vectors for {' and '.join(sorted(set(arrays) & set(COMPONENTS)))}, and the model has "
                f"{' and '.join(widths)}. Use a textual inversion that was trained for this model."
            )
    elif len(arrays) == 1:
        ((name, array),) = arrays.items()
        own, unmatched = {_encoder_of(file, name, array, widths): array}, ()
        token = name if token is None and name != UNNAMED else token
    else:
        raise InputError(
            f"{file} has {len(arrays)} tensors ({', '.join(sorted(arrays))[:80]}); a textual inversion has one, or "
            "clip_l and clip_g. Save each token in a file of its own."
        )
    vectors = {component: _vectors(file, component, own[component], widths[component]) for component in own}
    name = file.stem if token is None else token
    if not name or any(map(str.isspace, (name[0], name[-1]))):
        raise InputError(f"The token {name!r} of {file} is empty or has space at an end. Give a name: {path}=TOKEN.")
    return Embedding(file, sha256_of(file), name, vectors, unmatched)


def _encoder_of(file: Path, name: str, array: npt.NDArray[Any], widths: Mapping[str, int]) -> str:
    """The text encoder of this width; raises InputError unless it is one."""
    width = array.shape[-1] if array.ndim else 0
    found = [component for component, own in widths.items() if own == width]
    if not found:
        wanted = " and ".join(f"{component} has {own}" for component, own in widths.items())
        raise InputError(
            f"{file} has {name!r} of shape {array.shape}; the width of this model's {wanted}. "
            "Use a textual inversion that was trained for this model."
        )
    if len(found) > 1:
        raise InputError(
            f"{file} has {name!r} of the width of both {' and '.join(found)}, and does not say whose it is. "
            "Save it under the name clip_l or clip_g."
        )
    return found[0]


def _vectors(file: Path, component: str, array: npt.NDArray[Any], width: int) -> npt.NDArray[np.float32]:
    if array.ndim not in (1, 2) or not array.size or array.shape[-1] != width:
        raise InputError(
            f"{file} has vectors of shape {array.shape} for {component}; ({width},) or (n, {width}) is needed. "
            "Use a textual inversion that was trained for this model."
        )
    with np.errstate(over="ignore"):
        rows = array.reshape(-1, width).astype(np.float32)
    if not np.isfinite(rows).all():
        raise InputError(f"{file} has NaN or infinity for {component}. Use another one.")
    return rows
