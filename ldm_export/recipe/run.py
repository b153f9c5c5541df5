"""Applies a recipe: pass by pass, each result exported, measured on its bundle, and kept or undone.

A run that is interrupted goes on with the pass, and inside a training with the state, that it was at: what a stage has
come to is kept in a folder of its own (:mod:`ldm_export.recipe.stages`). Where a shipped checkpoint has the results of
the recipe's first passes, their training is not repeated.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ldm_export.bundle import Bundle
from ldm_export.bundle.bundle import check_output_folder
from ldm_export.bundle.plans import with_plan
from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.checkpoint.networks import UNET
from ldm_export.contract import NONE
from ldm_export.errors import BundleError, ExportError, InputError, ParityError
from ldm_export.export.chain import export_bundle
from ldm_export.export.graphs import copy_bundle
from ldm_export.families import family_of, open_checkpoint
from ldm_export.passes.base import learns_from_noise
from ldm_export.passes.distill_guidance import DistillGuidance
from ldm_export.passes.distill_steps import DistillSteps
from ldm_export.passes.prune_weights import PruneWeights
from ldm_export.plan.scheduler_classes import is_flow
from ldm_export.reading.hashes import hash_of
from ldm_export.recipe.change import Pass, adoptable, changed
from ldm_export.recipe.material import Material
from ldm_export.recipe.pictures import draw_gallery
from ldm_export.recipe.score import Judge, Score, verdict
from ldm_export.recipe.settings import Recipe
from ldm_export.recipe.stages import BUNDLE, CHECKPOINT, PICTURES, Record, Stage, StageCache
from ldm_export.verify.image_text_alignment import AlignmentJudge, Pictures, open_pictures
from ldm_export.verify.quality import Progress

TEACHER = "00-teacher"


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
    if checkpoint.merges:
        raise InputError(
            "A recipe was given with --lora; its passes read the checkpoint's files, in which the adapter is not. Save "
            "a checkpoint with the adapter in it (diffusers: fuse_lora, then save_pretrained), and give that."
        )
    if checkpoint.embeddings:
        raise InputError(
            "A recipe was given with --embedding; its passes read the checkpoint's files, in which the token is not. "
            "Save a checkpoint with it (diffusers: load_textual_inversion, then save_pretrained), and give that."
        )
    check_output_folder(output, force)
    if held_out is not None and data is None:
        raise InputError(f"--held-out {held_out} was given without --data; give the pictures that prompts are of, too.")
    _check_network(checkpoint, recipe)
    _check_guidance(checkpoint, recipe)
    pictures = _pictures(checkpoint, recipe, data)
    teacher, conditions, key = teacher_of(checkpoint, recipe, pictures)
    latents = work / "teacher" / f"latents-{key[:8]}.safetensors"
    material = Material(teacher, recipe.teacher, conditions, pictures, latents, progress)
    try:
        plain = _plain_bundle(work / TEACHER / BUNDLE, teacher, progress)
        if recipe.plan is not None:  # refused before any pass runs, if it cannot be
            _with_default_plan(plain, recipe)
        if data is None:
            data, held_out = draw_gallery(plain, conditions, recipe.budget.pictures, work / "pictures", progress)
        judge = Judge(data, held_out or data, alignment, recipe.budget.pictures, progress)
        adopted = None if from_scratch else adoptable(key, list(recipe.torch_passes))
        run = _Run(recipe, material, judge, StageCache(work, judge.name), adopted)
        stage = run.begun(key, plain)
        passes: list[Pass] = [*recipe.torch_passes, *recipe.graph_passes]
        for number, step in enumerate(passes, 1):
            stage = run.after(stage, step, number)
        made, drawn = (stage.bundle, None) if recipe.plan is None else _with_default_plan(stage.bundle, recipe)
        return copy_bundle(made, output, passes=stage.records, force=force, drawing=drawn), list(stage.records)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        raise InputError(
            f"{work} cannot be written ({error}). Free some space, or choose another --work folder; the recipe goes on."
        ) from error


def teacher_of(
    checkpoint: LatentDiffusion, recipe: Recipe, pictures: Pictures | None
) -> tuple[LatentDiffusion, list[str | int], str]:
    """The teacher as the recipe draws it, what it is asked for, and its stage's key: a hash of all of that."""
    conditions = [said for _, said in pictures.conditions] if pictures else _conditions(checkpoint, recipe)
    sampler = checkpoint.drawing.sampler if is_flow(checkpoint.scheduler) else "ddim"
    guided = family_of(checkpoint).roles.guidance.kind != NONE or checkpoint.reads_text
    drawing = SamplingDefaults(sampler, recipe.teacher.steps, recipe.teacher.guidance if guided else 1.0)
    teacher = replace(checkpoint, drawn_with=drawing)
    weights = [teacher.sha256(name) for name in teacher.components]
    learned = [] if pictures is None else [hashlib.sha256(pictures.images.tobytes()).hexdigest()]
    return teacher, conditions, hash_of(weights, asdict(recipe.teacher), list(conditions), *learned)


@dataclass(frozen=True)
class _Run:
    """A recipe at work: each method gives the stage that comes next."""

    recipe: Recipe
    material: Material
    judge: Judge
    cache: StageCache
    adopted: LatentDiffusion | None

    def begun(self, key: str, plain: Bundle) -> Stage:
        """The teacher, judged."""
        folder, teacher = self.cache.work / TEACHER, self.material.teacher
        record = self.cache.find(folder, key)
        if record is None:
            score, _, pictures = self.judge.score(plain, None, None)
            options = asdict(self.recipe.teacher)
            record = {"name": "teacher", "options": options, "key": key, "judged_on": self.judge.name}
            record = self.cache.keep(folder, {**record, "kept": True, "score": score.to_dict()}, pictures)
        return Stage(key, teacher, plain, Score.from_dict(record["score"]), records=[record])

    def after(self, stage: Stage, step: Pass, number: int) -> Stage:
        """A pass on a stage: found finished, adopted, or applied and judged."""
        key = stage.key_of(step)
        folder = self.cache.folder(number, step.name, key)
        record = self.cache.find(folder, key) or self._adopted(number, folder) or self._apply(stage, step, folder, key)
        return stage.after(record, folder)

    def _adopted(self, number: int, folder: Path) -> Record | None:
        """The record of a pass whose result a shipped checkpoint has, but for the last, which made its weights."""
        if self.adopted is None or number >= len(self.adopted.passes) - 1:
            return None
        return self.cache.keep(folder, self.adopted.passes[number])

    def _apply(self, stage: Stage, step: Pass, folder: Path, key: str) -> Record:
        """Change, export, measure, decide. Leaves all of it in ``folder``, the record last."""
        options = asdict(step)  # type: ignore[call-overload]
        record: Record = {"name": step.name, "options": options, "key": key, "judged_on": self.judge.name}
        started = time.perf_counter()
        try:
            bundle, report = changed(stage, step, folder, record, self.material, self.adopted)
        except (ParityError, ExportError) as error:
            seconds = time.perf_counter() - started
            return self.cache.keep(folder, {**record, "kept": False, "why": str(error), "seconds": seconds})
        seconds = time.perf_counter() - started
        pictures = np.load(self.cache.work / TEACHER / PICTURES, allow_pickle=False)
        score, faster, drawn = self.judge.score(bundle, stage.bundle, pictures)
        assert faster is not None
        faster /= stage.ahead
        teacher = Score.from_dict(stage.records[0]["score"])
        why = verdict(step.purpose, self.recipe.budget, teacher, stage.score, score, faster)
        record |= {"kept": why is None, "faster": faster, "seconds": seconds, "report": report}
        record |= {"score": score.to_dict(), **({} if why is None else {"why": why})}
        if (folder / CHECKPOINT).is_dir():
            open_checkpoint(folder / CHECKPOINT).record_passes([*stage.records, record])
        return self.cache.keep(folder, record, drawn)


def _plain_bundle(folder: Path, teacher: LatentDiffusion, progress: Progress) -> Bundle:
    """The teacher's bundle, exported unless the one that is there is of the same weights, generated with alike."""
    if folder.is_dir():
        try:
            bundle = Bundle.open(folder)
            model, drawing = bundle.manifest.model, teacher.drawing
            same = (model["default_steps"], bundle.roles.guidance.scale) == (drawing.steps, drawing.guidance)
            weights = {name: teacher.sha256(name) for name in teacher.components}
            if same and bundle.manifest.source["sha256"] == weights:
                return bundle
        except (BundleError, KeyError):
            pass
    return export_bundle(teacher, folder, force=True, progress=lambda what: progress(f"teacher: {what}", 0, 1))


def _with_default_plan(bundle: Bundle, recipe: Recipe) -> tuple[Bundle, tuple[str, int]]:
    """The bundle with the file of the recipe's plan, and the plan's name."""
    assert recipe.plan is not None
    chosen, plan = recipe.plan
    drawing = chosen.sampler, chosen.steps
    if plan is not None:
        return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode()), drawing
    return with_plan(bundle, *drawing)[0], drawing


def _pictures(checkpoint: LatentDiffusion, recipe: Recipe, data: Path | None) -> Pictures | None:
    """What students learn from, if that is a folder."""
    if recipe.teacher.latents_from != "data":
        return None
    if data is None:
        raise InputError(
            f'The recipe {recipe.name} says latents_from = "data", and no pictures were given; add --data FOLDER.'
        )
    vae, classes = checkpoint.configs["vae"], family_of(checkpoint).facts["class_count"]
    height, width = checkpoint.picture_size
    if height != width:
        raise InputError(
            f'The recipe {recipe.name} says latents_from = "data"; those pictures are square, and {checkpoint.name} '
            f"makes {height} x {width}. Leave latents_from out: the teacher then makes them."
        )
    condition = "text" if checkpoint.reads_text else "label" if classes else None
    return open_pictures(data, height, vae["in_channels"], condition)


def _check_network(checkpoint: LatentDiffusion, recipe: Recipe) -> None:
    """Passes over PyTorch networks are for UNets, but for those that learn nothing."""
    names = ", ".join(
        step.name for step in recipe.torch_passes if not (isinstance(step, PruneWeights) and not step.updates)
    )
    denoiser = checkpoint.index[checkpoint.kind.denoiser][-1]
    if names and not learns_from_noise(checkpoint):
        raise InputError(
            f"The recipe {recipe.name} has {names}, for a {' or '.join(UNET.classes)}; {checkpoint.name} has a "
            f"{denoiser}. Leave them out; passes over graphs (half, quantize-...) apply, and prune-weights with "
            "updates = 0."
        )


def _check_guidance(checkpoint: LatentDiffusion, recipe: Recipe) -> None:
    """Steps are distilled of a network that is called once a step."""
    passes = {step.name: step for step in recipe.torch_passes}
    guided = checkpoint.reads_text and recipe.teacher.guidance > 1 and not checkpoint.drawing.guidance_distilled
    distilled = getattr(passes.get(DistillGuidance.name), "method", None) == "fixed"
    if DistillSteps.name in passes and guided and not distilled:
        raise InputError(
            f"The recipe {recipe.name} has {DistillSteps.name} for {checkpoint.name}, which is drawn with guidance "
            f"{recipe.teacher.guidance:g}; put {DistillGuidance.name}, with the method fixed, before it."
        )


def _conditions(checkpoint: LatentDiffusion, recipe: Recipe) -> list[str | int]:
    """What the model is asked for: the recipe's prompts, all classes, or nothing."""
    classes = family_of(checkpoint).facts["class_count"]
    if checkpoint.reads_text and not recipe.prompts:
        raise InputError(
            f"{checkpoint.name} reads text and the recipe {recipe.name} has no prompts; add prompts = FILE."
        )
    if checkpoint.reads_text:
        return list(recipe.prompts)
    return list(range(classes)) if classes else []
