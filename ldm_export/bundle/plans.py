"""Sampling plans of a bundle: read from ``plans/``, or compiled by the bundle's scheduler config where they are needed.

A file under ``plans/`` is added for loops, which are made of one, and for what cannot be compiled.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ldm_export.bundle.bundle import Bundle
from ldm_export.errors import BundleError, InputError
from ldm_export.plan import Plan, compile_plan
from ldm_export.plan.schedule import short_repr
from ldm_export.reading.documents import MalformedError, parsed

SCHEDULER = "scheduler/scheduler_config.json"
"""File of the scheduler config that plans are compiled from."""


def read_plan(bundle: Bundle, sampler: str, steps: int) -> Plan:
    """The plan of that sampler and number of steps: the bundle's file, or else compiled by its scheduler config.

    Raises
    ------
    InputError
        If there is no such file and none can be compiled; the message says why.
    BundleError
        If the file, or the config, cannot be read, or the file is of another plan.
    """
    path = f"plans/{sampler}-{steps}.json"
    if path in bundle.manifest.files:
        return _plan_of(bundle, path)
    there = [name[len("plans/") : -len(".json")] for name in bundle.manifest.files if name.startswith("plans/")]
    lacks = f"This bundle has no plan for {short_repr(sampler)} with {steps} steps"
    if SCHEDULER not in bundle.manifest.files:
        raise InputError(
            f"{lacks}, and no {SCHEDULER} to compile one from; its plans: {', '.join(sorted(there)) or 'none'}. "
            "Use one of those, or export the bundle anew."
        )
    try:
        return _compiled(bundle.read(SCHEDULER), sampler, steps)
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
            _plan_of(bundle, path)
    try:
        read_plan(bundle, bundle.manifest.model["default_sampler"], bundle.manifest.model["default_steps"])
    except InputError as error:
        raise BundleError(f"Bundle {bundle.path} cannot be drawn with as it says of itself. {error}") from error


@lru_cache(maxsize=8)
def _compiled(config: bytes, sampler: str, steps: int) -> Plan:
    """Compile by the text of a scheduler config; the last plans are remembered."""
    return compile_plan(scheduler_from_json(config), sampler, steps)


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


def _plan_of(bundle: Bundle, path: str) -> Plan:
    try:
        plan = Plan.from_json(bundle.read(path))
    except InputError as error:
        raise BundleError(f"Bundle {bundle.path}: {path}: {error}") from error
    if path != f"plans/{plan.file_name}":
        raise BundleError(f"Bundle {bundle.path}: {path} has the plan {plan.file_name}. Export the bundle anew.")
    return plan


def add_plan(bundle: Bundle, sampler: str, steps: int, *, eta: float = 0.0) -> tuple[Bundle, Plan]:
    """Compile a sampler by the bundle's scheduler config and add the plan, or replace the one of its name.

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
    plan = compile_plan(scheduler, sampler, steps, eta=eta)
    return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode()), plan


def with_plan(bundle: Bundle, sampler: str, steps: int) -> tuple[Bundle, Plan]:
    """The plan that the runtime draws with, and the bundle with that plan's file, which is added where it is missing.

    Raises
    ------
    BundleError, InputError
        As `read_plan` does.
    """
    plan = read_plan(bundle, sampler, steps)
    path = f"plans/{plan.file_name}"
    if path not in bundle.manifest.files:
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
