from __future__ import annotations

import json
from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.cli.options import bundle_argument, console, json_option, print_json
from ldm_export.errors import BundleError
from ldm_export.plan import SAMPLERS, compile_plan


@click.command()
@bundle_argument
@click.option("--sampler", required=True, help=f"One of {', '.join(SAMPLERS)}.")
@click.option("--steps", type=int, required=True, help="Denoising steps.")
@click.option("--eta", default=0.0, show_default=True, help="DDIM's share of DDPM's noise, in [0, 1].")
@json_option
def command(bundle: Path, sampler: str, steps: int, eta: float, as_json: bool) -> None:
    """Compile a sampler into a plan and add it to BUNDLE; an installed C++ application can then use it too."""
    opened = Bundle.open(bundle)
    try:
        scheduler = json.loads(opened.file("scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{bundle}: scheduler_config.json is not JSON ({error}). Export the bundle anew.") from error
    plan = compile_plan(scheduler, sampler, steps, eta=eta)
    opened.add_file(f"plans/{plan.file_name}", plan.to_json().encode())
    if as_json:
        print_json({"plan": f"plans/{plan.file_name}", "rows": len(plan.rows)})
    else:
        console.print(f"plans/{plan.file_name}: {len(plan.rows)} network calls")
