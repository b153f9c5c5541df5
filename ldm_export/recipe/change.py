"""How a pass changes a stage: networks are changed and exported anew, or the bundle's graphs are changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import PASSES, LatentDiffusion, shipped_checkpoints
from ldm_export.export.chain import export_bundle
from ldm_export.export.graphs import change_graphs
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import GraphPass
from ldm_export.passes.base import PassContext, TorchPass, learns_from_noise
from ldm_export.passes.teacher import TeacherData
from ldm_export.reading.hashes import hash_of
from ldm_export.recipe.material import Material
from ldm_export.recipe.settings import GRAPH_PASSES
from ldm_export.recipe.stages import BUNDLE, CHECKPOINT, Record, Stage

Pass = TorchPass | GraphPass


def changed(
    stage: Stage, step: Pass, folder: Path, record: Record, material: Material, adopted: LatentDiffusion | None
) -> tuple[Bundle, Mapping[str, Any]]:
    """Apply a pass to a stage; gives the new bundle, under ``folder``, and what the pass reports.

    Parameters
    ----------
    record : of the pass, as far as it is known; written with a changed checkpoint
    adopted : a checkpoint that may have the result already

    Raises
    ------
    ParityError, ExportError
        If the result is not what it shall be, or cannot be exported.
    """

    def progress(what: str) -> None:
        material.progress(f"{step.name}: {what}", 0, 1)

    if step.name in GRAPH_PASSES:
        calls, conditions = material.calls(stage), material.calibration_conditions
        graph_pass: Any = step
        return change_graphs(stage.bundle, folder / BUNDLE, graph_pass, calls, conditions, stage.checkpoint, progress)
    path = folder / CHECKPOINT
    if adopted is not None and adopted.passes[-1]["key"] == record["key"]:
        shutil.copytree(adopted.path, path, dirs_exist_ok=True)
    elif not (path / PASSES).is_file():  # which is written last: with it, an interrupted run had come that far
        shutil.rmtree(path, ignore_errors=True)
        _save_changed(stage, step, path, record, material)
    checkpoint = open_checkpoint(path)
    bundle = export_bundle(checkpoint, folder / BUNDLE, force=True, progress=progress)
    return bundle, checkpoint.passes[-1]["report"]


def _save_changed(stage: Stage, step: Any, path: Path, record: Record, material: Material) -> None:
    """Apply a pass over networks and write the checkpoint that it leads to."""
    data = material.data if learns_from_noise(stage.checkpoint) else TeacherData.nothing()
    made = step.apply(PassContext(stage.checkpoint, material.teacher, data, path.parent, material.progress))
    drawing = made.drawing or stage.checkpoint.drawing
    passes = [*stage.records, {**record, "report": dict(made.report)}]
    stage.checkpoint.save_changed(path, made.networks, made.scheduler, drawing, passes)


def adoptable(key: str, steps: list[TorchPass]) -> LatentDiffusion | None:
    """The shipped checkpoint that has the results of the most of a recipe's first passes, if any has.

    Parameters
    ----------
    key : of the recipe's teacher
    """
    found: list[LatentDiffusion] = []
    for name in shipped_checkpoints():
        candidate = open_checkpoint(name)
        records, at = candidate.passes, key
        fits = len(records) > 1 and records[0]["key"] == key and len(records) <= len(steps) + 1
        for step, record in zip(steps, records[1:], strict=False):
            options: Any = step
            expected = hash_of(at, step.name, asdict(options))
            fits = fits and record["key"] == expected
            at = expected if record["kept"] else at
        if fits:
            found.append(candidate)
    return max(found, key=lambda candidate: len(candidate.passes), default=None)
