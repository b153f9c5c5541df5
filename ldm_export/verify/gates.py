"""Limits that a user sets as ``KEY=NUMBER`` (``--fail-under``, budgets), and whether a value keeps within them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldm_export.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What can be asked for.

    Attributes
    ----------
    at_least : whether the limit is the least that is allowed, and not the most
    unit : what follows the number, with its space
    says : a sentence with a place for ``value``, and for what else the caller names
    example : a limit that makes sense
    """

    at_least: bool
    unit: str
    says: str
    example: float


@dataclass(frozen=True)
class Gate:
    """One thing that is asked for."""

    key: str
    limit: float

    def __str__(self) -> str:
        return f"{self.key}={self.limit:g}"

    def judged(self, kind: Kind, value: float, **names: str) -> dict[str, Any]:
        """Judge a value, in the kind's unit: key, limit, value, whether it ``passed`` (NaN does not), and the sentence
        ``says``."""
        passed = value >= self.limit if kind.at_least else value <= self.limit
        shown, limit = (f"{number:.3g}{kind.unit}" for number in (value, self.limit))
        bound = f"at {'least' if kind.at_least else 'most'} {limit} is asked for"
        return {
            **asdict(self),
            "value": value,
            "passed": passed,
            "says": f"{kind.says.format(value=shown, **names)}; {bound}",
        }


def gate_from_text(text: str, kinds: Mapping[str, Kind], option: str = "--fail-under") -> Gate:
    """``psnr=40`` as a gate of one of the kinds; ``option`` is where it was given.

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
    if key not in kinds or not equals or not math.isfinite(limit):
        examples = " or ".join(f"{name}={kind.example:g}" for name, kind in list(kinds.items())[:2])
        raise InputError(
            f"{option} {text} cannot be judged; it is KEY=NUMBER with a KEY of {', '.join(kinds)}, such as {examples}."
        )
    return Gate(key, limit)
