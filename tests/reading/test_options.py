"""Options of passes are checked when they are made: keys, types and ranges, in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from ldm_export.errors import InputError
from ldm_export.reading.options import check_between, check_least, check_one_of, options_from_table


@dataclass(frozen=True)
class Every:
    """An option of each kind."""

    count: int
    share: float = 0.5
    fast: bool = True
    kind: str = "a"
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        check_between("share", self.share, 0.0, 1.0)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"count": 3}, Every(3)),
        ({"count": 3, "share": 1}, Every(3, 1)),
        ({"count": 3, "sizes": [4]}, Every(3, sizes=(4,))),
        ({"count": 0, "share": 0.25, "fast": False, "kind": "b", "sizes": ()}, Every(0, 0.25, False, "b", ())),
    ],
)
def test_a_table_becomes_options(table: dict[str, Any], expected: Every) -> None:
    made = options_from_table(Every, table, "here")
    assert made == expected
    assert isinstance(made.sizes, tuple)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"here lacks 'count'\."),
        ({"count": 1, "size": 2}, r"here has the unknown key 'size'; known are count, fast, kind, share, sizes\."),
        ({"count": 1.0}, r"here: count = 1\.0 must be a whole number\."),
        ({"count": True}, r"here: count = True must be a whole number\."),
        ({"count": 1, "share": "0.5"}, r"here: share = '0\.5' must be a number\."),
        ({"count": 1, "share": False}, r"here: share = False must be a number\."),
        ({"count": 1, "fast": 1}, r"here: fast = 1 must be true or false\."),
        ({"count": 1, "kind": 1}, r"here: kind = 1 must be text\."),
        ({"count": 1, "sizes": 1}, r"here: sizes = 1 must be a list\."),
        ({"count": 1, "share": 2.0}, r"here: share = 2\.0 must be from 0 to 1\."),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        options_from_table(Every, table, "here")


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_between_with_its_bounds(value: float) -> None:
    check_between("x", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-1e-9, 1.1, math.nan, math.inf, -math.inf])
def test_not_between(value: float) -> None:
    with pytest.raises(InputError, match=rf"^x = {value!r} must be from 0 to 1\.$"):
        check_between("x", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_not_between_without_the_bounds(value: float) -> None:
    with pytest.raises(InputError, match=r"^x = \S+ must be between 0 and 1, without these\.$"):
        check_between("x", value, 0.0, 1.0, inclusive=False)
    check_between("x", 0.5, 0.0, 1.0, inclusive=False)


def test_endless_bounds_allow_no_endless_value() -> None:
    with pytest.raises(InputError, match="x = inf"):
        check_between("x", math.inf, 0.0, math.inf)


@pytest.mark.parametrize("value", [0.99, math.nan, math.inf])
def test_least(value: float) -> None:
    check_least("x", 1, 1)
    with pytest.raises(InputError, match=rf"^x = {value!r} must be at least 1\.$"):
        check_least("x", value, 1)


def test_one_of() -> None:
    check_one_of("x", "b", ("a", "b"))
    with pytest.raises(InputError, match=r"^x = 'c' is not supported; allowed are 'a', 'b'\.$"):
        check_one_of("x", "c", ("a", "b"))
