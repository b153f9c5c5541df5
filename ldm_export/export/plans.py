"""Adds plans to a bundle."""

from __future__ import annotations

import json

from ldm_export.bundle import Bundle
from ldm_export.errors import BundleError
from ldm_export.plan import Plan, compile_plan


def add_plan(bundle: Bundle, sampler: str, steps: int, *, eta: float = 0.0) -> tuple[Bundle, Plan]:
    """Compile a sampler by the bundle's scheduler config and add the plan, or replace the one of its name.

    Raises
    ------
    InputError
        For a sampler or a number of steps that cannot be compiled.
    """
    try:
        scheduler = json.loads(bundle.file("scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(
            f"{bundle.path}: scheduler_config.json is not JSON ({error}). Export the bundle anew."
        ) from error
    plan = compile_plan(scheduler, sampler, steps, eta=eta)
    return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode()), plan
