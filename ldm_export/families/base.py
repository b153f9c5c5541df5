"""What a family of models says: which graphs a checkpoint of it becomes, and which roles they fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.kind import CheckpointKind, Configs, Index, class_name
from ldm_export.contract import GraphSpec, Roles, TensorSpec, TextEncoder, graph_spec
from ldm_export.errors import CheckpointError
from ldm_export.families.tokenizers import Tokenizers
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
class Padding:
    """What rows of token ids are padded with: a token, on the ``left`` or on the right."""

    token: int
    left: bool


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
    padding : of its token ids, where that is masked
    """

    spec: GraphSpec
    load: Callable[[], GraphModule]
    component: str | None = None
    config: Mapping[str, Any] | None = None
    ids: int = 1
    patch_size: int = 1
    padding: Padding | None = None


CONDITIONER = "conditioner"
Load = Callable[[str], Any]
"""Opens a component of the checkpoint with its weights."""


def square_latents(denoiser: str) -> Callable[[Index, Configs, Any], tuple[int, int]]:
    """The `CheckpointKind.latent_size` of families whose denoiser's config has one ``sample_size`` for both sides."""

    def size(index: Index, configs: Configs, release: Any) -> tuple[int, int]:
        side = int(configs[denoiser]["sample_size"])
        return side, side

    return size


def conditioner_graph(
    network: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], ids: int = 1
) -> ModelGraph:
    """The graph of a conditioner, a module that takes and gives these; its inputs are named by their sources."""

    def load() -> GraphModule:
        own = deepcopy(network)  # whoever takes it may release its memory
        return GraphModule(own, lambda network, *inputs: network(*inputs)).eval()

    return ModelGraph(graph_spec(CONDITIONER, inputs, outputs), load, ids=ids)


def picture_faults(vae: Mapping[str, Any]) -> list[str]:
    """What is wrong with the pictures of an autoencoder of this config."""
    given, made = vae["in_channels"], vae.get("out_channels", vae["in_channels"])
    if given == made and given in (1, 3):
        return []
    return [
        f"the autoencoder's pictures have {given} channels in and {made} out; "
        "1 (grey) or 3 (RGB), the same on both sides, can be written. Use another autoencoder."
    ]


def channel_faults(config: Mapping[str, Any], vae: Mapping[str, Any], *, variance: bool = False) -> list[str]:
    """What is wrong with the channels of a transformer and an autoencoder of these configs.

    Parameters
    ----------
    variance : whether the transformer may give twice as many channels as it takes, the second half of which is dropped
    """
    latents = vae["latent_channels"]
    out = (latents, 2 * latents) if variance else (latents,)
    given = config["in_channels"] if config.get("out_channels") is None else config["out_channels"]
    if config["in_channels"] == latents and given in out:
        return picture_faults(vae)
    return [
        f"the transformer takes {config['in_channels']} channels and gives {given}, and the autoencoder has {latents} "
        f"of latents; it must take {latents} and give {' or '.join(map(str, out))}. Use the autoencoder that it was "
        "trained with."
    ]


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


def text_encoder_roles(tokenizers: Tokenizers) -> tuple[TextEncoder, ...]:
    """The text encoders of a bundle, in the tokenizers' order."""
    return tuple(
        TextEncoder(name, tokenizer.folder.name, tokenizer.kind, tokenizer.length)
        for name, tokenizer in tokenizers.items()
    )


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
    def tokenizers(self) -> Tokenizers:
        """The tokenizer of each text encoder, by the encoder's name."""

    @property
    def graphs(self) -> Sequence[ModelGraph]:
        """The graphs, in the order in which they run."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a runtime needs to know beside the graphs: the manifest's ``model``, but for the sampler's defaults."""


class TransformerFamily(ABC):
    """What families of one transformer have in common; a subclass has `faults`, and the rest of `Family`'s members."""

    kind: CheckpointKind

    def __init__(self, checkpoint: LatentDiffusion):
        self._checkpoint = checkpoint
        self._transformer, self._vae = checkpoint.configs[self.kind.denoiser], checkpoint.configs["vae"]

    def check(self) -> None:
        """Raise CheckpointError if a bundle of the checkpoint would not generate as its own pipeline does."""
        for fault in self.faults():
            raise CheckpointError(f"{self._checkpoint.path}: {fault}")
        self.tokenizers  # noqa: B018 - refuses tokenizers that do not fit
        self._checkpoint.drawing  # noqa: B018 - refuses a scheduler that no sampler is

    @property
    def tokenizers(self) -> Tokenizers:
        """The tokenizer of each text encoder, by the encoder's name."""
        return {}

    @abstractmethod
    def faults(self) -> list[str]:
        """What is wrong with the networks' configs, a sentence each."""
