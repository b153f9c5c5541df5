"""Networks of other libraries as components of a checkpoint, whatever their configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.checkpoint.kind import Component
from ldm_export.checkpoint.weights import OF_TRANSFORMERS, name_of_diffusers
from ldm_export.errors import CheckpointError

UNREAD = re.compile(r"(decoder|lm_head)\.")
"""Names in a file of a whole model of which the encoder alone is read, as transformers reads it."""


def from_diffusers(*names: str) -> Component:
    """A component that is one of diffusers' classes of these names."""

    def build(name: str, config: dict[str, Any]) -> nn.Module:
        cls = library_class("diffusers", name)
        with _config_errors(), without_weights():
            network: nn.Module = cls.from_config(config)
        return network

    def config(network: Any) -> dict[str, Any]:
        kept = {key: value for key, value in network.config.items() if not key.startswith("_")}
        return {"_class_name": type(network).__name__, **kept}

    return Component(names, build, config, name_of=name_of_diffusers)


def from_transformers(*names: str, module: str = "transformers", part: str | None = None) -> Component:
    """A component that is one of transformers' classes of these names, in a module of it.

    Parameters
    ----------
    part : what of the config describes the network, where the config is of a larger model, such as ``encoder``
    """

    def build(name: str, config: dict[str, Any]) -> nn.Module:
        cls = library_class(module, name)
        with _config_errors(), without_weights():
            read = cls.config_class.from_dict({**config, "dtype": None})
            network: nn.Module = cls(getattr(read, part) if part in config else read)
        return network

    def config(network: Any) -> dict[str, Any]:
        kept: dict[str, Any] = network.config.to_dict()
        return kept

    return Component(names, build, config, OF_TRANSFORMERS, lambda name: None if UNREAD.match(name) else name)


def either(*components: Component) -> Component:
    """A component that is of a class of any of these, whose files and weights are named alike."""
    alike = {(component.weights, component.name_of) for component in components}
    if len(alike) > 1:
        raise ValueError("components of one name must name their weights alike")
    by_name = {name: component for component in components for name in component.classes}

    def config(network: Any) -> dict[str, Any]:
        name = next(cls.__name__ for cls in type(network).__mro__ if cls.__name__ in by_name)
        return by_name[name].config(network)

    return Component(tuple(by_name), lambda name, values: by_name[name].build(name, values), config)


def library_class(library: str, name: str) -> Any:
    """A class of a library, wherever in it, by its name.

    Raises
    ------
    CheckpointError
        If the library is not installed, or has no such class.
    """
    top = library.partition(".")[0]
    try:
        installed = importlib.import_module(top)
    except ImportError as error:
        raise CheckpointError(
            f"{name} is a class of {top}, which is not installed. Run: pip install 'ldm_export[families]'"
        ) from error
    try:
        return getattr(importlib.import_module(library), name)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{name} is a class that the installed {top} {installed.__version__} does not have. "
            "Run: pip install --upgrade 'ldm_export[families]'"
        ) from error


@contextmanager
def _config_errors() -> Iterator[None]:
    """Raise ValueError for whatever a library makes of a config that it cannot use."""
    try:
        yield
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


@contextmanager
def without_weights() -> Iterator[None]:
    """Build networks of which what a file holds is on the meta device, and takes no memory, and other buffers are real.

    Such as the frequencies of rotary positions, which are what their class computes.
    """
    register, keep = nn.Module.register_parameter, nn.Module.register_buffer

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    def without_stored_values(
        module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True, **options: Any
    ) -> None:
        keep(module, name, tensor.to("meta") if persistent and tensor is not None else tensor, persistent, **options)

    try:
        nn.Module.register_buffer = without_stored_values  # type: ignore[method-assign, assignment]
        nn.Module.register_parameter = without_values  # type: ignore[method-assign, assignment]
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.register_buffer = keep  # type: ignore[method-assign]
