"""A sampler as a table: compiled from a scheduler config once, run anywhere with a loop of fifteen lines.

    plan = compile_plan(scheduler_config, "dpmpp-2m", 20)
    trajectory = plan.from_noise()                        or plan.for_strength(0.6) for image-to-image
    latents = trajectory.noise_scale * noise              + trajectory.image_scale * image_latents
    stepper = Stepper(trajectory.rows, latents)
    for row in trajectory.rows:
        stepper.network_input(out=buffer)
        stepper.advance(network(buffer, row.timestep), draw)

`table` has the format and its executor, `schedule` the noise levels, `onestep` and `multistep` the samplers' formulas,
`samplers` the list of samplers, `compiler` what makes a plan of one, `forecast` what leaves network calls out of it,
`levels` reads the noise levels off a plan. numpy and the standard library only.
"""

from ldm_export.plan.compiler import compile_plan
from ldm_export.plan.flow import picture_tokens, shifts_dynamically
from ldm_export.plan.forecast import CALLS, Forecast, forecast_of
from ldm_export.plan.levels import Scales, row_levels
from ldm_export.plan.samplers import SAMPLERS
from ldm_export.plan.scheduler_classes import sampler_of
from ldm_export.plan.table import FORMAT_VERSION, MAX_HISTORY, Entry, Plan, Row, Stepper, Trajectory

__all__ = [
    "CALLS",
    "FORMAT_VERSION",
    "MAX_HISTORY",
    "SAMPLERS",
    "Entry",
    "Forecast",
    "Plan",
    "Row",
    "Scales",
    "Stepper",
    "Trajectory",
    "compile_plan",
    "forecast_of",
    "picture_tokens",
    "row_levels",
    "sampler_of",
    "shifts_dynamically",
]
