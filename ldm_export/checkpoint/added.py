"""Networks that people add to a checkpoint, such as ControlNets, each in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ldm_export.checkpoint.building import built, checked_tensors, read_json, stored_tensors
from ldm_export.checkpoint.kind import Component
from ldm_export.checkpoint.weights import find_weights
from ldm_export.errors import CheckpointError
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.weight_files import HOW_TO_CONVERT, PICKLES


@dataclass(frozen=True)
class AddedNetwork:
    """A network in a folder with its ``config.json`` and weights, as diffusers' ``save_pretrained`` leaves it.

    Attributes
    ----------
    folder : its folder
    component : what it may be
    """

    folder: Path
    component: Component

    def check(self) -> None:
        """Raise CheckpointError unless the folder has such a network, with weights that can be read."""
        if self.folder.suffix in PICKLES:
            raise CheckpointError(f"{self.folder} is a pickle, which can run code when it is opened. {HOW_TO_CONVERT}")
        if not (self.folder / "config.json").is_file():
            kinds = " or ".join(self.component.classes)
            raise CheckpointError(
                f"{self.folder} has no config.json; a folder of a {kinds} in diffusers layout is needed. "
                "Save it with diffusers' save_pretrained."
            )
        self.config  # noqa: B018 - refuses what cannot be built
        find_weights(self.folder, self.component.weights)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The network's config, defaults filled in."""
        return self.component.config(self._skeleton())

    @property
    def weights_bytes(self) -> int:
        """What its weights take in float32."""
        return sum(4 * parameter.numel() for parameter in self._skeleton().parameters())

    @property
    def sha256(self) -> str:
        """SHA-256 of its weight files, in name order, hex."""
        return sha256_of(*self.weight_files)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Its safetensors files, in name order."""
        return find_weights(self.folder, self.component.weights).files

    def load(self) -> Any:
        """The network with its weights, float32, in evaluation mode, without gradients."""
        network = self._skeleton()
        tensors = checked_tensors(self.folder, stored_tensors(self.component, self.folder, network), network)
        network.load_state_dict(tensors, assign=True)
        return network.requires_grad_(False).eval()

    def _skeleton(self) -> nn.Module:
        file = self.folder / "config.json"
        values = read_json(file)
        name = values.get("_class_name") or next(iter(values.get("architectures") or []), None)
        if not isinstance(name, str) or name not in self.component.classes:
            raise CheckpointError(
                f"{file} is of a {str(name)[:60]}; {' or '.join(self.component.classes)} is needed beside this model."
            )
        network: nn.Module = built(self.component, name, values, file)
        return network
