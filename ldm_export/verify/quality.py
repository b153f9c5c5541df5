"""How good a model's pictures are, of a PyTorch checkpoint and of a bundle alike: same prompts, seeds and judges.

Reconstruction is of the autoencoder alone, on pictures that it was not trained on. The rest is of drawn pictures, one a
prompt: does a picture look like those of its own prompt (retrieval, alignment), do all of them look like real ones
(distances between sets, beside the floor that two sets of real pictures have), and are they copies (memorisation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import shipped_checkpoints
from ldm_export.errors import CheckpointError, InputError
from ldm_export.families import open_checkpoint
from ldm_export.families.tokenizers import open_tokenizer
from ldm_export.verify.image_generators import ImageGenerator, SamplingSettings
from ldm_export.verify.image_text_alignment import AlignmentJudge, Pictures, features_of, open_pictures
from ldm_export.verify.metrics import (
    Figure,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    over_hits,
    over_pictures,
    over_sets,
    psnr,
    recalled,
    ssim,
)

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with what is done now, how much of it is done, and how much there is."""

FEATURES = "EfficientNet-Lite0 features (not Inception FID)"
FEWEST = 10
"""Pictures, drawn or held out, that anything can be said of."""
MOST = 2000
"""Held-out pictures that are used: distances take a matrix of all their pairs, for the interval a hundred times."""


@dataclass
class QualityReport:
    """What was measured.

    Attributes
    ----------
    figures : name -> value with its 95 % interval; a unit ends a name
    floors : name -> what real pictures score on the same figure
    notes : what was left out or is to be known, a sentence each
    judge : the checkpoint whose alignment heads judged
    counts : how many pictures there were: drawn, training, reference (those held out, if given)
    images : uint8 (N, H, W, C), what was drawn
    """

    target: str
    settings: SamplingSettings
    figures: dict[str, Figure] = field(default_factory=dict)
    floors: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    judge: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    prompts: list[str | int] = field(default_factory=list)
    images: Array = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))

    def to_dict(self) -> dict[str, Any]:
        figures = {
            kind: {name: figure._asdict() for name, figure in values.items()}
            for kind, values in (("figures", self.figures), ("real_pictures", self.floors))
        }
        return {
            "target": self.target,
            "features": FEATURES,
            **self.settings.__dict__,
            "judge": self.judge,
            "pictures": self.counts,
            **figures,
            "notes": self.notes,
            "prompts_drawn": self.prompts,
        }


def open_judge(target: str, judge: str | None) -> AlignmentJudge | None:
    """The judge of alignment: that of ``judge``, of the target, or of the shipped checkpoint that a bundle is from."""
    name = judge or target
    if judge is None and (Path(target) / "manifest.json").is_file():
        name = str(Bundle.open(target).manifest.source.get("checkpoint", ""))
        if name not in shipped_checkpoints():
            return None
    checkpoint = open_checkpoint(name)
    tokenizers = [open_tokenizer(checkpoint.tokenizer_folder(name)) for name in checkpoint.text_encoders]
    found = AlignmentJudge.open(checkpoint, tokenizers[0]) if tokenizers else None
    if found is None and judge is not None:
        raise CheckpointError(f"{judge} has no alignment/ folder; train it with a [text_stage], or leave --judge out.")
    return found


def evaluate(
    image_generator: ImageGenerator,
    data_folder: Path,
    held_out_folder: Path | None,
    settings: SamplingSettings,
    judge: AlignmentJudge | None,
    progress: Progress,
) -> QualityReport:
    """Measure everything.

    Parameters
    ----------
    data_folder : the training pictures; prompts are its captions, or its classes
    held_out_folder : real pictures that no stage has seen; without it ``data_folder`` serves, and a note says so

    Raises
    ------
    InputError
        If a folder cannot be used, or has fewer pictures than are needed.
    """
    report = QualityReport(image_generator.name, settings)
    progress("reading pictures", 0, 1)
    data, held_out = (
        open_pictures(folder, image_generator.size, image_generator.channels, image_generator.condition)
        for folder in (data_folder, held_out_folder or data_folder)
    )
    if held_out_folder is None:
        report.notes.append(
            "No held-out pictures were given: reconstruction and distances are to the training pictures."
        )
    chosen = choose_prompts(data, settings, image_generator.condition)
    report.prompts = [condition for _, condition in chosen]
    kept = choose_held_out(len(held_out.images))
    if len(kept) < len(held_out.images):
        report.notes.append(f"Of the {len(held_out.images)} pictures to compare with, {len(kept)} were drawn and used.")
    report.counts = {"drawn": len(chosen), "training": len(data.images), "reference": len(kept)}

    report.images = draw_pictures(image_generator, report.prompts, settings, progress)
    _reconstruction(report, image_generator, held_out.images[kept], progress)

    def features(what: str, images: Array) -> Array:
        return features_of(images, lambda done, of: progress(f"features of {what} pictures", done, of))

    drawn, gallery = features("drawn", report.images), features("training", data.images)
    apart = gallery[kept] if held_out_folder is None else features("held-out", held_out.images[kept])
    _distances(report, drawn, gallery, apart, same=held_out_folder is None)
    if image_generator.condition is None:
        report.notes.append("The model is unconditional: there is no retrieval and no alignment.")
    else:
        _retrieval(report, drawn, gallery, data, chosen)
    if image_generator.condition == "text":
        if judge is None:
            report.notes.append(
                "No checkpoint with alignment/ is known for this target: alignment is left out (--judge)."
            )
        else:
            report.judge = judge.name
            _alignment(report, drawn, gallery, chosen, judge, settings.seed)
    return report


def choose_prompts(data: Pictures, settings: SamplingSettings, condition: str | None) -> list[tuple[int, str | int]]:
    """``prompts`` different pictures and one caption of each, or its class; a function of the seed."""
    generator = np.random.default_rng(settings.seed)
    count = len(data.images)
    if settings.prompts > count:
        raise InputError(f"{settings.prompts} prompts are asked for and the data has {count} pictures; ask for fewer.")
    if settings.prompts < FEWEST:
        raise InputError(f"{settings.prompts} prompts are too few to measure anything; use at least {FEWEST}.")
    said: dict[int, list[str | int]] = {}
    for picture, text in data.conditions:
        said.setdefault(picture, []).append(text)
    pictures = sorted(generator.permutation(count)[: settings.prompts].tolist())
    if condition is None:
        return [(picture, "") for picture in pictures]
    return [(picture, said[picture][int(generator.integers(len(said[picture])))]) for picture in pictures]


def choose_held_out(count: int) -> Array:
    """Choose which of ``count`` held-out pictures are used, in order: all, or :data:`MOST`, whatever the settings."""
    if count < FEWEST:
        raise InputError(f"{count} held-out pictures are too few to measure anything; use at least {FEWEST}.")
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST])


def draw_pictures(
    image_generator: ImageGenerator, conditions: Sequence[str | int], settings: SamplingSettings, progress: Progress
) -> Array:
    """One picture a prompt, or class, with the seeds from ``settings.seed`` on: uint8 (N, H, W, C)."""
    images = []
    for start in range(0, len(conditions), settings.batch):
        part = conditions[start : start + settings.batch]
        progress("drawing", start, len(conditions))
        seeds = [settings.seed + k for k in range(start, start + len(part))]
        images.append(image_generator.draw(part, seeds, settings))
    return np.concatenate(images)


def _reconstruction(report: QualityReport, image_generator: ImageGenerator, images: Array, progress: Progress) -> None:
    redrawn = []
    for start in range(0, len(images), report.settings.batch):
        progress("reconstructing", start, len(images))
        redrawn.append(image_generator.reconstruct(images[start : start + report.settings.batch]))
    after = np.concatenate(redrawn)
    report.figures["reconstruction_psnr_db"] = over_pictures(psnr(after, images))
    report.figures["reconstruction_ssim"] = over_pictures(ssim(after, images))


def _distances(report: QualityReport, drawn: Array, gallery: Array, apart: Array, *, same: bool) -> None:
    """Measure distances to the held-out set, beside two sets of real pictures, and to the nearest training picture.

    A median does not show that one picture in ten is a copy. So the share is counted too of drawn pictures that are
    nearer to a training picture than 95 % of the held-out ones are: 0.05 where a model copies nothing.
    """
    generator = np.random.default_rng(report.settings.seed)
    real = gallery if same else np.concatenate([gallery, apart])
    first = min(len(drawn), len(real) // 2)
    order = generator.permutation(len(real))
    halves = real[order[:first]], real[order[first : first + len(apart)]]
    for name, distance in (("frechet_distance", frechet_distance), ("kernel_distance", kernel_distance)):
        report.figures[name] = over_sets(distance, drawn, apart)
        report.floors[name] = over_sets(distance, *halves)
    near = nearest_distance(drawn, gallery)
    if same:
        report.figures["nearest_training_picture"] = over_pictures(near, np.median)
    else:
        near_of_real = nearest_distance(apart, gallery)
        very_near = max(np.quantile(near_of_real, 0.05), 1e-6)  # a copy is one, were even held-out pictures copies
        for figures, distances in ((report.figures, near), (report.floors, near_of_real)):
            figures["nearest_training_picture"] = over_pictures(distances, np.median)
            figures["nearer_than_95_percent_of_held_out"] = over_hits(distances <= very_near)


def _retrieval(
    report: QualityReport, drawn: Array, gallery: Array, data: Pictures, chosen: Sequence[tuple[int, str | int]]
) -> None:
    own = pictures_of_own([said for _, said in chosen], data)
    for k in (1, 5):
        report.figures[f"retrieval_at_{k}"] = over_hits(recalled(drawn, gallery, own, k))


def pictures_of_own(conditions: Sequence[str | int], gallery: Pictures) -> Array:
    """Membership, (N, M) bool, of each picture of a gallery in the pictures of each prompt, or class."""
    pictures_of: dict[str | int, list[int]] = {}
    for picture, said in gallery.conditions:
        pictures_of.setdefault(said, []).append(picture)
    own = np.zeros((len(conditions), len(gallery.images)), bool)
    for row, said in enumerate(conditions):
        own[row, pictures_of.get(said, [])] = True
    return own


def _alignment(
    report: QualityReport,
    drawn: Array,
    gallery: Array,
    chosen: Sequence[tuple[int, str | int]],
    judge: AlignmentJudge,
    seed: int,
) -> None:
    prompts = [str(said) for _, said in chosen]
    order = np.random.default_rng(seed).permutation(len(prompts))
    others = order[np.argsort(np.roll(order, 1))]  # a picture never gets its own
    report.figures["alignment"] = over_pictures(judge.score(drawn, prompts))
    report.figures["alignment_with_another_prompt"] = over_pictures(judge.score(drawn, [prompts[k] for k in others]))
    real = gallery[[picture for picture, _ in chosen]]
    report.floors["alignment"] = over_pictures(judge.score(real, prompts))
