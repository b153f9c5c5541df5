"""Plans that the C++ runtime compiles are those that Python compiles: all their numbers, or the same refusal."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.errors import InputError
from ldm_export.plan import Plan, compile_plan
from ldm_export.plan.table import Row
from tests.plan_cases import (
    TOKENS,
    Case,
    drawn,
    far_shifts,
    flows,
    forecasts,
    grid,
    long,
    long_forecasts,
    wrong,
    wrong_flows,
    wrong_forecasts,
)

TOLERANCE = 1e-12
"""Largest difference of a number from Python's, as a share of the largest of its column in the plan, or of 1."""
COLUMNS = 8
"""Numbers of a row besides its weights."""


def compiled_in_cpp(program: Path, cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """What the C++ compiler makes of each case, all in one process."""
    asked = [
        json.dumps({"config": json.dumps(config), "sampler": sampler, "steps": steps, "tokens": config.get(TOKENS, 0)})
        for config, sampler, steps in cases
    ]
    done = subprocess.run([program], input="\n".join(asked) + "\n", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(asked)
    return map(json.loads, lines)


def numbers_of(row: Row) -> list[Any]:
    *scalars, weights, noise = vars(row).values()
    return [*scalars, noise, list(weights)]


def difference(plan: Plan, found: dict[str, Any]) -> float:
    """The largest difference of a plan from what C++ made, infinite where it is not of the same shape."""
    said = found.get("sampler"), found.get("steps"), len(found.get("entries", ())), len(found.get("rows", ()))
    if said != (plan.sampler, plan.num_inference_steps, len(plan.entries), len(plan.rows)):
        return np.inf
    ours = [*map(numbers_of, plan.rows)]
    theirs = [*found["rows"]]
    scales = [[plan.init_scale, 0.0]], [[found["init_scale"], 0.0]]
    for entry, (image_scale, noise_scale, resume, warmup) in zip(plan.entries, found["entries"], strict=True):
        if (resume, len(warmup)) != (entry.resume, len(entry.warmup)):
            return np.inf
        ours += map(numbers_of, entry.warmup)
        theirs += warmup
        scales[0].append([entry.image_scale, entry.noise_scale])
        scales[1].append([image_scale, noise_scale])
    if [len(row[-1]) for row in ours] != [len(row[-1]) for row in theirs]:
        return np.inf
    widest = max(len(row[-1]) for row in ours)
    tables = [
        np.array([[*row[:COLUMNS], *row[COLUMNS], *[0.0] * (widest - len(row[COLUMNS]))] for row in rows])
        for rows in (ours, theirs)
    ]
    pairs = [(tables[0], tables[1]), (np.array(scales[0]), np.array(scales[1]))]
    return max(float((np.abs(a - b) / np.maximum(np.abs(a).max(axis=0), 1.0)).max()) for a, b in pairs)


def in_python(case: Case) -> Plan | str:
    try:
        plan = compile_plan(*case, tokens=case[0].get(TOKENS, 0))
        return replace(plan, entries=tuple(plan.entries))  # which are made, and checked, now
    except InputError as error:
        return str(error)


KINDS = {
    "the grid": lambda: itertools.islice(grid(), 0, None, 3),
    "random configs": lambda: drawn(1500),
    "many steps": long,
    "flow matching": lambda: flows(1500),
    "what is not meant of flow matching": lambda: wrong_flows(1500),
    "shifts beyond what there is": lambda: far_shifts(1500),
    "what is not meant": lambda: wrong(1500),
    "forecasts": lambda: forecasts(1500),
    "forecasts of many steps": long_forecasts,
    "forecasts of what is not meant": lambda: wrong_forecasts(1500),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_compile_alike(programs: Path, kind: str) -> None:
    cases = [*KINDS[kind]()]
    largest, plans, wrong_ones = 0.0, 0, []
    for case, found in zip(cases, compiled_in_cpp(programs / "ldm_compile_plans", cases), strict=True):
        expected = in_python(case)
        if isinstance(expected, str):
            if found != {"refused": expected}:
                wrong_ones.append((case, expected, str(found)[:400]))
            continue
        plans += 1
        apart = difference(expected, found)
        largest = max(largest, apart)
        if not apart <= TOLERANCE:
            wrong_ones.append((case, apart, str(found)[:400]))
    print(f"{len(cases)} cases, {plans} plans, largest difference {largest:.1e}")
    assert not wrong_ones, f"{len(wrong_ones)} of {len(cases)}:\n" + "\n".join(map(repr, wrong_ones[:10]))
    assert plans > len(cases) / 4


def test_a_wrong_table_is_told_apart(programs: Path) -> None:
    case: Case = ({"timestep_spacing": "trailing"}, "unipc", 8)
    (found,) = compiled_in_cpp(programs / "ldm_compile_plans", [case])
    plan = compile_plan(*case)
    assert difference(plan, found) <= TOLERANCE
    assert difference(compile_plan({"timestep_spacing": "leading"}, "unipc", 8), found) > 1e-3
    found["entries"][3][3][0][-1][0] *= 1 + 1e-11
    assert difference(plan, found) > TOLERANCE
