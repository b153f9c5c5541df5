"""Pruned channels and the imitation that follows: the loss and the sizes by diffusers' networks, what is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from ldm_reference.noise import noise_from_config
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError
from ldm_export.passes import prune_channels
from ldm_export.passes.base import Change, PassContext
from ldm_export.passes.channels import Channels
from ldm_export.passes.imitation import (
    MEASURED,
    DistillationOptions,
    Imitation,
    PrunedStudent,
    noisy_rows,
    timesteps_drawn,
)
from ldm_export.passes.importance import magnitude
from ldm_export.passes.prune_channels import PruneChannels, narrowed
from ldm_export.passes.teacher import TeacherData
from tests.passes.unets import Errors, diffusers_sizes, diffusers_unet, hooks_of, randn, write_model

MakeSetting = Callable[..., PassContext]
SHORT = {"updates": 25, "batch_size": 12, "learning_rate": 4e-3, "ema_decay": 0.7}
PLACE = "attentions.{}.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def bare(layered: LatentDiffusion, data: TeacherData, tmp_path_factory: pytest.TempPathFactory) -> Change:
    """Half of the channels cut, nothing learned."""
    folder = tmp_path_factory.mktemp("bare")
    setting = PassContext(layered, layered, data, folder / "work", lambda what, done, of: None)
    change = PruneChannels(ratio=0.5, updates=0).apply(setting)
    assert not setting.folder.exists()
    return change


# --- the loss ---------------------------------------------------------------------------------------------------------


def imitation(smaller: PrunedStudent, model: LatentDiffusion, **options: float) -> Imitation:
    return Imitation(smaller, noise_from_config(model.scheduler), DistillationOptions(**options))  # type: ignore[arg-type]


def rows(data: TeacherData, count: int = 6) -> dict[str, Tensor]:
    return noisy_rows(data, count, torch.arange(1000), torch.Generator().manual_seed(5))


@torch.no_grad()
def test_a_student_that_is_its_teacher_has_no_loss(
    layered: LatentDiffusion, teacher: UNet2DConditionModel, data: TeacherData
) -> None:
    channels = Channels(teacher)
    scores = {name: torch.ones(space.size) for name, space in channels.spaces.items()}
    smaller = narrowed(teacher, channels, scores, Fraction(1))
    objective = imitation(smaller, layered)
    terms = objective(**rows(data))
    assert terms.keys() == {"loss", "output", "features", "attention"}
    assert all(abs(term.item()) < 1e-10 for term in terms.values())
    assert objective.error(**rows(data)) < 1e-5
    smaller.student.conv_out.weight.mul_(1.1)
    assert objective(**rows(data))["output"].item() > 1e-3
    objective.close()
    assert hooks_of(teacher) == hooks_of(smaller.student) == 0


@torch.no_grad()
def log_attention(given: dict[str, Any], heads: int, temperature: float) -> Tensor:
    """Of every head, by matrix products of what diffusers' layers gave."""
    rows = []
    for q, k in zip(given["q"].chunk(heads, dim=-1), given["k"].chunk(heads, dim=-1), strict=True):
        rows.append((q @ k.mT / (q.shape[-1] ** 0.5 * temperature)).log_softmax(-1))
    return torch.stack(rows, dim=1)


@torch.no_grad()
def judged_call(theirs: Any, x: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """diffusers' output, what its stages gave, and queries and keys of its cross-attentions."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    for name, module in theirs.named_modules():
        stage = name == "mid_block" or (name.startswith(("down_blocks.", "up_blocks.")) and name.count(".") == 1)
        if stage or name.endswith((".attn2.to_q", ".attn2.to_k")):
            module.register_forward_hook(keep(name))
    return theirs(x, batch["timesteps"], batch["encoder_hidden_states"]).sample, seen


def test_the_loss_is_that_of_diffusers_networks(
    layered: LatentDiffusion, teacher: UNet2DConditionModel, data: TeacherData, tmp_path: Path
) -> None:
    """All terms, where stages and heads were narrowed, each by a choice of its own."""
    channels = Channels(teacher)
    scores = {name: randn(k, space.size).exp() for k, (name, space) in enumerate(channels.spaces.items())}
    smaller = narrowed(teacher, channels, scores, Fraction(1, 2))
    attentions = [f"down_blocks.0.{PLACE.format(k)}" for k in (0, 1)] + [f"mid_block.{PLACE.format(0)}"]
    attentions += [f"up_blocks.1.{PLACE.format(k)}" for k in (0, 1, 2)]
    stages = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert sorted(smaller.heads) == sorted(attentions)
    assert sorted(smaller.stages) == stages
    assert len({tuple(heads.tolist()) for _, heads in smaller.heads.values()}) > 2
    batch = rows(data)
    objective = imitation(smaller, layered, feature_weight=0.3, attention_weight=0.7, temperature=3.0)
    terms = {name: term.item() for name, term in objective(**batch).items()}
    objective.close()
    scheduler = diffusers.DDIMScheduler.from_pretrained(layered.path / "scheduler")
    x = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    out, mine = judged_call(diffusers_unet(smaller.student, tmp_path / "student"), x, batch)
    goal, theirs = judged_call(diffusers_unet(teacher, tmp_path / "teacher"), x, batch)

    def relative(given: Tensor, expected: Tensor) -> float:
        return float((given - expected).square().mean() / expected.square().mean())

    def kept(space: str) -> Tensor:
        best = scores[space].reshape(channels.spaces[space].blocks, -1).sum(1).topk(channels.spaces[space].blocks // 2)
        return best.indices.sort().values

    expected = {"output": relative(out, goal)}
    streams = {
        "down_blocks.0": "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1": "down_blocks.1.resnets.0",
        "mid_block": "down_blocks.1.resnets.0",
        "up_blocks.0": "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1": "up_blocks.1.resnets.2",
    }
    features = []
    for stage, stream in streams.items():
        groups = theirs[stage].unflatten(1, (8, -1))[:, kept(stream)].flatten(1, 2)
        features.append(relative(mine[stage], groups))
    expected["features"] = sum(features) / len(features)
    distances = []
    for name in attentions:
        sides = [{"q": seen[f"{name}.to_q"], "k": seen[f"{name}.to_k"]} for seen in (mine, theirs)]
        ours, wide = log_attention(sides[0], 2, 3.0), log_attention(sides[1], 4, 3.0)
        wide = wide[:, kept(f"{name}.heads")]
        distances.append(float(9 * (wide.exp() * (wide - ours)).sum(-1).mean()))
    expected["attention"] = sum(distances) / len(distances)
    expected["loss"] = expected["output"] + 0.3 * expected["features"] + 0.7 * expected["attention"]
    assert terms == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "left"), [("feature_weight", "attention"), ("attention_weight", "features")])
def test_a_term_without_weight_is_not_computed(
    layered: LatentDiffusion, teacher: UNet2DConditionModel, data: TeacherData, name: str, left: str
) -> None:
    channels = Channels(teacher)
    scores = {name: torch.ones(space.size) for name, space in channels.spaces.items()}
    objective = imitation(narrowed(teacher, channels, scores, Fraction(1, 2)), layered, **{name: 0.0})
    assert objective(**rows(data)).keys() == {"loss", "output", left}
    objective.close()


# --- what is taught ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drawing", [SamplingDefaults("ddim", 20), SamplingDefaults("lcm", 4), SamplingDefaults("ddim", 5)], ids=str
)
def test_timesteps_are_those_of_the_sampler(layered: LatentDiffusion, drawing: SamplingDefaults) -> None:
    found = timesteps_drawn(dataclasses.replace(layered, drawn_with=drawing))
    assert found.dtype == torch.int64
    if drawing.steps == 20:
        assert found.tolist() == [*range(1000)]
        return
    kind = diffusers.LCMScheduler if drawing.sampler == "lcm" else diffusers.DDIMScheduler
    scheduler = kind.from_pretrained(layered.path / "scheduler")
    scheduler.set_timesteps(drawing.steps)
    assert found.tolist() == sorted(scheduler.timesteps.tolist())


def test_rows_are_latents_with_their_prompts_or_now_and_then_none(data: TeacherData) -> None:
    given = noisy_rows(data, 2000, torch.tensor([7, 9]), torch.Generator().manual_seed(0), guided=True)
    text, none = given["encoder_hidden_states"], data.empty["encoder_hidden_states"]
    without = (text == none).all(dim=2).all(dim=1)
    assert without.float().mean().item() == pytest.approx(0.25, abs=0.03)  # three deviations
    assert {*given["timesteps"].tolist()} == {7, 9}
    for row in range(0, 2000, 97):
        (drawn,) = (data.latents == given["latents"][row]).flatten(1).all(dim=1).nonzero().flatten().tolist()
        told = data.conditions["encoder_hidden_states"][data.owner[drawn]]
        assert without[row] or torch.equal(text[row], told)
    always = noisy_rows(data, 200, torch.tensor([7]), torch.Generator().manual_seed(0))["encoder_hidden_states"]
    assert not (always == none).all(dim=2).all(dim=1).any()


# --- the pass ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("ratio", [0.0, 0.05])
def test_a_ratio_of_nothing_changes_nothing(setting: MakeSetting, layered: LatentDiffusion, ratio: float) -> None:
    before, given = files_of(layered.path), setting(layered)
    change = PruneChannels(ratio=ratio, updates=5).apply(given)
    assert change == Change({}, report={"ratio": 0.0, "asked": ratio, "why": "nothing goes at the nearest ratio"})
    assert files_of(layered.path) == before
    assert not given.folder.exists()


def test_the_report_holds_diffusers_sizes(
    bare: Change,
    teacher: UNet2DConditionModel,
    layered: LatentDiffusion,
    data: TeacherData,
    errors: Errors,
    tmp_path: Path,
) -> None:
    student: Any = bare.networks["unet"]
    one = {name: value[:1] for name, value in errors.inputs.items()}
    wide, narrow = (
        diffusers_sizes(diffusers_unet(unet, tmp_path / name), **one)
        for name, unet in (("teacher", teacher), ("student", student))
    )
    report = bare.report
    assert (report["ratio"], report["asked"]) == (0.5, 0.5)
    assert report["parameters"] == {"before": wide[0], "after": narrow[0]}
    assert report["flops"] == {"before": wide[1], "after": narrow[1]}
    assert narrow[0] < 0.35 * wide[0]
    assert narrow[1] < 0.35 * wide[1]  # of half the channels a quarter, and what reads the prompt
    assert report["output_error"]["cut"] == report["output_error"]["taught"]
    rows = noisy_rows(data, MEASURED, timesteps_drawn(layered), torch.Generator().manual_seed(0), guided=True)
    assert report["output_error"]["cut"] == pytest.approx(Errors(layered, data, rows).of(student), rel=1e-4)
    assert student.config == dataclasses.replace(
        teacher.config, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2
    )
    assert (bare.drawing, bare.scheduler) == (None, None)


def test_updates_bring_the_student_nearer(
    setting: MakeSetting, layered: LatentDiffusion, errors: Errors, bare: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = LatentDiffusion.load
    monkeypatch.setattr(LatentDiffusion, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    said: list[str] = []
    given = setting(layered, progress=lambda what, done, of: said.append(what))
    change = PruneChannels(ratio=0.5, **SHORT).apply(given)  # type: ignore[arg-type]
    student = change.networks["unet"]
    assert change.report["output_error"]["taught"] < 0.7 * change.report["output_error"]["cut"]
    assert not student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert [hooks_of(network) for network in (*loaded, student)] == [0] * (len(loaded) + 1)
    assert len([what for what in said if what == "prune-channels: scores"]) == 16
    assert errors.of(student) < 0.8 * errors.of(bare.networks["unet"])


def test_the_channels_that_count_most_are_those_that_stay(
    setting: MakeSetting, layered: LatentDiffusion, errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut of one group in four is nearer than the one that the opposite scores give; not by far, since a network of
    random weights has no channel to spare."""
    step = PruneChannels(ratio=0.25, updates=0)
    nearest = step.apply(setting(layered)).networks["unet"]
    score = prune_channels.taylor
    monkeypatch.setattr(prune_channels, "taylor", lambda *args: {name: -s for name, s in score(*args).items()})
    farthest = step.apply(setting(layered)).networks["unet"]
    assert nearest.conv_in.out_channels == farthest.conv_in.out_channels == 12  # type: ignore[union-attr]
    assert errors.of(nearest) < 0.95 * errors.of(farthest)


def test_by_magnitude_the_largest_weights_stay(
    setting: MakeSetting, layered: LatentDiffusion, teacher: UNet2DConditionModel
) -> None:
    said: list[str] = []
    given = setting(layered, progress=lambda what, done, of: said.append(what))
    change = PruneChannels(ratio=0.5, importance="magnitude", updates=0).apply(given)
    channels = Channels(teacher)
    expected = narrowed(teacher, channels, magnitude(teacher, channels), Fraction(1, 2)).student.state_dict()
    weights = change.networks["unet"].state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert said == []


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_a_model_of_one_norm_group_cannot_be_narrowed(
    setting: MakeSetting, tiny_checkpoint: Path, tmp_path: Path, ratio: float
) -> None:
    model = write_model(tmp_path / "stiff", tiny_checkpoint, norm_num_groups=1)
    with pytest.raises(InputError) as refused:
        PruneChannels(ratio=ratio).apply(setting(model))
    assert str(refused.value) == (
        f"prune-channels: ratio = {ratio:g}, and the heads and norm groups of stiff allow none but 0. Leave the pass "
        "out for this model."
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "negative ratio": ({"ratio": -0.1}, "ratio = -0.1 must be from 0 to 0.9."),
    "all channels": ({"ratio": 1.0}, "ratio = 1.0 must be from 0 to 0.9."),
    "no number": ({"ratio": float("nan")}, "ratio = nan must be from 0 to 0.9."),
    "importance": (
        {"importance": "random"},
        "importance = 'random' is not supported; allowed are 'taylor', 'magnitude'.",
    ),
    "updates": ({"updates": -1}, "updates = -1 must be at least 0."),
    "features": ({"feature_weight": -1.0}, "feature_weight = -1.0 must be at least 0."),
    "attention": ({"attention_weight": float("inf")}, "attention_weight = inf must be at least 0."),
    "cold": ({"temperature": 0.0}, "temperature = 0.0 must be between 0 and 100, without these."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        PruneChannels(**options)
    assert str(refused.value) == message
