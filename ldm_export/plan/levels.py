"""Noise levels of the latents between a plan's rows, read off its table: what inpainting noises a picture to.

The entry of a step says at which level ``x = image_scale * image_latents + noise_scale * z`` the plan is entered there,
and so what the latents are before that step's first row. Each row is of a step by its timestep, since a network that is
given one timestep expects one level.
"""

from __future__ import annotations

from ldm_export.errors import InputError
from ldm_export.plan.table import Entry, Plan, Row

Scales = tuple[float, float]
"""``image_scale`` and ``noise_scale`` of latents."""


def row_levels(plan: Plan, start: int) -> tuple[Scales, ...]:
    """Levels of the latents before each row of ``plan.starting_at(start)``, start 0 being the run from noise.

    Raises
    ------
    InputError
        If the table does not tell one, as where two steps have one timestep and another number of rows than steps.
    """
    rows, entries = plan.starting_at(start).rows, plan.entries[start:]
    steps = [(_first_row(plan, entry).timestep, (entry.image_scale, entry.noise_scale)) for entry in entries]
    if [row.timestep for row in rows] == [timestep for timestep, _ in steps]:  # a row a step, as most samplers have
        return tuple(level for _, level in steps)
    known: dict[float, set[Scales]] = {}
    for timestep, level in steps:
        known.setdefault(timestep, set()).add(level)
    return tuple(_only(plan, row, known.get(row.timestep, set())) for row in rows)


def _first_row(plan: Plan, entry: Entry) -> Row:
    return entry.warmup[0] if entry.warmup else plan.rows[entry.resume]


def _only(plan: Plan, row: Row, levels: set[Scales]) -> Scales:
    if len(levels) != 1:
        raise InputError(
            f"The plan {plan.sampler} with {plan.num_inference_steps} steps has {len(levels) or 'no'} noise levels at "
            f"timestep {row.timestep:g}; keeping a part of a picture takes one. Use another sampler, or other steps."
        )
    (level,) = levels
    return level
