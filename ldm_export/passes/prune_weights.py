"""Unstructured pruning: single weights become zero, the smallest of all (L1) or two of every four in a row (2:4).

Zeros alone make nothing faster: dense kernels multiply them as they do all others, on a CPU and on a GPU. What they buy
is a bundle that compresses better, and, in the 2:4 pattern and fp16 or int8, the sparse tensor cores of NVIDIA GPUs
from Ampere on, if the engine is built with sparse weights allowed (2104.08378). The report says how well they compress.

What a UNet loses it can learn again, from noisy latents. Any other denoiser is pruned as it is, with ``updates`` 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import prune

from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose, learns_from_noise
from ldm_export.passes.imitation import DistillationOptions, PrunedStudent
from ldm_export.reading.options import check_between, check_one_of


@dataclass(frozen=True)
class PruneWeights(DistillationOptions):
    """Options.

    Attributes
    ----------
    pattern : "unstructured", or "2:4": of every four weights along the inputs, the two largest stay
    ratio : of the weights of all layers together that become zero, where unstructured
    """

    name: ClassVar[str] = "prune-weights"
    purpose: ClassVar[Purpose] = "zeros"

    pattern: str = "unstructured"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("pattern", self.pattern, ("unstructured", "2:4"))
        check_between("ratio", self.ratio, 0.0, 1.0, inclusive=False)

    def apply(self, setting: PassContext) -> Change:
        name = setting.model.kind.denoiser
        teacher, student = setting.model.load(name), setting.model.load(name)
        layers, left = prunable(student, self.pattern)
        before = compressed_bytes(student)
        if self.pattern == "2:4":
            for layer in layers.values():
                prune.custom_from_mask(layer, "weight", two_of_four(layer.weight))
        else:
            weights = [(layer, "weight") for layer in layers.values()]
            prune.global_unstructured(weights, prune.L1Unstructured, amount=self.ratio)
        check_none_is_lost(layers, self.ratio)
        errors: dict[str, Any] = {}
        if learns_from_noise(setting.model):
            assert isinstance(teacher, UNet2DConditionModel)
            assert isinstance(student, UNet2DConditionModel)
            report = self.imitate(self.name, setting, PrunedStudent(student, teacher, {}, {}))
            errors["output_error"] = report["output_error"]
        for layer in layers.values():
            prune.remove(layer, "weight")
        errors["weight_error"] = relative_change(student, teacher)
        zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
        return Change(
            {name: student},
            report={
                "zeros": zeros,
                "of": sum(layer.weight.numel() for layer in layers.values()),
                "left_alone": left,
                "compressed_bytes": {"before": before, "after": compressed_bytes(student)},
                **errors,
                "speed": "none from zeros, except 2:4 on the sparse tensor cores of NVIDIA GPUs",
            },
        )


def relative_change(student: nn.Module, teacher: nn.Module) -> float:
    """How far all weights are from the teacher's, as a share of them: root of the ratio of the sums of squares."""
    pruned = student.state_dict()
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if tensor.is_floating_point()}
    moved = sum(float((pruned[name] - tensor).double().square().sum()) for name, tensor in weights.items())
    return math.sqrt(moved / sum(float(tensor.double().square().sum()) for tensor in weights.values()))


def check_none_is_lost(layers: Mapping[str, nn.Module], ratio: float) -> None:
    """Raise InputError if a layer has lost all of its weights, so that nothing passes it (2006.05467, section 4)."""
    lost = [
        name
        for name, layer in layers.items()
        if not layer.get_buffer("weight_mask").any() and layer.get_parameter("weight_orig").any()
    ]
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"prune-weights with ratio {ratio:g} takes all weights of {lost[0]}{others}, which are the smallest of the "
            'network, and nothing would pass it. Lower the ratio, or use the pattern "2:4", which takes half of each.'
        )


def prunable(unet: nn.Module, pattern: str) -> tuple[dict[str, nn.Linear | nn.Conv2d], list[str]]:
    """Layers by name whose weights can go, and the names of those whose inputs cannot be cut into fours."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    left = [name for name, layer in layers.items() if pattern == "2:4" and layer.weight.shape[1] % 4]
    return {name: layer for name, layer in layers.items() if name not in left}, left


def two_of_four(weight: Tensor) -> Tensor:
    """1 where a weight (out, in, ...) is among the two largest of its four along the inputs, else 0."""
    fours = weight.detach().abs().reshape(weight.shape[0], -1, 4, *weight.shape[2:])
    places = fours.topk(2, dim=2).indices
    return torch.zeros_like(fours).scatter_(2, places, 1.0).flatten(1, 2)


def compressed_bytes(network: nn.Module) -> int:
    """What deflate, as in a zip file, makes of the weights in fp16."""
    tensors = (tensor.detach().half().numpy().tobytes() for tensor in network.state_dict().values())
    return sum(len(zlib.compress(data, 6)) for data in tensors)
