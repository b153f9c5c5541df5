"""Seeded calls of a bundle's graphs, as generating makes them: for calibrating, and for comparing in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import REQUEST_SOURCES, GraphSpec, TextEncoder, conditions_of, tokens_read
from ldm_export.export.onnx import random_inputs
from ldm_export.export.parity import graph_session
from ldm_export.graph.base import Array, Inputs

TIMESTEPS = (999.0, 500.0, 1.0)
CALIBRATED = {"batch": 2, "height": 16, "width": 16}
"""Sizes of what a conversion sees, in latents."""


def example_calls(bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int]) -> list[Inputs]:
    """Calls of a graph; of the denoiser a few timesteps, with conditions that the bundle's own graphs made."""
    call = random_call(bundle, graph, sizes)
    if graph.name != bundle.roles.denoiser:
        return [call]
    conditions = _conditions(bundle, sizes)
    if all(value.shape == call[name].shape for name, value in conditions.items()):
        call |= conditions
    return [{**call, "timestep": np.full_like(call["timestep"], timestep)} for timestep in TIMESTEPS]


def random_call(bundle: Bundle, spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Random inputs of a graph, of sizes in latents; ids are of the vocabulary, or of the classes, of the bundle."""
    facts, encoders = bundle.manifest.model, bundle.roles.text_encoders
    ids = int(facts.get("class_count") or 2)
    if any("input_ids" in tensor.name for tensor in spec.inputs):  # a text encoder's, or a loop's
        vocabularies = {entry.graph: _vocabulary_size(bundle, entry) for entry in encoders}
        ids = vocabularies.get(spec.name, min(vocabularies.values()))
    sizes = {**sizes, "tokens": tokens_read(bundle.roles, bundle.manifest.graphs)}
    tensors = random_inputs(spec, sizes, facts["pixels_per_latent"], ids, facts.get("patch_size", 1))
    return {tensor.name: np.asarray(value) for tensor, value in zip(spec.inputs, tensors, strict=True)}


def _vocabulary_size(bundle: Bundle, encoder: TextEncoder) -> int:
    if encoder.kind == "clip":
        return len(bundle.json(f"{encoder.tokenizer}/vocab.json"))
    return len(bundle.json(f"{encoder.tokenizer}/tokenizer.json")["model"]["vocab"])


def run_graph(bundle: Bundle, name: str, inputs: Inputs, *, as_written: bool = False) -> dict[str, Array]:
    """One call of a graph of a bundle, by its name, in a session of its own; gives its outputs by name."""
    spec = bundle.manifest.graphs[name]
    names = [tensor.name for tensor in spec.outputs]
    session = graph_session(bundle.file(spec.path), as_written=as_written)
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _conditions(bundle: Bundle, sizes: Mapping[str, int]) -> dict[str, Array]:
    """The denoiser's conditions, of random token ids."""
    graphs, roles = bundle.manifest.graphs, bundle.roles
    denoiser = random_call(bundle, graphs[roles.denoiser], sizes)
    sources = {source: denoiser[name] for name, source in roles.conditions.items() if source in REQUEST_SOURCES}
    if roles.conditioner is not None:
        asked = random_call(bundle, graphs[roles.conditioner], sizes)
        sources |= {name: value for name, value in asked.items() if name in REQUEST_SOURCES}
    for entry in roles.text_encoders:
        outputs = run_graph(bundle, entry.graph, random_call(bundle, graphs[entry.graph], sizes))
        sources |= {f"{entry.graph}.{name}": value for name, value in outputs.items()}
    return conditions_of(roles, graphs, sources, lambda name, inputs: run_graph(bundle, name, inputs))
