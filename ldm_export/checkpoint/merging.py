"""Adapters (LoRA and its kin) merged into the networks of a checkpoint when they are loaded."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_export.adapters import Adapter, Layer, Networks, merged, read_adapter
from ldm_export.checkpoint.key_maps import unet_key
from ldm_export.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merge:
    """An adapter and the strength that it is merged with."""

    adapter: Adapter
    scale: float

    @property
    def facts(self) -> dict[str, Any]:
        """What a bundle's manifest says of it."""
        return {"name": self.adapter.file.name, "sha256": self.adapter.sha256, "scale": self.scale}


def read_merges(given: Sequence[tuple[Path, float]], networks: Networks) -> tuple[Merge, ...]:
    """Adapters for these networks; names in their files that belong to no layer are logged as a warning.

    Raises
    ------
    InputError
        If an adapter cannot be used, or a strength is not a finite number.
    """
    merges = []
    for path, scale in given:
        if not math.isfinite(scale):
            raise InputError(f"The scale {scale} of {path} is not finite. Give a number such as 0.8.")
        adapter = read_adapter(path, networks)
        if adapter.unmatched:
            used = sum(map(len, adapter.layers.values()))
            _log.warning(
                f"{adapter.file}: {used} layers are used; {len(adapter.unmatched)} names are of no layer of this model "
                f"and left out: {', '.join(adapter.unmatched)}"
            )
        merges.append(Merge(adapter, scale))
    return tuple(merges)


def layers_of(component: str, network: nn.Module, config: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers of a network that an adapter may change, a UNet's with CompVis' names beside their own.

    Parameters
    ----------
    config : the network's
    """
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in network.state_dict().items()
        if name.endswith(".weight") and weight.ndim in (2, 4)
    }
    return named_layers(component, shapes, config.get("layers_per_block"))


def named_layers(component: str, shapes: Mapping[str, tuple[int, ...]], blocks: object) -> dict[str, Layer]:
    """Layers of these names and shapes of weights, a UNet's with CompVis' names beside their own.

    Parameters
    ----------
    blocks : residual blocks a resolution of a UNet, ``layers_per_block`` of its config; other values give its own
        names alone
    """
    layers = {}
    for module, shape in shapes.items():
        name = f"{module}.weight"
        theirs = unet_key(name, blocks) if component == "unet" and isinstance(blocks, int) else name
        others = {theirs.replace(".up.", f".{place}.").removesuffix(".weight") for place in (1, 2)}  # as the block has
        layers[module] = Layer(shape, tuple(sorted(others - {module})))
    return layers


def merged_weights(component: str, tensors: Mapping[str, Tensor], merges: Sequence[Merge]) -> dict[str, Tensor]:
    """The weights that adapters change, changed one adapter after another in float64, as float32.

    Parameters
    ----------
    tensors : the network's float32 weights by their names

    Raises
    ------
    InputError
        If a weight is not finite then.
    """
    own = [(merge, merge.adapter.layers.get(component, {})) for merge in merges]
    changed = {}
    for module in dict.fromkeys(module for _, layers in own for module in layers):
        weight = tensors[f"{module}.weight"].numpy()
        for merge, layers in own:
            if module in layers:
                weight = merged(weight, layers[module], merge.scale)
        with np.errstate(over="ignore"):
            found = weight.astype(np.float32)
        if not np.isfinite(found).all():
            raise InputError(
                f"{module} of {component} is not finite with {', '.join(str(merge.adapter.file) for merge, _ in own)} "
                "merged. Give a smaller scale, or another adapter."
            )
        changed[f"{module}.weight"] = torch.from_numpy(found)
    return changed


def merged_sha256(sha256: str, component: str, merges: Sequence[Merge]) -> str:
    """Hash of a component's weights and of what is merged into it; of the weights alone where nothing is."""
    own = [f" {merge.adapter.sha256} {merge.scale!r}" for merge in merges if component in merge.adapter.layers]
    return hashlib.sha256("".join([sha256, *own]).encode()).hexdigest() if own else sha256
