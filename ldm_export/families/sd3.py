"""Stable Diffusion 3 and 3.5 (2403.03206): a transformer that attends to latents and text together, and flow matching.

With two text encoders of CLIP's kind, and T5 as the third; where a checkpoint has none, its states are zeros, as in
diffusers. T5 and the transformer are those libraries' own classes, at any configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.kind import CheckpointKind, PipelineClass
from ldm_export.checkpoint.networks import CLIP_TEXT_ENCODER, SHIFTED_AUTOENCODER
from ldm_export.contract import TWO_ROWS, GraphSpec, Guidance, Roles, TensorSpec, graph_spec
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
from ldm_export.families.controlnets import (
    SD3_CONTROL,
    check_controls,
    control_graph_names,
    sd3_control_faults,
    sd3_control_graphs,
    sd3_residuals,
)
from ldm_export.families.libraries import from_diffusers, from_transformers
from ldm_export.families.patches import make_traceable
from ldm_export.families.text_encoders import clip_graph, states_graph
from ldm_export.families.tokenizers import ClipFiles, Tokenizers, WholeTokenizer

DENOISER = "transformer"
ENCODERS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
T5_TOKENS = 256
"""Tokens of a prompt for the third text encoder in diffusers' pipeline, whose states are zeros without it."""
PIPELINE = PipelineClass(steps=28, guidance=7.0, shifting={"max_shift": 1.16})
KIND = CheckpointKind(
    components={
        "text_encoder": CLIP_TEXT_ENCODER,
        "text_encoder_2": CLIP_TEXT_ENCODER,
        "text_encoder_3": from_transformers("T5EncoderModel"),
        "transformer": from_diffusers("SD3Transformer2DModel"),
        "vae": SHIFTED_AUTOENCODER,
    },
    denoiser=DENOISER,
    optional_parts=("image_encoder", "feature_extractor"),
    pipelines={"StableDiffusion3Pipeline": PIPELINE, "StableDiffusion3Img2ImgPipeline": PIPELINE},
    saved_as=("StableDiffusion3Pipeline",),
    default_pipeline=lambda index: PIPELINE,
    latent_size=square_latents(DENOISER),
    control=SD3_CONTROL,
)


class StableDiffusion3(TransformerFamily):
    """A checkpoint with a transformer of Stable Diffusion 3; see :class:`ldm_export.families.base.Family`."""

    kind = KIND

    def __init__(self, checkpoint: LatentDiffusion):
        super().__init__(checkpoint)
        self._encoders = {name: checkpoint.configs[name] for name in checkpoint.text_encoders}
        self._t5 = self._encoders.pop(T5, None)
        self._controls = [control.config for control in checkpoint.controls.values()]

    def check(self) -> None:
        super().check()
        for first in self._controls[:1]:
            check_controls(self._checkpoint, partial(sd3_control_faults, self._transformer, first))

    @property
    def notes(self) -> list[str]:
        notes = common_notes(self._checkpoint, "StableDiffusion3Pipeline")
        if self._t5 is None:
            notes.append("There is no third text encoder (T5): its states are zeros, as in diffusers without it.")
        return notes

    @cached_property
    def roles(self) -> Roles:
        made = {name: f"{CONDITIONER}.{name}" for name in ("encoder_hidden_states", "pooled_projections")}
        return Roles(
            DENOISER,
            "vae_decoder",
            "vae_encoder",
            Guidance(TWO_ROWS, self._checkpoint.drawing.guidance),
            text_encoder_roles(self.tokenizers),
            CONDITIONER,
            made,
            control_graph_names(self._checkpoint),
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        patch, most = self._transformer["patch_size"], self._transformer["pos_embed_max_size"]
        largest = most * patch * self._checkpoint.pixels_per_latent
        own = {"patch_size": patch, "largest_size": largest, "strength_rounds_up": True}
        return {**common_facts(self._checkpoint), **own}

    @cached_property
    def graphs(self) -> Sequence[ModelGraph]:
        load = self._checkpoint.load
        texts = {
            name: clip_graph(load, name, config, self.tokenizers[name].length, layers=True)
            for name, config in self._encoders.items()
        }
        states = [f"{name}.hidden_states.{config['num_hidden_layers'] - 1}" for name, config in self._encoders.items()]
        if self._t5 is not None:
            width, count = self._t5["d_model"], self._t5["vocab_size"]
            texts[T5] = states_graph(load, T5, count, width, self._t5_tokenizer, masked=False)
        conditioner = Conditioner(
            states,
            [f"{name}.text_embeds" for name in ENCODERS],
            None if self._t5 is None else f"{T5}.last_hidden_state",
            self._transformer["joint_attention_dim"],
        )
        outputs = {f"{name}.{tensor.name}": tensor for name, graph in texts.items() for tensor in graph.spec.outputs}
        inputs = [TensorSpec(name, outputs[name].dtype, outputs[name].shape) for name in conditioner.sources]
        tokens = self.tokenizers[ENCODERS[0]].length + T5_TOKENS
        joined, pooled = self.denoiser_spec.inputs[2:4]
        made = [TensorSpec(joined.name, joined.dtype, ("batch", tokens, joined.shape[2])), pooled]
        return [
            *texts.values(),
            conditioner_graph(conditioner, inputs, made),
            *sd3_control_graphs(self._checkpoint, self.denoiser_spec),
            ModelGraph(
                self.denoiser_spec,
                partial(_denoiser, load),
                DENOISER,
                self._transformer,
                patch_size=self._transformer["patch_size"],
            ),
            *autoencoder_graphs(load, self._checkpoint.index["vae"][1], self._vae),
        ]

    @cached_property
    def denoiser_spec(self) -> GraphSpec:
        """The transformer."""
        config = self._transformer
        latents = ("batch", config["in_channels"], "height", "width")
        inputs = [
            TensorSpec("sample", "float32", latents),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", config["joint_attention_dim"])),
            TensorSpec("pooled_projections", "float32", ("batch", config["pooled_projection_dim"])),
        ]
        residuals = [tensor for config in self._controls[:1] for tensor in sd3_residuals(config)]
        out = TensorSpec("out_sample", "float32", latents)
        return graph_spec(DENOISER, [*inputs, *residuals], [out])

    @cached_property
    def tokenizers(self) -> Tokenizers:
        clip = {name: ClipFiles.of(self._checkpoint, name) for name in self._encoders}
        return clip if self._t5 is None else {**clip, T5: self._t5_tokenizer}

    @cached_property
    def _t5_tokenizer(self) -> WholeTokenizer:
        return WholeTokenizer.of(self._checkpoint, T5, T5_TOKENS)

    def faults(self) -> list[str]:
        config = self._transformer
        if type(config["pos_embed_max_size"]) is not int:
            return ["the transformer's config says no pos_embed_max_size. Use the one that was saved with the weights."]
        if tuple(self._encoders) != ENCODERS:
            return [f"it has {' and '.join(self._encoders) or 'no text encoder'}; {' and '.join(ENCODERS)} are needed."]
        if not all(encoder["with_projection"] for encoder in self._encoders.values()):
            return ["the pooled text is of projections: both text encoders must be a CLIPTextModelWithProjection."]
        if len({self.tokenizers[name].length for name in ENCODERS}) > 1:
            return ["its tokenizers are of different lengths, whose states cannot be joined."]
        if faults := channel_faults(config, self._vae):
            return faults
        widths = sum(encoder["hidden_size"] for encoder in self._encoders.values())
        pooled = sum(encoder["projection_dim"] for encoder in self._encoders.values())
        if widths > config["joint_attention_dim"] or pooled != config["pooled_projection_dim"]:
            return [
                f"the text encoders give states {widths} and pooled text {pooled} wide; the transformer reads "
                f"{config['joint_attention_dim']} (joint_attention_dim) and {config['pooled_projection_dim']} "
                "(pooled_projection_dim). Use the text encoders that it was trained with."
            ]
        if self._t5 is not None and self._t5["d_model"] != config["joint_attention_dim"]:
            return [
                f"the third text encoder gives states {self._t5['d_model']} wide; the transformer reads "
                f"{config['joint_attention_dim']} (joint_attention_dim). Use the one that it was trained with."
            ]
        return []


class Conditioner(nn.Module):
    """What the transformer reads beside latents and timestep, of the text encoders' outputs.

    Parameters
    ----------
    states : sources of the states (B, L, w) that are joined by width and padded with zeros to ``width``
    pooled : sources of the pooled texts (B, w), which are joined
    following : source of the states (B, T, width) that follow, or None for `T5_TOKENS` tokens of zeros
    """

    def __init__(self, states: Sequence[str], pooled: Sequence[str], following: str | None, width: int):
        super().__init__()
        self.config = {"states": states, "pooled": pooled, "following": following, "width": width}
        self.sources = (*states, *pooled, *([following] if following else []))
        self._states, self._pooled, self._width = tuple(states), tuple(pooled), width

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.sources, tensors, strict=True))
        following = [value for name, value in given.items() if name not in (*self._states, *self._pooled)]
        joined = torch.cat([given[name] for name in self._states], dim=-1)
        room = (0, self._width - joined.shape[-1], 0, 0 if following else T5_TOKENS)
        states = torch.cat([nn.functional.pad(joined, room), *following], dim=-2)
        return states, torch.cat([given[name] for name in self._pooled], dim=-1)


def _denoiser(load: Load) -> GraphModule:
    network = load(DENOISER)
    make_traceable(network.pos_embed)

    def call(
        network: Any, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor, *residuals: Tensor
    ) -> tuple[Tensor, ...]:
        out = network(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            block_controlnet_hidden_states=residuals or None,
        )
        return (out.sample,)

    return GraphModule(network, call).eval()
