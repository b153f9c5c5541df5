"""Alphas and ranks that are not among an adapter's tensors.

PEFT keeps them in ``adapter_config.json`` beside the weights; diffusers puts the same into the file's metadata, with
the component's name before every key. A pattern is a regular expression of the end of a layer's path; the first that
matches counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.reading.documents import MalformedError

KINDS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Settings:
    """What a config says of every layer; patterns overrule it."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    by_root: bool = False
    dora: bool = False

    def scale(self, path: str, found: int | None) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank).

        Parameters
        ----------
        path : the layer's, with dots
        found : rank of its factors, or None where they are whole

        Raises
        ------
        MalformedError
            If the rank is not the one that the config says.
        """
        rank, alpha = _matching(self.rank_pattern, path, self.rank), _matching(self.alpha_pattern, path, self.alpha)
        if found not in (None, rank):
            raise MalformedError(f"has the rank {found}; its config says {rank}")
        return float(alpha / (math.sqrt(rank) if self.by_root else rank))


def settings_of(config: object) -> Settings:
    """Settings of the content of ``adapter_config.json``.

    Raises
    ------
    MalformedError
        If it is none, or of another kind of adapter.
    """
    if not isinstance(config, dict):
        raise MalformedError("is no JSON object")
    kind = config.get("peft_type") or "LORA"
    if kind not in KINDS:
        raise MalformedError(f"is of the kind {kind!r}; {', '.join(KINDS)} (and DoRA) are read")
    rank = _number(config, "r")
    alpha = _number(config, "lora_alpha" if kind == "LORA" else "alpha")
    ranks, alphas = (_pattern(config, key) for key in ("rank_pattern", "alpha_pattern"))
    flags = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    return Settings(int(rank), alpha, {key: int(value) for key, value in ranks.items()}, alphas, *flags)


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise MalformedError(f"has {key} = {value!r}, which is no number above 0")
    return float(value)


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, float]:
    values = config.get(key) or {}
    if not isinstance(values, dict):
        raise MalformedError(f"has a {key} that is no JSON object")
    for pattern in values:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MalformedError(f"has {pattern!r} in {key}, which is no regular expression") from error
    return {pattern: _number(values, pattern) for pattern in values}


def _matching(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)
