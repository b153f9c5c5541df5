"""Graphs of text encoders, as the families that read them share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ldm_export.contract import TensorSpec, graph_spec
from ldm_export.families.autoencoder import Load
from ldm_export.families.base import GraphModule, ModelGraph


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
