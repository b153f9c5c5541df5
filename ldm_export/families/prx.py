"""PRX (Photoroom): a transformer of which picture tokens attend to themselves and to T5Gemma's states, flow matching.

With an autoencoder of 16 shifted channels, or with DC-AE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.checkpoint.kind import CheckpointKind, Configs, Index, PipelineClass, pixels_by_levels
from ldm_export.checkpoint.networks import SHIFTED_AUTOENCODER
from ldm_export.contract import TWO_ROWS, Guidance, Roles, TensorSpec, graph_spec
from ldm_export.errors import CheckpointError
from ldm_export.families.autoencoder import DC_AUTOENCODER, autoencoder_graphs
from ldm_export.families.base import (
    GraphModule,
    Load,
    ModelGraph,
    TransformerFamily,
    channel_faults,
    common_facts,
    common_notes,
    text_encoder_roles,
)
from ldm_export.families.libraries import either, from_diffusers, from_transformers
from ldm_export.families.text_encoders import states_graph
from ldm_export.families.tokenizers import WholeTokenizer

DENOISER, ENCODER = "transformer", "text_encoder"
T5GEMMA = "transformers.models.t5gemma.modeling_t5gemma"
POSITIONS = 1024
"""Rows, and columns, of picture tokens at most."""


def _latent_size(index: Index, configs: Configs, release: Any) -> tuple[int, int]:
    side = KIND.option(index, "default_sample_size")
    if type(side) is not int or side < 1:
        raise CheckpointError(f"model_index.json has default_sample_size = {side!r}; a number of pixels is needed.")
    return side // pixels_by_levels(configs), side // pixels_by_levels(configs)


PIPELINE = PipelineClass(options={"default_sample_size": 512}, steps=28)
KIND = CheckpointKind(
    components={
        "text_encoder": from_transformers("T5GemmaEncoder", module=T5GEMMA, part="encoder"),
        "transformer": from_diffusers("PRXTransformer2DModel"),
        "vae": either(SHIFTED_AUTOENCODER, DC_AUTOENCODER),
    },
    denoiser=DENOISER,
    optional_parts=(),
    pipelines={"PRXPipeline": PIPELINE},
    saved_as=("PRXPipeline",),
    default_pipeline=lambda index: PIPELINE,
    latent_size=_latent_size,
)


class PRX(TransformerFamily):
    """A checkpoint with a transformer of PRX; see :class:`ldm_export.families.base.Family`."""

    kind = KIND

    @property
    def notes(self) -> list[str]:
        return [
            *common_notes(self._checkpoint, "PRXPipeline"),
            "A picture is drawn at the size that is asked for, as by diffusers with use_resolution_binning=False.",
            "Prompts are stripped and made lower case. diffusers' pipeline also rewrites them: it drops brackets, "
            "slashes and signs such as & # * @, sizes such as 1920x1080, addresses, file names and Chinese characters, "
            "makes curly quotes straight and many hyphens spaces. Prompts without those give the same pictures.",
        ]

    @cached_property
    def roles(self) -> Roles:
        return Roles(
            DENOISER,
            "vae_decoder",
            "vae_encoder",
            Guidance(TWO_ROWS, self._checkpoint.drawing.guidance),
            text_encoder_roles(self.tokenizers),
            None,
            {
                "encoder_hidden_states": f"{ENCODER}.last_hidden_state",
                "attention_mask": f"{ENCODER}.attention_mask",
            },
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        patch = self._transformer["patch_size"]
        largest = POSITIONS * patch * self._checkpoint.pixels_per_latent
        return {**common_facts(self._checkpoint), "patch_size": patch, "largest_size": largest}

    @cached_property
    def tokenizers(self) -> Mapping[str, WholeTokenizer]:
        return {ENCODER: WholeTokenizer.of(self._checkpoint, ENCODER, lowercase=True)}

    @cached_property
    def graphs(self) -> Sequence[ModelGraph]:
        load, text, config = self._checkpoint.load, self._checkpoint.configs[ENCODER], self._transformer
        latents = TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width"))
        inputs = [
            latents,
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", config["context_in_dim"])),
            TensorSpec("attention_mask", "float32", ("batch", "tokens")),
        ]
        steps = self._checkpoint.scheduler.get("num_train_timesteps", 1000)
        return [
            states_graph(load, ENCODER, text["vocab_size"], text["hidden_size"], self.tokenizers[ENCODER], masked=True),
            ModelGraph(
                graph_spec(DENOISER, inputs, [TensorSpec("out_sample", "float32", latents.shape)]),
                partial(_denoiser, load, steps),
                DENOISER,
                config,
                patch_size=config["patch_size"],
            ),
            *autoencoder_graphs(load, self._checkpoint.index["vae"][1], self._vae),
        ]

    def faults(self) -> list[str]:
        if ENCODER not in self._checkpoint.components:
            return ["model_index.json names no text_encoder; the transformer reads the states of a T5GemmaEncoder."]
        width, read = self._checkpoint.configs[ENCODER]["hidden_size"], self._transformer["context_in_dim"]
        if width != read:
            return [
                f"the text encoder gives states {width} wide; the transformer reads {read} (context_in_dim). "
                "Use the text encoder that it was trained with."
            ]
        return channel_faults(self._transformer, self._vae)


class RotaryTable(nn.Module):
    """Rotary positions of a ``PRXEmbedND``, looked up: it computes them in float64, which not every runtime has."""

    def __init__(self, embedder: Any):
        super().__init__()
        places = torch.arange(POSITIONS, dtype=torch.float32)[None]
        for axis, width in enumerate(embedder.axes_dim):
            self.register_buffer(f"table_{axis}", embedder.rope(places, width, embedder.theta)[0], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Positions (B, 1, L, D / 2, 2, 2) of row and column numbers (B, L, 2)."""
        axes = [table[ids[..., axis].long()] for axis, table in enumerate(self.buffers())]
        return torch.cat(axes, dim=-3).unsqueeze(1)


def _denoiser(load: Load, steps: int) -> GraphModule:
    network = load(DENOISER)
    network.pe_embedder = RotaryTable(network.pe_embedder)

    def call(network: Any, sample: Tensor, timestep: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out = network(
            hidden_states=sample, timestep=timestep / steps, encoder_hidden_states=states, attention_mask=mask > 0.5
        )
        return (out.sample,)

    return GraphModule(network, call).eval()
