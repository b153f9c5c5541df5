"""LoRA of a denoiser: PEFT's layers in it, the loss that trains them, and the file that holds them.

With x = alpha_t x0 + sigma_t eps and the target that the checkpoint's scheduler says (epsilon, v, x0, or the velocity
of flow matching), the loss is the mean over a batch of w |out(x, t) - target|^2, averaged over a latent's values. Files
have diffusers' names and, as their metadata, PEFT's config, as its ``save_lora_weights`` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ldm_reference.noise import Noise
from ldm_reference.state import write_tensors
from torch import Tensor, nn

from ldm_export import __version__
from ldm_export.adapt.options import Factors
from ldm_export.adapters import Adapter
from ldm_export.adapters.factors import LORA
from ldm_export.adapters.reader import METADATA
from ldm_export.errors import InputError
from ldm_export.families.base import GraphModule

ATTENTION = re.compile(
    r"(^|\.)(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|img_qkv_proj|txt_kv_proj)$"
)
"""Names of the linear layers of attentions, in diffusers' UNets and transformers and in those that are trained here."""
NAME = "default"
"""PEFT's own name of an adapter that has none."""


def layers_to_train(network: nn.Module, which: str) -> list[str]:
    """Names of the linear layers and convolutions of a network that get factors, ``which`` as `Factors` has it.

    Raises
    ------
    InputError
        If there are none.
    """
    kinds = (nn.Linear, nn.Conv2d)
    found = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    if which == "attention":
        found = [name for name in found if ATTENTION.search(name)]
    if not found:
        raise InputError(f"The denoiser has no layers of the kind {which!r}. Train all: --layers all.")
    return found


def add_factors(network: nn.Module, factors: Factors, seed: int) -> dict[str, Any]:
    """Put PEFT's LoRA into a network, in place, its first factors random and its second zero; gives PEFT's config.

    Raises
    ------
    InputError
        If the network has no such layers, or PEFT is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("Adapting needs PEFT, which is not installed. pip install 'ldm_export[adapt]'") from error
    alpha: Any = factors.rank if factors.alpha is None else factors.alpha  # PEFT takes fractions, too
    names = layers_to_train(network, factors.layers)
    config = LoraConfig(r=factors.rank, lora_alpha=alpha, target_modules=names)
    network.requires_grad_(False)
    torch.manual_seed(seed)
    inject_adapter_in_model(config, network, NAME)
    said: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}


def factors_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The factors in a network, by the names that a file has for them behind the component's."""
    return {name.replace(f".{NAME}.", "."): value for name, value in network.named_parameters() if f".{NAME}." in name}


def by_file_name(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an `AdaptObjective` by the names of `factors_of`."""
    return {key.removeprefix("denoiser.network.").replace(f".{NAME}.", "."): value for key, value in trained.items()}


def start_from(network: nn.Module, factors: Factors, start: Adapter, component: str) -> None:
    """Give the factors in a network the values of a file's.

    Raises
    ------
    InputError
        If the file is no LoRA of just these layers and this rank.
    """
    alpha = factors.rank if factors.alpha is None else factors.alpha
    given, own = start.layers.get(component, {}), factors_of(network)
    layers = {name.partition(".lora_")[0] for name in own}
    if {*given} != layers or len(start.layers) != 1:
        raise InputError(
            f"{start.file} changes {sum(map(len, start.layers.values()))} layers, and {len(layers)} are to be trained. "
            "Give the --layers that it was trained with."
        )
    for layer, found in given.items():
        if found.kind != LORA or found.magnitude is not None or {*found.tensors} != {"down", "up"}:
            raise InputError(f"{start.file} is no plain LoRA, which alone training can start from.")
        down, up = (torch.from_numpy(np.array(found.tensors[name], np.float32)) for name in ("down", "up"))
        if len(down) != factors.rank:
            raise InputError(
                f"{start.file} has the rank {len(down)}, and {factors.rank} was asked for. Give --rank {len(down)}."
            )
        with torch.no_grad():
            own[f"{layer}.lora_A.weight"].copy_(down.reshape(own[f"{layer}.lora_A.weight"].shape))
            up = up.reshape(own[f"{layer}.lora_B.weight"].shape) * (found.scale * factors.rank / alpha)
            own[f"{layer}.lora_B.weight"].copy_(up)


class AdaptObjective(nn.Module):
    """The loss of a denoiser with factors in it, weighted by row."""

    def __init__(self, denoiser: GraphModule, reads: Sequence[str], noise: Noise):
        super().__init__()
        self.denoiser = denoiser
        self.noise = noise
        self.reads = tuple(reads)

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor, **conditions: Tensor
    ) -> dict[str, Tensor]:
        """Latents and noise (B, C, h, w), timesteps and weights (B,), and the conditions, (B, ...) each."""
        sample = self.noise.add(latents, noise, timesteps)
        (out,) = self.denoiser(sample, timesteps.float(), *(conditions[name] for name in self.reads))
        errors = (out.float() - self.noise.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
        return {"loss": (weights * errors).mean()}


def write_factors(
    file: Path, component: str, values: Mapping[str, Tensor], config: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Write factors, by the names of `factors_of`, as diffusers does; ``made`` says how they came about."""
    tensors = {f"{component}.{name}": tensor.detach().float().contiguous() for name, tensor in values.items()}
    packed = {f"{component}.{key}": value for key, value in config.items()}
    said = {"ldm_export": json.dumps({"version": __version__, **made}, sort_keys=True)}
    metadata = {"format": "pt", METADATA: json.dumps(packed, indent=2, sort_keys=True), **said}
    write_tensors(file, tensors, metadata)
