"""Weights of one network of a checkpoint: the files that hold them, their names, and whether they can be used.

Which file is read where there are several follows the library that reads the network: diffusers (UNet, autoencoder)
takes the shards that an index names before a whole file, transformers (text encoders) a whole file before an index.
Weights come from safetensors; a pickle is never opened.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm_export.errors import CheckpointError
from ldm_export.reading.documents import MalformedError, parsed, read_bytes
from ldm_export.reading.weight_files import HOW_TO_CONVERT, PICKLES, remedy_of

OF_DIFFUSERS, OF_TRANSFORMERS = "diffusion_pytorch_model", "model"
WEIGHT_FILE = re.compile(
    rf"(?P<base>{OF_DIFFUSERS}|{OF_TRANSFORMERS})(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?(?:\.(?P<old_place>\w+))?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
"""A whole file, one shard of several or the index of shards, of a variant such as ``fp16`` or of none."""
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that torch.compile and wrappers of training put in; a network has no module of that name."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names that models saved before diffusers 0.14 have for the projections of their spatial self-attention."""
UNREAD = re.compile(r"(.*\.)?position_ids|logit_scale|vision_model\..*|visual_projection\..*")
"""Names in a file, such as one of a whole CLIP model, of what no network here has."""
OPTIONAL = ("text_projection.weight",)
"""Names that a text encoder of CLIP's kind has with a projection, and without one in a file of a whole model."""
LORA = re.compile(r"(^|.*[._])(lora|lora_\w+|base_layer|hada_\w+|lokr_\w+|dora_scale)([._].*|$)")
QUANTIZED = re.compile(
    r".*\.(absmax|quant_map|nested_\w+|quant_state\..*|SCB|weight_format|scale_weight|weight_scale|input_scale|"
    r"qweight|qzeros|g_idx|_data|_scale)"
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightFiles:
    """Safetensors files of a network, in name order, and the file of each tensor where an index says so."""

    files: tuple[Path, ...]
    places: Mapping[str, str] | None = None


def find_weights(folder: Path, base: str) -> WeightFiles:
    """The files that hold a network's weights.

    Parameters
    ----------
    folder : the component's folder
    base : `OF_DIFFUSERS` or `OF_TRANSFORMERS`, the name that the component's library gives to its files

    Raises
    ------
    CheckpointError
        If there are none, or the index that says which they are cannot be used.
    """
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    known = [match for name in names if (match := WEIGHT_FILE.fullmatch(name))]
    known = [match for match in known if match["base"] == base] or known
    variants: dict[str, list[re.Match[str]]] = {}
    for match in known:
        variant = match["variant"] or match["old_place"] or match["index_variant"] or ""
        variants.setdefault(variant, []).append(match)
    for variant in sorted(variants):  # the empty name is the least
        found = variants[variant]
        whole = [match.string for match in found if not match["index"] and not match["shard"]]
        index = [match.string for match in found if match["index"]]
        if index and not (whole and base == OF_TRANSFORMERS):
            return _indexed(folder / index[0])
        if whole:
            return WeightFiles((folder / whole[0],))
        return _without_an_index(folder, found)
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(f"{folder} has its weights only as a pickle, which is never opened. {HOW_TO_CONVERT}")
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".msgpack", ".h5"))]
    there = f"; {others[0]} is none of its names" if others else ""
    raise CheckpointError(
        f"{folder} has no weights{there}; {base}.safetensors is needed. Put the file that belongs there into it."
    )


def _indexed(index: Path) -> WeightFiles:
    try:
        found = parsed(read_bytes(index), repeats=True, constants=True)
        places = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise MalformedError("has no weight_map from names of weights to names of files")
    except (MalformedError, OSError) as error:
        raise CheckpointError(f"{index} cannot be used: {error}. {remedy_of(index)}") from error
    files = sorted({*places.values()})
    for name in files:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names the file {name!r}; a safetensors file beside it is needed. "
                "Save the model anew with save_pretrained."
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the file {name}, which is not there. Download the missing file.")
    return WeightFiles(tuple(index.parent / name for name in files), places)


def _without_an_index(folder: Path, found: list[re.Match[str]]) -> WeightFiles:
    """Shards, all of one model."""
    counts = {int(match["shards"]) for match in found}
    if len(counts) > 1:
        raise CheckpointError(
            f"{folder} has shards of several models ({found[0].string} and {found[-1].string}) and no index that says "
            "which belong together. Remove those that do not belong there."
        )
    return WeightFiles(tuple(folder / match.string for match in found))


def read_tensors(weights: WeightFiles) -> dict[str, Tensor]:
    """The tensors of a network's files, memory-mapped, under the names that the files have for them.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or an index says of a tensor that it is in a file which has it not.
    """
    tensors: dict[str, Tensor] = {}
    for file in weights.files:
        with opened(file) as content:
            names = {*content.keys()}
            for name in names:
                if weights.places is None or weights.places.get(name, file.name) == file.name:
                    tensors[name] = content.get_tensor(name)
        listed = {name for name, place in (weights.places or {}).items() if place == file.name}
        if lost := sorted(listed - names):
            raise CheckpointError(
                f"{file} has no {lost[0]!r}, which the index of the shards says is in it. "
                "Use the index that was saved with these shards."
            )
    return tensors


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open, memory-mapped.

    Raises
    ------
    CheckpointError
        If it cannot be read, now or in the body of the ``with``.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file} is not a regular file. Give a safetensors file.")
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}). {remedy_of(file)}") from error


def without_wrappers(key: str) -> str:
    """A weight's name without what torch.compile and wrappers of training put into it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def name_of_diffusers(name: str) -> str:
    """The name that a network of today has for a weight of a file that may be older."""
    parts = name.split(".")
    if len(parts) > 3 and parts[-4] == "attentions":
        parts[-2] = OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)


def name_of_clip(name: str) -> str | None:
    """The name that a text encoder of CLIP's kind has for a weight of a file; None for what it does not read."""
    if not UNREAD.fullmatch(name) and name.split(".")[0] not in ("text_model", "text_projection"):
        name = f"text_model.{name}"  # transformers 5 leaves it out where there is no projection
    return None if UNREAD.fullmatch(name) else name


def current_names(
    place: Path, name_of: Callable[[str], str | None], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors under the names that the network has for them, without wrappers' parts and what no network reads.

    Parameters
    ----------
    place : what they were read from, for the message
    name_of : gives the network's name for one in a file, or None for what it does not read
    expected : the network's parameters; a projection that the text encoder does not have is left out

    Raises
    ------
    CheckpointError
        If two tensors have the same name then.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = name_of(without_wrappers(key))
        if name is None or (name in OPTIONAL and name not in expected):
            continue
        if name in named:
            raise CheckpointError(
                f"{place} has the weight {name!r} twice, the second time as {key!r}, and does not say which is meant. "
                "Save the network on its own, without what wraps it."
            )
        named[name] = tensor
    return named


def shared_tensors(network: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that a file leaves out since the network has them under another name, too, which the file has."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, Tensor] = {}
    for alike in names.values():
        there = next((name for name in alike if name in given), None)
        found |= {name: given[there] for name in alike if there is not None and name not in given}
    return found


def check_tensors(place: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors are the network's: names, shapes, floating-point and finite.

    Parameters
    ----------
    place : what they were read from, for the message
    expected : the network's parameters, of which only the shapes matter
    """
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if lora := next(filter(LORA.fullmatch, unknown), None):
        raise CheckpointError(
            f"{place} has the weights of a LoRA beside those of the network (such as {lora!r}). "
            "Load the pipeline with diffusers, call fuse_lora() and unload_lora_weights(), and save it."
        )
    whole = next((key for key in [*expected, *unknown] if key in given and given[key].dtype not in FLOATS), None)
    if quantized := whole or next(filter(QUANTIZED.fullmatch, unknown), None):
        kind = str(given[quantized].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{place} has quantized weights ({quantized!r} is {kind}); float32, float16 and bfloat16 can be read. "
            "Use the model before it was quantized; export quantizes by recipe."
        )
    if missing or unknown:
        counts = [
            f"{len(keys)} {what} (such as {keys[0]!r})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise CheckpointError(
            f"{place}: of the weights that config.json asks for, {' and '.join(counts)}. "
            "Use a config.json and weights that were saved together, whole."
        )
    for key, tensor in expected.items():
        shape = tuple(given[key].shape)
        old_projection = (*shape, 1, 1) == tuple(tensor.shape) or shape == (*tuple(tensor.shape), 1, 1)
        if shape != tuple(tensor.shape) and not old_projection:
            raise CheckpointError(
                f"{place}: {key!r} has shape {shape}; config.json asks for {tuple(tensor.shape)}. "
                "Use the config.json that was saved with these weights."
            )
    for key in expected:
        if not torch.isfinite(given[key]).all():
            raise CheckpointError(
                f"{place}: {key!r} holds NaN or infinity; a network with it makes no picture. Use a checkpoint from "
                "before training diverged, or download the file again if others have it whole."
            )
