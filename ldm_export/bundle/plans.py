"""Sampling plans of a bundle: read from ``plans/``, or compiled by the bundle's scheduler config where they are needed.

A file under ``plans/`` is added for loops, which are made of one, and for what cannot be compiled. Where the scheduler
config shifts dynamically, a plan is of pictures of one number of tokens: a file has that of the model's own size, and
is passed over for pictures of other sizes, whose plan is compiled; loops are of the size of their file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ldm_export.bundle.bundle import Bundle
from ldm_export.errors import BundleError, InputError
from ldm_export.plan import Forecast, Plan, compile_plan, picture_tokens, shifts_dynamically
from ldm_export.plan.schedule import short_repr
from ldm_export.reading.documents import MalformedError, parsed

SCHEDULER = "scheduler/scheduler_config.json"
"""File of the scheduler config that plans are compiled from."""


def read_plan(bundle: Bundle, sampler: str, steps: int, size: tuple[int, int] | None = None) -> Plan:
    """The plan of that sampler and number of steps: the bundle's file, or else compiled by its scheduler config.

    Parameters
    ----------
    size : height and width of the pictures in pixels, by which some configs shift; the model's own by default

    Raises
    ------
    InputError
        If there is no such file and none can be compiled; the message says why.
    BundleError
        If the file, or the config, cannot be read, or the file is of another plan.
    """
    path = f"plans/{sampler}-{steps}.json"
    passed_over = False
    if path in bundle.manifest.files:
        plan = plan_in(bundle, path)
        passed_over = plan.tokens > 0 and plan.tokens != _tokens(bundle, size)
        if not passed_over:
            return plan
    there = [name[len("plans/") : -len(".json")] for name in bundle.manifest.files if name.startswith("plans/")]
    lacks = f"This bundle has no plan for {short_repr(sampler)} with {steps} steps"
    if passed_over:
        lacks += f" and pictures of {_tokens(bundle, size)} tokens"
    if SCHEDULER not in bundle.manifest.files:
        raise InputError(
            f"{lacks}, and no {SCHEDULER} to compile one from; its plans: {', '.join(sorted(there)) or 'none'}. "
            "Use one of those, or export the bundle anew."
        )
    try:
        text = bundle.read(SCHEDULER)
        return _compiled(text, sampler, steps, _tokens(bundle, size) if _shifts_dynamically(text) else 0)
    except MalformedError as error:
        raise BundleError(f"Bundle {bundle.path}: {SCHEDULER} is {error}. Export the bundle anew.") from error
    except InputError as error:
        kin = sorted((name for name in there if name.rpartition("-")[0] == sampler), key=lambda name: (len(name), name))
        has = f" (it has {', '.join(kin)})" if kin else ""
        raise InputError(f"{lacks}{has}, and it cannot be compiled: {error}") from error


def check_plans(bundle: Bundle) -> None:
    """Raise BundleError unless each plan file of a bundle can be read and is what its name says, and the bundle's
    default plan can be had."""
    for path in bundle.manifest.files:
        if path.startswith("plans/"):
            plan_in(bundle, path)
    try:
        read_plan(bundle, bundle.manifest.model["default_sampler"], bundle.manifest.model["default_steps"])
    except InputError as error:
        raise BundleError(f"Bundle {bundle.path} cannot be drawn with as it says of itself. {error}") from error


@lru_cache(maxsize=8)
def _compiled(config: bytes, sampler: str, steps: int, tokens: int) -> Plan:
    """Compile by the text of a scheduler config; the last plans are remembered."""
    return compile_plan(scheduler_from_json(config), sampler, steps, tokens=tokens)


@lru_cache(maxsize=8)
def _shifts_dynamically(config: bytes) -> bool:
    return shifts_dynamically(scheduler_from_json(config))


def _tokens(bundle: Bundle, size: tuple[int, int] | None = None) -> int:
    """Tokens of a picture of this height and width, or of the model's own."""
    model = bundle.manifest.model
    try:
        return picture_tokens(model, *(size or (model["height"], model["width"])))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BundleError(
            f"Bundle {bundle.path}: manifest.json does not say how large the model's pictures are. Export it anew."
        ) from error


def check_loop_size(bundle: Bundle, sampler: str, steps: int, size: tuple[int, int]) -> None:
    """Raise InputError if pictures of this height and width have another plan than the one that a loop is made of.

    Raises
    ------
    BundleError
        As `read_plan` does.
    """
    path = f"plans/{sampler}-{steps}.json"
    made_for = plan_in(bundle, path) if path in bundle.manifest.files else read_plan(bundle, sampler, steps)
    if made_for.tokens and made_for.tokens != _tokens(bundle, size):
        model, what = bundle.manifest.model, f"pictures of {made_for.tokens} tokens"
        if made_for.tokens == _tokens(bundle):
            what = f"{model['height']}x{model['width']}"
        raise InputError(
            f"The whole loop {sampler}-{steps} was asked for at {size[0]}x{size[1]}; it is made for {what}, since this "
            "model's noise levels are by the size of the picture. Use that size, or draw step by step."
        )


def scheduler_from_json(text: bytes) -> dict[str, Any]:
    """A scheduler config, in which diffusers may have written ``Infinity``.

    Raises
    ------
    MalformedError
        If it is no JSON object.
    """
    config = parsed(text, constants=True)
    if not isinstance(config, dict):
        raise MalformedError("no JSON object")
    return config


def plan_in(bundle: Bundle, path: str) -> Plan:
    """The plan in one of a bundle's files.

    Raises
    ------
    BundleError
        If the file cannot be read, or is of another plan.
    """
    try:
        plan = Plan.from_json(bundle.read(path))
    except InputError as error:
        raise BundleError(f"Bundle {bundle.path}: {path}: {error}") from error
    if path != f"plans/{plan.file_name}":
        raise BundleError(f"Bundle {bundle.path}: {path} has the plan {plan.file_name}. Export the bundle anew.")
    return plan


def add_plan(
    bundle: Bundle, sampler: str, steps: int, *, eta: float = 0.0, forecast: Forecast | None = None
) -> tuple[Bundle, Plan]:
    """Compile a sampler by the bundle's scheduler config and add the plan, or replace the one of its name.

    Where the config shifts dynamically, it is the plan of pictures of the model's own size.

    Raises
    ------
    BundleError
        If the bundle has no such config, or it is no JSON object.
    InputError
        For a sampler or a number of steps that cannot be compiled.
    """
    try:
        scheduler = scheduler_from_json(bundle.read(SCHEDULER))
    except MalformedError as error:
        raise BundleError(f"Bundle {bundle.path}: {SCHEDULER} is {error}. Export the bundle anew.") from error
    tokens = _tokens(bundle) if shifts_dynamically(scheduler) else 0
    plan = compile_plan(scheduler, sampler, steps, eta=eta, tokens=tokens, forecast=forecast)
    return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode()), plan


def add_fitted(bundle: Bundle, plan: Plan, report: Mapping[str, Any]) -> Bundle:
    """Add a plan that was made for this bundle, or replace the one of its name; ``fits/`` has what is known of it."""
    bundle = bundle.add_file(f"fits/{plan.file_name}", (json.dumps(report, indent=1, sort_keys=True) + "\n").encode())
    return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode())


def with_plan(bundle: Bundle, sampler: str, steps: int) -> tuple[Bundle, Plan]:
    """The plan that the runtime draws with at the model's own size, and the bundle with that plan's file.

    The file is added where it is missing or of another size.

    Raises
    ------
    BundleError, InputError
        As `read_plan` does.
    """
    plan = read_plan(bundle, sampler, steps)
    path = f"plans/{plan.file_name}"
    if path not in bundle.manifest.files or plan_in(bundle, path).tokens not in (0, plan.tokens):
        bundle = bundle.add_file(path, plan.to_json().encode())
    return bundle, plan


def loop_of(name: str) -> tuple[str, int]:
    """The sampler and the steps of a loop's name, such as ``ddim-20``.

    Raises
    ------
    InputError
        If it is no such name.
    """
    sampler, _, steps = name.rpartition("-")
    if not sampler or not (steps.isascii() and steps.isdigit() and len(steps) < 6):
        raise InputError(f"--loop {name} is not the name of a plan; it is SAMPLER-STEPS, such as ddim-20.")
    return sampler, int(steps)
