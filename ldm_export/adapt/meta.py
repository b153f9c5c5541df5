"""Meta-learning: the LoRA from which `adapt` needs fewer steps, learnt over tasks that are like those to come.

A task is a folder of pictures, as `adapt` takes one. What is learnt is the start of the factors that `adapt` trains and
not the networks: it is a small file, an adapter like any other, and the checkpoint stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from ldm_reference.config import ConfigError
from ldm_reference.fit import Rows, Run
from ldm_reference.noise import Noise
from ldm_reference.reptile import Reptile, reptile
from safetensors import SafetensorError
from torch import Tensor

from ldm_export.adapt.factors import by_file_name, write_factors
from ldm_export.adapt.material import Pictures, encoded, rows_at, shuffled
from ldm_export.adapt.options import Factors
from ldm_export.adapt.pictures import Asked, pictures_in
from ldm_export.adapt.training import Progress, check_asked, check_names, learner_of, recipe_of
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, read_text
from ldm_export.reading.options import check_between, check_least, check_one_of, options_from_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

TASK = "{task}"
"""What stands for a task's name in a prompt."""


@dataclass(frozen=True)
class MetaOptions:
    """How a start is learnt: the keys of a config.

    Attributes
    ----------
    rank, alpha, layers : of the factors, which `adapt` must be given alike
    rounds, inner_steps, learning_rate, outer_rate : `ldm_reference.reptile.Reptile`'s
    pictures : of a task that are learnt in a round, drawn anew; a task with fewer gives all
    batch_size : pictures an inner step
    mixed_precision : no or bf16
    """

    precisions: ClassVar[tuple[str, ...]] = ("no", "bf16")

    rank: int = Factors.rank
    alpha: float = 0.0
    layers: str = Factors.layers
    rounds: int = Reptile.rounds
    inner_steps: int = Reptile.inner_steps
    learning_rate: float = Reptile.learning_rate
    outer_rate: float = Reptile.outer_rate
    pictures: int = 10
    batch_size: int = 4
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("pictures", self.pictures, 1)
        check_least("batch_size", self.batch_size, 1)
        check_between("seed", self.seed, 0, 2**32 - 1)
        check_one_of("mixed_precision", self.mixed_precision, self.precisions)
        self.factors  # noqa: B018 - refuses what is no rank
        self.reptile  # noqa: B018 - refuses rates

    @property
    def factors(self) -> Factors:
        return Factors(self.rank, self.alpha or None, self.layers)

    @property
    def reptile(self) -> Reptile:
        try:
            return Reptile(self.rounds, self.inner_steps, self.learning_rate, self.outer_rate)
        except ConfigError as error:
            raise InputError(f"{error}.") from error


def read_options(file: Path) -> MetaOptions:
    """Options of a TOML file, whose keys are `MetaOptions`' fields; raises InputError for what is none."""
    try:
        table = tomllib.loads(read_text(file))
    except (OSError, MalformedError, ValueError) as error:
        raise InputError(f"{file} is no readable TOML ({error}).") from error
    return options_from_table(MetaOptions, table, file.name)


def round_rows(tasks: Sequence[Pictures], noise: Noise, options: MetaOptions, number: int, step: int) -> Rows:
    """The batch of an inner step: of a round's task, of the few of its pictures that the round has drawn."""
    task = tasks[int(shuffled(len(tasks), 1, number, options.seed))]
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
    few = torch.randperm(len(task.moments), generator=generator)[: options.pictures]
    drawn = Pictures(task.moments[few], task.conditions, task.owner[few])
    place = number * options.inner_steps + step
    return rows_at(place, drawn, None, noise, options.batch_size, 1.0, options.seed)


def meta_train(
    checkpoint: LatentDiffusion,
    folder: Path,
    asked: Asked,
    output: Path,
    options: MetaOptions,
    *,
    work: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Learn a start over the folders in a folder, each a task, and write it; gives what was done.

    Parameters
    ----------
    asked : what pictures without a text of their own show; a prompt may say ``{task}``, the name of the task's folder
    work : for the state of an interrupted run; beside ``output`` by default

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be exported either.
    InputError
        If tasks, prompt or options cannot be used, or an interrupted run in ``work`` was another.
    """
    check_names(output)
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(folders) < 2:
        raise InputError(f"{folder} holds {len(folders)} folders; a task is a folder of pictures. Give at least two.")
    shown = [pictures_in(each, _asked(asked, each.name)) for each in folders]
    learner = learner_of(checkpoint, options.factors, options.seed)
    check_asked(learner.generator, asked, "")
    tasks = []
    for number, each in enumerate(shown):
        progress("tasks", number, len(shown))
        tasks.append(encoded(learner.generator, each))

    def batch_at(number: int, step: int) -> Rows:
        return round_rows(tasks, learner.noise, options, number, step)

    def advance(name: str, done: int, of: int, loss: float) -> None:
        progress(f"{name}  loss {loss:.4f}", done, of)

    recipe = recipe_of(checkpoint, [each for task in shown for each in task], options, None)
    work = work or output.with_name(f"{output.stem}.work")
    try:
        run = Run.begin(work, options.mixed_precision, advance)
        values: Mapping[str, Tensor] = reptile(run, learner.objective, batch_at, options.reptile, recipe, options.seed)
    except ConfigError as error:
        raise InputError(f"{error}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{work} cannot be written ({error}). Make room; the same command resumes.") from error
    made = {
        "checkpoint": checkpoint.name,
        f"{learner.component}_sha256": checkpoint.sha256(learner.component),
        "meta": "reptile",
        "tasks": [each.name for each in folders],
        "rounds": options.rounds,
        "seed": options.seed,
    }
    write_factors(output, learner.component, by_file_name(values), learner.config, made)
    return {"output": str(output), **made, "work": str(work)}


def _asked(asked: Asked, task: str) -> Asked:
    return asked.replace(TASK, task.replace("-", " ").replace("_", " ")) if isinstance(asked, str) else asked
