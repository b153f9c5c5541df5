"""PixArt-alpha (2310.00426) and PixArt-sigma (2403.04692): a transformer that reads T5's states by cross-attention.

Where the transformer was trained so, it reads the picture's sizes and their ratio, too. Half of its output, a variance,
is left out. diffusers' pipeline of a newer network may draw another size than it is asked for and resize the picture
(``use_resolution_binning``); a bundle draws the size itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.checkpoint.kind import CheckpointKind, PipelineClass, class_name
from ldm_export.checkpoint.networks import AUTOENCODER
from ldm_export.contract import REQUEST_SOURCES, TWO_ROWS, Guidance, Roles, TensorSpec, graph_spec
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
    text_encoder_roles,
)
from ldm_export.families.libraries import from_diffusers, from_transformers
from ldm_export.families.patches import CrossAttention, make_traceable, unpatchified
from ldm_export.families.text_encoders import states_graph
from ldm_export.families.tokenizers import WholeTokenizer

DENOISER, ENCODER = "transformer", "text_encoder"
ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
TOKENS = {ALPHA: 120, SIGMA: 300}
"""Tokens of a prompt in diffusers' pipelines."""
PIPELINE = PipelineClass(guidance=4.5)
KIND = CheckpointKind(
    components={
        "text_encoder": from_transformers("T5EncoderModel"),
        "transformer": from_diffusers("PixArtTransformer2DModel"),
        "vae": AUTOENCODER,
    },
    denoiser=DENOISER,
    optional_parts=(),
    pipelines={ALPHA: PIPELINE, SIGMA: PIPELINE},
    saved_as=(ALPHA, SIGMA),
    default_pipeline=lambda index: PIPELINE,
    latent_size=square_latents(DENOISER),
    old_class="Transformer2DModel",
)


class PixArt(TransformerFamily):
    """A checkpoint with a transformer of PixArt; see :class:`ldm_export.families.base.Family`."""

    kind = KIND

    @property
    def notes(self) -> list[str]:
        return [
            *common_notes(self._checkpoint, SIGMA),
            "A picture is drawn at the size that is asked for, as by diffusers with use_resolution_binning=False, and "
            "prompts are stripped and made lower case, as with clean_caption=False.",
        ]

    @cached_property
    def roles(self) -> Roles:
        conditions = {
            "encoder_hidden_states": f"{ENCODER}.last_hidden_state",
            "encoder_attention_mask": f"{ENCODER}.attention_mask",
            **({name: f"{CONDITIONER}.{name}" for name in ("resolution", "aspect_ratio")} if self._reads_sizes else {}),
        }
        return Roles(
            DENOISER,
            "vae_decoder",
            "vae_encoder",
            Guidance(TWO_ROWS, self._checkpoint.drawing.guidance),
            text_encoder_roles(self.tokenizers),
            CONDITIONER if self._reads_sizes else None,
            conditions,
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**common_facts(self._checkpoint), "patch_size": self._transformer["patch_size"]}

    @cached_property
    def tokenizers(self) -> Mapping[str, WholeTokenizer]:
        length = TOKENS.get(class_name(self._checkpoint.index), TOKENS[SIGMA])
        return {ENCODER: WholeTokenizer.of(self._checkpoint, ENCODER, length, lowercase=True)}

    @cached_property
    def graphs(self) -> Sequence[ModelGraph]:
        load, text = self._checkpoint.load, self._checkpoint.configs[ENCODER]
        encoder = states_graph(
            load, ENCODER, text["vocab_size"], text["d_model"], self.tokenizers[ENCODER], masked=True
        )
        mask = encoder.spec.outputs[1]
        latents = ("batch", self._vae["latent_channels"], "height", "width")
        sizes = [
            TensorSpec("resolution", "float32", ("batch", 2)),
            TensorSpec("aspect_ratio", "float32", ("batch", 1)),
        ]
        inputs = [
            TensorSpec("sample", "float32", latents),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", text["d_model"])),
            TensorSpec("encoder_attention_mask", "float32", ("batch", "tokens")),
            *(sizes if self._reads_sizes else []),
        ]
        rows = TensorSpec(f"{ENCODER}.{mask.name}", mask.dtype, mask.shape)
        asked = [REQUEST_SOURCES["height"][0], REQUEST_SOURCES["width"][0]]
        return [
            encoder,
            *([conditioner_graph(Sizes(), [rows, *asked], sizes)] if self._reads_sizes else []),
            ModelGraph(
                graph_spec(DENOISER, inputs, [TensorSpec("out_sample", "float32", latents)]),
                partial(_denoiser, load, latents[1]),
                DENOISER,
                self._transformer,
                patch_size=self._transformer["patch_size"],
            ),
            *autoencoder_graphs(load, self._checkpoint.index["vae"][1], self._vae),
        ]

    @property
    def _reads_sizes(self) -> bool:
        """Whether the transformer reads the picture's sizes: by default where it was trained at 1024 pixels."""
        given = self._transformer["use_additional_conditions"]
        return self._transformer["sample_size"] == 128 if given is None else bool(given)

    def faults(self) -> list[str]:
        config = self._transformer
        if ENCODER not in self._checkpoint.components:
            return ["model_index.json names no text_encoder; the transformer reads the states of a T5EncoderModel."]
        width, read = self._checkpoint.configs[ENCODER]["d_model"], config["caption_channels"]
        if width != (read or config["cross_attention_dim"]):
            return [
                f"the text encoder gives states {width} wide; the transformer reads "
                f"{read or config['cross_attention_dim']} (caption_channels). Use the text encoder that it was trained "
                "with."
            ]
        return channel_faults(config, self._vae, variance=True)


class Sizes(nn.Module):
    """The picture's height and width in pixels, and their ratio, for each row."""

    config: Mapping[str, Any] = {}

    def forward(self, mask: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, ...]:
        rows = mask.shape[0]
        return torch.stack([height, width]).expand(rows, -1), (height / width).reshape(1, 1).expand(rows, -1)


def _denoiser(load: Load, channels: int) -> GraphModule:
    network = load(DENOISER)
    make_traceable(network.pos_embed)
    network.set_attn_processor(CrossAttention())

    def call(
        network: Any, sample: Tensor, timestep: Tensor, states: Tensor, mask: Tensor, *sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """Run as ``PixArtTransformer2DModel``, which squeezes what may be one token; that cannot be traced."""
        patch, (resolution, aspect_ratio) = network.config.patch_size, sizes or (None, None)
        asked = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        tokens = network.pos_embed(sample)
        modulation, embedding = network.adaln_single(
            timestep, asked, batch_size=sample.shape[0], hidden_dtype=tokens.dtype
        )
        states = states if network.caption_projection is None else network.caption_projection(states)
        bias = (1.0 - mask)[:, None] * -10000.0
        for block in network.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=states, encoder_attention_mask=bias, timestep=modulation)
        shift, scale = (network.scale_shift_table[None] + embedding[:, None]).chunk(2, dim=1)
        tokens = network.proj_out(network.norm_out(tokens) * (1 + scale) + shift)
        out = unpatchified(tokens, sample.shape[-2] // patch, sample.shape[-1] // patch, patch)
        return (out[:, :channels],)

    return GraphModule(network, call).eval()
