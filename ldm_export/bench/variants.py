"""The variants of a bench: a checkpoint in PyTorch, if one is given, and bundles; each drawn as it is meant to be."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import BackendError, InputError
from ldm_export.export.chain import check_same_graphs
from ldm_export.families import read_files
from ldm_export.runtime.facts import check_drawable
from ldm_export.runtime.results import Timings
from ldm_export.verify.image_generators import BundleImageGenerator, Sample, SamplingSettings, TorchImageGenerator
from ldm_export.verify.latency import Draw

PROMPTS = (
    "grinning face with smiling eyes",
    "red apple",
    "black cat",
    "heavy black heart",
    "pizza",
    "sunflower",
    "automobile",
    "rocket",
    "snowman",
    "strawberry",
    "octopus",
    "soccer ball",
    "crescent moon",
    "birthday cake",
    "frog face",
    "smiling face with sunglasses",
)
"""What is drawn unless something else is asked for; the pictures that the shipped model knows."""
DEFAULT_PICTURES = 8
FEW_STEPS = 8
"""Most steps of a student that draws in as many as it was taught and no others, unless it is of the sampler lcm."""


@dataclass
class Variant:
    """What is measured.

    Attributes
    ----------
    name : the checkpoint's, with "PyTorch", or the bundle folder's, as long as it must be to tell all apart; and, where
        bundles are drawn by several backends, the backend's as it was asked for
    target : the folder, or the name of a shipped checkpoint
    settings : sampler, steps, guidance
    backend : what runs it
    bytes : the bundle's files, or the checkpoint's weights as they lie on disk
    """

    name: str
    target: str
    image_generator: BundleImageGenerator | TorchImageGenerator
    settings: SamplingSettings
    backend: str
    bytes: int
    bundle: Bundle | None = None

    @property
    def guided(self) -> bool:
        """Whether the denoiser is called with and without the prompt, so on two pictures for one."""
        return self.image_generator.guided(self.settings.guidance)

    @property
    def drawing(self) -> tuple[str, int, float]:
        """Sides with the same draw step by step alike."""
        guidance = self.settings.guidance if self.image_generator.uses_guidance else 1.0
        return self.settings.sampler, self.settings.steps, guidance

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int]) -> Sample:
        return self.image_generator.sample(conditions, seeds, self.settings)

    def timed(self, conditions: Sequence[str | int], seed: int, batch: int = 1) -> Draw:
        """What draws ``batch`` pictures a call, the next of the conditions and seeds each time."""

        def draw(number: int) -> Timings:
            numbers = range(number * batch, (number + 1) * batch)
            asked = [conditions[k % len(conditions)] for k in numbers]
            if self.image_generator.condition == "text":  # new each time: a pipeline remembers what it has encoded
                asked = [f"{text} {k}" for text, k in zip(asked, numbers, strict=True)]
            return self.sample(asked, [seed + k for k in numbers]).timings

        return draw

    def child(self, condition: str | int, seed: int) -> dict[str, Any]:
        """Request for :mod:`ldm_export.bench.child` to draw one picture in a process of its own."""
        given = self.image_generator.given([condition], [seed], self.settings)
        if isinstance(self.image_generator, BundleImageGenerator):
            opened = {"backend": self.image_generator.requested_backend, "threads": self.image_generator.threads}
            return {"bundle": self.target, **opened, "given": given}
        changed = {"adapters": self.image_generator.adapters, "embeddings": self.image_generator.embeddings}
        return {"checkpoint": self.target, **changed, "families": read_files(), "given": given}

    def facts(self) -> dict[str, Any]:
        """What a row of results says of how it came about."""
        sampler, steps, guidance = self.settings.sampler, self.settings.steps, self.settings.guidance
        height, width = self.settings.size or self.image_generator.pixels
        size = {"height": height, "width": width}
        plan = {"sampler": sampler, "steps": steps, "calls": self.settings.calls}
        drawn = {**plan, "guidance": guidance, "guided": self.guided, **size}
        passes = [] if self.bundle is None else [dict(record) for record in self.bundle.manifest.passes]
        kind = "checkpoint" if self.bundle is None else "bundle"
        threads = torch.get_num_threads() if self.bundle is None else None
        ran = {"backend": self.backend, "threads": threads}
        return {"kind": kind, "target": self.target, "passes": passes, **ran, **drawn}


def open_variants(
    bundles: Sequence[Path],
    checkpoint: LatentDiffusion | None,
    *,
    sampler: str | None,
    steps: int | None,
    backends: Sequence[str],
) -> tuple[list[Variant], dict[str, str]]:
    """The checkpoint, if there is one, and the bundles, hashes checked, in their order, each by every backend.

    Backends that do not run here are left out: the second value says why, by the name that the variant would have.

    ``sampler`` and ``steps`` hold for the bundles that have or can compile such a plan, and one must; a student that
    was taught to draw in few steps keeps its own. Otherwise each is drawn as its manifest says, and the checkpoint as
    the first bundle that was exported from it.

    Raises
    ------
    BackendError
        If no bundle can be drawn by any of the backends.
    BundleError, CheckpointError, InputError
        If a variant cannot be opened, or they do not all draw the same kind of pictures.
    """
    opened = [Bundle.open(path, verify=True) for path in bundles]
    for bundle in opened:
        check_drawable(bundle)
        if checkpoint is not None:
            check_same_graphs(bundle, checkpoint)
    names = distinct_names([os.path.abspath(path) for path in bundles])
    plans = [plan_for(bundle, sampler, steps) for bundle in opened]
    if (sampler or steps) and not any(found for *_, found in plans):
        model = opened[0].manifest.model
        read_plan(opened[0], sampler or model["default_sampler"], steps or model["default_steps"])  # says what there is
    variants: list[Variant] = []
    left_out: dict[str, str] = {}
    for (folder, bundle, (its_sampler, its_steps, _)), backend in product(
        zip(names, opened, plans, strict=True), backends
    ):
        name = folder if len(backends) == 1 else f"{folder} {backend}"
        try:
            image_generator = BundleImageGenerator(bundle, backend)
            image_generator.load()
        except BackendError as error:
            left_out[name] = str(error)
            continue
        settings = replace(image_generator.defaults, sampler=its_sampler, steps=its_steps)
        variants.append(
            Variant(
                name, str(bundle.path), image_generator, settings, image_generator.backend, bundle.size_bytes, bundle
            )
        )
    if not variants:
        raise BackendError(" ".join(dict.fromkeys(left_out.values())))
    if checkpoint is not None:
        variants.insert(0, _checkpoint_variant(checkpoint, variants, sampler, steps))
    for variant in variants[1:]:
        check_alike(variant, variants[0])
    return variants, left_out


def plan_for(bundle: Bundle, sampler: str | None, steps: int | None) -> tuple[str, int, bool]:
    """Sampler and steps that the bundle is drawn with, and whether those are what was asked for."""
    model = bundle.manifest.model
    wanted = sampler or model["default_sampler"], steps or model["default_steps"]
    own = model["default_sampler"], model["default_steps"]
    taught = own[1] <= FEW_STEPS and not (own[0] == wanted[0] == "lcm")
    if f"plans/{wanted[0]}-{wanted[1]}.json" in bundle.manifest.files or not taught:
        try:
            read_plan(bundle, *wanted)
        except InputError:
            return *own, False
        return *wanted, True
    return *own, wanted == own


def _checkpoint_variant(
    checkpoint: LatentDiffusion, bundles: Sequence[Variant], sampler: str | None, steps: int | None
) -> Variant:
    image_generator = TorchImageGenerator(checkpoint)
    like = next(
        (
            variant.settings
            for variant in bundles
            if variant.bundle and same_weights(variant.bundle, checkpoint)[variant.bundle.roles.denoiser]
        ),
        image_generator.defaults,
    )
    settings = replace(like, sampler=sampler or like.sampler, steps=steps or like.steps)
    return pytorch_variant(checkpoint, image_generator, settings)


def pytorch_variant(
    checkpoint: LatentDiffusion, image_generator: TorchImageGenerator, settings: SamplingSettings
) -> Variant:
    """The checkpoint in PyTorch, drawn so."""
    files = [file for component in checkpoint.components for file in checkpoint.weight_files(component)]
    size = sum(file.stat().st_size for file in {*files})
    name = f"PyTorch {checkpoint.name}"
    backend = f"torch {torch.__version__.partition('+')[0]} cpu"
    return Variant(name, str(checkpoint.path), image_generator, settings, backend, size)


def same_weights(bundle: Bundle, checkpoint: LatentDiffusion) -> dict[str, bool]:
    """Whether each graph's network was exported from this checkpoint, by the hashes that the manifest keeps.

    Graphs without weights of the checkpoint's, such as loops, which are made of other graphs, are left out.
    """
    exported: Any = bundle.manifest.source.get("sha256", {})
    components: Any = bundle.manifest.source.get("components", {})
    hashes = {component: checkpoint.sha256(component) for component in checkpoint.components}
    return {
        name: component in hashes and exported.get(component) == hashes[component]
        for name, component in components.items()
        if name in bundle.manifest.graphs
    }


def conditions_for(variant: Variant, prompts: Sequence[str]) -> list[str | int]:
    """What is drawn: the prompts, or of models that read none every class, or nothing, a few times.

    Raises
    ------
    InputError
        If there are prompts for a model that reads none.
    """
    if variant.image_generator.condition == "text":
        return list(prompts or PROMPTS[:DEFAULT_PICTURES])
    if prompts:
        raise InputError(f"{len(prompts)} prompts were given; {variant.name} reads no text. Leave them out.")
    if variant.image_generator.condition is None:
        return [""] * DEFAULT_PICTURES
    return list(range(min(variant.image_generator.classes or 1, DEFAULT_PICTURES)))


def check_alike(variant: Variant, first: Variant) -> None:
    """Raise InputError unless both draw the same kind of pictures."""
    facts = [
        (x.image_generator.condition, x.image_generator.channels, x.image_generator.pixels) for x in (variant, first)
    ]
    if facts[0] != facts[1]:
        described = [
            f"{x.name} ({kind or 'no'} condition, {c} channels, {h}x{w})"
            for x, (kind, c, (h, w)) in zip((variant, first), facts, strict=True)
        ]
        raise InputError(
            f"{described[0]} and {described[1]} draw different pictures. Compare models of one kind and size."
        )


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The end of each path, without ``.bundle``, of as many parts as it takes to tell all apart."""
    for count in range(1, max(path.count(os.sep) for path in paths) + 1):
        names = [os.sep.join(path.split(os.sep)[-count:]).removesuffix(".bundle") for path in paths]
        if max(Counter(names).values()) == 1:
            return names
    raise InputError(f"{Counter(paths).most_common(1)[0][0]} was given twice. Name each bundle once.")
