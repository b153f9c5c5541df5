"""Opens a checkpoint in diffusers layout as the reference networks. The only seam to ``ldm_reference``.

Components are loaded one at a time, when they are asked for, and their weights are memory-mapped: a model larger than
half of the memory can be exported. Weights come from safetensors; a pickle is never opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_export.errors import CheckpointError
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.config import ConfigError
from ldm_reference.layout import config_to_dict
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel

Network = AutoencoderKL | UNet2DConditionModel | CLIPTextModel

CLASSES: dict[str, type[AutoencoderKL] | type[UNet2DConditionModel] | type[CLIPTextModel]] = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModel,
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HOW_TO_CONVERT = (
    "Load it where you trust it and save it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names that autoencoders saved before diffusers 0.14 have for the projections of their attention."""


@dataclass(frozen=True)
class LatentDiffusion:
    """A checkpoint on disk.

    Attributes
    ----------
    name : the folder's name
    path : the folder
    index : the content of ``model_index.json``
    """

    name: str
    path: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, checkpoint: str | Path) -> LatentDiffusion:
        """Open a folder, or a shipped checkpoint by its name.

        Raises
        ------
        CheckpointError
            If there is no such checkpoint, it is a pickle or a single file, or a component is missing.
        """
        path = Path(checkpoint)
        if not path.exists() and str(checkpoint) in shipped_checkpoints():
            path = shipped_checkpoints()[str(checkpoint)]
        if not path.exists():
            raise CheckpointError(
                f"There is no checkpoint {str(checkpoint)!r}; give a folder in diffusers layout or one of the shipped: "
                f"{', '.join(shipped_checkpoints()) or 'none'}."
            )
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, which can run code when it is opened. {HOW_TO_CONVERT}")
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"{path} has no model_index.json; a checkpoint is a folder in diffusers layout. "
                "Save it with diffusers' save_pretrained, or train one with `ldm-export train`."
            )
        model = cls(path.resolve().name, path, _read_json(path / "model_index.json"))
        for component in ("unet", "vae"):
            if component not in model.components:
                raise CheckpointError(f"{path / 'model_index.json'} names no {component}; a latent diffusion model has one.")
        return model

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The networks that it has, in the order in which they run."""
        order = ("text_encoder", "text_encoder_2", "unet", "vae")
        return tuple(name for name in order if self.index.get(name) and self.index[name][0] is not None)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Each network's config, defaults filled in; ``with_projection`` is added for text encoders."""
        configs = {}
        for name in self.components:
            network = self._skeleton(name)
            configs[name] = config_to_dict(network)
            if isinstance(network, CLIPTextModel):
                configs[name]["with_projection"] = network.config.with_projection
        return configs

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The content of ``scheduler_config.json``."""
        return _read_json(self.path / "scheduler" / "scheduler_config.json")

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The component's safetensors files, in name order."""
        folder = self.path / component
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        whole = [file for file in files if file.stem in ("diffusion_pytorch_model", "model")]
        if whole:
            return tuple(whole)
        if files:  # shards, or a single precision variant such as model.fp16.safetensors
            variants = {file.name.split(".")[1] for file in files if file.name.count(".") > 1}
            chosen = [file for file in files if not variants or file.name.split(".")[1] == min(variants)]
            return tuple(chosen)
        if folder.is_dir() and any(file.suffix in PICKLES for file in folder.iterdir()):
            raise CheckpointError(f"{folder} has its weights only as a pickle, which is never opened. {HOW_TO_CONVERT}")
        raise CheckpointError(f"{folder} has no weights; *.safetensors is needed. {HOW_TO_CONVERT}")

    def sha256(self, component: str) -> str:
        """Over the component's weight files, in name order."""
        digest = hashlib.sha256()
        for file in self.weight_files(component):
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def load(self, component: str) -> Network:
        """The network with its weights, float32, in evaluation mode, without gradients.

        Raises
        ------
        CheckpointError
            If weights are missing, truncated, of another shape, or of a network that the config does not describe.
        """
        network = self._skeleton(component)
        tensors: dict[str, Tensor] = {}
        for file in self.weight_files(component):
            try:
                tensors |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}). Fetch it again.") from error
        tensors = {_current_name(key): tensor for key, tensor in tensors.items() if not key.endswith(".position_ids")}
        expected = network.state_dict()
        _check_weights(self.path / component, tensors, expected)
        tensors = {key: tensor.float().reshape(expected[key].shape) for key, tensor in tensors.items()}
        network.load_state_dict(tensors, assign=True)
        return network.requires_grad_(False).eval()

    def _skeleton(self, component: str) -> Network:
        """The network on the meta device: shapes, no memory."""
        file = self.path / component / "config.json"
        values = _read_json(file)
        try:
            with torch.device("meta"):
                return CLASSES[component].from_config(values)
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}.") from error


def shipped_checkpoints() -> dict[str, Path]:
    """The checkpoints that come with ``ldm_reference``, by name."""
    spec = find_spec("ldm_reference")
    folder = Path(spec.submodule_search_locations[0]) / "pretrained" if spec and spec.submodule_search_locations else None
    found: Iterator[Path] = folder.glob("*/model_index.json") if folder else iter(())
    return {file.parent.name: file.parent for file in sorted(found)}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete. Fetch it again.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}; a JSON object is needed. Fetch it again.")
    return values


def _current_name(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) > 2 and parts[-2] in OLD_ATTENTION and "mid_block" in parts:
        parts[-2] = OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def _check_weights(folder: Path, given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        counts = [
            f"{len(keys)} {what} (such as {keys[0]!r})" for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys
        ]
        raise CheckpointError(f"{folder}: of the weights that config.json asks for, {' and '.join(counts)}. Fetch it again.")
    for key, tensor in expected.items():
        shape = tuple(given[key].shape)
        old_projection = shape + (1, 1) == tuple(tensor.shape) or shape == tuple(tensor.shape) + (1, 1)
        if shape != tuple(tensor.shape) and not old_projection:
            raise CheckpointError(
                f"{folder}: {key!r} has shape {shape}; config.json asks for {tuple(tensor.shape)}. "
                "Use the config.json that was saved with these weights."
            )


def parameters_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
