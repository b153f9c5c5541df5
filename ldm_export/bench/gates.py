"""``--fail-under``: what a bench must reach, judged on its document, so that CI fails where a model got worse.

    psnr=40       every picture at least 40 dB from the baseline's            faster=1.5    at least 1.5 times as fast
    drift=1e-3    latents never further than this from the baseline's         smaller=2     at most half of its bytes
    parity=1      no graph further from its network than its tolerance times this

The baseline is the checkpoint or, without one, the first bundle. A gate holds for every other variant that it can be
judged of: latents of variants that are drawn with other steps have no drift, and graphs with other weights no parity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm_export.verify.gates import Gate, Kind

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Measured(Kind):
    """``value`` reads what is judged from the results of a variant, None where it cannot be judged; the sentence has
    places for ``variant`` and ``baseline``."""

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
    "psnr": Measured(True, " dB", "the worst picture of {variant} is {value} from that of {baseline}", 40, _psnr),
    "faster": Measured(True, "x", "{variant} is {value} as fast as {baseline}", 1.5, _faster),
    "smaller": Measured(True, "x", "{baseline} is {value} as large as {variant}", 2, _smaller),
    "drift": Measured(
        False, "", "the latents of {variant} drift from those of {baseline} by up to {value}", 1e-3, _drift
    ),
    "parity": Measured(False, "x", "the worst graph of {variant} is off by {value} what it may be", 1, _parity),
}


def judge(gates: Sequence[Gate], results: Results, baseline: str | None) -> list[dict[str, Any]]:
    """Judge each gate of each variant that it applies to: key, limit, variant, value, passed, the sentence ``says``."""
    judged = []
    for gate in gates:
        kind = KINDS[gate.key]
        for variant in results["latency"]:
            value = None if variant == baseline else kind.value(results, variant)
            if value is not None:
                found = gate.judged(kind, value, variant=variant, baseline=baseline or "")
                judged.append({**found, "variant": variant})
    return judged
