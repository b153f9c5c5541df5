"""Graphs of text encoders, as the families that read them share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_export.contract import TensorSpec, graph_spec
from ldm_export.families.base import GraphModule, Load, ModelGraph, Padding
from ldm_export.families.tokenizers import WholeTokenizer


def clip_graph(load: Load, name: str, config: Mapping[str, Any], length: int, *, layers: bool) -> ModelGraph:
    """The graph of a text encoder of CLIP's kind.

    Parameters
    ----------
    name : the component, which the graph is named by
    config : its config, with ``with_projection``
    length : token ids of a prompt
    layers : whether every layer's hidden states are outputs, too
    """
    width = config["hidden_size"]
    states = TensorSpec("last_hidden_state", "float32", ("batch", length, width))
    if config["with_projection"]:
        outputs = [TensorSpec("text_embeds", "float32", ("batch", config["projection_dim"])), states]
    else:
        outputs = [states, TensorSpec("pooler_output", "float32", ("batch", width))]
    if layers:
        hidden = range(config["num_hidden_layers"] + 1)
        outputs += [TensorSpec(f"hidden_states.{layer}", "float32", states.shape) for layer in hidden]
    spec = graph_spec(name, [TensorSpec("input_ids", "int64", ("batch", length))], outputs)
    saved = {key: value for key, value in config.items() if key != "with_projection"}
    module = partial(_clip, load, name, tuple(tensor.name for tensor in outputs))
    return ModelGraph(spec, module, name, saved, config["vocab_size"])


def _clip(load: Load, name: str, outputs: Sequence[str]) -> GraphModule:
    def call(network: Any, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoding = network(input_ids)
        named = {f"hidden_states.{i}": state for i, state in enumerate(encoding.hidden_states)}
        named |= {"last_hidden_state": encoding.last_hidden_state}
        named |= {"pooler_output": encoding.pooled, "text_embeds": encoding.pooled}
        return tuple(named[name] for name in outputs)

    return GraphModule(load(name), call).eval()


def states_graph(
    load: Load, name: str, vocab_size: int, width: int, tokenizer: WholeTokenizer, *, masked: bool
) -> ModelGraph:
    """The graph of a text encoder of transformers of which the last hidden state is read.

    Parameters
    ----------
    name : the component, which the graph is named by
    width : of the states
    tokenizer : what makes its ids
    masked : whether padding is masked, and the mask is an output, too: float32 (B, L), 1 for text and 0 for padding
    """
    ids = TensorSpec("input_ids", "int64", ("batch", tokenizer.length))
    outputs = [TensorSpec("last_hidden_state", "float32", ("batch", tokenizer.length, width))]
    if masked:
        outputs.append(TensorSpec("attention_mask", "float32", ids.shape))
    padding = Padding(tokenizer.pad_token_id, tokenizer.pads_left) if masked else None
    module = partial(_states, load, name, padding)
    return ModelGraph(graph_spec(name, [ids], outputs), module, name, ids=vocab_size, padding=padding)


def text_mask(input_ids: Tensor, padding: Padding) -> Tensor:
    """Where rows of token ids (B, L) have text, bool (B, L): all between the padding and the other end.

    A tokenizer's own mask says the same, since no text begins, or ends, with the token of the padding.
    """
    text, places = input_ids != padding.token, torch.arange(input_ids.shape[1])
    if padding.left:
        return places >= torch.where(text, places, input_ids.shape[1]).amin(dim=1, keepdim=True)
    return places < torch.where(text, places + 1, 0).amax(dim=1, keepdim=True)


def _states(load: Load, name: str, padding: Padding | None) -> GraphModule:
    def call(network: Any, input_ids: Tensor) -> tuple[Tensor, ...]:
        if padding is None:
            return (network(input_ids=input_ids).last_hidden_state,)
        mask = text_mask(input_ids, padding)
        return network(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask.float()

    return GraphModule(load(name), call).eval()
