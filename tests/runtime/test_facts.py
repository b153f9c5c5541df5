"""The contract of each role takes every kind of model that export writes, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ldm_export.contract import (
    GraphSpec,
    TensorSpec,
    loop_spec,
    unet_spec,
    vae_decoder_spec,
    vae_encoder_spec,
)
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime.facts import check_graphs

UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None,
    "block_out_channels": [8],
    "cross_attention_dim": 32,
    "class_embed_type": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "time_cond_proj_dim": None,
}
WITHOUT_TEXT = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
XL = {
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "inpainting": {"in_channels": 9},
    "told the guidance scale": {"time_cond_proj_dim": 256},
    "SDXL": XL,
    "unconditional": WITHOUT_TEXT,
    "class-conditional": {**WITHOUT_TEXT, "num_class_embeds": 5},
    "features": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
}


def text_encoder(name: str, *, states: bool = False, projection: bool = False) -> GraphSpec:
    """As export writes it: 77 tokens, width 32, two layers; SDXL's give every layer's states."""
    shape = ("batch", 77, 32)
    outputs = [TensorSpec("last_hidden_state", "float32", shape)]
    pooled = TensorSpec("text_embeds", "float32", ("batch", 24)), TensorSpec("pooler_output", "float32", ("batch", 32))
    outputs.append(pooled[0] if projection else pooled[1])
    outputs += [TensorSpec(f"hidden_states.{layer}", "float32", shape) for layer in range(3 * states)]
    return GraphSpec(f"{name}/model.onnx", (TensorSpec("input_ids", "int64", ("batch", 77)),), tuple(outputs))


def graphs_of(kind: str, channels: int = 3) -> dict[str, GraphSpec]:
    unet = unet_spec({**UNET, **KINDS[kind]})
    vae = {"in_channels": channels, "out_channels": channels, "latent_channels": 4}
    graphs = {"unet": unet, "vae_decoder": vae_decoder_spec(vae), "vae_encoder": vae_encoder_spec(vae)}
    if kind == "SDXL":
        graphs["text_encoder"] = text_encoder("text_encoder", states=True)
        graphs["text_encoder_2"] = text_encoder("text_encoder_2", states=True, projection=True)
    elif any(tensor.name == "encoder_hidden_states" for tensor in unet.inputs):
        graphs["text_encoder"] = text_encoder("text_encoder")
    return graphs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_export_writes_is_taken(kind: str, channels: int) -> None:
    check_graphs(graphs_of(kind, channels), 4)


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("kind", ["text", "told the guidance scale", "unconditional", "class-conditional"])
def test_its_loops_are_taken(kind: str, draws: int) -> None:
    graphs = graphs_of(kind)
    guided = kind == "text"
    loop = loop_spec("ddim-2", graphs, guided=guided, draws=draws)
    check_graphs({**graphs, loop.name: loop}, 4)
    with pytest.raises(MalformedError, match="loops/ddim-2"):
        check_graphs({**graphs, loop.name: replace(loop, outputs=loop.outputs[:1])}, 4)


def changed(graphs: dict[str, GraphSpec], name: str, tensor: TensorSpec) -> dict[str, GraphSpec]:
    """The graphs with one tensor in place of that of its name."""
    sides = {
        side: tuple(tensor if each.name == tensor.name else each for each in getattr(graphs[name], side))
        for side in ("inputs", "outputs")
    }
    return {**graphs, name: replace(graphs[name], **sides)}


@pytest.mark.parametrize(
    ("kind", "graph", "tensor"),
    [
        ("SDXL", "unet", TensorSpec("time_ids", "float32", ("batch", 5))),
        ("SDXL", "unet", TensorSpec("text_embeds", "float32", ("batch", 25))),
        ("SDXL", "unet", TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 32))),
        ("SDXL", "text_encoder_2", TensorSpec("input_ids", "int64", ("batch", 60))),
        ("SDXL", "text_encoder", TensorSpec("hidden_states.1", "float32", ("batch", 77, 31))),
        ("told the guidance scale", "unet", TensorSpec("timestep_cond", "float32", ("batch", 3))),
        ("class-conditional", "unet", TensorSpec("class_labels", "float32", ("batch",))),
        ("features", "unet", TensorSpec("class_labels", "int64", ("batch", 16))),
        ("features", "unet", TensorSpec("class_labels", "float32", ("batch", "features"))),
        ("text", "text_encoder", TensorSpec("last_hidden_state", "float32", ("batch", 77, 31))),
    ],
)
def test_other_graphs_are_refused(kind: str, graph: str, tensor: TensorSpec) -> None:
    with pytest.raises(MalformedError):
        check_graphs(changed(graphs_of(kind), graph, tensor), 4)


def test_encoders_and_what_reads_them_belong_together() -> None:
    graphs = graphs_of("SDXL")
    with pytest.raises(MalformedError, match="text_embeds"):
        check_graphs({name: graph for name, graph in graphs.items() if name != "text_encoder_2"}, 4)
    with pytest.raises(MalformedError, match="text_embeds"):
        check_graphs({**graphs_of("text"), "text_encoder_2": graphs["text_encoder_2"]}, 4)
