"""Stable Diffusion 1, 2 and XL and what is built alike: a UNet that reads latents, and text by cross-attention.

With text encoders of CLIP's kind, or with class labels, or with nothing; SDXL's two text encoders and picture sizes
(2307.01952), its refiner's aesthetic score, LCM's guidance embedding (2310.04378), further channels of latents as
inpainting and InstructPix2Pix have them. Names of inputs and outputs are those of optimum-onnx, whose pipelines open
such a bundle as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.image_adapter import ImageAdapter
from ldm_export.checkpoint.kind import CheckpointKind, Configs, Index, PipelineClass, class_name, names_part
from ldm_export.checkpoint.networks import AUTOENCODER, CLIP_TEXT_ENCODER, UNET
from ldm_export.contract import (
    INPUT,
    NONE,
    REQUEST_SOURCES,
    RESIDUAL,
    THREE_ROWS,
    TWO_ROWS,
    GraphSpec,
    Guidance,
    Roles,
    TensorSpec,
    graph_spec,
)
from ldm_export.errors import CheckpointError
from ldm_export.families.autoencoder import autoencoder_graphs
from ldm_export.families.base import (
    CONDITIONER,
    GraphModule,
    ModelGraph,
    common_facts,
    common_notes,
    conditioner_graph,
    picture_faults,
    text_encoder_roles,
)
from ldm_export.families.controlnets import (
    UNET_CONTROL,
    check_controls,
    control_graph_names,
    unet_control_faults,
    unet_control_graphs,
    unet_residuals,
)
from ldm_export.families.ip_adapter import GRAPH as IMAGE_ENCODER
from ldm_export.families.ip_adapter import (
    SCALE,
    TOKENS,
    adapt,
    image_adapter_faults,
    image_adapter_inputs,
    image_encoder_graph,
)
from ldm_export.families.stable_diffusion_conditioner import SIZES, SIZES_AND_SCORE, Conditioner
from ldm_export.families.text_encoders import clip_graph
from ldm_export.families.tokenizers import ClipFiles

DENOISER = "unet"


def _default_pipeline(index: Index) -> PipelineClass:
    """The pipeline class whose text encoders a checkpoint of an unknown class has."""
    return XL if names_part(index, "text_encoder_2") else BASE


def _latent_size(index: Index, configs: Configs, release: Any) -> tuple[int, int]:
    """Height and width of the latents; before diffusers 0.9, sizes below 64 were leftovers, which it overrules."""
    pipeline, size = KIND.pipeline(index), configs["unet"]["sample_size"]
    if size is None:
        size = pipeline.sample_size
    old = re.match(r"0\.[0-8]\.", release) if isinstance(release, str) else None
    if isinstance(size, int) and size < 64 and old and pipeline is BASE:
        size = 64
    return (size, size) if isinstance(size, int) else (size[0], size[1])


CHECKER: Mapping[str, Any] = {"requires_safety_checker": True}
BASE = PipelineClass({"steps_offset": 1, "clip_sample": False}, CHECKER)
XL_OPTIONS: Mapping[str, Any] = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
XL = PipelineClass(options=XL_OPTIONS, sample_size=128)
XL_FROM_IMAGE = PipelineClass(options={**XL_OPTIONS, "requires_aesthetics_score": False}, sample_size=128)
KIND = CheckpointKind(
    components={
        "text_encoder": CLIP_TEXT_ENCODER,
        "text_encoder_2": CLIP_TEXT_ENCODER,
        "unet": UNET,
        "vae": AUTOENCODER,
    },
    denoiser="unet",
    optional_parts=("safety_checker", "feature_extractor", "image_encoder", "watermark"),
    pipelines={
        "StableDiffusionPipeline": BASE,
        "StableDiffusionImg2ImgPipeline": BASE,
        "StableDiffusionInpaintPipeline": PipelineClass({"steps_offset": 1, "skip_prk_steps": True}, CHECKER),
        "LatentConsistencyModelPipeline": PipelineClass(options=CHECKER),
        "LatentConsistencyModelImg2ImgPipeline": PipelineClass(options=CHECKER),
        "StableDiffusionXLPipeline": XL,
        "StableDiffusionXLImg2ImgPipeline": XL_FROM_IMAGE,
        "StableDiffusionXLInpaintPipeline": XL_FROM_IMAGE,
        "StableDiffusionInstructPix2PixPipeline": PipelineClass(options=CHECKER, guidance=7.5),
        "StableDiffusionXLInstructPix2PixPipeline": PipelineClass(
            options={**XL_OPTIONS, "is_cosxl_edit": False}, sample_size=128, guidance=5.0
        ),
    },
    saved_as=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    default_pipeline=_default_pipeline,
    latent_size=_latent_size,
    control=UNET_CONTROL,
)


class StableDiffusion:
    """A checkpoint with a UNet; see :class:`ldm_export.families.base.Family`."""

    kind = KIND

    def __init__(self, checkpoint: LatentDiffusion):
        self._checkpoint = checkpoint
        self._unet, self._vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
        self._encoders = {name: checkpoint.configs[name] for name in checkpoint.text_encoders}

    def check(self) -> None:
        faults = [*self._channel_faults(), *self._text_faults()]
        if faults:
            raise CheckpointError(f"{self._checkpoint.path}: {faults[0]}")
        sizes = self._vae["latent_channels"], self._checkpoint.pixels_per_latent
        check_controls(self._checkpoint, partial(unet_control_faults, self._unet, *sizes))
        if self._checkpoint.image_adapter is not None:
            for fault in image_adapter_faults(self._checkpoint.skeleton("unet"), self._checkpoint.image_adapter):
                raise CheckpointError(f"The IP-Adapter {self._checkpoint.image_adapter.file}: {fault}")
        self._checkpoint.drawing  # noqa: B018 - refuses a scheduler that no sampler is

    @property
    def notes(self) -> list[str]:
        like = "StableDiffusionXLPipeline" if "text_encoder_2" in self._encoders else "StableDiffusionPipeline"
        said = common_notes(self._checkpoint, like)
        if self._image_channels:
            takes = f"The UNet takes {self._unet['in_channels']} channels, as for"
            if not self._edits:
                said.append(f"{takes} inpainting, so the bundle wants an image and a mask with each prompt.")
            elif self.roles.guidance.kind == THREE_ROWS:
                said.append(f"{takes} editing a picture, so the bundle wants an image with each prompt.")
            else:
                said.append(
                    f"{takes} editing a picture, which the runtimes do as a prompt says and by two guidances, and this "
                    "model has none, so its graphs are for a loop of your own."
                )
        return said

    @cached_property
    def roles(self) -> Roles:
        drawing = self._checkpoint.drawing
        if not self._encoders:
            guidance = Guidance(NONE, 1.0)
        elif self._unet["time_cond_proj_dim"]:
            guidance = Guidance(INPUT, drawing.guidance)
        else:
            rows = THREE_ROWS if self._edits else TWO_ROWS
            guidance = Guidance(NONE if drawing.guidance_distilled else rows, drawing.guidance)
        conditioner = self._conditioner
        made = () if conditioner is None else conditioner.outputs
        direct = {"class_labels": "class_labels", "image_latents": "image_latents"}
        direct |= {TOKENS: f"{IMAGE_ENCODER}.image_tokens", SCALE: "image_scale"}
        if self._encoders:
            last = list(self._encoders)[-1]
            direct |= {"encoder_hidden_states": f"{last}.last_hidden_state", "text_embeds": f"{last}.text_embeds"}
        names = [tensor.name for tensor in self.denoiser_spec.inputs[2:] if tensor not in self._residuals]
        return Roles(
            DENOISER,
            "vae_decoder",
            "vae_encoder",
            guidance,
            text_encoder_roles(self.tokenizers),
            None if conditioner is None else CONDITIONER,
            {name: f"{CONDITIONER}.{name}" if name in made else direct[name] for name in names},
            control_graph_names(self._checkpoint),
            None if self._checkpoint.image_adapter is None else IMAGE_ENCODER,
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        return common_facts(self._checkpoint, self._unet["num_class_embeds"])

    @cached_property
    def graphs(self) -> Sequence[ModelGraph]:
        graphs = [*self._text_graphs.values()]
        classes = self._unet["num_class_embeds"] or 1
        if self._conditioner is not None:
            spec = self.conditioner_spec
            graphs.append(conditioner_graph(self._conditioner, spec.inputs, spec.outputs, classes))
        named = tuple(tensor.name for tensor in self.denoiser_spec.inputs)
        height, width = self._checkpoint.latent_size
        config = {**self._unet, "sample_size": height if height == width else (height, width)}
        load = self._checkpoint.load
        adapter = self._checkpoint.image_adapter
        if adapter is not None:
            graphs.insert(len(self._text_graphs), image_encoder_graph(adapter, self._text_width))
        graphs += unet_control_graphs(self._checkpoint, self.denoiser_spec)
        network = partial(_denoiser, load, named, self._image_scale, adapter)
        graphs.append(ModelGraph(self.denoiser_spec, network, "unet", config, classes))
        return [*graphs, *autoencoder_graphs(load, self._checkpoint.index["vae"][1], self._vae)]

    @cached_property
    def _text_graphs(self) -> Mapping[str, ModelGraph]:
        """Graphs of the text encoders; for SDXL with every layer's states, the last but one of which it reads."""
        load, layers = self._checkpoint.load, self._reads_sizes
        return {
            name: clip_graph(load, name, config, self.tokenizers[name].length, layers=layers)
            for name, config in self._encoders.items()
        }

    @cached_property
    def denoiser_spec(self) -> GraphSpec:
        """The UNet; inputs that it does not have are left out."""
        config, latents = self._unet, self._vae["latent_channels"]
        inputs = [
            TensorSpec("sample", "float32", ("batch", latents, "height", "width")),
            TensorSpec("timestep", "float32", ("batch",)),
        ]
        if self._reads_text:
            inputs.append(TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", self._text_width)))
        if config["class_embed_type"] in ("identity", "projection"):
            features = config["projection_class_embeddings_input_dim"] or config["block_out_channels"][0] * 4
            inputs.append(TensorSpec("class_labels", "float32", ("batch", features)))
        elif config["class_embed_type"] or config["num_class_embeds"]:
            inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
        if self._reads_sizes:
            inputs.append(TensorSpec("text_embeds", "float32", ("batch", self._pooled_width)))
            inputs.append(TensorSpec("time_ids", "float32", ("batch", self._size_count)))
        if config["time_cond_proj_dim"]:
            inputs.append(TensorSpec("timestep_cond", "float32", ("batch", config["time_cond_proj_dim"])))
        if self._image_channels:
            shape = ("batch", self._image_channels, "height", "width")
            inputs.append(TensorSpec("image_latents", "float32", shape))
        if self._reads_text:
            inputs += image_adapter_inputs(self._checkpoint.image_adapter, self._text_width)
        inputs += self._residuals
        out = TensorSpec("out_sample", "float32", ("batch", config["out_channels"], "height", "width"))
        return graph_spec(DENOISER, inputs, [out])

    @property
    def conditioner_spec(self) -> GraphSpec:
        """What makes the UNet's further inputs of states and sizes."""
        assert self._conditioner is not None
        given = {name: kinds[0] for name, kinds in REQUEST_SOURCES.items()}
        for name in self._encoders:
            given |= {f"{name}.{tensor.name}": tensor for tensor in self._text_graphs[name].spec.outputs}
        inputs = [TensorSpec(name, given[name].dtype, given[name].shape) for name in self._conditioner.sources]
        wanted = {tensor.name: tensor for tensor in self.denoiser_spec.inputs}
        outputs = []
        for name in self._conditioner.outputs:
            shape = wanted[name].shape
            if "tokens" in shape:
                shape = (shape[0], inputs[0].shape[1], shape[2])
            outputs.append(TensorSpec(name, wanted[name].dtype, shape))
        return graph_spec(CONDITIONER, inputs, outputs)

    @cached_property
    def tokenizers(self) -> Mapping[str, ClipFiles]:
        return {name: ClipFiles.of(self._checkpoint, name) for name in self._encoders}

    @property
    def _residuals(self) -> Sequence[TensorSpec]:
        """What ControlNets add to the UNet; none without them."""
        return unet_residuals(self._unet) if self._checkpoint.controls else ()

    @property
    def _text_width(self) -> int:
        width = self._unet["cross_attention_dim"]
        return int(width if isinstance(width, int) else width[0])

    @property
    def _reads_text(self) -> bool:
        kinds = (*self._unet["down_block_types"], *self._unet["up_block_types"], self._unet["mid_block_type"] or "")
        return any("CrossAttn" in kind for kind in kinds)

    @property
    def _reads_sizes(self) -> bool:
        """Whether it is SDXL's kind, which is given pooled text and the picture's sizes."""
        return bool(self._unet["addition_embed_type"] == "text_time")

    @property
    def _image_channels(self) -> int:
        """Channels that the UNet reads beside those of the latents."""
        return int(self._unet["in_channels"] - self._vae["latent_channels"])

    @property
    def _edits(self) -> bool:
        """Whether the UNet reads the latents of a picture that is edited, without a mask."""
        return bool(self._image_channels == self._vae["latent_channels"])

    @property
    def _image_scale(self) -> float:
        """Factor of the picture's latents that the UNet was trained with: those of a picture that is edited are the
        autoencoder's, not scaled as the sampler has them, but for CosXL's."""
        if not self._edits or self.kind.option(self._checkpoint.index, "is_cosxl_edit"):
            return 1.0
        return 1.0 / float(self._vae["scaling_factor"])

    @property
    def _pooled_width(self) -> int:
        return int(list(self._encoders.values())[-1]["projection_dim"])

    @property
    def _size_count(self) -> int:
        """Numbers of ``time_ids``, from what is left of the embedding beside the pooled text."""
        left = self._unet["projection_class_embeddings_input_dim"] - self._pooled_width
        return int(left // self._unet["addition_time_embed_dim"])

    @cached_property
    def _conditioner(self) -> Conditioner | None:
        """None where the UNet reads the text encoder's states as they are."""
        guidance: int = self._unet["time_cond_proj_dim"] or 0
        states, pooled = tuple[str, ...](), ""
        if self._reads_sizes:
            layers = {name: config["num_hidden_layers"] - 1 for name, config in self._encoders.items()}
            states = tuple(f"{name}.hidden_states.{layer}" for name, layer in layers.items())
            pooled = f"{list(self._encoders)[-1]}.text_embeds"
        zeros = self._reads_sizes and bool(self.kind.option(self._checkpoint.index, "force_zeros_for_empty_prompt"))
        if not states and not guidance:
            return None
        return Conditioner(states, pooled if zeros else "", self._size_count if states else 0, guidance)

    def _channel_faults(self) -> list[str]:
        unet, vae = self._unet, self._vae
        latents, faults = vae["latent_channels"], []
        if unet["in_channels"] not in (latents, 2 * latents, 2 * latents + 1):
            faults.append(
                f"the UNet takes {unet['in_channels']} channels and the autoencoder has {latents} of latents; the same "
                f"number is needed, {2 * latents} (InstructPix2Pix) or {2 * latents + 1} (inpainting). Models that are "
                "given other pictures beside the latents (depth, upscaling) cannot be exported."
            )
        if "Marigold" in class_name(self._checkpoint.index):
            faults.append("it is of a Marigold pipeline, whose UNet reads the picture first. It cannot be exported.")
        if unet["out_channels"] != latents:
            faults.append(
                f"the UNet gives {unet['out_channels']} channels and the autoencoder has {latents} of latents; the "
                "same number is needed. Models that predict a variance, too, cannot be exported."
            )
        if self._edits and (vae.get("shift_factor") or 0.0):
            faults.append(
                "the UNet reads the latents of a picture that is edited, and the autoencoder shifts latents. Such "
                "models cannot be exported: one of their predictions is of no picture, latents of zeros."
            )
        faults += picture_faults(vae)
        return faults

    def _text_faults(self) -> list[str]:
        unet, encoders = self._unet, self._encoders
        if not self._reads_text:
            said = "the UNet reads no text, but there is a text encoder. Leave it out of model_index.json."
            return [said] if encoders else []
        if not encoders:
            return [
                "the UNet reads the states of an encoder, and model_index.json names no text_encoder. Models that are "
                "given pictures in place of text cannot be exported."
            ]
        both, second = ("text_encoder", "text_encoder_2"), ("text_encoder_2",)
        allowed = (both, second) if self._reads_sizes else (("text_encoder",),)
        if tuple(encoders) not in allowed:
            wanted = " or ".join(" and ".join(names) for names in allowed)
            return [
                f"it has {' and '.join(encoders)} for a UNet that reads {wanted}. Use the parts it was trained with."
            ]
        for name, config in encoders.items():
            if config["with_projection"] != (name == "text_encoder_2"):
                needed = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
                return [f"the {name} is not a {needed}, of which the UNet reads the states. Save it as one."]
        widths, width = unet["cross_attention_dim"], sum(config["hidden_size"] for config in encoders.values())
        if any(one != width for one in (widths if isinstance(widths, (list, tuple)) else (widths,))):
            return [
                f"the text encoding is {width} wide, and the UNet reads {widths} (cross_attention_dim). "
                "Use the text encoder that the UNet was trained with."
            ]
        if self._reads_sizes:
            read, each = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
            if read - self._pooled_width not in (SIZES * each, SIZES_AND_SCORE * each):
                return [
                    f"the pooled text is {self._pooled_width} wide, and the UNet reads {read} with {SIZES} or "
                    f"{SIZES_AND_SCORE} sizes of {each} (projection_class_embeddings_input_dim). Use the text encoder "
                    "that the UNet was trained with."
                ]
        self.tokenizers  # noqa: B018 - refuses tokenizers that do not fit
        return []


def _denoiser(load: Any, names: Sequence[str], image_scale: float, adapter: ImageAdapter | None) -> GraphModule:
    unet = load("unet")
    prompt = None if adapter is None else adapt(unet, adapter)

    def call(network: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, inputs, strict=True))
        if "image_latents" in given:
            beside = given.pop("image_latents")
            beside = beside if image_scale == 1.0 else beside * image_scale
            given["sample"] = torch.cat([given["sample"], beside], dim=1)
        if prompt is not None:
            prompt.tokens, prompt.scale = given.pop(TOKENS), given.pop(SCALE)
        residuals = [given.pop(name) for name in names if name.startswith(RESIDUAL)]
        return (network(**given, residuals=residuals),)

    return GraphModule(unet, call).eval()
