"""Seeded calls of a bundle's graphs, as drawing makes them: for calibrating, and for comparing in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.export.onnx import random_inputs
from ldm_export.export.parity import graph_session
from ldm_export.graph.base import Array, Inputs

TIMESTEPS = (999.0, 500.0, 1.0)
CALIBRATED = {"batch": 2, "height": 16, "width": 16}
"""Sizes of what a conversion sees, in latents."""


def example_calls(bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int]) -> list[Inputs]:
    """Calls of a graph: a few timesteps, states of the bundle's text encoder, SDXL's sizes."""
    call, graphs = drawn(bundle, graph, sizes), bundle.manifest.graphs
    if "encoder_hidden_states" in call and "text_encoder" in graphs:
        encoder = graphs["text_encoder"]
        (states,) = graph_session(bundle.file(encoder.path)).run(["last_hidden_state"], drawn(bundle, encoder, sizes))
        if states.shape == call["encoder_hidden_states"].shape:  # SDXL's are of two encoders
            call["encoder_hidden_states"] = states
    if "time_ids" in call:
        height, width = bundle.manifest.model["height"], bundle.manifest.model["width"]
        call["time_ids"][:] = (height, width, 0, 0, height, width)
    if "timestep" not in call:
        return [call]
    return [{**call, "timestep": np.full_like(call["timestep"], timestep)} for timestep in TIMESTEPS]


def drawn(bundle: Bundle, spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Random inputs of a graph, of sizes in latents; ids are of the vocabulary, or of the classes, of the bundle."""
    facts, graphs = bundle.manifest.model, bundle.manifest.graphs
    length = int(graphs["text_encoder"].inputs[0].shape[1]) if "text_encoder" in graphs else 1
    ids = int(facts.get("num_class_embeds") or 2)
    if any(tensor.name == "input_ids" for tensor in spec.inputs):
        ids = _words(bundle, spec.name if spec.name.startswith("text_encoder") else "text_encoder")  # a loop's
    tensors = random_inputs(spec, {**sizes, "tokens": length}, facts["pixels_per_latent"], ids)
    return {tensor.name: np.asarray(value) for tensor, value in zip(spec.inputs, tensors, strict=True)}


def _words(bundle: Bundle, encoder: str) -> int:
    """How many token ids a text encoder knows."""
    return len(bundle.json(f"{encoder.replace('text_encoder', 'tokenizer')}/vocab.json"))
