"""Teaches a model what is on a few pictures: LoRA, with class pictures against forgetting (DreamBooth, 2208.12242).

The loop is that of `train`, so what is interrupted resumes, to the bit, and a batch is a function of the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_reference.config import ConfigError
from ldm_reference.fit import Rows, Run, Stage, fit
from ldm_reference.noise import Noise, noise_from_config
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ldm_export.adapt.factors import AdaptObjective, add_factors, by_file_name, start_from, write_factors
from ldm_export.adapt.material import encoded, rows_at
from ldm_export.adapt.options import AdaptOptions, Factors
from ldm_export.adapt.pictures import Asked, Shown, pictures_in
from ldm_export.bundle.atomic import check_output
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.families import family_of
from ldm_export.plan import SAMPLERS
from ldm_export.plan.scheduler_classes import as_trained, is_flow
from ldm_export.reading.hashes import sha256_of
from ldm_export.verify.image_generators import TorchImageGenerator
from ldm_export.verify.torch_reference import more_than_text_or_class

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how much of it is done, and how much there is."""
STAGE = "adapt"
ENDING = ".safetensors"


@dataclass(frozen=True)
class Prior:
    """Pictures of the class that what is taught belongs to, which the model is to keep.

    Attributes
    ----------
    asked : what they show, such as "a robot", or the number of a class
    folder : where they are; None lets the model draw them
    count : how many it draws
    """

    asked: Asked
    folder: Path | None = None
    count: int = 50


@dataclass(frozen=True)
class Learner:
    """A checkpoint's networks, and its denoiser with factors in it.

    Attributes
    ----------
    component : the denoiser's, by which names in files begin
    config : PEFT's
    """

    generator: TorchImageGenerator
    noise: Noise
    objective: AdaptObjective
    component: str
    config: dict[str, Any]


def learner_of(checkpoint: LatentDiffusion, factors: Factors, seed: int, start: Path | None = None) -> Learner:
    """Open a checkpoint and put factors into its denoiser, the first of them random by ``seed``, or those of a file.

    Raises
    ------
    CheckpointError
        If it cannot be exported either.
    InputError
        If the model is given more than text or a class, ``start`` is of other layers, or PEFT is missing.
    """
    given = None if start is None else checkpoint.with_adapters([(start, 1.0)]).merges[0].adapter
    if more := more_than_text_or_class(family_of(checkpoint)):
        raise InputError(
            f"{checkpoint.path}: the denoiser reads {more}. Models that are asked for pictures with a text, the number "
            "of a class, or nothing can be adapted."
        )
    generator, component = TorchImageGenerator(checkpoint), checkpoint.kind.denoiser
    denoiser = generator.reference.denoiser
    config = add_factors(denoiser.network, factors, seed)
    if given is not None:
        start_from(denoiser.network, factors, given, component)
    noise = trained_noise(checkpoint)
    objective = AdaptObjective(denoiser, generator.reference.denoiser_reads, noise)
    return Learner(generator, noise, objective, component, config)


def trained_noise(checkpoint: LatentDiffusion) -> Noise:
    """The noise that a checkpoint's denoiser was trained on, by its scheduler's config and the defaults of its class.

    Raises
    ------
    InputError
        If that has betas of its own.
    """
    scheduler = checkpoint.scheduler
    if scheduler.get("trained_betas"):
        raise InputError(f"{checkpoint.path}: its scheduler has trained_betas, with which nothing is trained here.")
    if is_flow(scheduler):
        return noise_from_config(scheduler)
    return noise_from_config(as_trained(scheduler, SAMPLERS[checkpoint.drawing.sampler]))


def check_asked(generator: TorchImageGenerator, asked: Asked, what: str) -> None:
    """Raise InputError if a model cannot be asked for that; ``what`` names the option."""
    kind = {str: "text", int: "label", type(None): None}[type(asked)]
    needs = {"text": f"a text, --{what}prompt", "label": f"the number of a class, --{what}label", None: "nothing"}
    if generator.condition != kind:
        given = "nothing" if kind is None else needs[kind]
        raise InputError(
            f"{generator.name} is asked for pictures with {needs[generator.condition]}, and {given} was given."
        )
    if isinstance(asked, int) and not 0 <= asked < generator.classes:
        raise InputError(f"Class {asked} is none; this model has 0 to {generator.classes - 1}.")


def adapt(
    checkpoint: LatentDiffusion,
    pictures: Path,
    asked: Asked,
    output: Path,
    options: AdaptOptions,
    *,
    prior: Prior | None = None,
    start: Path | None = None,
    work: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Train a LoRA on the pictures of a folder and write it; gives what was done, as JSON has it.

    Parameters
    ----------
    asked : what the pictures show (`ldm_export.adapt.pictures.pictures_in`)
    output : a safetensors file
    start : a LoRA to start from, such as a meta-learned one
    work : for states of an interrupted run, class pictures and logs; beside ``output`` by default

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be exported either.
    InputError
        If pictures, prompts or options cannot be used, or an interrupted run in ``work`` was another.
    """
    check_names(output)
    shown = pictures_in(pictures, asked)
    work = work or output.with_name(f"{output.stem}.work")
    learner = learner_of(checkpoint, options.factors, options.seed, start)
    generator = learner.generator
    check_asked(generator, asked, "")
    kept: list[Shown] = []
    if prior is not None:
        check_asked(generator, prior.asked, "class-")
        kept = class_pictures(checkpoint, prior, work, options.seed, progress)
    taught, known = encoded(generator, shown), encoded(generator, kept) if kept else None
    noise, objective, component, config = learner.noise, learner.objective, learner.component, learner.config
    del generator, learner  # text encoders and the autoencoder have done their part

    def batch_at(step: int) -> Rows:
        return rows_at(step, taught, known, noise, options.batch_size, options.prior_weight, options.seed)

    recipe = recipe_of(checkpoint, [*shown, *kept], options, start)
    settings = options.optimisation(prior=known is not None)
    stage = Stage(STAGE, objective, batch_at, settings, recipe, options.seed)
    values = by_file_name(_fitted(work, options.mixed_precision, stage, progress))
    made = {
        "checkpoint": checkpoint.name,
        f"{component}_sha256": checkpoint.sha256(component),
        "prompt": asked,
        "pictures": len(shown),
        "class_pictures": len(kept),
        "steps": options.steps,
        "seed": options.seed,
    }
    write_factors(output, component, values, config, made)
    shutil.rmtree(work / "training", ignore_errors=True)
    report = {"output": str(output), "layers": len(values) // 2, "parameters": sum(map(Tensor.numel, values.values()))}
    return {**report, **made, "work": str(work)}


def check_names(output: Path) -> None:
    """Raise InputError if no adapter can be written there."""
    if output.suffix != ENDING:
        raise InputError(f"{output} does not end with {ENDING}, by which others know an adapter. Name it so.")
    check_output(output)


def _fitted(work: Path, mixed_precision: str, stage: Stage, progress: Progress) -> dict[str, Any]:
    """Run `fit` in a folder; raises InputError for what goes wrong there."""

    def advance(name: str, done: int, of: int, loss: float) -> None:
        progress(f"{name}  loss {loss:.4f}", done, of)

    try:
        return fit(Run.begin(work, mixed_precision, advance), stage)
    except ConfigError as error:
        raise InputError(f"{error}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{work} cannot be written ({error}). Make room; the same command resumes.") from error


def recipe_of(
    checkpoint: LatentDiffusion, shown: Sequence[Shown], options: Any, start: Path | None, **more: Any
) -> str:
    """All that a run depends on, as text."""
    content = hashlib.sha256()
    for each in shown:
        content.update(f"{sha256_of(each.file)} {each.asked!r}\n".encode())
    networks = {name: checkpoint.sha256(name) for name in checkpoint.components}
    begun = None if start is None else sha256_of(start)
    parts = [dataclasses.asdict(options), networks, checkpoint.scheduler, content.hexdigest(), begun, more]
    return json.dumps(parts, sort_keys=True)


def class_pictures(checkpoint: LatentDiffusion, prior: Prior, work: Path, seed: int, progress: Progress) -> list[Shown]:
    """The class pictures: a given folder's, or those that the model itself draws into a folder in ``work``, each
    once."""
    if prior.folder is not None:
        return pictures_in(prior.folder, prior.asked)
    drawn_of = f"{[checkpoint.sha256(name) for name in checkpoint.components]} {prior.asked!r}"
    folder = work / f"class-{hashlib.sha256(drawn_of.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    named = [Shown(folder / f"{seed + number}.png", prior.asked) for number in range(prior.count)]
    missing = [each for each in named if not each.file.is_file()]
    generator = TorchImageGenerator(checkpoint) if missing else None
    for done, each in enumerate(missing):
        assert generator is not None
        progress("class pictures", done, len(missing))
        asked = 0 if each.asked is None else each.asked
        (image,) = generator.draw([asked], [int(each.file.stem)], generator.defaults)
        partial = each.file.with_suffix(".partial")
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, format="PNG")
        partial.replace(each.file)
    return named
