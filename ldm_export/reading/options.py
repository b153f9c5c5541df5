"""Options of passes: frozen dataclasses whose fields are the keys of a table in a recipe, checked when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ldm_export.errors import InputError

Options = TypeVar("Options")

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
    "tuple": ((list, tuple), "a list"),
}
"""What a TOML value may be, by the outer name of a field's annotation, and what that is called."""


def options_from_table(cls: type[Options], table: Mapping[str, Any], where: str) -> Options:
    """Build ``cls``, a dataclass, from a table; ``where`` begins every message.

    Raises
    ------
    InputError
        For a key that it does not have, one without a default that is missing, or a value of a wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise InputError(f"{where} has the unknown key {key!r}; known are {', '.join(sorted(fields))}.")
        kinds, called = KINDS[str(fields[key].type).partition("[")[0]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{where}: {key} = {value!r} must be {called}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise InputError(f"{where} lacks {missing[0]!r}.")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_between(name: str, value: float, low: float, high: float, *, inclusive: bool = True) -> None:
    """Raise InputError unless ``value`` lies between the bounds, both of them included or neither."""
    fits = low <= value <= high if inclusive else low < value < high
    if not fits or not math.isfinite(value):
        allowed = f"from {low:g} to {high:g}" if inclusive else f"between {low:g} and {high:g}, without these"
        raise InputError(f"{name} = {value!r} must be {allowed}.")


def check_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise InputError(f"{name} = {value!r} must be at least {least:g}.")


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} = {value!r} is not supported; allowed are {', '.join(map(repr, allowed))}.")
