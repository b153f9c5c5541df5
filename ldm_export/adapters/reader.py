"""Reads an adapter's file: the factors that it has for each layer of a model, and what fits no layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_export.adapters.factors import Array, Factors, delta_shape, fits, kind_of, rank_of
from ldm_export.adapters.names import PEFT, Layer, Networks, Place, places_of, spellings, split
from ldm_export.adapters.settings import Settings, settings_of
from ldm_export.adapters.tensors import read_arrays
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, parsed, read_json
from ldm_export.reading.hashes import sha256_of

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Key of a file's metadata under which diffusers keeps PEFT's configs."""
IN_A_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names that diffusers and PEFT give to the file where they save a folder."""


@dataclass(frozen=True)
class Adapter:
    """An adapter for one model.

    Attributes
    ----------
    file : where it is
    sha256 : of the file, hex
    layers : factors, by component and by the layer's name in its network
    unmatched : names in the file that belong to no layer of the model, or are no factors that are read
    """

    file: Path
    sha256: str
    layers: Mapping[str, Mapping[str, Factors]]
    unmatched: tuple[str, ...]


@dataclass
class _Group:
    """Tensors of one layer, by what they are, and the layer's path in the file, by which configs know it."""

    name: str
    path: str
    scale_of: Settings | None
    tensors: dict[str, Array]


def read_adapter(path: Path, networks: Networks) -> Adapter:
    """Read LoRA, LoHa, LoKr or DoRA from a safetensors file.

    Parameters
    ----------
    path : the file, or the folder in which diffusers or PEFT have saved it
    networks : the model's layers, whose names and shapes decide what is whose

    Raises
    ------
    InputError
        If the file cannot be read, no name in it is of a layer of the model, or what it has for one cannot be used:
        a factor is missing, has another rank or shape, or holds NaN or infinity.
    """
    file = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path)
    if file.is_dir():
        raise InputError(f"{path} is a folder without {' or '.join(IN_A_FOLDER)}. Name the adapter's safetensors file.")
    arrays, metadata = read_arrays(file)
    groups, unmatched = _groups(file, arrays, networks, _settings(file, metadata, arrays))
    if not groups:
        names = ", ".join(repr(name) for name in [*arrays][:2]) or "none"
        raise InputError(
            f"{file}: none of its {len(arrays)} names (such as {names}) is of a layer of this model. "
            "Use an adapter of this very kind of model."
        )
    layers: dict[str, dict[str, Factors]] = {}
    for (component, module), group in groups.items():
        try:
            layers.setdefault(component, {})[module] = _factors(group, networks[component][module])
        except MalformedError as error:
            raise InputError(f"{file}: {group.name} {error}. Use an adapter of this model, whole.") from error
    return Adapter(file, sha256_of(file), layers, tuple(sorted(unmatched)))


def _groups(
    file: Path, arrays: Mapping[str, Array], networks: Networks, settings: Callable[[str, str], Settings | None]
) -> tuple[dict[Place, _Group], set[str]]:
    places, unmatched = places_of(networks), set()
    groups: dict[Place, _Group] = {}
    for name, array in arrays.items():
        layer, role = split(name) or (name, "")
        place = _place(file, layer, places) if role else None
        if place is None:
            unmatched.add(layer)
            continue
        path = next(spellings(layer)).removeprefix(f"{place[0]}.")
        group = groups.setdefault(place, _Group(layer, path, settings(layer, place[0]), {}))
        if role in group.tensors:
            raise InputError(
                f"{file} has {role} of {place[1]} of {place[0]} twice, the second time as {name!r}. "
                "Save the adapter under names of one kind."
            )
        group.tensors[role] = array
    return groups, unmatched


def _place(file: Path, layer: str, places: Mapping[str, list[Place]]) -> Place | None:
    found = next((places[name] for name in spellings(layer) if name in places), [])
    if len(found) > 1:
        components = " and ".join(sorted({component for component, _ in found}))
        raise InputError(
            f"{file}: {layer!r} may be of {components}, and the file does not say which. "
            f"Save it under names that begin with the component's, such as {found[-1][0]}.*"
        )
    return found[0] if found else None


def _settings(
    file: Path, metadata: Mapping[str, str], arrays: Mapping[str, Array]
) -> Callable[[str, str], Settings | None]:
    """What the configs beside or in the file say, of a layer's name in the file and its component."""
    config, beside = file.parent / PEFT_CONFIG, None
    if any(name.startswith(PEFT) for name in arrays) and not any(name.endswith(".alpha") for name in arrays):
        if not config.is_file():
            raise InputError(
                f"{file} has PEFT's names, and {PEFT_CONFIG}, which has its alpha, is not beside it. Put it there."
            )
        beside = _read(config, lambda: read_json(config))
    inside = {}
    if METADATA in metadata:
        where = f"{METADATA} of {file}"
        found = _read(where, lambda: parsed(metadata[METADATA]), check=dict)
        for component in sorted({key.partition(".")[0] for key in found if key.endswith(".r")}):
            start = f"{component}."
            own = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
            inside[component] = _read(where, partial(dict, own))
    return lambda layer, component: beside if layer.startswith(PEFT) else inside.get(component)


def _read(where: Path | str, content: Callable[[], Any], check: Callable[[Any], Any] = settings_of) -> Any:
    try:
        return check(content())
    except (MalformedError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{where} {error}. Use the one that was saved with the weights.") from error


def _factors(group: _Group, layer: Layer) -> Factors:
    """Factors of one layer; raises MalformedError with what is wrong."""
    alpha, scale, own = group.tensors.pop("alpha", None), group.tensors.pop("dora_scale", None), group.scale_of
    vector = group.tensors.pop("magnitude", None)
    kind = kind_of({*group.tensors})
    for role, array in group.tensors.items():
        if not np.isfinite(array).all():
            raise MalformedError(f"has NaN or infinity in {role}")
    given = delta_shape(kind, {role: array.shape for role, array in group.tensors.items()})
    if not fits(given, layer.shape):
        raise MalformedError(f"is a change of shape {given}; the model's weight has {layer.shape}")
    if own is not None and own.dora and vector is None:
        raise MalformedError("lacks lora_magnitude_vector, which use_dora asks for")
    magnitude, axis = _magnitude(vector, scale, layer.shape)
    rank = rank_of(kind, group.tensors)
    if alpha is not None:
        if alpha.size != 1 or not np.isfinite(alpha).all():
            raise MalformedError("has an alpha that is not one finite number")
        factor = float(alpha.reshape(())) / rank if rank else 1.0
    else:
        factor = own.scale(group.path, rank) if own is not None else 1.0
    return Factors(kind, group.tensors, factor, magnitude, axis)


def _magnitude(vector: Array | None, scale: Array | None, shape: tuple[int, ...]) -> tuple[Array | None, int]:
    """DoRA's magnitudes, one axis, and that axis of the weight: of outputs in PEFT, by its shape in ``dora_scale``."""
    found = scale if vector is None else vector
    if found is None:
        return None, 0
    of_inputs = vector is None and found.shape[:1] == (1,) and found.ndim > 1 and shape[0] != 1
    axis = 1 if of_inputs else 0
    if found.size != shape[axis] or not np.isfinite(found).all():
        raise MalformedError(f"has magnitudes of shape {found.shape}, or not finite ones; {shape[axis]} are needed")
    return found.reshape(-1), axis
