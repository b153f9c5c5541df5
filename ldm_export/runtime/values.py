"""Checks of single values that callers give, whatever their type: from Python, a web form or JSON.

Each returns the value as plain Python has it, or raises InputError with one sentence that names the value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Set
from itertools import islice
from typing import Any

import numpy as np

from ldm_export.errors import InputError

MOST_ITEMS = 4096
"""Pictures of one generation."""
_SHOWN = 60


def shown(value: object) -> str:
    """A value for a message, shortened: ``'7.5' of type str``."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a stranger's type raises; an int of more than 4300 digits does
        text = "a value"
    kind = "" if type(value) in (int, float) else f" of type {type(value).__name__}"
    return f"{text[:_SHOWN]}{'...' * (len(text) > _SHOWN)}{kind}"


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``; numpy's integers are taken, booleans and floats are not."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise InputError(f"{name} is {shown(value)}; give a whole number from {low} to {high}.")
    return number


def real_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from ``low`` to ``high``; numpy's are taken, booleans and text are not."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    try:
        number = float(value) if known else math.nan
    except OverflowError:  # a whole number beyond float64
        number = math.inf
    if not low <= number <= high:  # nor is NaN
        raise InputError(f"{name} is {shown(value)}; give a number from {low:g} to {high:g}.")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {shown(value)}; give True or False.")
    return bool(value)


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; give text, of type str.")
    return str(value)


def listed(name: str, value: Any) -> list[Any]:
    """The items of a list, a tuple, an array or another iterable, in order, `MOST_ITEMS` at most; text, a dict and a
    set are not taken."""
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping, Set)):
            raise TypeError
        items = list(islice(value, MOST_ITEMS + 1))
    except Exception as error:  # whatever a stranger's type raises
        raise InputError(f"{name} is {shown(value)}; give a list.") from error
    if len(items) > MOST_ITEMS:
        raise InputError(f"{name} has more than {MOST_ITEMS} items; give fewer, and call more often.")
    return items
