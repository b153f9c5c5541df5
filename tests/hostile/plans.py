"""Plan files: every field of a plan, a row and an entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.hostile.base import Draft
from tests.hostile.case import ASKS, MISSING, Case, file_value, rows

PLAN = "plans/ddim-2.json"
NO_NUMBER = (
    "NaN",
    "Infinity",
    "1e999",
    "1e39",
    "-1e39",
    "3.5e38",
    "1" + "0" * 40,
    '"1"',
    "true",
    "null",
    "[1]",
    "{}",
    MISSING,
)
"""What no field takes that has a number: each must be finite in float32."""
NO_LIST = ("null", "{}", '""', "1", MISSING)
ROW = ("rows", 0)


def _plan(*path: str | int) -> Callable[..., Case]:
    return file_value(PLAN, *path)


def _tokens(raw: str, opens: bool) -> Case:
    """A plan for pictures of so many tokens; those of the sound bundle have 16."""

    def change(draft: Draft) -> None:
        draft.put(PLAN, draft.document(PLAN) | {"tokens": draft.raw(raw)})

    return Case(f"{PLAN} tokens = {raw}", opens, change)


def _whole() -> Iterator[Case]:
    yield from rows(_plan("format_version"), refused=("0", "2", "1.0", "true", '"1"', "null", MISSING))
    yield from rows(_plan("sampler"), refused=('"euler"', '""', '"ddim\\u0000"', '"../ddim"', "null", "1", MISSING))
    yield from rows(_plan("num_inference_steps"), refused=("1", "3", "0", "-2", "2.0", '"2"', "true", "null", MISSING))
    yield from rows(_plan("init_scale"), opened=("1", "0", "0.5", "1e-50"), refused=NO_NUMBER)
    yield from rows(_plan("x"), refused=("1", "null"))
    no_tokens = ("0", "-1", "1.0", "1e2", "true", '"1"', "null", "[]", str(2**40 + 1), str(2**63), str(10**30))
    yield from rows(_tokens, opened=("16", "15", str(2**40)), refused=no_tokens)  # those of other sizes are passed over
    yield from rows(_plan("rows"), refused=("[]", "[1]", "[[]]", "[{}]", *NO_LIST))
    yield from rows(_plan("entries"), refused=("[]", "[1, 2]", "[{}, {}]", *NO_LIST))


def _rows() -> Iterator[Case]:
    for key in ("from_sample", "from_output", "keep", "direct", "noise"):
        yield from rows(_plan(*ROW, key), opened=("0", "-0.5", "1", "2"), refused=NO_NUMBER)
    yield from rows(_plan(*ROW, "timestep"), opened=("0", "999.5"), refused=("-1", *NO_NUMBER))
    yield from rows(_plan(*ROW, "input_scale"), opened=("1", "0.01"), refused=("0", "-1", "1e-50", *NO_NUMBER))
    yield from rows(_plan(*ROW, "clip"), opened=("0", "1.5"), refused=("-1", *NO_NUMBER))
    yield from rows(
        _plan(*ROW, "weights"),
        opened=("[]", "[0.5]"),
        refused=("[1, 2]", "[1, 2, 3, 4, 5, 6]", "[NaN]", "[1e39]", '["1"]', "[null]", "[[1]]", *NO_LIST),
    )
    yield from rows(_plan("rows", 1, "weights"), opened=("[0.5]",), refused=("[1, 0.5]", "[1, 2, 3]"))  # entered there
    yield from rows(_plan(*ROW, "x"), refused=("1",))
    yield from rows(_plan(*ROW), refused=("[]", "null", "1", MISSING))


def _entries() -> Iterator[Case]:
    entry = ("entries", 1)
    for key in ("image_scale", "noise_scale"):
        yield from rows(_plan(*entry, key), opened=("0.5",), refused=NO_NUMBER)
    yield from rows(
        _plan(*entry, "resume"), opened=("0", "1"), refused=("2", "3", "-1", "1.0", "true", "null", MISSING)
    )
    yield from rows(_plan(*entry, "warmup"), refused=("[1]", "[{}]", *NO_LIST))
    yield from rows(_plan(*entry, "x"), refused=("1",))
    yield from rows(_plan(*entry), refused=("[]", "null", MISSING))


def _repeated(draft: Draft, key: str, times: int) -> None:
    plan = draft.document(PLAN)
    plan[key] = plan[key][:1] * times
    draft.put(PLAN, plan)


def _of_steps(draft: Draft, steps: int, calls: int) -> None:
    """The plan with so many steps, under its name and said alike, of so many network calls."""
    plan = draft.document(PLAN)
    plan["num_inference_steps"] = steps
    plan["rows"] = plan["rows"][:1] * calls
    plan["entries"] = [{**plan["entries"][0], "resume": 0}] * steps
    draft.files[f"plans/ddim-{steps}.json"] = json.dumps(plan).encode()


def _warmups(draft: Draft, count: int) -> None:
    plan = draft.document(PLAN)
    plan["entries"][1]["warmup"] = plan["rows"][:1] * count
    draft.put(PLAN, plan)


def cases() -> Iterator[Case]:
    """All of this part."""
    for part in (_whole, _rows, _entries):
        yield from part()
    asks: Any
    for sampler, steps in (("dpmpp-2m", 3), ("euler-ancestral", 2)):
        asks = {**ASKS, "sampler": sampler, "steps": steps}
        yield Case(f"a plan of {sampler}", True, lambda draft: None, asks=asks)
        yield Case(f"a plan of {sampler}, with an image", True, lambda draft: None, asks={**asks, "image": True})
    for asks in ({"sampler": "ddim", "steps": 3}, {"sampler": "none", "steps": 2}, {"sampler": "../ddim", "steps": 2}):
        name, opens = f"no file of {asks['sampler']} with {asks['steps']}", asks["sampler"] == "ddim"
        yield Case(name, opens, lambda draft: None, asks={**ASKS, **asks})
    for key, times in (("rows", 1), ("rows", 5), ("entries", 1), ("entries", 3)):
        yield Case(f"a plan with {times} {key}", False, partial(_repeated, key=key, times=times))
    for steps, calls, opens in ((3, 3, True), (3, 6, True), (3, 7, False), (3, 2, True), (10001, 10001, False)):
        change = partial(_of_steps, steps=steps, calls=calls)
        yield Case(f"a plan of {steps} steps and {calls} calls", opens, change, asks={**ASKS, "steps": steps})
    for count, opens in ((0, True), (5, True), (2001, False)):
        yield Case(f"a plan with {count} warm-up rows", opens, partial(_warmups, count=count))
    yield Case(
        "a plan under another's name",
        False,
        lambda draft: draft.files.update({PLAN: draft.files["plans/euler-ancestral-2.json"]}),
    )
    yield Case("a plan that is a folder", True, _folder)  # so it is compiled
    yield Case("a plan that is a JSON text", False, lambda draft: draft.files.update({PLAN: b'"plan"'}))


def _folder(draft: Draft) -> None:
    draft.files[f"{PLAN}/x"] = draft.files.pop(PLAN)
