"""The bench: every measurement of all variants, each written down as soon as it is made.

The document is JSON: what was measured, on what, and under ``results`` what came out, by measurement and variant. It is
all that the report is made from. Its ``key`` is a hash of whatever could change a result: the bundles' hashes, the
checkpoint's, options, versions, machine. A bench that was interrupted goes on where a document of its own key ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm_export.bench.image_similarity import LARGEST, compare_pictures
from ldm_export.bench.machine import machine, versions
from ldm_export.bench.process import processes_in_turn
from ldm_export.bench.variants import Variant, conditions_for, open_variants, same_weights
from ldm_export.bundle.atomic import write_whole
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, read_json
from ldm_export.verify.gates import Gate
from ldm_export.verify.image_text_alignment import open_pictures
from ldm_export.verify.latency import runs_in_turn, stages, times_as_fast
from ldm_export.verify.parity import compare_with_checkpoint
from ldm_export.verify.quality import choose_prompts, evaluate, open_judge

FORMAT = 1
MOST_BYTES = 1 << 30
"""Largest document that is read, with its pictures, bytes."""
_PLAIN = re.compile(r"[\w .,:/+=-]*")
PROCESSES = 3
"""New processes a variant for cold start and memory, or the number of repeats if that is smaller."""

Document = dict[str, Any]
Progress = Callable[[str], None]
"""Called with what begins now."""


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes
    ----------
    prompts : what is drawn; for models that read text, a few of the shipped model's by default
    sampler, steps : of the bundles that can be drawn so; each bundle's own by default
    seed : of the first picture; the next has one more
    batch : pictures drawn at a time where latency is measured
    warm_up, repeats : rounds of all variants that are not counted, and that are
    backends : what runs the bundles, each of them by every one
    data, held_out : folders of pictures that quality is judged by; without them it is not
    pictures : how many are drawn for that
    """

    prompts: tuple[str, ...] = ()
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 1
    warm_up: int = 2
    repeats: int = 9
    backends: tuple[str, ...] = ("auto",)
    data: Path | None = None
    held_out: Path | None = None
    pictures: int = 200

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warm_up", 0), ("batch", 1), ("pictures", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                default = BenchOptions.__dataclass_fields__[name].default
                raise InputError(f"{name} is {value}; at least {least} is needed. Use {default}.")
        if len(set(self.backends)) != len(self.backends):
            raise InputError(f"The backends {', '.join(self.backends)} were given. Name each once.")
        if self.held_out is not None and self.data is None:
            raise InputError("held_out pictures were given without data. Give both, or neither.")


class Bench:
    """Sides that are open, and what is measured of them.

    Raises
    ------
    LdmExportError
        At once, before anything is measured, for whatever cannot be used.
    """

    def __init__(self, bundles: Sequence[Path], checkpoint: LatentDiffusion | None, options: BenchOptions):
        self.options = options
        self.took_up: Path | None = None
        """The document of an earlier run whose results were taken up."""
        self._checkpoint = checkpoint
        self.variants, self.left_out = open_variants(
            bundles, checkpoint, sampler=options.sampler, steps=options.steps, backends=options.backends
        )
        self.conditions = conditions_for(self.variants[0], options.prompts)
        self.baseline = self.variants[0].name if len(self.variants) > 1 else None
        if options.data is not None:
            self._check_data(options.data)

    @property
    def comparable(self) -> list[str]:
        """The variants that are drawn as the baseline is, step by step."""
        return [variant.name for variant in self.variants[1:] if variant.drawing == self.variants[0].drawing]

    def check_gates(self, gates: Sequence[Gate]) -> None:
        """Raise InputError if a gate can be judged of no variant, or a variant that it is asked of is left out."""
        for gate in gates:
            for name, why in self.left_out.items():
                raise InputError(f"--fail-under {gate} is asked of every variant, and {name} is left out: {why}")
            if self.baseline is None:
                raise InputError(
                    f"--fail-under {gate} compares, and there is one bundle alone. "
                    "Name a checkpoint with --against, or a second bundle."
                )
            if gate.key == "parity":
                self._check_parity_gate(gate)
            if gate.key == "drift" and not self.comparable:
                ours, theirs = (
                    f"{variant.name} with {variant.drawing}" for variant in (self.variants[1], self.variants[0])
                )
                raise InputError(
                    f"--fail-under {gate} compares step by step; {ours} and {theirs} (sampler, steps, guidance) take "
                    "other steps. Use psnr instead, or give them the same --steps."
                )

    def _check_parity_gate(self, gate: Gate) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise InputError(f"--fail-under {gate} is about PyTorch's networks. Name a checkpoint with --against.")
        bundles = [variant.bundle for variant in self.variants if variant.bundle is not None]
        if not any(same for bundle in bundles for same in same_weights(bundle, checkpoint).values()):
            raise InputError(
                f"--fail-under {gate} compares graphs with the networks that they were exported from, and no bundle "
                f"was exported from {checkpoint.path}. Name that checkpoint, or leave the gate out."
            )

    def run(self, path: Path, command: str, *, resume: bool, progress: Progress) -> Document:
        """Measure what ``path`` does not hold yet, writing it there bit by bit.

        A document of the same bench that was interrupted is always gone on with; a complete one, with ``resume``.

        Raises
        ------
        InputError
            If ``resume`` is asked for and the document there is of another bench.
        """
        document = self._begin(path, command, resume=resume)
        for name, measure in self._measurements().items():
            if name not in document["results"]:
                document["results"][name] = measure(progress)
                write_document(document, path)
        document["complete"] = True
        write_document(document, path)
        return document

    def _measurements(self) -> dict[str, Callable[[Progress], Any]]:
        measurements: dict[str, Callable[[Progress], Any]] = {
            "bytes": self._bytes,
            "latency": self._latency,
            "pictures": self._pictures,
        }
        by_bundle = {variant.target: variant for variant in reversed(self.variants) if variant.bundle is not None}
        for variant in self.variants if self._checkpoint is not None else ():
            if variant is by_bundle.get(variant.target):  # its graphs are the same, whatever runs them
                measurements[f"parity of {variant.name}"] = partial(self._parity, variant)
        measurements["process"] = self._process
        for variant in self.variants if self.options.data is not None else ():
            measurements[f"quality of {variant.name}"] = partial(self._quality, variant)
        return measurements

    def _bytes(self, progress: Progress) -> dict[str, Any]:
        first = self.variants[0]
        return {
            variant.name: {"bytes": variant.bytes, "smaller": None if variant is first else first.bytes / variant.bytes}
            for variant in self.variants
        }

    def _latency(self, progress: Progress) -> dict[str, Any]:
        options, rounds = self.options, self.options.warm_up + self.options.repeats
        draws = {variant.name: variant.timed(self.conditions, options.seed, options.batch) for variant in self.variants}
        runs = runs_in_turn(
            draws, options.repeats, options.warm_up, lambda done: progress(f"latency, round {done + 1} of {rounds}")
        )
        first = self.variants[0].name
        return {
            name: {
                "calls": len(runs[name][0].denoiser_ms),
                "faster": None if name == first else times_as_fast(runs[first], runs[name]),
                "stages": stages(runs[name]),
                "totals_ms": [run.total_ms for run in runs[name]],
            }
            for name in draws
        }

    def _pictures(self, progress: Progress) -> dict[str, Any]:
        def drawn_by(variant: Variant) -> Any:
            return lambda k: variant.sample([self.conditions[k]], [self.options.seed + k])

        variants = {variant.name: drawn_by(variant) for variant in self.variants}
        return compare_pictures(variants, len(self.conditions), self.baseline, self.comparable, progress)

    def _parity(self, variant: Variant, progress: Progress) -> list[dict[str, Any]]:
        assert self._checkpoint is not None
        assert variant.bundle is not None
        same = same_weights(variant.bundle, self._checkpoint)
        records = compare_with_checkpoint(
            variant.bundle, self._checkpoint, lambda what: progress(f"{variant.name}, {what}")
        )
        found = []
        for record in records:
            error = record.max_error if math.isfinite(record.max_error) else LARGEST
            found.append({**record.to_dict(), "max_error": error, "same_weights": same.get(record.graph, True)})
        return found

    def _process(self, progress: Progress) -> dict[str, Any]:
        children = {variant.name: variant.child(self.conditions[0], self.options.seed) for variant in self.variants}
        return processes_in_turn(children, min(self.options.repeats, PROCESSES), progress)

    def _quality(self, variant: Variant, progress: Progress) -> dict[str, Any]:
        assert self.options.data is not None
        settings = replace(variant.settings, prompts=self.options.pictures, seed=self.options.seed)
        judge = open_judge(variant.target, None)
        report = evaluate(
            variant.image_generator,
            self.options.data,
            self.options.held_out,
            settings,
            judge,
            lambda what, done, of: progress(f"quality of {variant.name}, {what} {done} of {of}"),
        )
        return {name: figure._asdict() for name, figure in report.figures.items()}

    def _check_data(self, data: Path) -> None:
        """Refuse folders that cannot be judged by before minutes have passed."""
        image_generator = self.variants[0].image_generator
        settings = replace(self.variants[0].settings, prompts=self.options.pictures)
        pictures = open_pictures(data, image_generator.size, image_generator.channels, image_generator.condition)
        choose_prompts(pictures, settings, image_generator.condition)
        if self.options.held_out is not None:
            open_pictures(
                self.options.held_out, image_generator.size, image_generator.channels, image_generator.condition
            )

    def _begin(self, path: Path, command: str, *, resume: bool) -> Document:
        new = self._new_document(command)
        old = read_document(path)
        if old is not None and old.get("key") == new["key"] and (resume or not old.get("complete")):
            if not _is_plain(old["results"]):
                raise InputError(f"{path} holds results that no bench writes. Delete it, and measure anew.")
            self.took_up = path
            return {**new, "results": old["results"]}
        if resume and old is not None:
            raise InputError(
                f"{path} holds a bench of other bundles, options, versions or another machine. "
                "Leave --resume out to measure anew, or name another report."
            )
        return new

    def _new_document(self, command: str) -> Document:
        options = json.loads(json.dumps(asdict(self.options), default=str))  # as it is read again
        row = {"machine": machine(), "versions": versions(), "options": options, "conditions": self.conditions}
        hashes = {variant.name: weights_hash(variant, self._checkpoint) for variant in self.variants}
        text = json.dumps([FORMAT, row, hashes], sort_keys=True)
        return {
            "format": FORMAT,
            "key": hashlib.sha256(text.encode()).hexdigest(),
            "complete": False,
            "command": command,
            **row,
            "baseline": self.baseline,
            "variants": {variant.name: variant.facts() for variant in self.variants},
            "left_out": self.left_out,
            "results": {},
        }


def weights_hash(variant: Variant, checkpoint: LatentDiffusion | None) -> Any:
    """Hash of a bundle's manifest, or of each of the checkpoint's components: what its pictures depend on."""
    if variant.bundle is not None:
        return hashlib.sha256(variant.bundle.manifest.to_json().encode()).hexdigest()
    assert checkpoint is not None
    return [checkpoint.sha256(component) for component in checkpoint.components]


def _is_plain(value: Any) -> bool:
    """Whether results hold numbers, and of text only names and base64: what else they held would go into the page."""
    if isinstance(value, (dict, list)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, str) or _PLAIN.fullmatch(value) is not None


def read_document(path: Path) -> Document | None:
    """What a bench wrote, or None where there is nothing of that kind."""
    try:
        document = read_json(path, MOST_BYTES)
    except (OSError, MalformedError):
        return None
    is_bench = (
        isinstance(document, dict) and document.get("format") == FORMAT and isinstance(document.get("results"), dict)
    )
    return document if is_bench else None


def write_document(document: Document, path: Path) -> None:
    """Write a document whole or not at all."""
    try:
        write_whole(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Make room, and run the same again.") from error


def results_by_variant(document: Document) -> Document:
    """Results as measurement -> variant -> value, also of those that are made a variant at a time."""
    found: Document = {}
    for name, value in document["results"].items():
        measurement, of, variant = name.partition(" of ")
        if of:
            found.setdefault(measurement, {})[variant] = value
        else:
            found[name] = value
    return found
