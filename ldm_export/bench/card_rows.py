"""The rows of a fidelity card: which bundles are drawn with which plans at which sizes, and by which command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ldm_export.bench.variants import (
    FEW_STEPS,
    PROMPTS,
    Variant,
    check_alike,
    distinct_names,
    plan_for,
    pytorch_variant,
)
from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.export.chain import check_same_graphs
from ldm_export.runtime.facts import check_drawable
from ldm_export.verify.fidelity import Reference, real_pictures
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings, TorchImageGenerator
from ldm_export.verify.quality import choose_prompts

TRUTH_STEPS = 50
"""Steps of the truth, if nothing has more."""
SHOWN = SamplingSettings().batch
"""Pictures of a row that are shown, those that its command draws; one batch, so that both draw the same."""

Size = tuple[int, int]


@dataclass(frozen=True)
class CardOptions:
    """What a card is of.

    Attributes
    ----------
    prompts : what is drawn; by default the captions of ``data``, or a few of the shipped model's
    pictures : how many; where there are fewer prompts, those again with other seeds
    data, held_out : folders of real pictures that sets are compared with
    truth_steps : of the truth; by default 50, or more where the checkpoint or a row has more, and of a checkpoint that
        was taught to draw in few steps those
    steps, calls, sizes, samplers : of the rows; each bundle's own by default, and as many steps as the truth has.
        ``calls`` are network calls in the truth's number of steps
    seed : of the first picture; the next has one more
    backend : what runs the bundles
    """

    prompts: tuple[str, ...] = ()
    pictures: int = 32
    data: Path | None = None
    held_out: Path | None = None
    truth_steps: int | None = None
    steps: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    sizes: tuple[Size, ...] = ()
    samplers: tuple[str, ...] = ()
    seed: int = 0
    backend: str = "cpu"

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise InputError(f"pictures is {self.pictures}; at least 1 is needed. Use 32.")
        if self.held_out is not None and self.data is None:
            raise InputError("held_out pictures were given without data. Give both, or neither.")
        for name in ("steps", "calls", "sizes", "samplers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise InputError(f"The {name} {', '.join(map(str, values))} were given. Name each once.")
        if self.truth_steps is not None and self.truth_steps < 1:
            raise InputError(f"truth_steps is {self.truth_steps}; at least 1 is needed. Use {TRUTH_STEPS}.")
        for name in ("steps", "calls"):
            if any(value < 1 for value in getattr(self, name)):
                raise InputError(f"{name} is {min(getattr(self, name))}; at least 1 is needed.")


@dataclass(frozen=True)
class Rows:
    """What is measured.

    Attributes
    ----------
    truths : one a size; its reference is None where the truth draws that itself, too
    rows : with the size of their truth; the first is of the bundle whose card it is
    left_out : what was asked for and cannot be drawn by a bundle -> why
    """

    truths: dict[Size, tuple[Variant, Reference | None]]
    rows: list[tuple[Size, Variant]]
    conditions: list[str | int]
    left_out: dict[str, str]


def open_rows(bundles: Sequence[Path], checkpoint: LatentDiffusion, options: CardOptions) -> Rows:
    """Open all that a card is of and check every row, before anything is drawn.

    Raises
    ------
    LdmExportError
        For whatever cannot be used, or drawn by no bundle.
    """
    opened = [Bundle.open(path, verify=True) for path in bundles]
    for bundle in opened:
        check_drawable(bundle)
        check_same_graphs(bundle, checkpoint)
    generator = TorchImageGenerator(checkpoint)
    sizes = options.sizes or (generator.pixels,)
    truths = {}
    for size in sizes:
        settings = _truth_settings(generator, size, options)
        truth = pytorch_variant(checkpoint, generator, settings)
        truth.name += f" {plan_name(truth, several_sizes=len(sizes) > 1)}"
        truths[size] = truth, _reference(generator, size, options)
    conditions = _conditions(generator, truths[sizes[0]][1], options)
    names = distinct_names([os.path.abspath(path) for path in bundles])
    rows: list[tuple[Size, Variant]] = []
    refused: list[tuple[Variant, InputError]] = []
    for path, bundle, name in zip(bundles, opened, names, strict=True):
        variants = list(_variants(path, bundle, name, truths[sizes[0]][0], options))
        check_alike(variants[0], truths[sizes[0]][0])
        for size, variant in product(sizes, variants):
            sized = replace(variant, settings=replace(variant.settings, size=_own_or(size, generator.pixels)))
            sized.name += f" {plan_name(sized, several_sizes=len(sizes) > 1)}"
            try:
                _check(sized, conditions, options.seed)
                rows.append((size, sized))
            except InputError as error:
                refused.append((sized, error))
    _check_all_asked_for([variant for _, variant in rows], refused, options, generator.pixels)
    return Rows(truths, rows, conditions, {variant.name: str(error) for variant, error in refused})


def plan_name(variant: Variant, *, several_sizes: bool) -> str:
    """How it is drawn, such as ``ddim 50 with 16 calls``."""
    settings, size = variant.settings, variant.settings.size or variant.image_generator.pixels
    calls = f" with {settings.calls} calls" if settings.calls is not None else ""
    return f"{settings.sampler} {settings.steps}{calls}" + (f" {size[0]}x{size[1]}" if several_sizes else "")


def command_of(variant: Variant, conditions: Sequence[str | int], seed: int) -> str:
    """The command that draws the first pictures of a bundle's row."""
    settings, generator = variant.settings, variant.image_generator
    assert isinstance(generator, BundleImageGenerator)
    words = ["ldm-export", "generate", variant.target, "-o", "pictures.png"]
    words += ["--sampler", settings.sampler, "--steps", f"{settings.steps}"]
    words += [] if settings.calls is None else ["--calls", f"{settings.calls}"]
    words += [] if settings.size is None else ["--size", f"{settings.size[0]}x{settings.size[1]}"]
    if generator.condition == "text" or generator.uses_guidance:
        words += ["--guidance", f"{settings.guidance}"]
    words += ["--seed", f"{seed}", "--backend", generator.requested_backend]
    shown = conditions[:SHOWN]
    if generator.condition == "text":
        words += ["--", *map(str, shown)]
    elif generator.condition == "label":
        words += [word for label in shown for word in ("--class-label", f"{label}")]
    else:
        words += ["--count", f"{len(shown)}"]
    return shlex.join(words)


def _truth_settings(generator: TorchImageGenerator, size: Size, options: CardOptions) -> SamplingSettings:
    own = generator.defaults
    least = own.steps if own.steps <= FEW_STEPS else TRUTH_STEPS  # a student is not made better by more steps
    steps = options.truth_steps or max(own.steps, least, *options.steps)
    return replace(own, steps=steps, seed=options.seed, size=_own_or(size, generator.pixels))


def _own_or(size: Size, pixels: Size) -> Size | None:
    return None if size == pixels else size


def _reference(generator: TorchImageGenerator, size: Size, options: CardOptions) -> Reference | None:
    if options.data is None:
        return None
    return real_pictures(options.data, options.held_out, size, generator.channels, generator.condition)


def _conditions(generator: TorchImageGenerator, reference: Reference | None, options: CardOptions) -> list[str | int]:
    """One a picture."""
    some: Sequence[str | int] = options.prompts
    if options.prompts and generator.condition != "text":
        raise InputError(f"{len(options.prompts)} prompts were given; {generator.name} reads no text. Leave them out.")
    if not some and reference is not None and reference.gallery is not None:
        asked = SamplingSettings(prompts=options.pictures, seed=options.seed)
        return [said for _, said in choose_prompts(reference.gallery, asked, generator.condition)]
    if not some:
        some = PROMPTS if generator.condition == "text" else range(generator.classes or 1)
    if generator.condition is None:
        some = [""]
    return [some[k % len(some)] for k in range(options.pictures)]


def _variants(path: Path, bundle: Bundle, name: str, truth: Variant, options: CardOptions) -> Iterator[Variant]:
    """The bundle with every plan that is asked for; students of few steps keep those that they were taught."""
    generator = BundleImageGenerator(bundle, options.backend)
    generator.load()
    own = generator.defaults
    steps = options.steps or dict.fromkeys((own.steps, truth.settings.steps))
    plans: list[tuple[str, int, int | None]] = [
        (sampler, number, None) for sampler in options.samplers or (own.sampler,) for number in steps
    ]
    plans += [
        (sampler, truth.settings.steps, calls)
        for sampler in options.samplers or (own.sampler,)
        for calls in options.calls
    ]
    settings = [replace(own, sampler=sampler, steps=number, calls=calls) for sampler, number, calls in plans]
    student = own.steps <= FEW_STEPS and not any(plan_for(bundle, each.sampler, each.steps)[2] for each in settings)
    for each in [own] if student else settings:
        each = replace(each, seed=options.seed)
        yield Variant(name, str(path), generator, each, generator.backend, bundle.size_bytes, bundle)


def _check(variant: Variant, conditions: Sequence[str | int], seed: int) -> None:
    """Raise InputError if the bundle cannot draw so, or only as something that it was not taught."""
    generator, bundle, settings = variant.image_generator, variant.bundle, variant.settings
    assert isinstance(generator, BundleImageGenerator)
    assert bundle is not None
    generator.check(conditions[:1], [seed], settings)
    if not plan_for(bundle, settings.sampler, settings.steps)[2]:
        read_plan(bundle, settings.sampler, settings.steps)
        own = generator.defaults
        raise InputError(
            f"{bundle.path} was taught to draw with {own.sampler} in {own.steps} steps, and {settings.sampler} with "
            f"{settings.steps} is asked for. Leave that out, or name another bundle."
        )


def _check_all_asked_for(
    rows: Sequence[Variant], refused: Sequence[tuple[Variant, InputError]], options: CardOptions, pixels: Size
) -> None:
    """Raise InputError if a bundle is in no row, or something that was asked for is in none."""
    asked = {
        "sampler": options.samplers,
        "steps": options.steps,
        "calls": options.calls,
        "size": [_own_or(size, pixels) for size in options.sizes],
    }
    for variant, error in refused:
        if not any(row.bundle is variant.bundle for row in rows):
            raise error
    for axis, values in asked.items():
        for value in values:
            if any(getattr(row.settings, axis) == value for row in rows):
                continue
            for variant, error in refused:
                if getattr(variant.settings, axis) == value:
                    raise error
            taught = f"{rows[0].settings.sampler} in {rows[0].settings.steps} steps"
            raise InputError(
                f"{axis} {value} is asked for, and {rows[0].target} was taught to draw with {taught}. Leave it out, or "
                "name another bundle."
            )
