"""What a configuration is worth: how true its pictures are, how long one takes, how much memory; each measured once.

Every record is written down as soon as it is measured, under a hash of all that could change it, so that what was
interrupted resumes, and another budget over the same model measures little anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ldm_export.bench.image_similarity import png_from_pixels
from ldm_export.bench.machine import machine, versions
from ldm_export.bench.process import processes_in_turn
from ldm_export.bench.variants import Variant
from ldm_export.bundle.atomic import write_whole
from ldm_export.errors import CancelledError, InputError, LdmExportError, NumericalError, ParityError
from ldm_export.plan.forecast import forecast_of
from ldm_export.reading.documents import MalformedError, read_json
from ldm_export.reading.hashes import hash_of
from ldm_export.runtime.results import Timings
from ldm_export.tune.candidates import Configuration
from ldm_export.tune.latency import FEW_CALLS, WHOLE_S, calculated
from ldm_export.tune.variants import Variants
from ldm_export.verify.fidelity import FidelityJudge
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.latency import runs_in_turn, stages, times_as_fast
from ldm_export.verify.quality import draw_pictures

FORMAT = 1
RECORDS = "measurements.json"
MOST_BYTES = 1 << 30
SHOWN = 4
"""Pictures of a configuration that are kept to be shown."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """A half of what is drawn: what its pictures are of, the seed of the first, what they are compared with, and a hash
    of all of it."""

    conditions: tuple[str | int, ...]
    seed: int
    judge: FidelityJudge
    key: str


class Records:
    """Records by their keys, in one file that is written whole after each.

    A record with ``failed`` says in a sentence why there is no other. It is written down where the model is why, and
    tried again by the next run where it may be the machine, such as its disk.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            found = read_json(path, MOST_BYTES)
        except (OSError, MalformedError):
            found = {}
        fits = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("records"), dict)
        self._records: dict[str, Record] = found["records"] if fits else {}
        self._passing: dict[str, Record] = {}

    def __call__(self, key: str, make: Callable[[], Record]) -> Record:
        """The record of a key, made if it is not there; what this project refuses is kept as ``failed``."""
        if key in self._passing:
            return self._passing[key]
        if key not in self._records:
            try:
                self._records[key] = make()
            except CancelledError:
                raise
            except (ParityError, NumericalError) as error:
                self._records[key] = {"failed": str(error)}
            except LdmExportError as error:
                self._passing[key] = {"failed": str(error)}
                return self._passing[key]
            document = {"format": FORMAT, "records": self._records}
            try:
                write_whole(self._path, json.dumps(document, ensure_ascii=False).encode())
            except OSError as error:
                raise InputError(f"{self._path} cannot be written ({error.strerror}). Make room.") from error
        return self._records[key]


class Measure:
    """Measures configurations.

    Parameters
    ----------
    truth : how the untouched bundle is drawn
    guidance : its scale, and that of all configurations but other bundles
    rounds : timed rounds, after one that is not
    """

    def __init__(
        self,
        variants: Variants,
        records: Records,
        truth: Configuration,
        guidance: float,
        conditions: Sequence[str | int],
        rounds: int,
    ):
        self._variants, self._records, self._truth = variants, records, truth
        self._guidance, self._conditions, self._rounds = guidance, conditions, rounds
        self._machine = hash_of(machine(), versions())
        self._hashes: dict[str, str] = {}

    def made(self, configuration: Configuration) -> Record:
        """Bytes of a configuration's bundle, and the network calls of its plan."""
        return self._records(hash_of("made", self._key(configuration)), lambda: self._made(configuration))

    def _made(self, configuration: Configuration) -> Record:
        bundle = self._variants.bundle_of(configuration)
        return {"bytes": bundle.size_bytes, "calls": len(self._variants.plan_of(configuration).rows)}

    def quality(self, configuration: Configuration, pictures: Pictures) -> Record:
        """Figures of the fidelity judge, each with its interval, and the first pictures."""
        key = hash_of("quality", self._key(configuration, drawn=True), pictures.key)
        return self._records(key, lambda: self._quality(configuration, pictures))

    def _quality(self, configuration: Configuration, pictures: Pictures) -> Record:
        images = self.draw(configuration, pictures.conditions, pictures.seed)
        figures = {name: figure._asdict() for name, figure in pictures.judge.figures(images).items()}
        return {"figures": figures, "png": [png_from_pixels(image) for image in images[:SHOWN]]}

    def draw(self, configuration: Configuration, conditions: Sequence[str | int], seed: int) -> npt.NDArray[Any]:
        """One picture a condition, with seeds from ``seed`` on: uint8 (N, H, W, C)."""
        variant = self._variant(configuration, seed)
        try:
            return draw_pictures(variant.image_generator, conditions, variant.settings, lambda what, done, of: None)
        finally:
            _close(variant)

    def latency(self, configuration: Configuration, beside: Configuration) -> Record:
        """Median milliseconds of a picture, and how many times as fast as ``beside``, timed in turn with it."""
        if self.picture_s > WHOLE_S:
            return self._calculated(configuration, beside)
        key = hash_of("latency", self._key(configuration), self._key(beside), self._rounds)
        return self._records(key, lambda: self._latency(configuration, beside))

    @cached_property
    def picture_s(self) -> float:
        """Estimated seconds of a picture of the untouched bundle, from few network calls; 0 where those fail."""

        def probe() -> Record:
            run = self._runs({"this": self._shortened(self._truth)}, 1, 0)["this"][0]
            return {"s": calculated(run, self.made(self._truth)["calls"]).total_ms / 1e3}

        seconds: float = self._records(hash_of("seconds", self._key(self._truth)), probe).get("s", 0.0)
        return seconds

    def _latency(self, configuration: Configuration, beside: Configuration) -> Record:
        return _compared(self._runs({"beside": beside, "this": configuration}, self._rounds))

    def _calculated(self, configuration: Configuration, beside: Configuration) -> Record:
        """Likewise, from pictures of few calls; what differs in its plan alone takes no more timing."""
        asked = {"beside": beside, "this": configuration}
        short = {name: self._shortened(each) for name, each in asked.items()}
        if short["this"] == short["beside"]:
            del short["beside"]
        key = hash_of("parts", [self._key(each) for each in short.values()], self._rounds)

        def timed() -> Record:
            return {name: [asdict(run) for run in runs] for name, runs in self._runs(short, self._rounds).items()}

        found = self._records(key, timed)
        if "failed" in found:
            return found
        runs = {}
        for name, each in asked.items():
            made = self.made(each)
            if "failed" in made:
                return made
            few = [Timings(**run) for run in found[name if name in short else "this"]]
            runs[name] = [calculated(run, made["calls"], each.deepcache) for run in few]
        return _compared(runs)

    def _shortened(self, configuration: Configuration) -> Configuration:
        """The same graphs on the same machine with few steps; as it is where its sampler has no such plan."""
        if configuration.bundle:
            return configuration
        sampler, steps = forecast_of(self._truth.sampler)[0], max(FEW_CALLS, configuration.deepcache)
        short = replace(configuration, sampler=sampler, steps=steps)
        try:
            self._variants.plan_of(short)
        except InputError:
            return configuration
        return short

    def _runs(
        self, configurations: Mapping[str, Configuration], rounds: int, warm_up: int = 1
    ) -> dict[str, list[Timings]]:
        variants: dict[str, Variant] = {}
        try:
            for name, each in configurations.items():
                variants[name] = self._variant(each, 0)
            draws = {name: variant.timed(self._conditions, 0) for name, variant in variants.items()}
            return runs_in_turn(draws, rounds, warm_up)
        finally:
            for variant in variants.values():
                _close(variant)

    def memory(self, configuration: Configuration) -> Record:
        """Peak resident memory, in bytes, of a process that draws two pictures; None where it cannot be measured."""
        return self._records(hash_of("memory", self._key(configuration)), lambda: self._memory(configuration))

    def _memory(self, configuration: Configuration) -> Record:
        variant = self._variant(configuration, 0)
        child = variant.child(self._conditions[0], 0)
        _close(variant)
        found = processes_in_turn({variant.name: child}, 1, lambda what: None)[variant.name]
        return {"peak_rss_bytes": found["peak_rss_bytes"], "cold_start_ms": found["cold_start_ms"]}

    def _variant(self, configuration: Configuration, seed: int) -> Variant:
        bundle = self._variants.bundle_of(configuration)
        generator = BundleImageGenerator(
            bundle, configuration.backend, threads=configuration.threads, deepcache=configuration.deepcache
        )
        guidance = bundle.roles.guidance.scale if configuration.bundle else self._guidance
        settings = SamplingSettings(
            sampler=configuration.sampler, steps=configuration.steps, guidance=guidance, seed=seed
        )
        return Variant("this", str(bundle.path), generator, settings, generator.backend, bundle.size_bytes, bundle)

    def _key(self, configuration: Configuration, *, drawn: bool = False) -> str:
        """What a measurement of a configuration depends on: the machine, too, whose rounding pictures have."""
        values: Mapping[str, Any] = configuration.drawn if drawn else asdict(configuration)
        plan = self._variants.kept_plan(configuration)
        made_for_it = plan.to_json() if plan is not None and not configuration.bundle else ""
        other = self._hash_of_other(configuration.bundle) if configuration.bundle else ""
        given = self._guidance, list(self._conditions)
        return hash_of(self._variants.key, values, made_for_it, other, self._machine, *given)

    def _hash_of_other(self, path: str) -> str:
        if path not in self._hashes:
            manifest = self._variants.bundle_of(Configuration("", 0, bundle=path)).manifest
            files = {name: entry.sha256 for name, entry in manifest.files.items()}
            self._hashes[path] = hash_of(os.path.abspath(path), files)
        return self._hashes[path]


def _compared(runs: Mapping[str, list[Timings]]) -> Record:
    """Median milliseconds by stage of ``this``, and how many times as fast as ``beside`` it is, round by round."""
    found = stages(runs["this"])
    spent = {name: found[name]["median_ms"] for name in ("text", "denoiser", "loop", "decode", "total")}
    return {"ms": spent["total"], "stages": spent, "faster": times_as_fast(runs["beside"], runs["this"])}


def _close(variant: Variant) -> None:
    assert isinstance(variant.image_generator, BundleImageGenerator)
    variant.image_generator.close()
