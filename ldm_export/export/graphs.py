"""Changes the graphs of a bundle: the same files, some graphs rewritten by a pass, compared with PyTorch again."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir

from ldm_export.bundle import Bundle, create_bundle
from ldm_export.bundle.atomic import partial_folder
from ldm_export.bundle.manifest import MANIFEST, is_loop, is_target
from ldm_export.bundle.parity import check_parity
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import ExportError, InputError
from ldm_export.export.chain import Progress, parity_runs, tolerances
from ldm_export.export.parity import compare_graph
from ldm_export.families import family_of
from ldm_export.graph.base import GraphPass, Inputs
from ldm_export.graph.files import load_outside, save
from ldm_export.graph.weights import check_weights, least_snr_db

CALIBRATION = "calibration"
"""Key in a manifest's ``source``: what calibration pictures were drawn of, so that they can be drawn again."""


def change_graphs(
    bundle: Bundle,
    output: Path,
    step: GraphPass,
    calibration: Mapping[str, Sequence[Inputs]],
    conditions: Sequence[str | int],
    checkpoint: LatentDiffusion,
    progress: Progress = lambda stage: None,
) -> tuple[Bundle, dict[str, Any]]:
    """Apply a pass to the graphs that it names; gives the new bundle, and the pass's report on each graph.

    Loops, which were made of the graphs as they were, are left behind.

    Parameters
    ----------
    calibration : {graph: its inputs in each recorded call}
    conditions : prompts or classes that the calls were recorded under
    checkpoint : the networks that the bundle was exported from

    Raises
    ------
    InputError
        If the bundle has none of these graphs.
    ParityError
        If a weight is not the one that it was rounded from, or a graph's output differs from its network's by more than
        the pass's tolerance, or has more noise than graphs of its precision may. Nothing is sealed.
    """
    names = graphs_of(bundle, step)
    if not names:
        raise InputError(
            f"{step.name} is for {', '.join(step.graphs)}; this bundle has {', '.join(bundle.manifest.graphs)}."
        )
    reports: dict[str, Any] = {}
    networks = {graph.spec.name: graph for graph in family_of(checkpoint).graphs}
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if not is_loop(graph.path)}
    kept = graphs.keys() - set(names)
    parity = [record for record in bundle.manifest.parity if record["graph"] in kept]
    with create_bundle(output, force=True) as writer:
        changed = {f"{graphs[name].path}{end}" for name in names for end in ("", "_data")}
        copy_files(bundle, writer.path, [path for path in bundle.manifest.files if is_loop(path) or path in changed])
        for name in names:
            graph, calls = graphs[name], calibration[name]
            file = writer.path / graph.path
            progress(f"{name}: {step.name}")
            with partial_folder(output.with_name(f"{output.name}.weights")) as outside:
                change = step.apply(load_outside(bundle.file(graph.path), outside), calls)
                file.parent.mkdir(exist_ok=True)
                save(onnx_ir.from_proto(change.model), file)
            reports[name] = dict(change.report)
            del change  # a large network takes its place
            try:
                onnx.checker.check_model(str(file), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise ExportError(f"{step.name} made no valid ONNX of {name} ({error}). Nothing was kept.") from error
            progress(f"{name}: comparing with PyTorch")
            written = onnx_ir.load(file)
            least = least_snr_db(written)
            if least is not None:  # its weights are rounded, and no others
                check_weights(onnx_ir.load(bundle.file(graph.path)), written, name)
            tolerance = max([step.tolerance, *tolerances(bundle, name).values()])
            records = [
                replace(record, tolerance=tolerance, least_snr_db=least)
                for record in compare_graph(file, graph, parity_runs(checkpoint, networks[name], calls))
            ]
            check_parity(records)
            parity += [record.to_dict() for record in records]
        manifest = bundle.manifest
        sealed = writer.seal(
            model=manifest.model,
            graphs=graphs,
            source={**manifest.source, CALIBRATION: list(conditions)},
            passes=manifest.passes,
            parity=parity,
            roles=manifest.roles,
        )
    return sealed, reports


def graphs_of(bundle: Bundle, step: GraphPass) -> list[str]:
    """Names of the bundle's graphs that a pass is for, by their roles or their names."""
    named = dict.fromkeys(name for each in step.graphs for name in bundle.roles.named(each))
    return [name for name in named if name in bundle.manifest.graphs]


def copy_bundle(
    bundle: Bundle,
    output: Path,
    *,
    passes: Sequence[Mapping[str, Any]],
    force: bool,
    drawing: tuple[str, int] | None = None,
) -> Bundle:
    """The same bundle elsewhere, with a record of what was done to it.

    Parameters
    ----------
    drawing : sampler and steps that it is drawn with by default from now on; by default, as it was
    """
    with create_bundle(output, force=force, needed_bytes=bundle.size_bytes) as writer:
        copy_files(bundle, writer.path)
        manifest = bundle.manifest
        drawn = {} if drawing is None else dict(zip(("default_sampler", "default_steps"), drawing, strict=True))
        return writer.seal(
            model={**manifest.model, **drawn},
            graphs=manifest.graphs,
            source=manifest.source,
            passes=passes,
            parity=manifest.parity,
            roles=manifest.roles,
        )


def copy_files(bundle: Bundle, folder: Path, left_out: Collection[str] = ()) -> None:
    """Everything that is listed, but for what is left out; neither the manifest nor targets."""
    for relative in bundle.manifest.files:
        if relative in left_out:
            continue
        assert relative != MANIFEST
        assert not is_target(relative)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / relative, folder / relative)
