"""The chain from a checkpoint to a sealed bundle: every network is exported, compared with PyTorch, and freed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from ldm_export.bundle import Bundle, create_bundle
from ldm_export.bundle.parity import Parity, check_parity
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.added import AddedNetwork
from ldm_export.checkpoint.image_adapter import ImageAdapter
from ldm_export.errors import ExportError, InputError
from ldm_export.export.onnx import export_graph, inputs_of, release_weights
from ldm_export.export.parity import (
    NetworkCall,
    compare_graph,
    compare_weights,
    reference_runs,
    weights_read,
)
from ldm_export.families import family_of
from ldm_export.families.base import GraphModule, ModelGraph
from ldm_export.graph.base import Inputs, spread
from ldm_export.graph.weights import least_snr_db
from ldm_export.plan import compile_plan
from ldm_export.reading.documents import json_text

_log = logging.getLogger(__name__)
CALLS_COMPARED = 8
EXAMPLE_SIZES = {"batch": 2, "height": 8, "width": 16, "tokens": 7}

Progress = Callable[[str], None]
"""Called with what begins now."""


def export_bundle(
    checkpoint: LatentDiffusion, output: Path, *, force: bool = False, progress: Progress = lambda stage: None
) -> Bundle:
    """Export a checkpoint as a bundle of plain ONNX graphs.

    Parameters
    ----------
    output : the folder to make
    force : replace a bundle that is there
    progress : called with the name of each stage

    Raises
    ------
    CheckpointError, ExportError, BundleError
        If the checkpoint, the export or the target cannot be used, or the runtime could not generate with the bundle.
        Nothing is left behind.
    ParityError
        If a graph differs from its network by more than the tolerance. Nothing is sealed.
    """
    family = family_of(checkpoint)
    family.check()
    drawing = checkpoint.drawing
    compile_plan(checkpoint.scheduler, drawing.sampler, drawing.steps, tokens=checkpoint.tokens)  # as the runtimes will
    for note in family.notes:
        _log.info(note)
    for name in checkpoint.components:
        checkpoint.weight_files(name)  # refuses what has no weights before anything is written
    added: dict[str, AddedNetwork | ImageAdapter]
    added = {graph: checkpoint.controls[name] for name, graph in family.roles.controls.items()}
    if family.roles.image_encoder is not None and checkpoint.image_adapter is not None:
        added[family.roles.image_encoder] = checkpoint.image_adapter
    needed_bytes = checkpoint.weights_bytes + sum(network.weights_bytes for network in added.values())
    parity: list[Parity] = []
    with create_bundle(output, force=force, needed_bytes=needed_bytes) as writer:
        progress("scheduler and tokenizer")
        _write_json(writer.path / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
        _write_json(writer.path / "model_index.json", _bundle_index(checkpoint))
        for encoder in family.roles.text_encoders:
            family.tokenizers[encoder.graph].write(writer.path / encoder.tokenizer)
        for graph in family.graphs:
            parity += _export_graph(graph, checkpoint, writer.path / graph.spec.name, progress)
        progress("hashes")
        return writer.seal(
            model={**family.facts, "default_sampler": drawing.sampler, "default_steps": drawing.steps},
            graphs={graph.spec.name: graph.spec for graph in family.graphs},
            roles=family.roles,
            source={
                "checkpoint": checkpoint.name,
                "sha256": {name: checkpoint.sha256(name) for name in checkpoint.components}
                | {name: network.sha256 for name, network in added.items()},
                "components": {graph.spec.name: graph.component for graph in family.graphs if graph.component},
                "torch": torch.__version__.partition("+")[0],
                **{key: value for key, value in _source_facts(checkpoint).items() if value},
            },
            parity=[record.to_dict() for record in parity],
        )


def _export_graph(graph: ModelGraph, checkpoint: LatentDiffusion, folder: Path, progress: Progress) -> list[Parity]:
    """Export one graph to its folder, and compare it with PyTorch; its network is freed in between."""
    name, pixels_per_latent = graph.spec.name, checkpoint.pixels_per_latent
    progress(f"{name}: running in PyTorch")
    module = graph.load()
    if not isinstance(module, GraphModule):  # of a family of a user's own
        kind = type(module).__name__
        raise ExportError(f"The family loads a {kind} for {name}; it must be a GraphModule(network, call). Wrap it.")
    runs = reference_runs(module, graph, pixels_per_latent)
    progress(f"{name}: exporting")
    example = inputs_of(graph, EXAMPLE_SIZES, pixels_per_latent)
    path = export_graph(module, graph.spec, example, folder)
    release_weights(module)
    progress(f"{name}: comparing with PyTorch")
    records = compare_graph(path, graph.spec, runs, threads=1)
    check_parity(records)
    if graph.config is not None:
        _write_json(folder / "config.json", graph.config)
    return records


def compare_bundle(
    bundle: Bundle,
    checkpoint: LatentDiffusion,
    progress: Progress,
    calibration: Mapping[str, Sequence[Inputs]] | None = None,
) -> list[Parity]:
    """Hold every graph of a sealed bundle against a checkpoint's networks, as :func:`export_bundle` does, and look for
    every weight of the networks in it.

    ``calibration`` has inputs, by graph, for those graphs that a pass has changed: what is quantized for the values
    that drawing meets is off for any others.

    Raises
    ------
    InputError
        If the checkpoint is of another shape than the bundle.
    """
    check_same_graphs(bundle, checkpoint)
    parity = []
    for graph in family_of(checkpoint).graphs:
        name = graph.spec.name
        progress(f"{name}: running in PyTorch")
        file = bundle.file(graph.spec.path)
        least = least_snr_db(onnx_ir.load(file))
        allowed = {} if least is None else tolerances(bundle, name)  # exact numbers need none, whatever it says
        calls = () if least is None else (calibration or {}).get(name, ())
        parity += _compare_weights(checkpoint, graph, file)
        runs = parity_runs(checkpoint, graph, calls)
        progress(f"{name}: comparing with PyTorch")
        parity += [
            replace(record, tolerance=allowed.get(record.output, record.tolerance), least_snr_db=least)
            for record in compare_graph(file, graph.spec, runs, threads=0 if calls else 1)
        ]
    return parity


def _compare_weights(checkpoint: LatentDiffusion, graph: ModelGraph, file: Path) -> list[Parity]:
    """A record that fails if the graph lacks a weight of its network; else none."""
    module = graph.load()
    example = inputs_of(graph, EXAMPLE_SIZES, checkpoint.pixels_per_latent)
    records = compare_weights(file, graph.spec, weights_read(module, example))
    release_weights(module)
    return records


def check_same_graphs(bundle: Bundle, checkpoint: LatentDiffusion) -> None:
    """Raise InputError unless the checkpoint's networks take and give what the bundle's graphs do."""
    family = family_of(checkpoint)
    roles = bundle.manifest.roles
    if roles is not None and roles.image_encoder is not None and checkpoint.image_adapter is None:
        raise InputError(
            f"The bundle {bundle.path} has an IP-Adapter, which {checkpoint.path} has not beside it. "
            f"Compare them with: ldm-export verify {bundle.path} --against {checkpoint.path} --ip-adapter FILE"
        )
    controls = {} if bundle.manifest.roles is None else bundle.manifest.roles.controls
    if lacking := sorted(controls.keys() - checkpoint.controls.keys()):
        raise InputError(
            f"The bundle {bundle.path} has the ControlNet {lacking[0]}, which {checkpoint.path} has not beside it. "
            f"Compare them with: ldm-export verify {bundle.path} --against {checkpoint.path} "
            f"--controlnet {lacking[0]}=FOLDER"
        )
    for spec in (graph.spec for graph in family.graphs):
        if bundle.manifest.graphs.get(spec.name) != spec:
            raise InputError(
                f"{spec.name} of {checkpoint.path} has other inputs or outputs than the bundle {bundle.path}. "
                "Compare a bundle with the checkpoint that it was exported from."
            )


def tolerances(bundle: Bundle, graph: str) -> dict[str, float]:
    """What the bundle allows each output of a graph, by its parity record."""
    return {record["output"]: record["tolerance"] for record in bundle.manifest.parity if record["graph"] == graph}


def parity_runs(checkpoint: LatentDiffusion, graph: ModelGraph, calls: Sequence[Inputs] = ()) -> list[NetworkCall]:
    """A graph's network on seeded inputs or, where there are any, on some of ``calls``; its memory is freed again."""
    module = graph.load()
    if calls:
        chosen = spread(calls, CALLS_COMPARED)
        inputs = [tuple(torch.from_numpy(call[tensor.name]) for tensor in graph.spec.inputs) for call in chosen]
        with torch.no_grad():
            runs = [(tensors, module(*tensors)) for tensors in inputs]
    else:
        runs = reference_runs(module, graph, checkpoint.pixels_per_latent)
    release_weights(module)
    return runs


def _source_facts(checkpoint: LatentDiffusion) -> dict[str, Any]:
    """What the checkpoint's own files do not say: choices, adapters that are merged, and parts that are left out."""
    return {
        "sampler": checkpoint.sampler,
        "prediction_type": checkpoint.prediction_type,
        "left_out": checkpoint.kind.left_out(checkpoint.index),
        "adapters": [merge.facts for merge in checkpoint.merges],
        "embeddings": [embedding.facts for embedding in checkpoint.embeddings],
    }


def _bundle_index(checkpoint: LatentDiffusion) -> dict[str, Any]:
    """``model_index.json`` without the components that a bundle does not have, so that diffusers looks for none."""
    kept = {*checkpoint.components, "scheduler"} | {
        name.replace("text_encoder", "tokenizer") for name in checkpoint.components
    }
    return {
        key: [None, None] if isinstance(value, list) and key not in kept else value
        for key, value in checkpoint.index.items()
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(values), encoding="utf-8")
