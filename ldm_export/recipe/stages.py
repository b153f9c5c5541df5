"""The stages of a recipe: what each has come to, and the folder that keeps it.

A stage is known by its key, a hash over all that it depends on. Its folder has its checkpoint (of passes over
networks), its bundle, its pictures and, last, ``stage.json``: what is there under the right key is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import write_whole
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.reading.hashes import hash_of
from ldm_export.recipe.score import Score

STAGE, PICTURES = "stage.json", "pictures.npy"
CHECKPOINT, BUNDLE = "checkpoint", "bundle"
"""Names in a stage's folder."""

Record = dict[str, Any]
"""What a pass did and whether it stayed, as it goes into manifests: name, options, key, kept, why, faster, report,
score."""


@dataclass(frozen=True)
class Stage:
    """What a recipe has come to.

    Attributes
    ----------
    key : SHA-256 over all that it depends on, hex
    checkpoint : the networks; after passes over graphs, those that the graphs were exported from
    bundle : its graphs; of a pass whose result is adopted with that of a later one, those of the stage before
    ahead : how much faster than ``bundle`` the stage is
    records : of the teacher and of every pass so far, undone ones included
    """

    key: str
    checkpoint: LatentDiffusion
    bundle: Bundle
    score: Score
    ahead: float = 1.0
    records: Sequence[Record] = ()

    def key_of(self, step: Any) -> str:
        """Key that the stage after a pass, a dataclass with a name, has."""
        return hash_of(self.key, step.name, asdict(step))

    def after(self, record: Record, folder: Path) -> Stage:
        """The stage that a pass led to, by its record and what it left in its folder; this one if it was undone."""
        records = [*self.records, record]
        if not record["kept"]:
            return replace(self, records=records)
        key, score = record["key"], Score.from_dict(record["score"])
        if not (folder / BUNDLE).is_dir():
            return replace(self, key=key, score=score, ahead=self.ahead * record["faster"], records=records)
        changed = folder / CHECKPOINT
        checkpoint = open_checkpoint(changed) if changed.is_dir() else self.checkpoint
        return Stage(key, checkpoint, Bundle.open(folder / BUNDLE), score, records=records)


@dataclass(frozen=True)
class StageCache:
    """The folders of all stages, under ``work``; other options lead to other folders, so that nothing is lost.

    Attributes
    ----------
    judged_on : what the pictures are that stages are judged by
    """

    work: Path
    judged_on: str

    def folder(self, number: int, name: str, key: str) -> Path:
        return self.work / f"{number:02d}-{name}-{key[:8]}"

    def find(self, folder: Path, key: str) -> Record | None:
        """The record of a stage that was finished under this key, and judged on the same pictures."""
        try:
            record: Record = json.loads((folder / STAGE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        complete = not record.get("kept") or (folder / BUNDLE).is_dir()
        return record if complete and (record.get("key"), record.get("judged_on")) == (key, self.judged_on) else None

    def keep(self, folder: Path, record: Record, pictures: npt.NDArray[Any] | None = None) -> Record:
        """Write a stage's pictures and, last, its record, which is given back.

        Raises
        ------
        InputError
            If the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if pictures is not None:
                np.save(folder / PICTURES, pictures, allow_pickle=False)
            write_whole(folder / STAGE, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}). Free some space; the recipe goes on."
            ) from error
        return record
