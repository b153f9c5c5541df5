"""Students with fewer blocks: the tensors that they keep, diffusers' opinion of them, what they learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.passes.base import PassContext
from ldm_export.passes.channels import Channels
from ldm_export.passes.distill_student import DistillStudent, with_fewer_blocks
from ldm_export.passes.imitation import PrunedStudent
from ldm_export.passes.importance import magnitude
from tests.passes.unets import (
    KINDS,
    TOLERANCE,
    Errors,
    diffusers_output,
    diffusers_sizes,
    diffusers_unet,
    hooks_of,
    inputs_of,
    off_by,
    output_of,
    random_unet,
)

MakeSetting = Callable[..., PassContext]
SHORT = {"updates": 25, "batch_size": 12, "learning_rate": 3e-3, "ema_decay": 0.7}
GONE = ("down_blocks.0.{}.1", "down_blocks.1.{}.1", "up_blocks.0.{}.1", "up_blocks.1.{}.1")
MOVED = {"up_blocks.0.{}.2": "up_blocks.0.{}.1", "up_blocks.1.{}.2": "up_blocks.1.{}.1"}
"""What BK-SDM removes of two layers a stage, three on the way up, and where what is left lies then."""


def remaining(weights: dict[str, Any], *, middle_block: bool) -> dict[str, Any]:
    """Of a network of two levels of two layers, by the names that they have in one of one layer."""
    left = {}
    for name, tensor in weights.items():
        for kind in ("resnets", "attentions"):
            if name.startswith(tuple(place.format(kind) + "." for place in GONE)):
                break
            for before, after in MOVED.items():
                if name.startswith(before.format(kind) + "."):
                    name = name.replace(before.format(kind), after.format(kind))
        else:
            if middle_block or not name.startswith("mid_block."):
                left[name] = tensor
    return left


@pytest.mark.parametrize("middle_block", [True, False])
def test_a_student_has_the_tensors_that_bk_sdm_keeps(
    setting: MakeSetting, layered: LatentDiffusion, teacher: UNet2DConditionModel, tmp_path: Path, middle_block: bool
) -> None:
    change = DistillStudent(updates=0, middle_block=middle_block).apply(setting(layered))
    student: Any = change.networks["unet"]
    assert student.config == dataclasses.replace(
        teacher.config, layers_per_block=1, mid_block_type="UNetMidBlock2DCrossAttn" if middle_block else None
    )
    expected, given = remaining(teacher.state_dict(), middle_block=middle_block), student.state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    theirs, inputs = diffusers_unet(student, tmp_path), inputs_of(student)
    assert off_by(output_of(student, **inputs), diffusers_output(theirs, **inputs)) < TOLERANCE
    one = inputs_of(student, batch=1)
    before, after = (
        diffusers_sizes(diffusers_unet(teacher, tmp_path / "teacher"), **one),
        diffusers_sizes(theirs, **one),
    )
    # the prompts of the model are 16 tokens, those of these inputs 7, which only the projections of prompts see
    assert change.report["parameters"] == {"before": before[0], "after": after[0]}
    assert change.report["flops"]["after"] < change.report["flops"]["before"]
    assert change.report["width"] == 1.0
    assert change.report["output_error"]["cut"] == change.report["output_error"]["taught"] > 0.01


@pytest.mark.parametrize(
    ("kind", "layers", "after", "origins"),
    [
        ("two-layers", 1, 1, {"0.0": "0.0", "0.1": "0.2", "1.1": "1.2", "2.0": "2.0", "2.1": "2.2"}),
        ("layers-per-block", 2, (1, 2, 2), {"0.2": "0.2", "1.1": "1.1", "1.2": "1.3", "2.1": "2.1"}),
        ("layers-per-block", 1, 1, {"0.1": "0.2", "1.0": "1.0", "1.1": "1.3", "2.0": "2.0", "2.1": "2.1"}),
        ("sd", 5, 1, {"0.0": "0.0", "0.1": "0.1", "2.1": "2.1"}),
    ],
)
def test_where_layers_on_the_way_up_come_from(kind: str, layers: int, after: Any, origins: dict[str, str]) -> None:
    """Blocks there count from the lowest level: its number of layers is the last of ``layers_per_block``."""
    unet = random_unet(**KINDS[kind])
    student = with_fewer_blocks(unet, layers, middle_block=True)
    assert student.config.layers_per_block == after
    mine, theirs = student.state_dict(), unet.state_dict()
    for new, old in origins.items():
        (block, layer), (_, origin) = new.split("."), old.split(".")
        place, source = f"up_blocks.{block}.resnets.{layer}.", f"up_blocks.{block}.resnets.{origin}."
        names = [name.removeprefix(place) for name in mine if name.startswith(place)]
        assert len(names) > 5
        assert all(torch.equal(mine[place + name], theirs[source + name]) for name in names)
    rest = [name for name in mine if not name.startswith("up_blocks")]
    assert all(torch.equal(mine[name], theirs[name]) for name in rest)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> list[PrunedStudent]:
    """What is handed over to be taught."""
    seen: list[PrunedStudent] = []
    imitate = DistillStudent.imitate
    monkeypatch.setattr(
        DistillStudent,
        "imitate",
        lambda *args: seen.append(args[-1]) or imitate(*args),  # type: ignore[func-returns-value]
    )
    return seen


def test_stages_and_heads_are_held_against_those_that_they_come_from(
    setting: MakeSetting, layered: LatentDiffusion, teacher: UNet2DConditionModel, imitated: list[PrunedStudent]
) -> None:
    DistillStudent(updates=0, middle_block=False, width=0.5).apply(setting(layered))
    (smaller,) = imitated
    attn = "attentions.{}.transformer_blocks.0.attn2"
    places = {f"down_blocks.0.{attn.format(0)}": f"down_blocks.0.{attn.format(0)}"}
    places |= {f"up_blocks.1.{attn.format(k)}": f"up_blocks.1.{attn.format(2 * k)}" for k in (0, 1)}
    assert {name: origin for name, (origin, _) in smaller.heads.items()} == places
    assert sorted(smaller.stages) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert hooks_of(smaller.student) == hooks_of(smaller.teacher) == 0
    weights = teacher.state_dict()
    student: Any = smaller.student
    assert len(smaller.teacher.state_dict()) == len(weights)  # the whole teacher teaches, not the shorter one
    for name, (origin, heads) in smaller.heads.items():  # the keys of those heads, and of no others
        assert len(heads) == student.get_submodule(name).heads == 2
        whole = weights[f"{origin}.to_k.weight"].unflatten(0, (4, -1))
        assert torch.equal(student.get_submodule(name).to_k.weight, whole[heads].flatten(0, 1))
    for stage, kept in smaller.stages.items():  # the bias of what writes the stream alone is that of the kept channels
        if stage == "down_blocks.0":
            bias = weights["down_blocks.0.downsamplers.0.conv.bias"]
            assert torch.equal(student.down_blocks[0].downsamplers[0].conv.bias, bias[kept])


def test_a_narrower_student_keeps_the_largest_weights(
    setting: MakeSetting, layered: LatentDiffusion, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    change = DistillStudent(updates=0, layers_per_block=2, width=0.5).apply(setting(layered))
    student: Any = change.networks["unet"]
    assert change.report["width"] == 0.5
    assert student.config.block_out_channels == (8, 16)
    assert student.config.layers_per_block == 2
    channels = Channels(teacher)
    kept = channels.kept(magnitude(teacher, channels), Fraction(1, 2))
    for space, name in (
        ("conv_in", "conv_in.bias"),
        ("up_blocks.0.resnets.1", "up_blocks.0.resnets.1.conv_shortcut.bias"),
    ):
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name][kept[space]])
    inputs = inputs_of(student)
    expected = diffusers_output(diffusers_unet(student, tmp_path), **inputs)
    assert off_by(output_of(student, **inputs), expected) < TOLERANCE


def test_updates_bring_the_student_nearer(
    setting: MakeSetting, layered: LatentDiffusion, errors: Errors, imitated: list[PrunedStudent]
) -> None:
    bare = DistillStudent(updates=0, middle_block=False).apply(setting(layered)).networks["unet"]
    change = DistillStudent(middle_block=False, **SHORT).apply(setting(layered))  # type: ignore[arg-type]
    student = change.networks["unet"]
    assert change.report["output_error"]["taught"] < 0.8 * change.report["output_error"]["cut"]
    assert errors.of(student) < 0.85 * errors.of(bare)
    assert hooks_of(student) == hooks_of(imitated[-1].teacher) == 0
    assert not student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    "options", [{"layers_per_block": 2}, {"layers_per_block": 9}, {"layers_per_block": 2, "width": 0.97}]
)
def test_a_student_that_is_the_teacher_is_refused(
    setting: MakeSetting, layered: LatentDiffusion, options: dict[str, Any]
) -> None:
    given = setting(layered)
    with pytest.raises(InputError) as refused:
        DistillStudent(**options).apply(given)
    assert str(refused.value) == (
        f"distill-student: layers_per_block = {options['layers_per_block']}, middle_block = True and width = "
        f"{options.get('width', 1.0):g} leave layered as it is. Ask for less, or leave the pass out."
    )
    assert not given.folder.exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"layers_per_block": 0}, "layers_per_block = 0 must be at least 1."),
    "no width": ({"width": 0.0}, "width = 0.0 must be from 0.1 to 1."),
    "wider": ({"width": 1.5}, "width = 1.5 must be from 0.1 to 1."),
    "updates": ({"updates": -1}, "updates = -1 must be at least 0."),
    "hot": ({"temperature": float("inf")}, "temperature = inf must be between 0 and 100, without these."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        DistillStudent(**options)
    assert str(refused.value) == message
