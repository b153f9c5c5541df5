"""The fidelity card of a bundle: how true its pictures are to the checkpoint's at shared noise, and how fast.

A row is a bundle drawn by one plan (sampler, steps, calls) at one size. Its quality is judged by
:mod:`ldm_export.verify.fidelity` against the truth, the checkpoint in PyTorch with many steps. Quality figures
depend on the pictures alone: who runs the card's command again gets the same ones. What depends on the machine, latency
and memory, is listed apart, with the machine.

The document is JSON. Every row is written down as soon as it is measured, with a key, a hash of whatever could change
it; what was interrupted resumes with the rows that it has. Beside it ``CARD.truth.npz`` keeps what PyTorch drew.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bench.card_rows import SHOWN, CardOptions, Size, command_of, open_rows
from ldm_export.bench.harness import MOST_BYTES, weights_hash, write_document
from ldm_export.bench.image_similarity import png_from_pixels
from ldm_export.bench.machine import machine, versions
from ldm_export.bench.process import processes_in_turn
from ldm_export.bench.variants import Variant
from ldm_export.bundle.atomic import write_whole
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, read_json
from ldm_export.verify.fidelity import KINDS, FidelityJudge, Reference, own_pictures, own_reference
from ldm_export.verify.gates import Gate
from ldm_export.verify.latency import runs_in_turn, stages, times_as_fast
from ldm_export.verify.quality import FEATURES, draw_pictures, open_judge

FORMAT = 1
KIND = "fidelity card"
WARM_UP, ROUNDS = 1, 5
"""Rounds of all rows in turn that are not timed, and that are."""

Document = dict[str, Any]
Progress = Callable[[str], None]


class Card:
    """What a card is of, open and checked.

    Raises
    ------
    LdmExportError
        At once, before anything is drawn, for whatever cannot be used.
    """

    def __init__(self, bundles: Sequence[Path], checkpoint: LatentDiffusion, options: CardOptions):
        self.options, self._checkpoint = options, checkpoint
        self.took_up = False
        """Whether rows of an earlier run were there to be taken up."""
        found = open_rows(bundles, checkpoint, options)
        self._truths, self.rows = found.truths, found.rows
        self.conditions, self.left_out = found.conditions, found.left_out
        self._alignment = open_judge(str(checkpoint.path), None)
        self._keep = Keep(None)
        self._judge = cache(self._open_judge)

    def run(self, path: Path, command: str, gates: Sequence[Gate], *, resume: bool, progress: Progress) -> Document:
        """Measure what ``path`` does not hold yet, writing it there row by row.

        The rows of a document that was interrupted are always taken up; those of a complete one with ``resume``.

        Raises
        ------
        InputError
            If a gate can be judged of no row, before any is measured.
        """
        old = read_card(path)
        kept = old if old is not None and (resume or not old.get("complete")) else {}
        self.took_up = bool(kept)
        self._keep = Keep(path.with_suffix(".truth.npz"), load=bool(kept))
        document = self._new_document(command)
        rows = {row.get("key"): row for row in kept.get("rows", ()) if isinstance(row, dict)}
        for size, variant in self._all():
            key = self._key(size, variant)
            if key not in rows:
                rows[key] = self._row(key, size, variant, gates, progress)
            document["rows"].append(rows[key])
            write_document(document, path)
        self._performance(document, kept.get("performance", {}), path, progress)
        document["gates"] = judged(document, gates)
        document["complete"] = True
        write_document(document, path)
        return document

    def _all(self) -> list[tuple[Size, Variant]]:
        return [*((size, truth) for size, (truth, _) in self._truths.items()), *self.rows]

    # --- quality ----------------------------------------------------------------------------------------------------

    def _row(self, key: str, size: Size, variant: Variant, gates: Sequence[Gate], progress: Progress) -> Document:
        judge = self._judge(size, progress)
        for gate in gates:
            if why := judge.missing.get(KINDS[gate.key].figure):
                raise InputError(f"--fail-under {gate} cannot be judged. {why} Leave it out.")
        images = judge.truth if variant.bundle is None else self._drawn(variant, variant.name, progress)
        progress(f"{variant.name}, judging")
        return {
            "name": variant.name,
            "key": key,
            **variant.facts(),
            "command": None if variant.bundle is None else command_of(variant, self.conditions, self.options.seed),
            "figures": {name: figure._asdict() for name, figure in judge.figures(images).items()},
            "notes": list(judge.notes),
            "png": [png_from_pixels(image) for image in images[:SHOWN]],
        }

    def _open_judge(self, size: Size, progress: Progress) -> FidelityJudge:
        truth, reference = self._truths[size]
        images = self._kept(truth, "truth", lambda: self._drawn(truth, "the truth", progress))
        if reference is None:
            others = self._kept(truth, "other seeds", lambda: self._others(truth, progress).images)
            reference = own_reference(others, self.conditions, truth.image_generator.condition)
        return FidelityJudge(images, tuple(self.conditions), reference, self._alignment)

    def _drawn(self, variant: Variant, name: str, progress: Progress) -> npt.NDArray[Any]:
        def report(what: str, done: int, of: int) -> None:
            progress(f"{name}, {what} {done} of {of}")

        return draw_pictures(variant.image_generator, self.conditions, variant.settings, report)

    def _others(self, truth: Variant, progress: Progress) -> Reference:
        def report(what: str, done: int, of: int) -> None:
            progress(f"the truth with other seeds, {what} {done} of {of}")

        return own_pictures(truth.image_generator, self.conditions, truth.settings, report)

    def _kept(self, truth: Variant, what: str, draw: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return self._keep(_hash([what, self._of_truth(truth)]), draw)

    # --- machine ----------------------------------------------------------------------------------------------------

    def _performance(self, document: Document, old: Document, path: Path, progress: Progress) -> None:
        """Memory of each row in a process of its own, and latency of all of them in turn."""
        performance: Document = {"machine": document["machine"], "memory": {}, "latency": {}}
        document["performance"] = performance
        keys = {row["name"]: row["key"] for row in document["rows"]}
        for _, variant in self._all():
            found = old.get("memory", {}).get(variant.name)
            if not _is_of(found, keys[variant.name]):
                child = {variant.name: variant.child(self.conditions[0], self.options.seed)}
                found = processes_in_turn(child, 1, progress)[variant.name]
                found = {"key": keys[variant.name], **found}
            performance["memory"][variant.name] = found
            write_document(document, path)
        latency = old.get("latency", {})
        if latency.keys() == keys.keys() and all(_is_of(latency[name], key) for name, key in keys.items()):
            performance["latency"] = latency
        else:
            performance["latency"] = self._latency(keys, progress)

    def _latency(self, keys: dict[str, str], progress: Progress) -> Document:
        variants, rounds = self._all(), WARM_UP + ROUNDS
        draws = {variant.name: variant.timed(self.conditions, self.options.seed) for _, variant in variants}
        runs = runs_in_turn(draws, ROUNDS, WARM_UP, lambda done: progress(f"latency, round {done + 1} of {rounds}"))
        truths = {size: runs[truth.name] for size, (truth, _) in self._truths.items()}
        return {
            variant.name: {
                "key": keys[variant.name],
                "calls": len(runs[variant.name][0].denoiser_ms),
                "faster": times_as_fast(truths[size], runs[variant.name]),
                "stages": stages(runs[variant.name]),
            }
            for size, variant in variants
        }

    # --- document ---------------------------------------------------------------------------------------------------

    def _new_document(self, command: str) -> Document:
        first = self.rows[0][1]
        return {
            "format": FORMAT,
            "kind": KIND,
            "complete": False,
            "bundle": first.target,
            "checkpoint": self._checkpoint.name,
            "command": command,
            "machine": machine(),
            "versions": versions(),
            "options": json.loads(json.dumps(asdict(self.options), default=str)),
            "conditions": self.conditions,
            "features": FEATURES,
            "alignment_judge": None if self._alignment is None else self._alignment.name,
            "left_out": self.left_out,
            "rows": [],
        }

    def _of_truth(self, truth: Variant) -> list[Any]:
        """What the truth's pictures depend on."""
        return [
            FORMAT,
            machine(),
            versions(),
            weights_hash(truth, self._checkpoint),
            asdict(truth.settings),
            truth.facts()["threads"],
            self.conditions,
        ]

    def _key(self, size: Size, variant: Variant) -> str:
        truth, reference = self._truths[size]
        real = None if reference is None else _hash_of_pictures(reference)
        judged_by = None if self._alignment is None else self._alignment.name
        own = [weights_hash(variant, self._checkpoint), variant.backend, asdict(variant.settings)]
        return _hash([self._of_truth(truth), real, judged_by, own, variant.name, variant.target])


class Keep:
    """Arrays that took long to draw, by name, in one .npz file that is written whole after each of them.

    ``load`` says whether what it holds is to be used. Without a file nothing is kept.
    """

    def __init__(self, path: Path | None, *, load: bool = False):
        self._path = path
        self._arrays: dict[str, Any] = _arrays_in(path) if load and path is not None else {}

    def __call__(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = make()
            if self._path is not None:
                content = io.BytesIO()
                np.savez(content, **self._arrays)
                try:
                    write_whole(self._path, content.getvalue())
                except OSError as error:
                    raise InputError(f"{self._path} cannot be written ({error.strerror}). Make room.") from error
        kept: npt.NDArray[Any] = self._arrays[name]
        return kept


def _arrays_in(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return {}


def judged(document: Document, gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """Judge each gate of every bundle's row: key, limit, row, value, passed, and the sentence ``says``.

    Raises
    ------
    InputError
        If a gate can be judged of no row.
    """
    found = []
    for gate in gates:
        values = {row["name"]: value_of(document, row, gate.key) for row in document["rows"] if row["kind"] == "bundle"}
        if all(value is None for value in values.values()):
            raise InputError(f"--fail-under {gate} cannot be judged: no row has that figure. Leave it out.")
        found += [
            {**gate.judged(KINDS[gate.key], value, row=name), "row": name}
            for name, value in values.items()
            if value is not None
        ]
    return found


def value_of(document: Mapping[str, Any], row: Mapping[str, Any], key: str) -> float | None:
    """The value of a row that is called by a key of :data:`~ldm_export.verify.fidelity.KINDS`; None where there is
    none."""
    name, performance = row["name"], document["performance"]
    if key == "latency_ms":
        latency: float = performance["latency"][name]["stages"]["total"]["median_ms"]
        return latency
    if key == "memory_mb":
        peak = performance["memory"][name]["peak_rss_bytes"]
        return None if peak is None else peak / 1e6
    figure = row["figures"].get(KINDS[key].figure)
    return None if figure is None else figure["value"]


def read_card(path: Path) -> Document | None:
    """What :meth:`Card.run` wrote, or None where there is nothing of that kind."""
    try:
        document = read_json(path, MOST_BYTES)
    except (OSError, MalformedError):
        return None
    is_card = isinstance(document, dict) and (document.get("format"), document.get("kind")) == (FORMAT, KIND)
    return document if is_card and isinstance(document.get("rows"), list) else None


def _is_of(found: Any, key: str) -> bool:
    return isinstance(found, dict) and found.get("key") == key


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _hash_of_pictures(reference: Reference) -> str:
    digest = hashlib.sha256(reference.images.tobytes())
    if reference.gallery is not None:
        digest.update(reference.gallery.images.tobytes())
        digest.update(json.dumps(reference.gallery.conditions).encode())
    return digest.hexdigest()
