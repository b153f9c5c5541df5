"""Diffusion transformers that read a class (DiT, 2212.09748), as diffusers' ``DiTPipeline`` draws with them.

A picture of no class, which guidance goes away from, is of one class more than there are. Where the transformer
predicts a variance, too, it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.checkpoint.kind import CheckpointKind, PipelineClass
from ldm_export.checkpoint.networks import AUTOENCODER
from ldm_export.contract import REQUEST_SOURCES, TWO_ROWS, GraphSpec, Guidance, Roles, TensorSpec, graph_spec
from ldm_export.families.autoencoder import autoencoder_graphs
from ldm_export.families.base import (
    CONDITIONER,
    GraphModule,
    Load,
    ModelGraph,
    TransformerFamily,
    channel_faults,
    common_facts,
    common_notes,
    conditioner_graph,
    square_latents,
)
from ldm_export.families.libraries import from_diffusers
from ldm_export.families.patches import make_traceable, unpatchified

DENOISER = "transformer"
PIPELINE = PipelineClass(steps=50)


KIND = CheckpointKind(
    components={"transformer": from_diffusers("DiTTransformer2DModel"), "vae": AUTOENCODER},
    denoiser=DENOISER,
    optional_parts=(),
    pipelines={"DiTPipeline": PIPELINE},
    saved_as=("DiTPipeline",),
    default_pipeline=lambda index: PIPELINE,
    latent_size=square_latents(DENOISER),
    old_class="Transformer2DModel",
)


class DiT(TransformerFamily):
    """A checkpoint with a transformer that reads a class; see :class:`ldm_export.families.base.Family`."""

    kind = KIND

    def faults(self) -> list[str]:
        return channel_faults(self._transformer, self._vae, variance=True)

    @property
    def notes(self) -> list[str]:
        notes = common_notes(self._checkpoint, "DiTPipeline")
        if self._checkpoint.drawing.sampler.startswith(("euler", "heun", "lms")):
            notes.append(
                f"{self._checkpoint.drawing.sampler} starts from noise of the scheduler's scale (init_noise_sigma), "
                "which diffusers' DiTPipeline leaves out."
            )
        if self._class_count != 1000:
            notes.append(
                f"Pictures of no class are of the class {self._class_count}, the one that is trained as none; "
                "diffusers' pipeline takes 1000 for it, whatever the model."
            )
        return notes

    @cached_property
    def roles(self) -> Roles:
        conditions = {"class_labels": f"{CONDITIONER}.shown_labels"}
        guidance = Guidance(TWO_ROWS, self._checkpoint.drawing.guidance)
        return Roles(DENOISER, "vae_decoder", "vae_encoder", guidance, (), CONDITIONER, conditions)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**common_facts(self._checkpoint, self._class_count), "patch_size": self._transformer["patch_size"]}

    @cached_property
    def graphs(self) -> Sequence[ModelGraph]:
        load, latents = self._checkpoint.load, self._vae["latent_channels"]
        labels = TensorSpec("class_labels", "int64", ("batch",))
        shown = TensorSpec("shown_labels", labels.dtype, labels.shape)
        inputs = [REQUEST_SOURCES["class_labels"][0], REQUEST_SOURCES["is_negative"][0]]
        return [
            conditioner_graph(Conditioner(self._class_count), inputs, [shown], ids=self._class_count),
            ModelGraph(
                self._denoiser_spec(labels),
                partial(_denoiser, load, latents),
                DENOISER,
                self._transformer,
                self._class_count + 1,
                self._transformer["patch_size"],
            ),
            *autoencoder_graphs(load, self._checkpoint.index["vae"][1], self._vae),
        ]

    def _denoiser_spec(self, labels: TensorSpec) -> GraphSpec:
        sample = TensorSpec("sample", "float32", ("batch", self._transformer["in_channels"], "height", "width"))
        timestep = TensorSpec("timestep", "float32", ("batch",))
        return graph_spec(DENOISER, [sample, timestep, labels], [TensorSpec("out_sample", "float32", sample.shape)])

    @property
    def _class_count(self) -> int:
        return int(self._transformer["num_embeds_ada_norm"])


class Conditioner(nn.Module):
    """The class that the transformer reads: the one asked for, or none, ``count``, in the rows of no prompt."""

    def __init__(self, count: int):
        super().__init__()
        self.config = {"count": count}

    def forward(self, class_labels: Tensor, is_negative: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(is_negative > 0.5, self.config["count"], class_labels),)


def _denoiser(load: Load, channels: int) -> GraphModule:
    network = load(DENOISER)
    make_traceable(network.pos_embed)

    def call(network: Any, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, ...]:
        """Run as ``DiTTransformer2DModel``, which takes every picture for a square."""
        patch = network.patch_size
        tokens = network.pos_embed(sample)
        for block in network.transformer_blocks:
            tokens = block(tokens, timestep=timestep, class_labels=class_labels)
        embedding = network.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=tokens.dtype)
        shift, scale = network.proj_out_1(nn.functional.silu(embedding)).chunk(2, dim=1)
        tokens = network.proj_out_2(network.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        out = unpatchified(tokens, sample.shape[-2] // patch, sample.shape[-1] // patch, patch)
        return (out[:, :channels],)

    return GraphModule(network, call).eval()
