"""One case of the table, and the shapes that most cases have: one value of one document is another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hostile.base import Draft

ASKS: Mapping[str, Any] = {"prompts": ["a cat"], "sampler": "ddim", "steps": 2, "seed": 1}
MISSING = "missing"


@dataclass(frozen=True)
class Case:
    """What is changed in a sound bundle, and whether it is opened; the package's docstring says what fields mean."""

    name: str
    opens: bool
    change: Callable[[Draft], object] = field(repr=False)
    asks: Mapping[str, Any] | None = field(default_factory=lambda: ASKS, repr=False)
    verify: bool = False
    target: bool | None = None


def place(document: Any, path: Iterable[str | int]) -> tuple[Any, Any]:
    """The holder of a value and its key."""
    *to, last = path
    for step in to:
        document = document[step]
    return document, last


def set_raw(draft: Draft, document: Any, path: Iterable[str | int], raw: str) -> None:
    """Make a value of a document a raw piece of JSON, or remove it."""
    holder, key = place(document, path)
    if raw == MISSING:
        del holder[key]
    else:
        holder[key] = draft.raw(raw)


def told(path: Iterable[str | int], raw: str) -> str:
    """A case's name: where the value is, and the value."""
    return f"{'.'.join(map(str, path))} = {raw if len(raw) < 40 else f'{raw[:20]}... ({len(raw)})'}"


def manifest_value(*path: str | int) -> Callable[[str, bool], Case]:
    """A function from a raw value and the verdict to the case in which the manifest has that value."""

    def case(raw: str, opens: bool, **options: Any) -> Case:
        def change(draft: Draft) -> None:
            draft.manifest = json.loads(json.dumps(draft.manifest))
            set_raw(draft, draft.manifest, path, raw)

        return Case(f"manifest {told(path, raw)}", opens, change, **options)

    return case


def file_value(file: str, *path: str | int, prepare: Callable[[Draft], object] | None = None) -> Callable[..., Case]:
    """As `manifest_value`, of another JSON file."""

    def case(raw: str, opens: bool, **options: Any) -> Case:
        def change(draft: Draft) -> None:
            if prepare is not None:
                prepare(draft)
            document = draft.document(file)
            set_raw(draft, document, path, raw)
            draft.put(file, document)

        return Case(f"{file} {told(path, raw)}", opens, change, **options)

    return case


def rows(make: Callable[[str, bool], Case], opened: Iterable[str] = (), refused: Iterable[str] = ()) -> Iterator[Case]:
    """The cases of one place: raw values with which the bundle is opened, and with which it is refused."""
    yield from (make(raw, True) for raw in opened)
    yield from (make(raw, False) for raw in refused)
