"""A start that is learnt over tasks: what it is, that `adapt` takes it, and that a run resumes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference.fit import Run
from ldm_reference.reptile import descend
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm_export.adapt.factors import factors_of
from ldm_export.adapt.material import encoded
from ldm_export.adapt.meta import MetaOptions, meta_train, round_rows
from ldm_export.adapt.options import AdaptOptions, Factors
from ldm_export.adapt.pictures import pictures_in
from ldm_export.adapt.training import adapt, learner_of
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from tests.adapt.pictures import write_few

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

OPTIONS = MetaOptions(rank=2, layers="all", rounds=3, inner_steps=2, pictures=3, batch_size=2, seed=1)


def silent(what: str, done: int, of: int) -> None:
    """Say nothing."""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    for name in ("red_things", "blue-things"):
        write_few(tmp_path / "tasks" / name, captioned=name == "red_things")
    return tmp_path / "tasks"


def learnt(checkpoint: Path, tasks: Path, file: Path, progress: Callable[..., None] = silent, **options: Any) -> Any:
    given = MetaOptions(**{**vars(OPTIONS), **options})
    return meta_train(open_checkpoint(checkpoint), tasks, "{task} here", file, given, progress=progress)


def test_it_is_reptile_over_the_tasks(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    report = learnt(tiny_checkpoint, tasks, tmp_path / "start.safetensors")
    assert report["tasks"] == ["blue-things", "red_things"]
    found = load_file(tmp_path / "start.safetensors")
    learner = learner_of(open_checkpoint(tiny_checkpoint), Factors(2, layers="all"), OPTIONS.seed)
    texts = ("blue things here", "red things here")
    shown = [pictures_in(tasks / name, text) for name, text in zip(("blue-things", "red_things"), texts, strict=True)]
    assert [each.asked for each in shown[1]].count("a green square") == 1
    encoded_tasks = [encoded(learner.generator, each) for each in shown]
    run, own = Run.begin(tmp_path / "run", "no", lambda *_: None), factors_of(learner.objective.denoiser.network)
    learner.objective.train()
    for number in range(OPTIONS.rounds):
        before = {name: value.detach().clone() for name, value in own.items()}
        batches = [round_rows(encoded_tasks, learner.noise, OPTIONS, number, step) for step in range(2)]
        assert len(list(descend(run, learner.objective, batches, OPTIONS.reptile))) == 2
        for name, value in own.items():
            value.data = before[name] + (1 - number / OPTIONS.rounds) * (value.detach() - before[name])
    for name, value in own.items():
        assert torch.allclose(found[f"unet.{name}"], value, atol=1e-6), name


def test_a_round_has_few_pictures_of_one_task(tiny_checkpoint: Path, tasks: Path) -> None:
    learner = learner_of(open_checkpoint(tiny_checkpoint), OPTIONS.factors, 0)
    groups = [encoded(learner.generator, pictures_in(each, each.name)) for each in sorted(tasks.iterdir())]
    marked = [
        type(group)(torch.stack([torch.full_like(group.moments[0], 10.0 * k + n) for n in range(5)]), *rest)
        for k, group in enumerate(groups)
        for rest in [(group.conditions, group.owner)]
    ]
    tasks_seen, pictures_seen = set(), []
    for number in range(2):
        seen: set[float] = set()
        for step in range(6):
            generator_rows = round_rows(marked, learner.noise, OPTIONS, number, step)
            seen |= {round(float(row.median())) for row in _means(generator_rows["latents"], marked)}
        pictures_seen.append(len(seen))
        tasks_seen |= {value // 10 for value in seen}
        assert len({value // 10 for value in seen}) == 1
    assert tasks_seen == {0, 1}
    assert pictures_seen == [3, 3]


def _means(latents: Tensor, marked: Any) -> list[Tensor]:
    """The picture that each latent is nearest to: deviations of these latents are exp(value / 2)."""
    values = torch.tensor([float(each) for group in marked for each in group.moments[:, 0, 0, 0]])
    scale = latents.flatten(1).std(dim=1)
    return [values[(values / 2 - value.log()).abs().argmin()] for value in scale]


def test_adapting_starts_from_it(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    learnt(tiny_checkpoint, tasks, start)
    with safe_open(start, "pt") as opened:
        assert json.loads(opened.metadata()["ldm_export"])["meta"] == "reptile"
    learner = learner_of(open_checkpoint(tiny_checkpoint), Factors(2, layers="all"), 7, start)
    given = load_file(start)
    for name, value in factors_of(learner.objective.denoiser.network).items():
        assert torch.equal(value, given[f"unet.{name}"])
    other = learner_of(open_checkpoint(tiny_checkpoint), Factors(2, 1.0, "all"), 7, start)  # half the scale
    for name, value in factors_of(other.objective.denoiser.network).items():
        assert torch.allclose(value, given[f"unet.{name}"] * (2.0 if "lora_B" in name else 1.0))
    made = []
    for name, file in itertools.product(("with", "without"), [start]):
        options = AdaptOptions(Factors(2, layers="all"), steps=1, learning_rate=1e-9, ema_decay=0.0)
        adapt(
            open_checkpoint(tiny_checkpoint),
            tasks / "red_things",
            "zorp",
            tmp_path / f"{name}.safetensors",
            options,
            start=file if name == "with" else None,
            progress=silent,
        )
        made.append(load_file(tmp_path / f"{name}.safetensors"))
    assert all(torch.allclose(made[0][name], given[name], atol=1e-6) for name in given)
    assert not all(torch.allclose(made[1][name], given[name], atol=1e-4) for name in given)


def test_an_interrupted_run_resumes(
    tiny_checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_reference.reptile.SAVE_EVERY", 1)
    learnt(tiny_checkpoint, tasks, tmp_path / "whole.safetensors")

    def interrupt(what: str, done: int, of: int) -> None:
        if what.startswith("reptile") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learnt(tiny_checkpoint, tasks, tmp_path / "broken.safetensors", interrupt)
    learnt(tiny_checkpoint, tasks, tmp_path / "broken.safetensors")
    whole, broken = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(
    ("factors", "message"),
    [(Factors(3, layers="all"), "Give --rank 2"), (Factors(2), "Give the --layers")],
)
def test_a_start_of_other_factors(
    factors: Factors, message: str, tiny_checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    learnt(tiny_checkpoint, tasks, tmp_path / "start.safetensors", rounds=1)
    with pytest.raises(InputError, match=message):
        learner_of(open_checkpoint(tiny_checkpoint), factors, 0, tmp_path / "start.safetensors")


def test_one_task_is_none(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 0 folders; a task is a folder"):
        learnt(tiny_checkpoint, tasks / "red_things", tmp_path / "start.safetensors")
