"""``--fail-under``: what a bench must reach, judged on its document, so that CI fails where a model got worse.

    psnr=40       every picture at least 40 dB from the baseline's            faster=1.5    at least 1.5 times as fast
    drift=1e-3    latents never further than this from the baseline's         smaller=2     at most half of its bytes
    parity=1      no graph further from its network than its tolerance times this

The baseline is the checkpoint or, without one, the first bundle. A gate holds for every other variant that it can be
judged of: latents of variants that are drawn with other steps have no drift, and graphs with other weights no parity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm_export.errors import InputError

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What can be asked for.

    Attributes
    ----------
    at_least : whether the limit is the least that is allowed, and not the most
    says : a sentence with places for ``variant``, ``baseline`` and ``value``
    value : reads it from the results of a variant; None where it cannot be judged
    """

    at_least: bool
    unit: str
    says: str
    value: Callable[[Results, str], float | None]


def _psnr(results: Results, variant: str) -> float | None:
    values = results["pictures"][variant].get("psnr_db")
    return None if values is None else min(values)


def _drift(results: Results, variant: str) -> float | None:
    drift = results["pictures"][variant].get("drift")
    return None if drift is None else max(drift["worst"])


def _parity(results: Results, variant: str) -> float | None:
    records = results.get("parity", {}).get(variant, [])
    shares = [record["max_error"] / record["tolerance"] for record in records if record["same_weights"]]
    return max(shares, default=None)


def _faster(results: Results, variant: str) -> float | None:
    value: float | None = results["latency"][variant]["faster"]
    return value


def _smaller(results: Results, variant: str) -> float | None:
    value: float | None = results["bytes"][variant]["smaller"]
    return value


KINDS = {
    "psnr": Kind(True, " dB", "the worst picture of {variant} is {value} from that of {baseline}", _psnr),
    "faster": Kind(True, "x", "{variant} is {value} as fast as {baseline}", _faster),
    "smaller": Kind(True, "x", "{baseline} is {value} as large as {variant}", _smaller),
    "drift": Kind(False, "", "the latents of {variant} drift from those of {baseline} by up to {value}", _drift),
    "parity": Kind(False, "x", "the worst graph of {variant} is off by {value} what it may be", _parity),
}


@dataclass(frozen=True)
class Gate:
    """One thing that is asked for."""

    key: str
    limit: float

    def __str__(self) -> str:
        return f"{self.key}={self.limit:g}"


def gate_from_text(text: str) -> Gate:
    """``psnr=40`` as a gate.

    Raises
    ------
    InputError
        If there is no such key, or what follows is no finite number.
    """
    key, equals, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = float("nan")
    if key not in KINDS or not equals or not math.isfinite(limit):
        raise InputError(
            f"--fail-under {text} cannot be judged; it is KEY=NUMBER with a KEY of {', '.join(KINDS)}, "
            "such as psnr=40 or faster=1.5."
        )
    return Gate(key, limit)


def judge(gates: Sequence[Gate], results: Results, baseline: str | None) -> list[dict[str, Any]]:
    """Judge each gate of each variant that it applies to: key, limit, variant, value, passed, the sentence ``says``."""
    judged = []
    for gate in gates:
        kind = KINDS[gate.key]
        for variant in results["latency"]:
            value = None if variant == baseline else kind.value(results, variant)
            if value is None:
                continue
            passed = value >= gate.limit if kind.at_least else value <= gate.limit  # false for NaN
            shown, limit = (f"{number:.3g}{kind.unit}" for number in (value, gate.limit))
            bound = f"at {'least' if kind.at_least else 'most'} {limit} is asked for"
            says = f"{kind.says.format(variant=variant, baseline=baseline, value=shown)}; {bound}"
            judged.append({**asdict(gate), "variant": variant, "value": value, "passed": passed, "says": says})
    return judged
