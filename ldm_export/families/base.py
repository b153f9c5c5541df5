"""What a family of models says: which graphs a checkpoint of it becomes, and which roles they fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.kind import CheckpointKind, class_name
from ldm_export.contract import GraphSpec, Roles
from ldm_export.plan.scheduler_classes import prediction_of


class GraphModule(nn.Module):
    """A network behind the positional inputs and outputs of its graph.

    Parameters
    ----------
    network : what has the weights; its ``config`` and they determine the graph
    call : called with the network and a tensor for each input, gives a tensor for each output
    """

    def __init__(self, network: nn.Module, call: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.call(self.network, *inputs)


@dataclass(frozen=True)
class ModelGraph:
    """One graph to be: all that exporting it and comparing it takes.

    Attributes
    ----------
    spec : its name, inputs and outputs
    load : opens the network with its weights
    component : the checkpoint's component that the weights are of; None where there are none
    config : what its ``config.json`` says, for other libraries that open the folder; None for no such file
    ids : how many token ids or class labels its inputs of whole numbers may have
    patch_size : what latents' heights and widths must be multiples of
    """

    spec: GraphSpec
    load: Callable[[], GraphModule]
    component: str | None = None
    config: Mapping[str, Any] | None = None
    ids: int = 1
    patch_size: int = 1


def common_facts(checkpoint: LatentDiffusion, class_count: int | None = None) -> dict[str, Any]:
    """What the manifest's ``model`` says of every family's checkpoint; ``class_count`` is null where there are none."""
    height, width = checkpoint.picture_size
    return {
        "class_name": class_name(checkpoint.index),
        "height": height,
        "width": width,
        "latent_channels": checkpoint.configs["vae"]["latent_channels"],
        "pixels_per_latent": checkpoint.pixels_per_latent,
        "class_count": class_count,
        "prediction_type": prediction_of(checkpoint.scheduler),
    }


def common_notes(checkpoint: LatentDiffusion, like: str) -> list[str]:
    """What a bundle leaves out of the checkpoint, and that it generates as the class ``like`` where that is another."""
    kind, index, said = checkpoint.kind, checkpoint.index, []
    if parts := kind.left_out(index):
        said.append(f"Left out: {', '.join(parts)}; a bundle has no such parts.")
    if class_name(index) not in kind.pipelines:
        said.append(f"The checkpoint is of a {class_name(index)}; the bundle generates as a {like} does.")
    return said


class Family(Protocol):
    """One checkpoint as its family sees it.

    Attributes
    ----------
    kind : what checkpoints of the family consist of
    """

    kind: CheckpointKind

    def __init__(self, checkpoint: LatentDiffusion): ...

    def check(self) -> None:
        """Raise CheckpointError if a bundle of the checkpoint would not generate as its own pipeline does."""

    @property
    def notes(self) -> list[str]:
        """What the bundle will not do, or do otherwise than the checkpoint's pipeline, a sentence each."""

    @property
    def roles(self) -> Roles:
        """Roles of the graphs."""

    @property
    def graphs(self) -> Sequence[ModelGraph]:
        """The graphs, in the order in which they run."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a runtime needs to know beside the graphs: the manifest's ``model``, but for the sampler's defaults."""
