"""Networks of other libraries as components of a checkpoint, whatever their configuration."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ldm_export.checkpoint.kind import Component
from ldm_export.errors import CheckpointError


def from_diffusers(*names: str) -> Component:
    """A component that is one of diffusers' classes of these names."""

    def build(name: str, config: dict[str, Any]) -> nn.Module:
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError as error:
            raise CheckpointError(
                f"{name} is a class of diffusers, which is not installed. Run: pip install 'ldm_export[families]'"
            ) from error
        network: nn.Module = getattr(diffusers, name).from_config(config)
        return network

    def config(network: Any) -> dict[str, Any]:
        kept = {key: value for key, value in network.config.items() if not key.startswith("_")}
        return {"_class_name": type(network).__name__, **kept}

    return Component(names, build, config)
