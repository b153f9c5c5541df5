"""Applies a recipe: pass by pass, each result exported, measured on its bundle, and kept or undone.

Every stage has a folder of its own, with its checkpoint (passes over networks), its bundle, its pictures and, last,
``stage.json``: a run that is interrupted goes on with the pass, and inside a training with the state, that it was at. A
stage is known by its key, a hash over all that it depends on; where a shipped checkpoint has the keys of the recipe's
first passes, their training is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import write_whole
from ldm_export.bundle.bundle import check_output_folder
from ldm_export.checkpoint import PASSES, Drawing, LatentDiffusion, shipped_checkpoints
from ldm_export.errors import BundleError, ExportError, InputError, ParityError
from ldm_export.export.accepted import open_tokenizer
from ldm_export.export.chain import export_bundle
from ldm_export.export.graphs import change_graphs, copy_bundle
from ldm_export.passes.base import Setting
from ldm_export.passes.distill_guidance import DistillGuidance
from ldm_export.passes.distill_steps import DistillSteps
from ldm_export.passes.teacher import TeacherData, draw_latents, encode_conditions, encode_pictures
from ldm_export.recipe.pictures import draw_gallery
from ldm_export.recipe.score import Judge, Score, verdict
from ldm_export.recipe.settings import GRAPH_PASSES, Recipe
from ldm_export.verify.calibration import calibration_calls, calibration_conditions
from ldm_export.verify.image_text_alignment import AlignmentJudge, Pictures, open_pictures
from ldm_export.verify.quality import Progress

STAGE, PICTURES = "stage.json", "pictures.npy"
LATENTS_SEED = 0

Record = dict[str, Any]
"""What a pass did and whether it stayed, as it goes into manifests: name, options, key, kept, why, faster, report,
score."""


@dataclass(frozen=True)
class Stage:
    """What a recipe has come to.

    Attributes
    ----------
    checkpoint : the networks; after passes over graphs, those that the graphs were exported from
    bundle : its graphs; of a pass whose result is adopted with that of a later one, those of the stage before
    ahead : how much faster than ``bundle`` the stage is
    """

    key: str
    checkpoint: LatentDiffusion
    bundle: Bundle
    score: Score
    ahead: float = 1.0


def run_recipe(
    checkpoint: LatentDiffusion,
    recipe: Recipe,
    output: Path,
    work: Path,
    *,
    data: Path | None = None,
    held_out: Path | None = None,
    alignment: AlignmentJudge | None = None,
    from_scratch: bool = False,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> tuple[Bundle, list[Record]]:
    """Make a bundle of a checkpoint by a recipe.

    Parameters
    ----------
    work : where stages are kept; the same recipe goes on there
    data, held_out : pictures to judge by; by default the teacher draws some itself
    from_scratch : train even what a shipped checkpoint has the result of

    Returns
    -------
    The bundle, and a record of the teacher and of every pass, undone ones included.

    Raises
    ------
    InputError
        If the recipe does not fit the model. What was done so far stays in ``work``.
    """
    check_output_folder(output, force)
    if held_out is not None and data is None:
        raise InputError(f"--held-out {held_out} was given without --data; give the pictures that prompts are of, too.")
    _check_guidance(checkpoint, recipe)
    pictures = _pictures(checkpoint, recipe, data)
    told = [said for _, said in pictures.conditions] if pictures else _told(checkpoint, recipe)
    run = _Run(checkpoint, recipe, work, told, pictures, from_scratch, progress)
    try:
        return run.run(output, data, held_out, alignment, force)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        raise InputError(
            f"{work} cannot be written ({error}). Free some space, or choose another --work folder; the recipe goes on."
        ) from error


class _Run:
    def __init__(
        self,
        checkpoint: LatentDiffusion,
        recipe: Recipe,
        work: Path,
        told: Sequence[str | int],
        pictures: Pictures | None,
        from_scratch: bool,
        progress: Progress,
    ):
        drawing = Drawing("ddim", recipe.teacher.steps, recipe.teacher.guidance if checkpoint.reads_text else 1.0)
        self.teacher = replace(checkpoint, drawn_with=drawing)
        self.recipe, self.work, self.told, self.pictures = recipe, work, told, pictures
        self.from_scratch, self.progress = from_scratch, progress
        self._data: TeacherData | None = None
        self._key = ""
        self._calibration: tuple[str, dict[str, Any]] = ("", {})

    def run(
        self,
        output: Path,
        data: Path | None,
        held_out: Path | None,
        alignment: AlignmentJudge | None,
        force: bool,
    ) -> tuple[Bundle, list[Record]]:
        weights = [self.teacher.sha256(name) for name in self.teacher.components]
        learned = None if self.pictures is None else hashlib.sha256(self.pictures.images.tobytes()).hexdigest()
        key = _hash(weights, asdict(self.recipe.teacher), list(self.told), *([learned] if learned else []))
        self._key = key
        folder = self.work / "00-teacher"
        plain = self._plain_bundle(folder / "bundle", self.teacher)
        if data is None:
            data, held_out = draw_gallery(
                plain, self.told, self.recipe.budget.pictures, self.work / "pictures", self.progress
            )
        judge = Judge(data, held_out or data, alignment, self.recipe.budget.pictures, self.progress)
        record = _finished(folder, key, judge)
        if record is None:
            score, _, pictures = judge.score(plain, None, None)
            record = {
                "name": "teacher",
                "options": asdict(self.recipe.teacher),
                "key": key,
                "judged_on": judge.name,
                "kept": True,
                "score": score.to_dict(),
            }
            _finish(folder, record, pictures)
        teacher = current = Stage(key, self.teacher, plain, Score.from_dict(record["score"]))
        records: list[Record] = [record]
        passes: list[Any] = [*self.recipe.torch_passes, *self.recipe.graph_passes]
        adopted = None if self.from_scratch else self._adopted(key)
        for number, step in enumerate(passes, 1):
            key = _hash(current.key, step.name, asdict(step))
            folder = self.work / f"{number:02d}-{step.name}-{key[:8]}"  # other options, other folder: nothing is lost
            record = _finished(folder, key, judge)
            if record is None and adopted is not None and number < len(adopted.passes) - 1:
                record = adopted.passes[number]  # the teacher's is the first; the last has what the others led to
                _finish(folder, record, None)
            if record is None:
                record = self._apply(step, folder, key, teacher, current, judge, adopted, records)
            records.append(record)
            if record["kept"] and (folder / "bundle").is_dir():
                changed = folder / "checkpoint"
                current = Stage(
                    key,
                    LatentDiffusion.open(changed) if changed.is_dir() else current.checkpoint,
                    Bundle.open(folder / "bundle"),
                    Score.from_dict(record["score"]),
                )
            elif record["kept"]:
                score = Score.from_dict(record["score"])
                current = replace(current, key=key, score=score, ahead=current.ahead * record["faster"])
        return copy_bundle(current.bundle, output, passes=records, force=force), records

    def _apply(
        self,
        step: Any,  # TorchPass or GraphPass
        folder: Path,
        key: str,
        teacher: Stage,
        current: Stage,
        judge: Judge,
        adopted: LatentDiffusion | None,
        records: Sequence[Record],
    ) -> Record:
        """One pass: change, export, measure, decide. Leaves all of it in ``folder``, ``stage.json`` last."""
        record: Record = {"name": step.name, "options": asdict(step), "key": key, "judged_on": judge.name}
        started = time.perf_counter()
        try:
            bundle, report = self._changed(step, folder, current, adopted, records, record)
        except (ParityError, ExportError) as error:
            record |= {"kept": False, "why": str(error), "seconds": time.perf_counter() - started}
            _finish(folder, record, None)
            return record
        seconds = time.perf_counter() - started
        pictures = np.load(self.work / "00-teacher" / PICTURES, allow_pickle=False)
        score, faster, drawn = judge.score(bundle, current.bundle, pictures)
        assert faster is not None
        faster /= current.ahead
        why = verdict(step.purpose, self.recipe.budget, teacher.score, current.score, score, faster)
        record |= {
            "kept": why is None,
            "faster": faster,
            "seconds": seconds,
            "report": report,
            "score": score.to_dict(),
        }
        if why is not None:
            record["why"] = why
        changed = folder / "checkpoint"
        if changed.is_dir():
            LatentDiffusion.open(changed).record_passes([*records, record])
        _finish(folder, record, drawn)
        return record

    def _changed(
        self,
        step: Any,
        folder: Path,
        current: Stage,
        adopted: LatentDiffusion | None,
        records: Sequence[Record],
        record: Record,
    ) -> tuple[Bundle, Mapping[str, Any]]:
        def stage(what: str) -> None:
            self.progress(f"{step.name}: {what}", 0, 1)

        if step.name in GRAPH_PASSES:
            told, calls = self._calls(current)
            return change_graphs(current.bundle, folder / "bundle", step, calls, told, current.checkpoint, stage)
        path = folder / "checkpoint"
        if adopted is not None and adopted.passes[-1]["key"] == record["key"]:
            shutil.copytree(adopted.path, path, dirs_exist_ok=True)
        elif not (path / PASSES).is_file():  # which is written last: with it, an interrupted run had come that far
            shutil.rmtree(path, ignore_errors=True)
            change = step.apply(Setting(current.checkpoint, self.teacher, self._latents(), folder, self.progress))
            drawing = change.drawing or current.checkpoint.drawing
            passes = [*records, {**record, "report": dict(change.report)}]
            current.checkpoint.save_changed(path, change.networks, change.scheduler, drawing, passes)
        checkpoint = LatentDiffusion.open(path)
        bundle = export_bundle(checkpoint, folder / "bundle", force=True, progress=stage)
        return bundle, checkpoint.passes[-1]["report"]

    def _plain_bundle(self, folder: Path, checkpoint: LatentDiffusion) -> Bundle:
        if folder.is_dir():
            try:
                bundle = Bundle.open(folder)
                model, drawing = bundle.manifest.model, checkpoint.drawing
                same = (model["default_steps"], model["default_guidance"]) == (drawing.steps, drawing.guidance)
                weights = {name: checkpoint.sha256(name) for name in checkpoint.components}
                if same and bundle.manifest.source["sha256"] == weights:
                    return bundle
            except (BundleError, KeyError):
                pass
        return export_bundle(
            checkpoint, folder, force=True, progress=lambda what: self.progress(f"teacher: {what}", 0, 1)
        )

    def _latents(self) -> TeacherData:
        """What students learn from; made when the first pass asks for it."""
        if self._data is None:
            tokenize = (
                open_tokenizer(self.teacher.tokenizer_folder("text_encoder")) if self.teacher.reads_text else None
            )
            conditions, empty = encode_conditions(
                self.teacher,
                self.told,
                None if tokenize is None else lambda prompts: torch.from_numpy(tokenize(prompts)),
            )
            if self.teacher.drawing.guidance <= 1:
                empty = {}
            if self.pictures is not None:
                owner = [number for number, _ in self.pictures.conditions] or list(range(len(self.pictures.images)))
                latents = encode_pictures(self.teacher, self.pictures.images)[owner]
                own = torch.arange(len(latents)) if conditions else torch.zeros(len(latents), dtype=torch.int64)
                self._data = TeacherData(conditions, empty, latents, own, self.teacher.drawing.guidance)
                return self._data
            count = self.recipe.teacher.latents
            self._data = draw_latents(
                self.teacher,
                conditions,
                empty,
                self.teacher.drawing,
                min(count, len(self.told)) if self.teacher.reads_text else count,
                LATENTS_SEED,
                self.work / "teacher" / f"latents-{self._key[:8]}.safetensors",
                self.progress,
                self.recipe.teacher.mixed_precision,
            )
        return self._data

    def _calls(self, current: Stage) -> tuple[list[str | int], dict[str, Any]]:
        """Calibration data of a stage's graphs, and what it was drawn of."""
        told = calibration_conditions(self.told)
        if self._calibration[0] != current.key:
            self.progress("calibration pictures", 0, 1)
            self._calibration = current.key, calibration_calls(current.bundle, told)
        return told, self._calibration[1]

    def _adopted(self, key: str) -> LatentDiffusion | None:
        """The shipped checkpoint that has the results of the most of the recipe's first passes, if any has."""
        found: list[LatentDiffusion] = []
        for name in shipped_checkpoints():
            candidate = LatentDiffusion.open(name)
            records, at = candidate.passes, key
            fits = len(records) > 1 and records[0]["key"] == key and len(records) <= len(self.recipe.torch_passes) + 1
            steps: Sequence[Any] = self.recipe.torch_passes
            for step, record in zip(steps, records[1:], strict=False):
                expected = _hash(at, step.name, asdict(step))
                fits = fits and record["key"] == expected
                at = expected if record["kept"] else at
            if fits:
                found.append(candidate)
        return max(found, key=lambda candidate: len(candidate.passes), default=None)


def _pictures(checkpoint: LatentDiffusion, recipe: Recipe, data: Path | None) -> Pictures | None:
    """What students learn from, if that is a folder."""
    if recipe.teacher.latents_from != "data":
        return None
    if data is None:
        raise InputError(
            f'The recipe {recipe.name} says latents_from = "data", and no pictures were given; add --data FOLDER.'
        )
    unet, vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
    height, width = checkpoint.picture_size
    if height != width:
        raise InputError(
            f'The recipe {recipe.name} says latents_from = "data"; those pictures are square, and {checkpoint.name} '
            f"makes {height} x {width}. Leave latents_from out: the teacher then makes them."
        )
    condition = "text" if checkpoint.reads_text else "label" if unet["num_class_embeds"] else None
    return open_pictures(data, height, vae["in_channels"], condition)


def _check_guidance(checkpoint: LatentDiffusion, recipe: Recipe) -> None:
    """Steps are distilled of a network that is called once a step."""
    passes = {step.name: step for step in recipe.torch_passes}
    guided = checkpoint.reads_text and recipe.teacher.guidance > 1 and not checkpoint.drawing.folded
    folded = getattr(passes.get(DistillGuidance.name), "method", None) == "fixed"
    if DistillSteps.name in passes and guided and not folded:
        raise InputError(
            f"The recipe {recipe.name} has {DistillSteps.name} for {checkpoint.name}, which is drawn with guidance "
            f"{recipe.teacher.guidance:g}; put {DistillGuidance.name}, with the method fixed, before it."
        )


def _told(checkpoint: LatentDiffusion, recipe: Recipe) -> list[str | int]:
    """What the model is asked for: the recipe's prompts, all classes, or nothing."""
    classes = checkpoint.configs["unet"]["num_class_embeds"]
    if checkpoint.reads_text and not recipe.prompts:
        raise InputError(
            f"{checkpoint.name} reads text and the recipe {recipe.name} has no prompts; add prompts = FILE."
        )
    if checkpoint.reads_text:
        return list(recipe.prompts)
    return list(range(classes)) if classes else []


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _finished(folder: Path, key: str, judge: Judge) -> Record | None:
    """The record of a stage that was finished under this key, and judged on the same pictures."""
    try:
        record: Record = json.loads((folder / STAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = not record.get("kept") or (folder / "bundle").is_dir()
    return record if complete and (record.get("key"), record.get("judged_on")) == (key, judge.name) else None


def _finish(folder: Path, record: Record, pictures: npt.NDArray[Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if pictures is not None:
            np.save(folder / PICTURES, pictures, allow_pickle=False)
        write_whole(folder / STAGE, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}). Free some space; the recipe goes on."
        ) from error
