"""Tensors of a safetensors file as numpy arrays, memory-mapped: bfloat16, which numpy has not, as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ldm_export.errors import InputError
from ldm_export.reading.weight_files import PICKLES, remedy_of

HOW_TO_CONVERT = "Load it where you trust it and save it as safetensors: pipeline.save_lora_weights(folder)."
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
WHOLES = {"I64": "<i8", "I32": "<i4"}  # of alphas in some files


def read_arrays(
    file: Path, what: str = "adapter", how_to_convert: str = HOW_TO_CONVERT
) -> tuple[dict[str, npt.NDArray[Any]], Mapping[str, str]]:
    """Arrays of a file by their names, and its metadata.

    Parameters
    ----------
    what : it is called in messages
    how_to_convert : said of a pickle

    Raises
    ------
    InputError
        If it cannot be read, or holds anything but floating-point numbers and single whole ones.
    """
    if not file.exists():
        raise InputError(f"There is no {what} {str(file)!r}. Give a safetensors file.")
    if file.suffix in PICKLES:
        raise InputError(f"{file} is a pickle, which can run code when it is opened. {how_to_convert}")
    try:
        with safe_open(file, "np") as opened:  # checks the header, and that the file has all that it names
            metadata = opened.metadata() or {}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        content = np.memmap(file, np.uint8, "r", 8 + length) if file.stat().st_size > 8 + length else np.empty(0, "u1")
    except (SafetensorError, OSError) as error:
        remedy = remedy_of(file, how_to_convert)
        raise InputError(f"{file} is truncated or not a safetensors file ({error}). {remedy}") from error
    header.pop("__metadata__", None)
    return {name: _array(file, name, facts, content) for name, facts in header.items()}, metadata


def _array(file: Path, name: str, facts: Mapping[str, Any], content: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    kind, shape = facts["dtype"], facts["shape"]
    start, end = facts["data_offsets"]
    if kind not in FLOATS and not (kind in WHOLES and end - start <= 8):
        raise InputError(
            f"{file}: {name!r} is of {kind}; float32, float16 and bfloat16 are read. Save the adapter unquantized."
        )
    raw = content[start:end].tobytes() if start % 8 else content[start:end]  # numpy wants aligned views
    found: npt.NDArray[Any] = np.frombuffer(raw, np.dtype({**FLOATS, **WHOLES}[kind])).reshape(shape)
    return (found.astype("<u4") << 16).view("<f4") if kind == "BF16" else found
