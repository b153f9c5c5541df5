"""Times that are calculated from parts: of plans without drawing them, of DeepCache by its two kinds of calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_export.bundle import Bundle
from ldm_export.runtime.results import Timings
from ldm_export.tune import measure as measuring
from ldm_export.tune.candidates import Configuration
from ldm_export.tune.latency import calculated
from ldm_export.tune.measure import RECORDS, Measure, Records
from ldm_export.tune.variants import Variants


def test_a_picture_of_many_calls_from_one_of_few() -> None:
    run = Timings(text_ms=5, encode_ms=1, denoiser_ms=[100.0, 300.0], loop_ms=2, decode_ms=50)
    found = calculated(run, 50)
    assert found.denoiser_ms == [200.0] * 50
    assert found.total_ms == 5 + 1 + 50 * 200 + 50 + 50


def test_deepcache_has_calls_of_two_kinds() -> None:
    run = Timings(denoiser_ms=[90.0, 10.0, 20.0])
    found = calculated(run, 50, every=3)
    assert found.denoiser_ms == ([90.0, 15.0, 15.0] * 17)[:50]
    assert sum(found.denoiser_ms) == 17 * 90 + 33 * 15


def test_a_long_picture_is_not_drawn_to_be_timed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Configuration("ddim", 50)
    forecast, cached = Configuration("ddim-calls16", 50), Configuration("ddim", 50, deepcache=3, target=True)
    drawn: list[int] = []
    runs = Measure._runs

    def counted(self: Measure, configurations: dict[str, Configuration], rounds: int, warm_up: int = 1) -> object:
        drawn.extend(each.steps for each in configurations.values())
        return runs(self, configurations, rounds, warm_up)

    monkeypatch.setattr(Measure, "_runs", counted)
    monkeypatch.setattr(measuring, "WHOLE_S", 0.0)
    variants = Variants(Bundle.open(tiny_bundle), None, [], tmp_path, lambda what: None)
    measure = Measure(variants, Records(tmp_path / RECORDS), truth, 4.0, ["a red circle"], 3)
    found = {each: measure.latency(each, truth) for each in (truth, forecast, cached)}
    assert drawn == [2, 2, 2, 3]  # the probe; what differs in its plan alone; the truth and DeepCache in turn
    assert found[truth]["faster"] == 1
    parts = found[truth]["stages"]
    fewer = parts["total"] - (parts["denoiser"] + parts["loop"]) * 34 / 50
    assert found[forecast]["ms"] == pytest.approx(fewer, rel=0.5)
    assert 1 < found[forecast]["faster"] < 50 / 16
    assert found[cached]["ms"] > 0
    again = Measure(variants, Records(tmp_path / RECORDS), truth, 4.0, ["a red circle"], 3)
    assert again.latency(forecast, truth) == found[forecast]
    assert len(drawn) == 4
