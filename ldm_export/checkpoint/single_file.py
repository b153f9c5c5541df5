"""Opens a checkpoint in CompVis' layout: one safetensors file with all networks of Stable Diffusion 1.x, 2.x or SDXL.

Shapes tell almost everything of a network, so configs are read off them, and tiny or pruned models open as well. What
no shape tells (heads, activation, scaling factor, schedule) is the family's, :data:`FAMILIES`. What the UNet predicts
is said by the caller, by a key of the file (``v_pred``) or by its metadata (``modelspec.prediction_type``,
``ss_v_parameterization``, ``modelspec.architecture``). Of a 2.x model it else follows from its ``global_step``: 875000
is that of 2.0-base, the one original that predicts epsilon (the rule of diffusers, too); without any it is v.

A file has no tokenizer: CLIP's files are looked for beside it, in ``tokenizer/`` (and ``tokenizer_2/`` for SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_export.checkpoint.key_maps import text_key, unet_key, vae_key
from ldm_export.checkpoint.weights import opened, without_wrappers
from ldm_export.errors import CheckpointError
from ldm_export.reading.hashes import sha256_of

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OTHER_KINDS = {
    r"lora_(unet|te\d?|transformer)_|.*\.lora_(A|B|up|down)\.|.*\.(hada|lokr)_\w+": "has the weights of a LoRA",
    r"control_model\.|controlnet_cond_embedding\.": "is a ControlNet",
    r"edm_(mean|std)$|edm_vpred\.": "is preconditioned as in EDM (Playground 2.5, CosXL), which no sampler here is for",
    r"(.*\.)?double_blocks\.": "has a transformer of Flux",
    r"(down_blocks|mid_block|up_blocks)\.\d": "is one network in diffusers' layout, which belongs into a folder",
    r"conditioner\.embedders\.0\.model\.": "is SDXL's refiner",
    r"(emb_params|string_to_param|clip_[gl])(\.|$)": "is a textual inversion",
    r"noise_augmentor\.|model\.diffusion_model\.motion_modules\.": "has parts that no bundle can have",
}
"""Keys of files that are another kind, and of what kind."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """What the shapes of a network do not tell.

    Attributes
    ----------
    text_encoders : component -> where its keys are; one that ends in ``model.`` is OpenCLIP's, else transformers'
    heads : of the UNet's attention, or None for 64 channels each
    dropped_layers : last layers of the text encoder that the UNet was not trained on
    """

    pipeline: str
    text_encoders: Mapping[str, str]
    heads: int | None
    dropped_layers: int
    scaling_factor: float
    sample_size: int


FAMILIES = {
    "sd1": Family(
        "StableDiffusionPipeline", {"text_encoder": "cond_stage_model.transformer."}, 8, 0, 0.18215, sample_size=64
    ),
    "sd2": Family(
        "StableDiffusionPipeline", {"text_encoder": "cond_stage_model.model."}, None, 1, 0.18215, sample_size=96
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
        None,
        0,
        0.13025,
        sample_size=128,
    ),
}
BASE_STEPS, BASE_SAMPLE_SIZE = 875000, 64
"""The ``global_step`` of Stable Diffusion 2.0-base, and its sample size."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

IGNORED = re.compile(r"(.*\.)?(position_ids|logit_scale)|first_stage_model\.loss\..*")
"""Keys inside the networks' prefixes that no network reads."""


class SingleFile:
    """One file, by its header; tensors are read when a component is asked for.

    Attributes
    ----------
    shapes : every key's
    family : which of :data:`FAMILIES`
    """

    def __init__(self, path: Path, prediction_type: str | None = None):
        self.path, self.prediction_type = path, prediction_type
        with opened(path) as file:
            keys = list(file.keys())
            self._stored = {_usual_name(key): key for key in keys}
            if len(self._stored) < len(keys):
                raise CheckpointError(
                    f"{path} has the same weights twice, bare and as a wrapped module's. Save those that are meant."
                )
            self.shapes: Shapes = {
                key: tuple(file.get_slice(stored).get_shape()) for key, stored in self._stored.items()
            }
            self.metadata: Mapping[str, str] = file.metadata() or {}
            single = self.shapes.get("global_step") in ((), (1,))
            step = file.get_tensor(self._stored["global_step"]).item() if single else None
        self.is_base = step == BASE_STEPS
        self.family = self._family()

    def _family(self) -> Family:
        for pattern, what in OTHER_KINDS.items():
            if any(map(re.compile(pattern).match, self.shapes)):
                raise CheckpointError(
                    f"{self.path} {what}; a single-file checkpoint holds UNet, autoencoder and text encoder of Stable "
                    "Diffusion 1.x, 2.x or SDXL, or all of Stable Diffusion 3, and nothing that changes them."
                )
        for part, prefix in (("UNet", UNET), ("autoencoder", VAE)):
            if not any(key.startswith(prefix) for key in self.shapes):
                average = part == "UNet" and any(key.startswith("model_ema.diffusion_model") for key in self.shapes)
                averaged = ", only an average of its weights (model_ema.*)" if average else ""
                raise CheckpointError(
                    f"{self.path} has no {part} ({prefix}*){averaged}; a single-file checkpoint holds UNet, "
                    "autoencoder and text encoder of Stable Diffusion 1.x, 2.x or SDXL. "
                    "Use a whole checkpoint, or a diffusers folder."
                )
        for family in FAMILIES.values():
            if all(any(key.startswith(p) for key in self.shapes) for p in family.text_encoders.values()):
                return family
        raise CheckpointError(
            f"{self.path} has no text encoder of Stable Diffusion 1.x, 2.x or SDXL (cond_stage_model.* or "
            "conditioner.embedders.0 and 1); no other kind can be opened. Convert it with diffusers."
        )

    @cached_property
    def index(self) -> dict[str, Any]:
        """What ``model_index.json`` would say."""
        projected = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
        index: dict[str, Any] = {
            "_class_name": self.family.pipeline,
            "scheduler": ["diffusers", SCHEDULER["_class_name"]],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        for name in self.family.text_encoders:
            index[name] = ["transformers", projected[name]]
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
        return index | ({"force_zeros_for_empty_prompt": True} if len(self.family.text_encoders) > 1 else {})

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """What ``scheduler_config.json`` would say.

        Raises
        ------
        CheckpointError
            If the file contradicts itself about what the UNet predicts, or says something unknown.
        """
        predicts = self.prediction_type or self._said_to_predict()
        config = SCHEDULER | {"prediction_type": predicts}
        if "ztsnr" in self.shapes:  # zero terminal SNR: what is learned at the last timestep is used, 2305.08891
            spacing = "trailing" if predicts == "v_prediction" else "leading"
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
        return config

    def _said_to_predict(self) -> str:
        said = {"v_prediction"} if "v_pred" in self.shapes else set()
        if given := self.metadata.get("modelspec.prediction_type"):
            words = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
            said.add(words.get(given.lower(), given))
        if given := self.metadata.get("ss_v_parameterization"):
            said.add("v_prediction" if given.lower() in ("true", "1") else "epsilon")
        if len(said) > 1 or said - {"v_prediction", "epsilon"}:
            raise CheckpointError(
                f"{self.path} says that the UNet predicts {' and '.join(sorted(said))}; epsilon or v_prediction is "
                "needed. Say which it is with --prediction-type."
            )
        if said:
            return said.pop()
        architecture = self.metadata.get("modelspec.architecture", "")
        if "v2-768-v" in architecture or "v2-512" in architecture:
            return "v_prediction" if "v2-768-v" in architecture else "epsilon"
        return "v_prediction" if self.family is FAMILIES["sd2"] and not self.is_base else "epsilon"

    def prefix(self, component: str) -> str:
        return {"unet": UNET, "vae": VAE, **self.family.text_encoders}[component]

    def config(self, component: str) -> dict[str, Any]:
        """What the component's ``config.json`` would say.

        Raises
        ------
        CheckpointError
            If the keys are not those of such a network.
        """
        prefix = self.prefix(component)
        shapes = {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)}
        try:
            return self._config(component, shapes)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} lacks or misshapes {prefix}{error.args[0] if error.args else '*'}; it is not a whole "
                f"{component.replace('_', ' ')} in CompVis' layout. Use a whole checkpoint."
            ) from error

    def _config(self, component: str, shapes: Shapes) -> dict[str, Any]:
        if component == "unet":
            return self._unet_config(shapes)
        return self._vae_config(shapes) if component == "vae" else self._text_config(component, shapes)

    def _unet_config(self, shapes: Shapes) -> dict[str, Any]:
        widths: list[int] = []
        depths: list[list[int]] = []  # transformer layers of each layer of each block
        layers = [0]
        context = None
        index = 1
        attends: list[bool] = [False]
        while any(key.startswith(f"input_blocks.{index}.") for key in shapes):
            block = f"input_blocks.{index}"
            if f"{block}.0.op.weight" in shapes:
                layers.append(0)
                attends.append(False)
            else:
                width = shapes[f"{block}.0.in_layers.2.weight"][0]
                depth = part_count(shapes, f"{block}.1.transformer_blocks")
                if layers[-1] == 0:
                    widths.append(width)
                    depths.append([])
                depths[-1].append(max(depth, 1))
                layers[-1] += 1
                attends[-1] = depth > 0
                if depth:
                    context = shapes[f"{block}.1.transformer_blocks.0.attn2.to_k.weight"][1]
                    linear = len(shapes[f"{block}.1.proj_in.weight"]) == 2
            index += 1
        if len(set(layers)) != 1 or context is None:
            raise ValueError("input_blocks.*")
        middle = "UNetMidBlock2DCrossAttn" if "middle_block.0.in_layers.2.weight" in shapes else None
        heads = [self.family.heads or max(1, width // 64) for width in widths]
        config: dict[str, Any] = {
            "sample_size": self.sample_size,
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "mid_block_type": middle,
            "layers_per_block": layers[0],
            **_depths(depths, [part_count(shapes, f"output_blocks.{i}.1.transformer_blocks") for i in range(index)]),
            "cross_attention_dim": context,
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
            "use_linear_projection": linear,
        }
        if "label_emb.0.0.weight" in shapes:
            inputs = shapes["label_emb.0.0.weight"][1]
            pooled = self.shapes["conditioner.embedders.1.model.text_projection"][1]
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": (inputs - pooled) // 6,  # six sizes beside the pooled text
                "projection_class_embeddings_input_dim": inputs,
            }
        return config

    @property
    def sample_size(self) -> int:
        return BASE_SAMPLE_SIZE if self.is_base else self.family.sample_size

    def _vae_config(self, shapes: Shapes) -> dict[str, Any]:
        levels = part_count(shapes, "encoder.down")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": part_count(shapes, "encoder.down.0.block"),
            "sample_size": self.sample_size * 2 ** (levels - 1),
            "scaling_factor": self.family.scaling_factor,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        }

    def _text_config(self, component: str, shapes: Shapes) -> dict[str, Any]:
        open_clip = self.prefix(component).endswith(".model.")
        key = text_key if open_clip else (lambda name: name)
        layers = part_count(shapes, "transformer.resblocks" if open_clip else "text_model.encoder.layers")
        vocabulary, width = shapes[key("text_model.embeddings.token_embedding.weight")]
        config = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes[key("text_model.encoder.layers.0.mlp.fc1.weight")][0],
            "num_hidden_layers": layers - self.family.dropped_layers,
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": shapes[key("text_model.embeddings.position_embedding.weight")][0],
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            "eos_token_id": vocabulary - 1,
        }
        if open_clip and "text_projection" in shapes:
            config["projection_dim"] = shapes["text_projection"][1]
        return config

    def tensors(self, component: str, names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The component's weights under the names of diffusers and transformers.

        Parameters
        ----------
        names : the network's parameters and their shapes
        """
        prefix = self.prefix(component)
        open_clip = prefix.endswith(".model.")
        layers = self.config("unet")["layers_per_block"] if component == "unet" else 0
        levels = part_count({key.removeprefix(VAE): () for key in self.shapes if key.startswith(VAE)}, "encoder.down")
        found, used = {}, set()
        with opened(self.path) as file:
            for name, shape in names.items():
                if component == "unet":
                    source = unet_key(name, layers)
                elif component == "vae":
                    source = vae_key(name, levels)
                else:
                    source = text_key(name) if open_clip else name
                key = prefix + source
                if ".up." in key and component == "unet":  # it comes after the block's attention, if there is one
                    key = next((k for k in (key.replace(".up.", f".{i}.") for i in (2, 1)) if k in self.shapes), key)
                used.add(key)
                if key in self.shapes:
                    found[name] = _shaped(file.get_tensor(self._stored[key]), name, shape)
        for key in self.shapes.keys() - used:
            if key.startswith(prefix) and not IGNORED.fullmatch(key) and not self._is_dropped(component, key, names):
                found[key] = torch.empty(0)  # is reported as unknown
        return found

    def _is_dropped(self, component: str, key: str, names: Mapping[str, Any]) -> bool:
        """Whether a key belongs to a layer of the text encoder that the family leaves out, or to its projection."""
        if not component.startswith("text_encoder"):
            return False
        if key.endswith((".text_projection", ".text_projection.weight")):
            return "text_projection.weight" not in names
        layers = part_count(dict.fromkeys(names, ()), "text_model.encoder.layers")
        return bool(self.family.dropped_layers) and f".resblocks.{layers}." in key

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file, hex."""
        return sha256_of(self.path)


def _usual_name(key: str) -> str:
    """A key without wrappers' parts, and of a text encoder with the part that some files leave out."""
    key = without_wrappers(key)
    for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        rest = key.removeprefix(prefix)
        if rest != key and rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            return f"{prefix}text_model.{rest}"
    return key


def _depths(down: list[list[int]], up: list[int]) -> dict[str, Any]:
    """The config's keys for the transformer layers of each layer on the way down, and of all layers on the way up."""
    layers = len(down[0]) + 1
    blocks = [[max(depth, 1) for depth in up[i * layers : (i + 1) * layers]] for i in range(len(down))]
    if all(len({*own, *other}) == 1 for own, other in zip(down, blocks[::-1], strict=True)):
        shared = [own[0] for own in down]
        return {"transformer_layers_per_block": shared if max(shared) > 1 else 1}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": blocks}


def part_count(shapes: Shapes, prefix: str) -> int:
    """How many numbered parts come under ``prefix``."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for key in shapes if (match := pattern.match(key))})


def _shaped(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """OpenCLIP's joint projections are cut, its text projection is turned, 1x1 convolutions become linear layers."""
    part = re.search(r"self_attn\.([qkv])_proj", name)
    if part and tensor.shape[0] == 3 * shape[0]:
        return tensor.chunk(3)["qkv".index(part[1])].contiguous()
    if name == "text_projection.weight":
        return tensor.T.contiguous()
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and len(shape) == 2:
        return tensor[:, :, 0, 0]
    return tensor
