"""The chain from a checkpoint to a sealed bundle: every network is exported, compared with PyTorch, and freed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from ldm_export import contract
from ldm_export.bundle import Bundle, create_bundle
from ldm_export.bundle.parity import Parity, check_parity
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.pipelines import class_name, left_out, option
from ldm_export.contract import GraphSpec
from ldm_export.errors import InputError
from ldm_export.export.accepted import check_accepted, notes, open_tokenizer, token_count
from ldm_export.export.onnx import export_graph, graph_module, random_inputs, release_weights
from ldm_export.export.parity import (
    NetworkCall,
    compare_graph,
    compare_weights,
    reference_runs,
    weights_read,
)
from ldm_export.graph.base import Inputs, spread
from ldm_export.graph.weights import least_snr_db
from ldm_export.plan import compile_plan
from ldm_export.reading.documents import parsed, read_bytes

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
    progress : told of each stage

    Raises
    ------
    CheckpointError, ExportError, BundleError
        If the checkpoint, the export or the target cannot be used, or the runtime could not generate with the bundle.
        Nothing is left behind.
    ParityError
        If a graph differs from its network by more than the tolerance. Nothing is sealed.
    """
    configs = checkpoint.configs
    check_accepted(checkpoint)
    compile_plan(checkpoint.scheduler, checkpoint.drawing.sampler, checkpoint.drawing.steps)  # as the runtimes will
    for note in notes(checkpoint):
        _log.info(note)
    graphs = graph_specs(checkpoint)
    pixels_per_latent = checkpoint.pixels_per_latent
    for name in configs:
        checkpoint.weight_files(name)  # refuses what has no weights before anything is written
    parity: list[Parity] = []
    with create_bundle(output, force=force, needed_bytes=checkpoint.weights_bytes) as writer:
        progress("scheduler and tokenizer")
        _write_json(writer.path / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
        _write_json(writer.path / "model_index.json", _bundle_index(checkpoint))
        for name in configs:
            if name.startswith("text_encoder"):
                source = checkpoint.tokenizer_folder(name)
                copy_tokenizer(source, writer.path / source.name)
        for graph in graphs:
            config = configs[_component(graph)]
            progress(f"{graph.name}: running in PyTorch")
            module = graph_module(checkpoint.load(_component(graph)), graph)
            runs = reference_runs(module, graph, pixels_per_latent, _ids(config))
            progress(f"{graph.name}: exporting")
            example = random_inputs(graph, EXAMPLE_SIZES, pixels_per_latent, _ids(config))
            path = export_graph(module, graph, example, writer.path / graph.name)
            release_weights(module)
            progress(f"{graph.name}: comparing with PyTorch")
            records = compare_graph(path, graph, runs, threads=1)
            check_parity(records)
            parity += records
            _write_json(writer.path / graph.name / "config.json", _without_projection(config))
        progress("hashes")
        return writer.seal(
            model=_model_facts(checkpoint, pixels_per_latent),
            graphs={graph.name: graph for graph in graphs},
            source={
                "checkpoint": checkpoint.name,
                "sha256": {name: checkpoint.sha256(name) for name in configs},
                "torch": torch.__version__.partition("+")[0],
                **{key: value for key, value in _source_facts(checkpoint).items() if value},
            },
            parity=[record.to_dict() for record in parity],
        )


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
    for graph in graph_specs(checkpoint):
        progress(f"{graph.name}: running in PyTorch")
        file = bundle.file(graph.path)
        least = least_snr_db(onnx_ir.load(file))
        allowed = {} if least is None else tolerances(bundle, graph.name)  # exact numbers need none, whatever it says
        calls = () if least is None else (calibration or {}).get(graph.name, ())
        parity += _compare_weights(checkpoint, graph, file)
        runs = parity_runs(checkpoint, graph, calls)
        progress(f"{graph.name}: comparing with PyTorch")
        parity += [
            replace(record, tolerance=allowed.get(record.output, record.tolerance), least_snr_db=least)
            for record in compare_graph(file, graph, runs, threads=0 if calls else 1)
        ]
    return parity


def _compare_weights(checkpoint: LatentDiffusion, graph: GraphSpec, file: Path) -> list[Parity]:
    """A record that fails if the graph lacks a weight of its network; else none."""
    configs, component = checkpoint.configs, _component(graph)
    module = graph_module(checkpoint.load(component), graph)
    example = random_inputs(graph, EXAMPLE_SIZES, checkpoint.pixels_per_latent, _ids(configs[component]))
    records = compare_weights(file, graph, weights_read(module, example))
    release_weights(module)
    return records


def check_same_graphs(bundle: Bundle, checkpoint: LatentDiffusion) -> None:
    """Raise InputError unless the checkpoint's networks take and give what the bundle's graphs do."""
    for graph in graph_specs(checkpoint):
        if bundle.manifest.graphs.get(graph.name) != graph:
            raise InputError(
                f"{graph.name} of {checkpoint.path} has other inputs or outputs than the bundle {bundle.path}. "
                "Compare a bundle with the checkpoint that it was exported from."
            )


def tolerances(bundle: Bundle, graph: str) -> dict[str, float]:
    """What the bundle allows each output of a graph, by its parity record."""
    return {record["output"]: record["tolerance"] for record in bundle.manifest.parity if record["graph"] == graph}


def parity_runs(checkpoint: LatentDiffusion, graph: GraphSpec, calls: Sequence[Inputs] = ()) -> list[NetworkCall]:
    """A graph's network on seeded inputs or, where there are any, on some of ``calls``; its memory is freed again."""
    configs = checkpoint.configs
    module = graph_module(checkpoint.load(_component(graph)), graph)
    if calls:
        chosen = spread(calls, CALLS_COMPARED)
        inputs = [tuple(torch.from_numpy(call[tensor.name]) for tensor in graph.inputs) for call in chosen]
        with torch.no_grad():
            runs = [(tensors, module(*tensors)) for tensors in inputs]
    else:
        runs = reference_runs(module, graph, checkpoint.pixels_per_latent, _ids(configs[_component(graph)]))
    release_weights(module)
    return runs


def graph_specs(checkpoint: LatentDiffusion) -> list[GraphSpec]:
    """The graphs of a checkpoint, in the order in which they run."""
    configs = checkpoint.configs
    all_states = "text_encoder_2" in configs
    specs = [
        contract.text_encoder_spec(config, name, length=token_count(checkpoint, name), all_states=all_states)
        for name, config in configs.items()
        if name.startswith("text_encoder")
    ]
    unet, vae = configs["unet"], configs["vae"]
    return [*specs, contract.unet_spec(unet), contract.vae_decoder_spec(vae), contract.vae_encoder_spec(vae)]


def _model_facts(checkpoint: LatentDiffusion, pixels_per_latent: int) -> dict[str, Any]:
    """What a runtime needs to know beside the graphs; the C++ runtime reads these and no config file."""
    unet, vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
    height, width = checkpoint.picture_size
    drawing = checkpoint.drawing
    return {
        "class_name": class_name(checkpoint.index),
        "height": height,
        "width": width,
        "latent_channels": vae["latent_channels"],
        "pixels_per_latent": pixels_per_latent,
        "scaling_factor": vae["scaling_factor"],
        "num_class_embeds": unet["num_class_embeds"],
        "default_sampler": drawing.sampler,
        "default_steps": drawing.steps,
        "default_guidance": drawing.guidance,
        "guidance_folded": drawing.folded,
        "prediction_type": checkpoint.scheduler.get("prediction_type", "epsilon"),
        "zeros_for_empty_prompt": bool(option(checkpoint.index, "force_zeros_for_empty_prompt")),
    }


def _source_facts(checkpoint: LatentDiffusion) -> dict[str, Any]:
    """What the checkpoint's own files do not say, and which of its parts are left out."""
    return {
        "sampler": checkpoint.sampler,
        "prediction_type": checkpoint.prediction_type,
        "left_out": left_out(checkpoint.index),
    }


def _component(graph: GraphSpec) -> str:
    """The checkpoint's component that a graph is made from."""
    return "vae" if graph.name.startswith("vae_") else graph.name


def _ids(config: Mapping[str, Any]) -> int:
    """How many token ids or class labels there are."""
    return int(config.get("vocab_size") or config.get("num_class_embeds") or 1)


def _bundle_index(checkpoint: LatentDiffusion) -> dict[str, Any]:
    """``model_index.json`` without the components that a bundle does not have, so that diffusers looks for none."""
    kept = {*checkpoint.components, "scheduler"} | {
        name.replace("text_encoder", "tokenizer") for name in checkpoint.components
    }
    return {
        key: [None, None] if isinstance(value, list) and key not in kept else value
        for key, value in checkpoint.index.items()
    }


def _without_projection(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "with_projection"}


def copy_tokenizer(source: Path, target: Path) -> None:
    """CLIP's files; ``vocab.json`` and ``merges.txt`` are written out where only ``tokenizer.json`` has them."""
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    whole = source / "tokenizer.json"
    open_tokenizer(source)  # refuses what no runtime could read
    target.mkdir()
    for name in (*names, whole.name):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if whole.is_file() and not (target / "vocab.json").is_file():
        model = parsed(read_bytes(whole), repeats=True)["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        _write_json(target / "vocab.json", model["vocab"])
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
