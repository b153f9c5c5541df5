"""Timing in turn: every variant once a round, medians of the rounds that count."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_export.runtime import Pipeline
from ldm_export.runtime.pipeline import Timings
from ldm_export.verify import latency
from ldm_export.verify.latency import Draw, Latency, draw_with, time_in_turn


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No time is slept; the pauses that were asked for."""
    asked: list[float] = []
    monkeypatch.setattr(latency.time, "sleep", asked.append)
    return asked


def variant(name: str, calls: list[tuple[str, int]], timings: Callable[[int], Timings]) -> Draw:
    def draw(seed: int) -> Timings:
        calls.append((name, seed))
        return timings(seed)

    return draw


def test_sides_take_turns(pauses: list[float]) -> None:
    calls: list[tuple[str, int]] = []
    variants = {name: variant(name, calls, lambda seed: Timings(denoiser_ms=[1.0])) for name in ("ours", "theirs")}
    assert time_in_turn(variants, 2).keys() == variants.keys()
    assert calls == [(name, seed) for seed in (0, 1, 2) for name in ("ours", "theirs")]
    assert pauses == [latency.SETTLE_S] * 6


def test_the_first_round_is_not_counted_and_one_slow_round_changes_nothing() -> None:
    def timings(seed: int) -> Timings:
        slow = {0: 1000.0, 2: 500.0}.get(seed, 1.0)
        return Timings(
            load_ms=9.0, text_ms=slow, encode_ms=0.0, denoiser_ms=[2 * slow, 4 * slow], loop_ms=slow, decode_ms=3 * slow
        )

    timed = time_in_turn({"ours": variant("ours", [], timings)}, 3)
    assert timed == {"ours": Latency(total_ms=11.0, text_ms=1.0, denoiser_ms=4.0, decode_ms=3.0, calls=2)}
    assert timed["ours"].to_dict() == {
        "total_ms": 11.0,
        "text_ms": 1.0,
        "denoiser_ms": 4.0,
        "decode_ms": 3.0,
        "calls": 2,
    }


def test_medians_are_of_each_stage() -> None:
    """The median of the totals, not the total of the medians."""
    rounds = [
        Timings(text_ms=t, denoiser_ms=[u], decode_ms=d) for t, u, d in ((1, 1, 1), (1, 5, 9), (5, 9, 1), (9, 1, 5))
    ]
    timed = time_in_turn({"ours": variant("ours", [], lambda seed: rounds[seed])}, 3)["ours"]
    assert timed.total_ms == statistics.median(run.total_ms for run in rounds[1:]) == 15
    assert (timed.text_ms, timed.denoiser_ms, timed.decode_ms) == (5, 5, 5)


def test_a_loop_graph_has_a_stage_of_its_own() -> None:
    runs = [Timings(loop_ms=1.0, whole_ms=ms) for ms in (7.0, 8.0, 9.0)]
    assert runs[0].total_ms == 8.0
    found = latency.stages(runs)
    assert [found[name]["median_ms"] for name in ("whole", "total", "denoiser_call", "denoiser")] == [
        8.0,
        9.0,
        0.0,
        0.0,
    ]
    assert time_in_turn({"ours": variant("ours", [], lambda seed: runs[0])}, 2)["ours"].calls == 0


def test_a_prompt_is_new_each_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    generate = Pipeline.generate

    def recorded(self: Pipeline, prompts: str, **options: int) -> object:
        asked.append((prompts, options))
        return generate(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "generate", recorded)
    draw = draw_with(Pipeline.open(tiny_bundle), ["red", "blue"])
    timings = [draw(seed) for seed in range(3)]
    assert asked == [("red 0", {"seed": 0}), ("blue 1", {"seed": 1}), ("red 2", {"seed": 2})]
    assert all(run.text_ms > 0 and len(run.denoiser_ms) == 20 and run.decode_ms > 0 for run in timings)


def test_a_model_without_text_is_told_nothing(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    draw = draw_with(Pipeline.open(kinds("unconditional")[1]), None)
    assert len(draw(3).denoiser_ms) == 20
