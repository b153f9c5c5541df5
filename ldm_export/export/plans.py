"""Adds plans to a bundle."""

from __future__ import annotations

from ldm_export.bundle import Bundle
from ldm_export.plan import Plan, compile_plan


def add_plan(bundle: Bundle, sampler: str, steps: int, *, eta: float = 0.0) -> tuple[Bundle, Plan]:
    """Compile a sampler by the bundle's scheduler config and add the plan, or replace the one of its name.

    Raises
    ------
    BundleError
        If the bundle has no such config, or it is no JSON.
    InputError
        For a sampler or a number of steps that cannot be compiled.
    """
    scheduler = bundle.json("scheduler/scheduler_config.json", constants=True)
    plan = compile_plan(scheduler, sampler, steps, eta=eta)
    return bundle.add_file(f"plans/{plan.file_name}", plan.to_json().encode()), plan
