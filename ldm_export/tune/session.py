"""A tuning from end to end: what is given, opened and checked; its pictures in two halves; the search; its document."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_export.bench.card import Keep
from ldm_export.bench.machine import machine, versions
from ldm_export.bench.variants import FEW_STEPS, PROMPTS, same_weights
from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import write_whole
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import NONE
from ldm_export.errors import InputError
from ldm_export.export.chain import check_same_graphs
from ldm_export.plan import Plan
from ldm_export.reading.hashes import hash_of
from ldm_export.runtime.backends import auto
from ldm_export.runtime.backends.base import allowed_threads
from ldm_export.runtime.facts import check_drawable
from ldm_export.tune.candidates import Configuration, Space, space_of
from ldm_export.tune.fit import FitOptions, fit_plan
from ldm_export.tune.latency import WHOLE_S
from ldm_export.tune.measure import RECORDS, Measure, Pictures, Records
from ldm_export.tune.search import Budget, Found, Progress, Search, why_not
from ldm_export.tune.variants import Variants
from ldm_export.verify.fidelity import KINDS, OTHER_SEEDS, FidelityJudge, Reference, own_reference, real_pictures
from ldm_export.verify.gates import Gate
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.quality import choose_prompts, open_judge

KIND, FORMAT = "tuning", 1
TRUTH_STEPS = 50
"""Steps of the truth, unless others are asked for or the bundle has more of its own."""
TRUTH = "truth.npz"
BY_PARTS = (
    "A picture takes about {seconds:.0f} s. None was drawn whole to be timed: times are calculated from those of text, "
    "of network calls and of the decoder, which were timed in turn."
)
FIT_HELD_OUT = 8
"""Pictures that a fit judges itself by; it is judged here as all else is."""

Document = dict[str, Any]


@dataclass(frozen=True)
class TuneOptions:
    """What a tuning is of.

    Attributes
    ----------
    budgets : limits, of :data:`~ldm_export.verify.fidelity.KINDS`
    goal : ``fastest`` or ``smallest``
    latency_only : judge no pictures, and choose what changes them by rounding alone
    prompts : what is drawn; by default the captions of ``data``, or a few of the shipped model's
    pictures : how many, half of them held out; where there are fewer prompts, those again with other seeds
    data, held_out : folders of real pictures that sets are compared with
    steps : of the truth
    seed : of the first picture; the next has one more
    candidates : other bundles, drawn as they stand
    fitted : numbers of network calls of plans that are fitted to the model
    rounds : timed rounds of each pair
    """

    budgets: tuple[Gate, ...] = ()
    goal: str = "fastest"
    latency_only: bool = False
    prompts: tuple[str, ...] = ()
    pictures: int = 48
    data: Path | None = None
    held_out: Path | None = None
    steps: int | None = None
    seed: int = 0
    candidates: tuple[Path, ...] = ()
    fitted: tuple[int, ...] = ()
    rounds: int = 5

    def __post_init__(self) -> None:
        asked = [gate for gate in self.budgets if gate.key not in ("latency_ms", "memory_mb")]
        if self.latency_only and asked:
            raise InputError(
                f"The budget {asked[0]} was given with latency_only, which judges no pictures. Leave one of them out."
            )
        if not self.latency_only and not asked:
            raise InputError(
                "No budget says how much the pictures may change. Give one, such as --budget psnr=35, or give "
                "--latency-only, which chooses what changes them by rounding alone."
            )
        if self.pictures < 2:
            raise InputError(f"pictures is {self.pictures}; at least 2 are needed, one of them held out. Use 48.")
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}; at least 1 is needed. Use 5.")
        if any(calls < 1 for calls in self.fitted):
            raise InputError(f"calls is {min(self.fitted)} of a plan to fit; at least 1 is needed. Use 8.")
        if self.held_out is not None and self.data is None:
            raise InputError("held_out pictures were given without data. Give both, or neither.")


class Tuning:
    """A tuning, open and checked.

    Raises
    ------
    LdmExportError
        At once, before anything is drawn, for whatever cannot be used.
    """

    def __init__(self, path: Path, checkpoint: LatentDiffusion | None, options: TuneOptions, work: Path):
        Bundle.open(path, verify=True)
        self.bundle, self.options, self._work = Bundle.open(path), options, work
        check_drawable(self.bundle)
        if checkpoint is not None:
            _check_same_weights(self.bundle, checkpoint)
        self._checkpoint = checkpoint
        self._generator = BundleImageGenerator(self.bundle)
        own = self._generator.defaults
        few = own.steps <= FEW_STEPS  # a student, which more steps do not make better
        steps = options.steps or (own.steps if few else max(own.steps, TRUTH_STEPS))
        self.truth = Configuration(own.sampler, steps)
        self._generator.check([0 if self._generator.condition == "label" else ""], [0], replace(own, steps=steps))
        self._others = [_other(each, self._generator) for each in options.candidates]
        self._reference = None if options.data is None else self._real_pictures(options.data)
        self.halves, self.notes = self._conditions()
        self._alignment = open_judge(str(path), None)

    def run(self, command: str, progress: Progress) -> tuple[Found, Variants, Document]:
        """Search; gives what was found, the bundles that it made, and the document."""
        started = time.perf_counter()

        def report(what: str) -> None:
            progress(what, 0, 1)

        generator, options = self._generator, self.options
        known = [] if generator.condition is None else self.halves[0]
        variants = Variants(self.bundle, self._checkpoint, known, self._work, report)
        records = Records(self._work / RECORDS)
        measure = Measure(variants, records, self.truth, generator.defaults.guidance, self.halves[0], options.rounds)
        halves = None
        if not options.latency_only:
            keep = Keep(self._work / TRUTH, load=True)
            tuning, held_out = (
                self._half(number, measure, variants, keep, report) for number in range(len(self.halves))
            )
            halves = tuning, held_out
        space = self._space()
        budget = Budget(options.budgets, options.goal)

        def fit(calls: int) -> tuple[str, int]:
            return self._fit(calls, variants, progress)

        search = Search(measure, space, self.truth, self._others, budget, halves, fit, progress)
        found = search.run()
        if measure.picture_s > WHOLE_S:
            self.notes.append(BY_PARTS.format(seconds=measure.picture_s))
        return found, variants, self._document(found, halves, command, time.perf_counter() - started)

    # --- pictures ---------------------------------------------------------------------------------------------------

    def _real_pictures(self, data: Path) -> Reference:
        generator = self._generator
        return real_pictures(data, self.options.held_out, generator.pixels, generator.channels, generator.condition)

    def _conditions(self) -> tuple[list[list[str | int]], list[str]]:
        """One a picture of each half, no prompt in both where there are several; and what is to be known of it."""
        generator, options = self._generator, self.options
        some: Sequence[str | int] = options.prompts
        if options.prompts and generator.condition != "text":
            raise InputError(
                f"{len(options.prompts)} prompts were given; {generator.name} reads no text. Leave them out."
            )
        if not some and self._reference is not None and self._reference.gallery is not None:
            asked = SamplingSettings(prompts=options.pictures, seed=options.seed)
            some = [said for _, said in choose_prompts(self._reference.gallery, asked, generator.condition)]
        if not some:
            some = PROMPTS if generator.condition == "text" else range(generator.classes or 1)
        if generator.condition is None:
            some = [""]
        distinct = list(dict.fromkeys(some))
        order = [distinct[k] for k in np.random.default_rng(0).permutation(len(distinct))]
        parts = order[0::2], order[1::2] or order
        counts = (options.pictures + 1) // 2, options.pictures // 2
        halves = [[part[k % len(part)] for k in range(count)] for part, count in zip(parts, counts, strict=True)]
        notes = []
        if len(distinct) == 1 and generator.condition is not None:
            notes.append("There is one prompt: what is held out differs from the rest by its seeds alone.")
        return halves, notes

    def _half(self, number: int, measure: Measure, variants: Variants, keep: Keep, report: Any) -> Pictures:
        name = ("tuning", "held-out")[number]
        conditions = self.halves[number]
        seed = self.options.seed + number * len(self.halves[0])
        key = hash_of(variants.key, asdict(self.truth), conditions, seed, machine(), versions())

        def draw(what: str, first: int) -> Any:
            report(f"the truth of the {name} half{what}")
            return keep(hash_of(key, first), lambda: measure.draw(self.truth, conditions, first))

        images, reference = draw("", seed), self._reference
        if reference is None:
            others = draw(", other seeds", seed + OTHER_SEEDS)
            reference = own_reference(others, conditions, self._generator.condition)
        judge = FidelityJudge(images, tuple(conditions), reference, self._alignment)
        for gate in self.options.budgets:
            if why := judge.missing.get(KINDS[gate.key].figure):
                raise InputError(f"The budget {gate} cannot be judged. {why} Leave it out.")
        digest = hashlib.sha256(reference.images.tobytes()).hexdigest()
        shown_among = [] if reference.gallery is None else list(reference.gallery.conditions)
        judged_by = None if self._alignment is None else self._alignment.name
        return Pictures(tuple(conditions), seed, judge, hash_of(key, digest, shown_among, judged_by))

    # --- choices ----------------------------------------------------------------------------------------------------

    def _space(self) -> Space:
        return space_of(
            self.bundle,
            self.truth,
            goal=self.options.goal,
            checkpoint_is_known=self._checkpoint is not None,
            openvino=auto.openvino_version() is not None,
            cores=allowed_threads() or os.cpu_count() or 1,
            taught=self._generator.defaults.steps <= FEW_STEPS,
            fitted=() if self.options.latency_only else self.options.fitted,
        )

    def _fit(self, calls: int, variants: Variants, progress: Progress) -> tuple[str, int]:
        """Fit a plan to the tuning half's prompts, unless it was; gives the name that it then has."""
        conditions = () if self._generator.condition is None else tuple(self.halves[0])
        options = FitOptions(
            calls, conditions, sampler=self.truth.sampler, teacher_steps=self.truth.steps, held_out=FIT_HELD_OUT
        )
        file = self._work / f"fitted-{hash_of(variants.key, asdict(options))[:16]}.json"
        try:
            plan = Plan.from_json(file.read_bytes())
        except (OSError, InputError):
            plan = fit_plan(variants.bundle_of(self.truth), options, self._work / "fits", progress).plan
            write_whole(file, plan.to_json().encode())
        variants.keep_plan(plan)
        return plan.sampler, plan.num_inference_steps

    # --- document ---------------------------------------------------------------------------------------------------

    def _document(
        self, found: Found, halves: tuple[Pictures, Pictures] | None, command: str, seconds: float
    ) -> Document:
        options = self.options
        notes = [*self.notes, *(() if halves is None else halves[1].judge.notes)]
        points = [
            {**point.to_dict(), "why_not": None if point.chosen else why_not(point, found.chosen)}
            for point in found.points
        ]
        guided = self.bundle.roles.guidance.kind != NONE
        return {
            "format": FORMAT,
            "kind": KIND,
            "bundle": str(self.bundle.path),
            "command": command,
            "machine": machine(),
            "versions": versions(),
            "goal": options.goal,
            "budgets": [asdict(gate) for gate in options.budgets],
            "truth": {**asdict(self.truth), "guidance": self._generator.defaults.guidance if guided else 1.0},
            "pictures": {"tuning": self.halves[0], "held_out": self.halves[1]},
            "seed": options.seed + len(self.halves[0]),
            "judged": found.judged,
            "points": points,
            "left_out": dict(found.left_out),
            "notes": notes,
            "seconds": seconds,
        }


def _check_same_weights(bundle: Bundle, checkpoint: LatentDiffusion) -> None:
    """Raise InputError unless the bundle's graphs were exported from this checkpoint."""
    check_same_graphs(bundle, checkpoint)
    others = [name for name, same in same_weights(bundle, checkpoint).items() if not same]
    if others:
        raise InputError(
            f"{others[0]} of {bundle.path} was exported from another network than {checkpoint.path} has; passes are "
            "compared with PyTorch. Give the checkpoint that the bundle was exported from, or none."
        )


def _other(path: Path, ours: BundleImageGenerator) -> Configuration:
    """Another bundle, as it says it is drawn; raises InputError if it draws other pictures than ours does."""
    Bundle.open(path, verify=True)
    bundle = Bundle.open(path)
    check_drawable(bundle)
    theirs = BundleImageGenerator(bundle)
    facts = [(each.condition, each.channels, each.pixels) for each in (theirs, ours)]
    if facts[0] != facts[1]:
        kinds = [f"{kind or 'no'} condition, {c} channels, {h}x{w}" for kind, c, (h, w) in facts]
        raise InputError(
            f"The candidate {path} draws other pictures ({kinds[0]}) than the bundle ({kinds[1]}). Give one "
            "of the same prompts and size."
        )
    return Configuration(theirs.defaults.sampler, theirs.defaults.steps, bundle=str(path))
