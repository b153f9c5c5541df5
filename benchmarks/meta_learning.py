"""How many steps `adapt` needs from a meta-learned start, from one trained on all tasks together, and from nothing.

meta_learning.py CHECKPOINT DATA WORK RESULT.json --tasks emoji|fashion [--rounds 150]

For each start the learning rate is tuned on tasks of their own, over one grid; then each held-out task is adapted to
with the same pictures, noise and number of steps from every start. The figure is the loss on pictures of the task
that were not adapted to, at noise that all starts share. RESULT.json gets a row at a time, and what it holds is not
measured again; the tables of docs/adapting.md are printed. Intervals are over tasks, of Fashion-MNIST over classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ldm_reference.fit import Rows, Run, Stage, fit
from ldm_reference.optimisation import Optimisation
from ldm_reference.reptile import descend
from torch import Tensor

from benchmarks.meta_tasks import tasks_of, write_emoji, write_fashion
from ldm_export.adapt.factors import by_file_name, factors_of, write_factors
from ldm_export.adapt.material import Pictures, encoded, rows_at
from ldm_export.adapt.meta import MetaOptions, meta_train
from ldm_export.adapt.pictures import pictures_in
from ldm_export.adapt.training import Learner, learner_of
from ldm_export.families import open_checkpoint

STEPS = (0, 5, 10, 20, 40)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
JUDGED_ROWS = 32
PLAIN, POOLED, META = "plain", "pooled", "reptile"
STARTS = {PLAIN: "plain", POOLED: "all tasks together", META: "Reptile"}
COMPARED = ((POOLED, PLAIN), (META, PLAIN), (META, POOLED))
CLUSTERS = {"emoji": lambda task: task, "fashion": lambda task: task.rpartition("-")[0]}
"""What is independent of each other: tasks, or classes, of which a task is one draw."""


def pooled_start(learner: Learner, tasks: Sequence[Pictures], options: MetaOptions, work: Path, file: Path) -> None:
    """Train the factors on the pictures of all tasks mixed, for as many steps as `meta_train` takes."""
    offsets = np.cumsum([0, *(len(next(iter(task.conditions.values()))) for task in tasks)])
    names = tasks[0].conditions
    together = Pictures(
        torch.cat([task.moments for task in tasks]),
        {name: torch.cat([task.conditions[name] for task in tasks]) for name in names},
        torch.cat([task.owner + int(offset) for task, offset in zip(tasks, offsets[:-1], strict=True)]),
    )

    def batch_at(step: int) -> Rows:
        return rows_at(step, together, None, learner.noise, options.batch_size, 1.0, options.seed)

    steps = options.rounds * options.inner_steps
    settings = Optimisation(steps, options.batch_size, options.learning_rate, warmup_steps=10, ema_decay=0.98)
    run = Run.begin(work, options.mixed_precision, lambda name, done, of, loss: None)
    values = fit(run, Stage("pooled", learner.objective, batch_at, settings, str(options), options.seed))
    write_factors(file, learner.component, by_file_name(values), learner.config, {"start": POOLED})


@torch.no_grad()
def judged_loss(run: Run, learner: Learner, rows: Rows) -> float:
    with run.accelerator.autocast():
        loss: Tensor = learner.objective(**rows)["loss"]
    return loss.item()


def adapted(
    run: Run,
    learner: Learner,
    start: dict[str, Tensor],
    few: Pictures,
    judged: Pictures,
    options: MetaOptions,
    seed: int,
) -> list[float]:
    """Losses on judged pictures after each number of `STEPS`, from a start."""
    with torch.no_grad():
        for name, value in factors_of(learner.objective.denoiser.network).items():
            value.copy_(start[name])
    rows = rows_at(0, judged, None, learner.noise, JUDGED_ROWS, 1.0, seed + 1)
    batches = (rows_at(step, few, None, learner.noise, options.batch_size, 1.0, seed) for step in range(STEPS[-1]))
    steps, losses, done = descend(run, learner.objective, batches, options.reptile), [], 0
    for goal in STEPS:
        list(islice(steps, goal - done))
        done = goal
        losses.append(judged_loss(run, learner, rows))
    return losses


def interval(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> list[float]:
    """Mean, and its 95 % interval by the bootstrap over clusters (10,000 draws)."""
    groups = [np.mean([v for v, c in zip(values, clusters, strict=True) if c == name]) for name in sorted({*clusters})]
    chosen = np.random.default_rng(seed).integers(len(groups), size=(10_000, len(groups)))
    low, high = np.quantile(np.asarray(groups)[chosen].mean(axis=1), [0.025, 0.975])
    return [float(np.mean(groups)), float(low), float(high)]


def summarised(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Tuned rates, losses as a share of the bare model's on the same task, and against each other."""
    tuned: dict[str, float] = {}
    for start in STARTS:
        means = {
            rate: np.mean(
                [r["losses"][1:] for r in rows if (r["split"], r["start"], r["rate"]) == ("tune", start, rate)]
            )
            for rate in RATES
        }
        tuned[start] = min(means, key=lambda rate: float(means[rate]))
    test = {
        start: {r["task"]: r["losses"] for r in rows if (r["split"], r["start"]) == ("test", start)} for start in STARTS
    }
    names = sorted(test[PLAIN])
    clusters = [CLUSTERS[kind](name) for name in names]
    share: dict[str, Any] = {start: {} for start in STARTS}
    versus: dict[str, Any] = {f"{start}/{other}": {} for start, other in COMPARED}
    for place, step in enumerate(STEPS):
        for start in STARTS:
            values = [test[start][name][place] / test[PLAIN][name][0] for name in names]
            share[start][str(step)] = interval(values, clusters)
        for start, other in COMPARED:
            ratios = [test[start][name][place] / test[other][name][place] - 1 for name in names]
            versus[f"{start}/{other}"][str(step)] = interval(ratios, clusters)
    return {"rates": tuned, "share_of_bare_loss": share, "change": versus, "tasks": len(names)}


def table(summary: dict[str, Any]) -> str:
    """Rows of the documentation's table."""
    lines = [f"| start | rate | {' | '.join(f'{step} steps' for step in STEPS)} |", "|---|---|" + "---:|" * len(STEPS)]
    for start, name in STARTS.items():
        cells = [summary["share_of_bare_loss"][start][str(step)] for step in STEPS]
        shown = " | ".join(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in cells)
        lines.append(f"| {name} | {summary['rates'][start]:g} | {shown} |")
    for start, other in COMPARED:
        cells = summary["change"][f"{start}/{other}"]
        shown = " | ".join("{:+.1%} ({:+.1%} to {:+.1%})".format(*cells[str(step)]) for step in STEPS)
        lines.append(f"| {STARTS[start]}, against {STARTS[other]} | | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "data", "work", "result"):
        parser.add_argument(name)
    parser.add_argument("--tasks", choices=CLUSTERS, required=True)
    parser.add_argument("--rounds", type=int, default=150)
    given = parser.parse_args()
    work, result = Path(given.work), Path(given.result)
    folder = work / "tasks"
    if not folder.is_dir():
        {"emoji": write_emoji, "fashion": write_fashion}[given.tasks](Path(given.data), folder)
    options = MetaOptions(layers="all", rounds=given.rounds, mixed_precision="bf16")
    checkpoint = open_checkpoint(given.checkpoint)

    def said(what: str, done: int, of: int) -> None:
        if done % 10 == 0:
            print(what, done, of, flush=True)

    files = {PLAIN: None, POOLED: work / "pooled.safetensors", META: work / "reptile.safetensors"}
    if not files[META].is_file():
        meta_train(checkpoint, folder / "train", "{task}", files[META], options, work=work / "meta", progress=said)
    if not files[POOLED].is_file():
        learner = learner_of(checkpoint, options.factors, options.seed)
        tasks = [encoded(learner.generator, pictures_in(each, each.name)) for each in tasks_of(folder, "train")]
        pooled_start(learner, tasks, options, work / "pooled", files[POOLED])
    starts = {}
    for name, file in files.items():
        learner = learner_of(checkpoint, options.factors, options.seed, file)
        network = learner.objective.denoiser.network
        starts[name] = {key: value.detach().clone() for key, value in factors_of(network).items()}
    run = Run.begin(work, options.mixed_precision, lambda name, done, of, loss: None)
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result.is_file() else []

    def measure(split: str, rates: dict[str, Sequence[float]]) -> None:
        for number, task in enumerate(tasks_of(folder, split)):
            parts = [encoded(learner.generator, pictures_in(task / part, task.name)) for part in ("few", "judged")]
            for start, rate in [(name, each) for name in STARTS for each in rates[name]]:
                key = {"split": split, "task": task.name, "start": start, "rate": rate}
                if any(key.items() <= row.items() for row in rows):
                    continue
                settings = dataclasses.replace(options, learning_rate=rate)
                losses = adapted(run, learner, starts[start], parts[0], parts[1], settings, number)
                rows.append({**key, "losses": losses})
                print(json.dumps(rows[-1]), flush=True)
                result.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")

    measure("tune", dict.fromkeys(STARTS, RATES))
    tuned = summarised([*rows, *({**r, "split": "test"} for r in rows)], given.tasks)["rates"]
    measure("test", {start: [rate] for start, rate in tuned.items()})
    summary = summarised(rows, given.tasks)
    made = {"checkpoint": checkpoint.name, "options": dataclasses.asdict(options), "steps": STEPS, "rates": RATES}
    document = {**made, "summary": summary, "rows": rows}
    result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(summary))


if __name__ == "__main__":
    main()
