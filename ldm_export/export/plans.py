"""Adds plans to a bundle as files: for loops, which are made of one, and for what is not compiled when it is drawn."""

from __future__ import annotations

from ldm_export.bundle import Bundle
from ldm_export.errors import BundleError, InputError
from ldm_export.plan import Plan, compile_plan
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime.request import SCHEDULER, read_plan, scheduler_from_json


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
