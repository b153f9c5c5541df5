"""Builds a network from the ``config.json`` beside its weights, and reads those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ldm_reference.config import ConfigError, UnsupportedError
from torch import Tensor, nn

from ldm_export.checkpoint.kind import Component
from ldm_export.checkpoint.weights import check_tensors, current_names, find_weights, read_tensors, shared_tensors
from ldm_export.errors import CheckpointError
from ldm_export.reading.documents import MalformedError, parsed, read_bytes
from ldm_export.reading.weight_files import remedy_of


def built(component: Component, class_name: str, values: dict[str, Any], file: Path) -> Any:
    """A network of a class without its weights, which take no memory; ``values`` are the content of ``file``.

    Raises
    ------
    CheckpointError
        If its weights are quantized, or the config describes no network that can be built.
    """
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{file} has a quantization_config, so the weights are quantized; float32, float16 and bfloat16 can be "
            "read. Use the model before it was quantized; export quantizes by recipe."
        )
    try:
        with torch.device("meta"):
            return component.build(class_name, values)
    except UnsupportedError as error:
        raise CheckpointError(
            f"{file}: {error}. Such a network cannot be exported; choose another checkpoint."
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}. Use the config.json that was saved with the weights.") from error
    except (ValueError, TypeError, RuntimeError) as error:  # torch's own words on sizes that no layer can have
        raise CheckpointError(
            f"{file} describes a network that cannot be built ({error}). "
            "Use the config.json that was saved with the weights."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; raises CheckpointError if it is missing or none."""
    try:
        values = parsed(read_bytes(file), repeats=True, constants=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing; the checkpoint is incomplete. Download or save it again, whole."
        ) from error
    except (OSError, MalformedError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}). {remedy_of(file)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{file} holds a {type(values).__name__}; a JSON object is needed. "
            "Use the file that was saved with the model."
        )
    return values


def stored_tensors(component: Component, folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a component's folder, memory-mapped, under the names that its network has for them."""
    files = find_weights(folder, component.weights)
    return current_names(folder, component.name_of, read_tensors(files), network.state_dict())


def checked_tensors(place: Path, tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A network's weights as float32, each of the network's own shape; ``place`` is what they were read from.

    Raises
    ------
    CheckpointError
        If weights are missing, unknown, quantized, not finite or of another shape.
    """
    expected = network.state_dict()
    tensors = {**tensors, **shared_tensors(network, tensors)}
    check_tensors(place, tensors, expected)
    return {key: tensor.float().reshape(expected[key].shape) for key, tensor in tensors.items()}
