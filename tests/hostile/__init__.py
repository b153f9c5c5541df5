"""Hostile and odd bundles, a table that the Python and the C++ runtime are both tested on.

    for case in CASES:
        write_case(case, folder)
        a runtime opens `folder` (with hashes checked if `case.verify`), and generates what `case.asks` says

`case.opens` is the verdict, written by hand: a picture comes, or there is a refusal in one sentence at either point.
Where `case.target` is not None the bundle has an ``ort-cpu`` target, a picture comes, and ``target`` says whether the
target runs (true) or is skipped with a warning (false).

``asks`` has ``prompts``, ``sampler``, ``steps`` and ``seed``, and where a picture is given ``image``, true for one of
the model's size; ``whole`` for a loop graph. It is None where opening alone is judged.
"""

from __future__ import annotations

from pathlib import Path

from tests.hostile import (
    documents,
    graphs,
    links,
    manifests,
    plans,
    protobufs,
    schedulers,
    targets,
    tokenizers,
    whole_tokenizers,
)
from tests.hostile.base import sound
from tests.hostile.case import Case

__all__ = ["CASES", "Case", "write_case"]

CASES: tuple[Case, ...] = tuple(
    case
    for part in (
        documents,
        manifests,
        graphs,
        protobufs,
        plans,
        schedulers,
        tokenizers,
        whole_tokenizers,
        links,
        targets,
    )
    for case in part.cases()
)


def write_case(case: Case, folder: Path) -> None:
    """Write a case's bundle to a folder, which is made."""
    draft = sound()
    case.change(draft)
    folder.mkdir(parents=True)
    draft.write(folder)
