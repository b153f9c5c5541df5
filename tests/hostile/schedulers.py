"""Scheduler configs: what a plan is compiled from where the bundle has no file of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.hostile.base import Draft, entry_of, sparse
from tests.hostile.case import ASKS, MISSING, Case, file_value, rows
from tests.hostile.documents import DAMAGE, GIB, OPENED, REFUSED

SCHEDULER = "scheduler/scheduler_config.json"
COMPILED = {**ASKS, "steps": 7}
CONSTANTS = (
    *("NaN", "Infinity", "-Infinity", "[NaN, -Infinity, {}]", '["-Infinity", NaN]'),
    *('{"a": [Infinity, "NaN"], "b": NaN}', '["\\\\", NaN, "\\"", NaN]'),
)
"""What diffusers writes, and JSON has not."""
NO_CONSTANTS = (
    *("inf", "infinity", "-NaN", "+Infinity", "- Infinity", "--Infinity", "NaNNaN", "NaN NaN", "1NaN", "NaN1"),
    *('"NaN', 'NaN"', '"" NaN', "{NaN: 1}", "{Infinity: 1}", "[Infinity", "Infinity, Infinity", "-Infinit"),
)
NO_NUMBER = ("0", "-1", "NaN", "Infinity", "-Infinity", '"1"', "true", "[]", "{}")
NO_TRUTH = ("2", "-1", '"true"', "[]", "{}", "NaN", "0.5")
NO_WORD = ("1", "true", "[]", '["linear"]', "{}", '""', '"LINEAR"', '"linear\\u0000"', "NaN")


def _scheduler(*path: str | int, sampler: str = "ddim", steps: int = 7) -> Any:
    asks = {**ASKS, "sampler": sampler, "steps": steps}
    return partial(file_value(SCHEDULER, *path), asks=asks)


def _numbers(draft: Draft, count: int, value: float = 0.01) -> None:
    config = draft.document(SCHEDULER)
    config |= {"trained_betas": [value] * count, "num_train_timesteps": count}
    draft.put(SCHEDULER, config)


def _large(draft: Draft, timesteps: int, scale: float) -> None:
    config = draft.document(SCHEDULER)
    config |= {"num_train_timesteps": timesteps, "beta_start": 0.00085 * scale, "beta_end": 0.012 * scale}
    draft.put(SCHEDULER, config)


def _keys() -> Iterator[Case]:
    whole = ("num_train_timesteps", ("1000.0", "100001", "1000000000000", "9223372036854775807", "6", "1" + "0" * 30))
    yield from rows(_scheduler(whole[0]), opened=("1000", "40", "null", MISSING), refused=(*whole[1], *NO_NUMBER))
    for key, fine in (("beta_start", "0.001"), ("beta_end", "0.02")):
        yield from rows(_scheduler(key), opened=(fine, "null", MISSING), refused=("1", "1e300", "1e-320", *NO_NUMBER))
    yield from rows(_scheduler("beta_schedule"), opened=('"linear"', '"sigmoid"', "null"), refused=NO_WORD)
    yield from rows(_scheduler("prediction_type"), opened=('"sample"', "null"), refused=NO_WORD)
    yield from rows(_scheduler("timestep_spacing"), opened=('"trailing"', '"linspace"', MISSING), refused=NO_WORD)
    yield from rows(_scheduler("steps_offset"), opened=("0", "3"), refused=("-1", "1.0", "148", "1000", "true", "[]"))
    yield from rows(_scheduler("rescale_betas_zero_snr"), opened=("false", "0", "0.0", "null"), refused=NO_TRUTH)
    yield from rows(_scheduler("clip_sample"), opened=("true", "1", "1.0", "false"), refused=NO_TRUTH)
    yield from rows(_scheduler("trained_betas"), opened=("null", "[]"), refused=("[0.1]", "[1]", "[NaN]", "{}", "1"))
    yield from rows(_scheduler("thresholding"), opened=("false", "0", "null"), refused=("true", "1", '""', "[]", "NaN"))
    yield from rows(
        _scheduler("_class_name"), opened=('"TCDScheduler"', "null", MISSING), refused=('"X"', "1", "[]", "{}")
    )
    for key, opened, refused in (
        ("lambda_min_clipped", ("-Infinity", "null"), ("Infinity", "NaN", "-1e308", '"-Infinity"', "0")),
        ("solver_order", ("1", "3"), ("0", "4", "2.0", "true", "1000000000000")),
        ("variance_type", ('"fixed_large_log"', "null"), ('"learned"', "1", "[]")),
        ("use_karras_sigmas", ("true", "0"), NO_TRUTH),
    ):
        yield from rows(_scheduler(key, sampler="dpmpp-2m"), opened=opened, refused=refused)
    yield from rows(
        _scheduler("disable_corrector", sampler="unipc"), opened=("[]", "null"), refused=("[0]", "{}", '""', "false")
    )
    yield from rows(_scheduler("timestep_scaling", sampler="lcm"), opened=("5", "1e30"), refused=("1e306", *NO_NUMBER))
    yield from rows(_scheduler("original_inference_steps", sampler="lcm"), opened=("7",), refused=("6", "1001", "1e2"))


def cases() -> Iterator[Case]:
    """All of this part."""
    free = _scheduler("x")
    yield from rows(free, (*OPENED, *CONSTANTS), (*NO_CONSTANTS, *(raw for raw in REFUSED if raw not in CONSTANTS)))
    yield from rows(free, refused=('1, "x": 2', '{"a": 1, "a": 2}', 'NaN, "x": NaN'))
    yield from _keys()
    for name, (damage, opens) in DAMAGE.items():
        change = partial(_damaged, damage=damage)
        yield Case(f"{SCHEDULER}: {name}", opens, change, asks=COMPILED)
    yield Case("no scheduler config, and a plan's file", True, lambda draft: draft.files.pop(SCHEDULER))
    yield Case("no scheduler config, and no file", False, lambda draft: draft.files.pop(SCHEDULER), asks=COMPILED)
    yield Case("a bad scheduler config, and a plan's file", True, lambda draft: draft.put(SCHEDULER, []))
    yield Case("a scheduler config with another hash", False, _swapped, asks=COMPILED, verify=True)
    yield Case(f"{SCHEDULER} of 20 GiB", False, _giant, asks=COMPILED)
    for sampler in ("ddpm", "plms", "lcm", "euler", "heun", "dpmpp-2m-sde", "unipc", "deis"):
        for image in (False, True):
            asks = {**COMPILED, "sampler": sampler, **({"image": True} if image else {})}
            yield Case(f"{sampler} compiled{', with an image' * image}", True, lambda draft: None, asks=asks)
    for count, opens in ((100_000, True), (100_001, False), (8, True), (6, False)):
        change = partial(_numbers, count=count, value=0.0001)
        yield Case(
            f"{count} trained betas", opens, change, asks={**COMPILED, "sampler": "unipc" if count > 8 else "ddim"}
        )
    yield Case("trained betas that leave nothing", False, partial(_numbers, count=1000, value=0.99), asks=COMPILED)
    yield Case("100000 training timesteps", True, partial(_large, timesteps=100_000, scale=0.01), asks=COMPILED)
    yield Case("more noise than a float holds", False, partial(_large, timesteps=100_000, scale=1.0), asks=COMPILED)
    for steps in (1001, 10_000, 1 << 20):
        yield Case(f"{steps} steps of 1000", False, lambda draft: None, asks={**ASKS, "steps": steps})
    asks = {**ASKS, "steps": 10_001}
    yield Case("10001 steps of 100000", False, partial(_large, timesteps=100_000, scale=0.01), asks=asks)


def _damaged(draft: Draft, damage: Any) -> None:
    draft.files[SCHEDULER] = damage(json.dumps(draft.document(SCHEDULER)).encode())


def _swapped(draft: Draft) -> None:
    draft.entries[SCHEDULER] = {**entry_of(draft.files[SCHEDULER]), "sha256": "0" * 64}


def _giant(draft: Draft) -> None:
    draft.entries[SCHEDULER] = {"size_bytes": 20 * GIB, "sha256": "0" * 64}
    draft.after.append(sparse(SCHEDULER, 20 * GIB))
