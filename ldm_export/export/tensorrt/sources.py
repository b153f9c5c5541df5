"""The ONNX graphs that engines are built from: the bundle's own, converted where another precision is asked for.

TensorRT takes every type as the graph has it (it is strongly typed), so precision is a matter of the graph. What was
converted is held against the plain graph in ONNX Runtime, on other values and sizes than it was calibrated with. On a
CPU that computes fp16 in fp32, so this proves the graph and its weights; that rounding what lies between costs little
is what `Half` itself makes sure of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from ldm_export.bundle import Bundle
from ldm_export.contract import STEP, GraphSpec, step_spec
from ldm_export.errors import InputError, ParityError
from ldm_export.export.chain import tolerances
from ldm_export.export.loop import Loop, build_loop
from ldm_export.export.onnx import random_inputs
from ldm_export.export.parity import graph_session, largest_error
from ldm_export.export.step import step_model
from ldm_export.graph.base import Array, GraphPass, Inputs
from ldm_export.graph.files import load, save
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.manifest import is_loop
from ldm_export.plan import Plan

PRECISIONS: dict[str, GraphPass | None] = {"fp32": None, "fp16": Half(), "int8": QuantizeWeights()}
"""How a plain graph comes to each precision; of int8 only the weights are integers, which is all that RTX has."""
TIMESTEPS = (999.0, 500.0, 1.0)
CALIBRATED = {"batch": 2, "height": 16, "width": 16}
COMPARED = {"batch": 3, "height": 21, "width": 15}
"""Sizes of the inputs, in latents, that a conversion sees, and that it is judged on: odd, so that halvings round."""


@dataclass(frozen=True)
class Source:
    """What an engine is made of: of what graph it is, which of the bundle's files says so, and all that go into it."""

    spec: GraphSpec
    path: str
    made_from: Mapping[str, str]


def source_of(bundle: Bundle, name: str) -> Source:
    """Of one of a bundle's graphs, of ``step``, or of ``loops/<plan>``.

    Raises
    ------
    InputError
        If there is no such graph or plan.
    """
    if is_loop(name):
        loop = loop_of(bundle, bundle, Path(name).name)
        return Source(loop.spec, f"plans/{Path(name).name}.json", loop.made_of)
    own = {graph: spec for graph, spec in bundle.manifest.graphs.items() if not is_loop(spec.path)}
    graph = "unet" if name == STEP else name
    if graph not in own:
        raise InputError(f"{bundle.path} has no graph {graph!r}; it has {', '.join(own)}. Name some of these.")
    path, files = own[graph].path, bundle.manifest.files
    made_from = {file: files[file].sha256 for file in files if file.startswith(path)}  # and its _data
    return Source(step_spec(own[graph]) if name == STEP else own[graph], path, made_from)


def parts_of(bundle: Bundle, sources: Iterable[Source]) -> list[str]:
    """The graphs that go into some engines, in the bundle's order."""
    of = {path for source in sources for path in source.made_from}
    return [name for name, spec in bundle.manifest.graphs.items() if spec.path in of]


def onnx_of(bundle: Bundle, made: Bundle, source: Source, work: Path) -> Path:
    """The file to build from; a loop is composed of the graphs as they were converted, a step is always in fp32.

    Parameters
    ----------
    made : the bundle as `converted` gave it
    work : where what is not a file of ``made`` is written
    """
    if source.spec.name == STEP:
        file = work / f"{STEP}.onnx"
        file.write_bytes(step_model(bundle.manifest.graphs["unet"]).SerializeToString(deterministic=True))
        return file
    if not is_loop(source.spec.path):
        return made.file(source.spec.path)
    folder = work / "loops"
    folder.mkdir(exist_ok=True)
    return loop_of(bundle, made, Path(source.path).stem).save(folder)


def converted(
    bundle: Bundle, names: list[str], precision: str, folder: Path, progress: Callable[[str], None]
) -> tuple[Bundle, dict[str, dict[str, Any]]]:
    """The bundle with some graphs converted, as files under ``folder``, and what is to be reported of each.

    Raises
    ------
    ParityError
        If a converted graph differs from the plain one by more than its conversion may.
    """
    step = PRECISIONS[precision]
    if step is None:
        return bundle, {name: {} for name in names}
    reports = {}
    made = replace(bundle, path=folder)
    for name in names:
        progress(f"{name}: to {precision}")
        graph = bundle.manifest.graphs[name]
        change = step.apply(load(bundle.file(graph.path)), example_calls(bundle, graph, CALIBRATED))
        made.file(graph.path).parent.mkdir(parents=True)
        save(onnx_ir.from_proto(change.model), made.file(graph.path))
        progress(f"{name}: comparing with the plain graph")
        error = _difference(bundle, made, graph)
        allowed = max([step.tolerance, *tolerances(bundle, name).values()])
        if not error <= allowed:
            raise ParityError(
                f"{name} in {precision} differs from the plain graph by {error:.2g} of its largest value; {allowed:g} "
                "is allowed. Nothing was kept. Use another precision."
            )
        reports[name] = {**change.report, "error": error, "allowed": allowed}
    return made, reports


def loop_of(bundle: Bundle, made: Bundle, name: str) -> Loop:
    """The loop of one of a bundle's plans, composed of the graphs of ``made``.

    Raises
    ------
    InputError
        If there is no such plan, or no loop can be made of the model.
    """
    path = f"plans/{name}.json"
    if path not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path} has no plan {name!r}; it has {', '.join(plans_of(bundle))}. Use one of these, or add it "
            "with ldm-export plan."
        )
    return build_loop(made, Plan.from_json(bundle.file(path).read_text(encoding="utf-8")))


def plans_of(bundle: Bundle) -> list[str]:
    return sorted(Path(path).stem for path in bundle.manifest.files if path.startswith("plans/"))


def example_calls(bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int]) -> list[Inputs]:
    """Seeded inputs as drawing has them: a few timesteps, states of the bundle's text encoder, SDXL's sizes."""
    facts, graphs = bundle.manifest.model, bundle.manifest.graphs
    labels = int(facts.get("num_class_embeds") or 2)
    length = int(graphs["text_encoder"].inputs[0].shape[1]) if "text_encoder" in graphs else 1

    def drawn(spec: GraphSpec) -> dict[str, Array]:
        words = _words(bundle, spec.name) if spec.name.startswith("text_encoder") else labels
        tensors = random_inputs(spec, {**sizes, "tokens": length}, facts["pixels_per_latent"], words)
        return {tensor.name: np.asarray(value) for tensor, value in zip(spec.inputs, tensors, strict=True)}

    call = drawn(graph)
    if "encoder_hidden_states" in call and "text_encoder" in graphs:
        encoder = graphs["text_encoder"]
        (states,) = graph_session(bundle.file(encoder.path)).run(["last_hidden_state"], drawn(encoder))
        if states.shape == call["encoder_hidden_states"].shape:  # SDXL's are of two encoders
            call["encoder_hidden_states"] = states
    if "time_ids" in call:
        height, width = facts["height"], facts["width"]
        call["time_ids"][:] = (height, width, 0, 0, height, width)
    if "timestep" not in call:
        return [call]
    return [{**call, "timestep": np.full_like(call["timestep"], timestep)} for timestep in TIMESTEPS]


def _words(bundle: Bundle, encoder: str) -> int:
    """How many token ids a text encoder knows."""
    vocabulary = bundle.path / encoder.replace("text_encoder", "tokenizer") / "vocab.json"
    return len(json.loads(vocabulary.read_text(encoding="utf-8")))


def _difference(bundle: Bundle, made: Bundle, graph: GraphSpec) -> float:
    calls = example_calls(bundle, graph, COMPARED)
    names = [tensor.name for tensor in graph.outputs]
    plain = graph_session(bundle.file(graph.path))
    expected = [plain.run(names, dict(call)) for call in calls]
    del plain
    other = graph_session(made.file(graph.path))
    results = [other.run(names, dict(call)) for call in calls]
    return float(np.max([largest_error(*pair) for pair in zip(expected, results, strict=True)]))
