"""Single weights that become zero: which, by brute force, and that they stay so through training, fp16 and export."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.export.onnx import export_graph, random_inputs
from ldm_export.families import family_of
from ldm_export.passes.base import Change, PassContext
from ldm_export.passes.prune_weights import PruneWeights, two_of_four
from ldm_export.passes.teacher import TeacherData
from tests.passes.unets import Errors, diffusers_unet, hooks_of, randn, write_model

MakeSetting = Callable[..., PassContext]
SHORT = {"updates": 25, "batch_size": 12, "learning_rate": 2e-3, "ema_decay": 0.7}
PATTERNS = ("unstructured", "2:4")
RATIO = 0.6
QUIET = "down_blocks.0.resnets.0.conv1"


def layers_of(network: Any) -> dict[str, Tensor]:
    """The weights of all convolutions and matrices."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: layer.weight for name, layer in network.named_modules() if isinstance(layer, kinds)}


def fours_of(weight: Tensor) -> Tensor:
    """(..., 4): neighbours along the inputs."""
    return weight.movedim(1, -1).unflatten(-1, (-1, 4))


def zipped_bytes(network: Any, folder: Path) -> int:
    """What a zip file makes of the weights that are saved."""
    folder.mkdir()
    diffusers_unet(network.half(), folder)
    network.float()
    with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "diffusion_pytorch_model.safetensors")
    return (folder / "all.zip").stat().st_size


def apply(model: LatentDiffusion, data: TeacherData, folder: Path, **options: Any) -> Change:
    nothing: Callable[[str, int, int], None] = lambda what, done, of: None  # noqa: E731
    return PruneWeights(**options).apply(PassContext(model, model, data, folder, nothing))


@pytest.fixture(scope="module")
def cuts(model: LatentDiffusion, data: TeacherData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Change]:
    """Nothing learned afterwards."""
    folder = tmp_path_factory.mktemp("cuts")
    return {name: apply(model, data, folder / "work", pattern=name, ratio=RATIO, updates=0) for name in PATTERNS}


@pytest.fixture(scope="module")
def taught(model: LatentDiffusion, data: TeacherData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Change]:
    folder = tmp_path_factory.mktemp("taught")
    return {
        name: apply(model, data, folder / str(k), pattern=name, ratio=RATIO, **SHORT) for k, name in enumerate(PATTERNS)
    }


# --- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (3, 12, 3, 3), (5, 4, 1, 1), (1, 4)])
def test_of_four_the_two_largest_stay(shape: tuple[int, ...]) -> None:
    weight = randn(len(shape), *shape)
    fours, masks = fours_of(weight), fours_of(two_of_four(weight))
    best = torch.zeros_like(fours[..., 0])
    for pair in combinations(range(4), 2):
        best = torch.maximum(best, fours[..., list(pair)].abs().sum(-1))
    assert {*masks.unique().tolist()} == {0.0, 1.0}
    assert (masks.sum(-1) == 2).all()
    torch.testing.assert_close((fours * masks).abs().sum(-1), best)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_of_four_equal_weights_two_stay(value: float) -> None:
    assert (fours_of(two_of_four(torch.full((3, 8), value))).sum(-1) == 2).all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.777])
def test_the_smallest_of_all_layers_together_go(
    model: LatentDiffusion, data: TeacherData, tmp_path: Path, ratio: float
) -> None:
    change = apply(model, data, tmp_path / "work", ratio=ratio, updates=0)
    before, after = layers_of(model.load("unet")), layers_of(change.networks["unet"])
    sizes = torch.cat([weight.abs().flatten() for weight in before.values()])
    gone = torch.cat([(after[name] == 0).flatten() for name in before])
    assert int(gone.sum()) == round(ratio * len(sizes)) == change.report["zeros"]
    assert change.report["of"] == len(sizes)
    assert sizes[gone].max() <= sizes[~gone].min()
    assert not (tmp_path / "work").exists()


def test_a_layer_that_would_lose_all_its_weights_is_named(
    model: LatentDiffusion, data: TeacherData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_quiet_layer(self: LatentDiffusion, component: str) -> Any:
        network = load(self, component)
        network.get_submodule(QUIET).weight.mul_(1e-6)
        return network

    load = LatentDiffusion.load
    monkeypatch.setattr(LatentDiffusion, "load", with_a_quiet_layer)
    with pytest.raises(InputError, match=rf"ratio 0\.5 takes all weights of {QUIET}, .* Lower the ratio"):
        apply(model, data, tmp_path / "work", ratio=0.5, updates=0)
    halved = apply(model, data, tmp_path / "work", pattern="2:4", updates=0).networks["unet"]
    assert float((halved.get_submodule(QUIET).weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_stays_is_as_it_was(model: LatentDiffusion, cuts: dict[str, Change], pattern: str) -> None:
    before, student = model.load("unet").state_dict(), cuts[pattern].networks["unet"]
    assert student.state_dict().keys() == before.keys()
    weights = layers_of(student)
    for name, tensor in student.state_dict().items():
        pruned = name.removesuffix(".weight") in weights and name.endswith(".weight")
        same = tensor == before[name]
        assert (same | (tensor == 0) if pruned else same).all(), name


def test_two_of_every_four_are_zero_by_brute_force(model: LatentDiffusion, cuts: dict[str, Change]) -> None:
    before, after = layers_of(model.load("unet")), layers_of(cuts["2:4"].networks["unet"])
    assert cuts["2:4"].report["left_alone"] == []
    assert cuts["2:4"].report["zeros"] * 2 == cuts["2:4"].report["of"] == sum(w.numel() for w in before.values())
    for name, weight in before.items():
        old, new = fours_of(weight).reshape(-1, 4), fours_of(after[name]).reshape(-1, 4)
        for four, left in zip(old[:500].tolist(), new[:500].tolist(), strict=True):
            largest = sorted(four, key=abs)[2:]
            assert [value for value in left if value] == [value for value in four if value in largest]
        assert ((new == 0).sum(1) == 2).all()


def test_layers_whose_inputs_are_no_fours_are_named(data: TeacherData, tiny_checkpoint: Path, tmp_path: Path) -> None:
    odd = {"block_out_channels": [12, 18], "norm_num_groups": 6, "attention_head_dim": 3, "layers_per_block": 1}
    model = write_model(tmp_path / "odd", tiny_checkpoint, **odd)
    change = apply(model, data, tmp_path / "work", pattern="2:4", updates=0)
    before, after = layers_of(model.load("unet")), layers_of(change.networks["unet"])
    left = [name for name, weight in before.items() if weight.shape[1] % 4]
    assert len(before) > len(left) > 3
    assert change.report["left_alone"] == left
    for name, weight in after.items():
        assert (torch.equal(weight, before[name]) and name in left) or (
            fours_of(weight) == 0
        ).sum() * 2 == weight.numel()
    assert change.report["of"] == sum(weight.numel() for name, weight in after.items() if name not in left)
    assert apply(model, data, tmp_path / "work", updates=0).report["left_alone"] == []


# --- what follows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_survive_training_which_brings_the_rest_nearer(
    model: LatentDiffusion, data: TeacherData, cuts: dict[str, Change], taught: dict[str, Change], pattern: str
) -> None:
    bare, student = layers_of(cuts[pattern].networks["unet"]), layers_of(taught[pattern].networks["unet"])
    for name, weight in bare.items():
        assert torch.equal(student[name] == 0, weight == 0), name
    assert any(not torch.equal(student[name], weight) for name, weight in bare.items())
    cut, after = (taught[pattern].report["output_error"][when] for when in ("cut", "taught"))
    assert cut == pytest.approx(cuts[pattern].report["output_error"]["cut"])
    assert after < 0.8 * cut
    errors = Errors(model, data)
    assert errors.of(taught[pattern].networks["unet"]) < 0.85 * errors.of(cuts[pattern].networks["unet"])
    network = taught[pattern].networks["unet"]
    assert hooks_of(network) == 0
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_survive_fp16_and_export(
    model: LatentDiffusion, taught: dict[str, Change], tmp_path: Path, pattern: str
) -> None:
    student = taught[pattern].networks["unet"]
    zeros = {name: weight == 0 for name, weight in layers_of(student).items()}
    saved = model.save_changed(tmp_path / "saved", {"unet": student}, None, model.drawing, [])
    student.float()
    opened = saved.load("unet")
    weights = layers_of(opened)
    assert all((weights[name][mask] == 0).all() for name, mask in zeros.items())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) >= taught[pattern].report["zeros"]
    if pattern == "unstructured":
        return  # one export is enough
    assert all(((fours_of(weight) == 0).sum(-1) >= 2).all() for weight in weights.values())
    denoiser = next(graph for graph in family_of(saved).graphs if graph.component == "unet")
    example = random_inputs(denoiser.spec, {"batch": 2, "height": 8, "width": 8, "tokens": 16}, 2, 100)
    graph = onnx.load(export_graph(denoiser.load(), denoiser.spec, example, tmp_path / "graph"))
    exported = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    written = sum(int((array == 0).sum()) for array in exported if array.ndim in (2, 4) and array.size > 16)
    assert written == sum(int((weight == 0).sum()) for weight in weights.values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_compressed_is_smaller(
    model: LatentDiffusion, cuts: dict[str, Change], tmp_path: Path, pattern: str
) -> None:
    reported = cuts[pattern].report["compressed_bytes"]
    before = zipped_bytes(model.load("unet"), tmp_path / "before")
    after = zipped_bytes(cuts[pattern].networks["unet"], tmp_path / "after")
    assert after < 0.85 * before
    assert reported["after"] / reported["before"] == pytest.approx(after / before, abs=0.1)  # a file has a header
    assert "none from zeros" in cuts[pattern].report["speed"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "pattern": ({"pattern": "1:4"}, "pattern = '1:4' is not supported; allowed are 'unstructured', '2:4'."),
    "none": ({"ratio": 0.0}, "ratio = 0.0 must be between 0 and 1, without these."),
    "all": ({"ratio": 1.0}, "ratio = 1.0 must be between 0 and 1, without these."),
    "no number": ({"ratio": float("nan")}, "ratio = nan must be between 0 and 1, without these."),
    "updates": ({"updates": -3}, "updates = -3 must be at least 0."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        PruneWeights(**options)
    assert str(refused.value) == message
