"""What diffusers' and transformers' own networks make of the inputs of a bundle's graphs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaConfig, T5GemmaEncoder

Tensors = dict[str, Tensor]


def judged(folder: Path, name: str, inputs: Tensors) -> Tensors:
    """Outputs, by name, of the network that a graph of this name is made of, from a checkpoint's folder."""
    return JUDGES[name.removesuffix("_2").removesuffix("_3")](folder, inputs, name)


def judge_unet(folder: Path, inputs: Tensors, _: str) -> Tensors:
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    options = {name: inputs[name] for name in ("class_labels", "timestep_cond") if name in inputs}
    text = inputs.get("encoder_hidden_states")
    sample = inputs["sample"]
    if "image_latents" in inputs:
        beside = inputs["image_latents"]
        scaled = json.loads((folder / "model_index.json").read_text()).get("is_cosxl_edit")
        if beside.shape[1] == sample.shape[1] and not scaled:  # of a picture that is edited
            beside = beside / json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
        sample = torch.cat([sample, beside], dim=1)
    out = unet(sample, inputs["timestep"], text, added_cond_kwargs=added or None, **options)
    return {"out_sample": out.sample}


def judge_transformer(folder: Path, inputs: Tensors, _: str) -> Tensors:
    name = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    transformer = getattr(diffusers, name).from_pretrained(folder / "transformer")
    sample, timestep = inputs["sample"], inputs["timestep"]
    states: Any = inputs.get("encoder_hidden_states")
    if name == "SD3Transformer2DModel":
        out = transformer(sample, states, inputs["pooled_projections"], timestep)
    elif name == "DiTTransformer2DModel":
        out = in_squares(transformer, sample, timestep, inputs["class_labels"])
    elif name == "PixArtTransformer2DModel":
        sizes = {key: inputs.get(key) for key in ("resolution", "aspect_ratio")}
        mask = inputs["encoder_attention_mask"]
        out = transformer(sample, states, timestep, added_cond_kwargs=sizes, encoder_attention_mask=mask)
    else:
        out = transformer(sample, timestep / 1000, states, inputs["attention_mask"] > 0.5)
    return {"out_sample": out.sample[:, : sample.shape[1]]}


def in_squares(transformer: Any, sample: Tensor, timestep: Tensor, labels: Tensor) -> SimpleNamespace:
    """What a DiT makes of any size; its class puts the patches together as a square, which is undone here."""
    patch, found = transformer.config.patch_size, []
    rows, columns = sample.shape[-2] // patch, sample.shape[-1] // patch
    handle = transformer.proj_out_2.register_forward_hook(lambda _, __, out: found.append(out))
    with contextlib.suppress(RuntimeError):  # so many patches make no square
        transformer(sample, timestep, labels)
    handle.remove()
    parts = found[0].reshape(len(sample), rows, columns, patch, patch, -1)
    return SimpleNamespace(sample=torch.einsum("nhwpqc->nchpwq", parts).reshape(len(sample), -1, *sample.shape[-2:]))


def judge_text_encoder(folder: Path, inputs: Tensors, name: str) -> Tensors:
    config = json.loads((folder / name / "config.json").read_text())
    ids = inputs["input_ids"]
    if config["model_type"] == "t5gemma":
        encoder = T5GemmaEncoder.from_pretrained(folder / name, config=T5GemmaConfig.from_dict(config).encoder)
    else:
        encoder = getattr(transformers, config["architectures"][0]).from_pretrained(folder / name)
    if config["model_type"] == "clip_text_model":
        out = encoder(ids, output_hidden_states=True)
        states = {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
        return {**states, **{key: value for key, value in out.items() if isinstance(value, Tensor)}}
    if name == "text_encoder_3":
        return {"last_hidden_state": encoder(ids).last_hidden_state}
    places, text = torch.arange(ids.shape[1]), [(row != 0).nonzero().flatten().tolist() for row in ids]
    left = config["model_type"] == "t5gemma"
    mask = torch.stack([places >= min(row) if left else places <= max(row) for row in text])
    return {"last_hidden_state": encoder(ids, mask).last_hidden_state, "attention_mask": mask.float()}


def judge_vae(folder: Path, inputs: Tensors, _: str) -> Tensors:
    name = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    vae = getattr(diffusers, name).from_pretrained(folder / "vae")
    factor, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    if "latent_sample" in inputs:
        return {"sample": vae.decode(inputs["latent_sample"] / factor + shift).sample}
    if name == "AutoencoderDC":
        return {"latent_sample": vae.encode(inputs["sample"]).latent * factor}
    found = vae.encode(inputs["sample"]).latent_dist  # of x * factor, the log-variance is larger by 2 log(factor)
    mean = (found.mean - shift) * factor
    return {"latent_parameters": torch.cat([mean, found.logvar + 2 * math.log(factor)], dim=1)}


def judge_conditioner(_: Path, inputs: Tensors, __: str) -> Tensors:
    """What diffusers' pipelines make of these, in numpy and torch of this test's own."""
    made, rows = {}, next(value.shape[0] for value in inputs.values() if value.ndim)
    if "text_encoder.text_embeds" in inputs:  # Stable Diffusion 3
        first, second, *pooled = (inputs[name] for name in inputs if "text_encoder_3" not in name)
        joined = torch.nn.functional.pad(torch.cat([first, second], dim=-1), (0, 96 - 64))
        third = inputs.get("text_encoder_3.last_hidden_state", torch.zeros(rows, 256, 96))
        states = torch.cat([joined, third], dim=-2)
        return {"encoder_hidden_states": states, "pooled_projections": torch.cat(pooled, dim=-1)}
    if "class_labels" in inputs:  # DiT, of which 1000 is no class
        return {"shown_labels": torch.where(inputs["is_negative"] == 1, 1000, inputs["class_labels"])}
    if "text_encoder.attention_mask" in inputs:  # PixArt
        sizes = torch.stack([inputs["height"], inputs["width"]]).repeat(rows, 1)
        return {"resolution": sizes, "aspect_ratio": (inputs["height"] / inputs["width"]).reshape(1, 1).repeat(rows, 1)}
    states = [value for name, value in inputs.items() if ".hidden_states." in name]
    if states:
        made["encoder_hidden_states"] = torch.cat(states, dim=-1)
        size = [inputs["height"], inputs["width"]]
        sizes = torch.stack([*size, torch.tensor(0.0), torch.tensor(0.0), *size]).repeat(rows, 1)
        if "is_negative" in inputs:
            sizes = sizes[:, :5].clone()
            sizes[:, 4] = 6.0 - 3.5 * inputs["is_negative"]
        made["time_ids"] = sizes
    if "text_encoder_2.text_embeds" in inputs:
        made["text_embeds"] = inputs["text_encoder_2.text_embeds"] * inputs["has_prompt"][:, None]
        made["encoder_hidden_states"] = made["encoder_hidden_states"] * inputs["has_prompt"][:, None, None]
    if "guidance_weight" in inputs:
        weights = inputs["guidance_weight"].repeat(rows)
        embedding = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        made["timestep_cond"] = embedding(SimpleNamespace(), weights, embedding_dim=10)  # type: ignore[arg-type]
    return made


JUDGES: dict[str, Callable[[Path, Tensors, str], Tensors]] = {
    "text_encoder": judge_text_encoder,
    "conditioner": judge_conditioner,
    "unet": judge_unet,
    "transformer": judge_transformer,
    "vae_decoder": judge_vae,
    "vae_encoder": judge_vae,
}
"""Judges by the graph's name, without the number of a text encoder."""
