"""Knowledge distillation into a smaller UNet: fewer blocks, narrower ones, or both (BK-SDM, 2305.15798, section 3.1).

Of every stage on the way down the first layers stay, since the first one meets the new resolution; on the way up the
first ones and the last, which meets the skip from the stage outside. The middle block may go. A narrower student starts
from the channels with the largest weights. The student is a network that diffusers' config can say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ldm_reference.config import per_block
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.errors import InputError
from ldm_export.passes.base import Change, PassContext, Purpose
from ldm_export.passes.channels import Channels, nearest_share
from ldm_export.passes.imitation import DistillationOptions
from ldm_export.passes.importance import magnitude
from ldm_export.passes.prune_channels import narrowed
from ldm_export.reading.options import check_between, check_least


@dataclass(frozen=True)
class DistillStudent(DistillationOptions):
    """Options.

    Attributes
    ----------
    layers_per_block : of every stage on the way down, and one more on the way up; where there are fewer, those stay
    middle_block : whether the student has it
    width : share of the channels, rounded to what the model's heads and norm groups allow
    """

    name: ClassVar[str] = "distill-student"
    purpose: ClassVar[Purpose] = "speed"

    layers_per_block: int = 1
    middle_block: bool = True
    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("layers_per_block", self.layers_per_block, 1)
        check_between("width", self.width, 0.1, 1.0)

    def apply(self, setting: PassContext) -> Change:
        teacher = setting.model.load("unet")
        assert isinstance(teacher, UNet2DConditionModel)
        shorter = with_fewer_blocks(teacher, self.layers_per_block, middle_block=self.middle_block)
        share = nearest_share(shorter.config, self.width)
        if share == 1 and shorter.config == teacher.config:
            raise InputError(
                f"{self.name}: layers_per_block = {self.layers_per_block}, middle_block = {self.middle_block} and "
                f"width = {self.width:g} leave {setting.model.name} as it is. Ask for less, or leave the pass out."
            )
        channels = Channels(shorter)
        smaller = narrowed(shorter, channels, magnitude(shorter, channels), share)
        layers = [layers_of(unet) for unet in (teacher, shorter)]
        heads = {name: (_source(name, *layers), kept) for name, (_, kept) in smaller.heads.items()}
        report = self.imitate(self.name, setting, replace(smaller, teacher=teacher, heads=heads))
        return Change({"unet": smaller.student}, report={"width": float(share), **report})


def layers_of(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """Layers of each down block, outermost first: (levels,)."""
    return per_block("layers_per_block", unet.config.layers_per_block, len(unet.config.block_out_channels))


def with_fewer_blocks(unet: UNet2DConditionModel, layers: int, *, middle_block: bool) -> UNet2DConditionModel:
    """The UNet without some of its layers, its other weights unchanged."""
    config = unet.config
    before = layers_of(unet)
    after = tuple(min(layers, count) for count in before)
    student = UNet2DConditionModel(
        replace(
            config,
            layers_per_block=after if len(set(after)) > 1 else after[0],
            mid_block_type=config.mid_block_type if middle_block else None,
        )
    )
    weights = unet.state_dict()
    student.load_state_dict({name: weights[_source(name, before, after)] for name in student.state_dict()})
    return student.requires_grad_(False).eval()


def _source(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """What a parameter or a module of the student is called in the teacher, whose last layer of a stage on the way up
    the student's last layer is."""
    parts = name.split(".")
    if parts[0] == "up_blocks" and parts[2] in ("resnets", "attentions"):
        level = len(before) - 1 - int(parts[1])
        if int(parts[3]) == after[level]:
            parts[3] = str(before[level])
    return ".".join(parts)
