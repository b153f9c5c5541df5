"""The optimisation loop on a model of two numbers: AdamW, clipping, averages, parts, states, logs."""

from __future__ import annotations

import errno
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm_reference.state
import pytest
import safetensors.torch
import torch
from ldm_reference.blocks import ResnetBlock2D
from ldm_reference.config import ConfigError
from ldm_reference.fit import Rows, Run, Stage, fit, recompute_activations
from ldm_reference.optimisation import Optimisation
from ldm_reference.unet import UNet2DConditionModel
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn

from tests.training import Losses

Loss = Callable[[Tensor, Tensor], Tensor]


class Point(nn.Module):
    """Two numbers, pulled to where the loss of (point, rows) says."""

    def __init__(self, loss: Loss):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.loss = loss

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.at, rows), "height": self.at[0].detach()}


def steps_as_rows(step: int) -> Rows:
    return {"rows": torch.full((1,), float(step))}


def settings(**changes: Any) -> Optimisation:
    return Optimisation(**{"steps": 4, "batch_size": 1, "learning_rate": 0.1, "warmup_steps": 1, **changes})


def fit_point(
    folder: Path,
    optimisation: Optimisation,
    loss: Loss,
    *,
    recipe: str = "r",
    batch_at: Callable[[int], Rows] = steps_as_rows,
    progress: Losses | None = None,
    **options: Any,
) -> Tensor:
    run = Run.begin(folder, "no", progress or Losses())
    stage = Stage("point", options.pop("objective", None) or Point(loss), batch_at, optimisation, recipe, 0, **options)
    return fit(run, stage)["at"]


def state(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "training" / "point.safetensors")


@pytest.mark.parametrize("steps", [5, 60])
def test_average_of_the_weights_is_what_is_left(tmp_path: Path, steps: int) -> None:
    """AdamW, clipping and the average, compared with the formulas written out in numbers."""
    pull = torch.tensor([3.0, 4.0])
    ours = settings(steps=steps, ema_decay=0.8, weight_decay=0.1)
    left = fit_point(tmp_path, ours, lambda at, rows: (at * pull).sum() * (1 + rows[0] % 3))
    weight = torch.tensor([1.0, -2.0])
    average, first, second = weight.clone(), torch.zeros(2), torch.zeros(2)
    for step in range(steps):
        gradient = pull / 5.0 * ours.max_grad_norm  # its norm, 5 to 15, is clipped to 1
        rate = ours.learning_rate_at(step)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        weight = weight * (1 - rate * 0.1)
        weight -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(left, average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state(tmp_path)["weight.at"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state(tmp_path)["average.at"], average, rtol=1e-4, atol=1e-5)


def test_small_gradients_are_not_scaled_up(tmp_path: Path) -> None:
    fit_point(tmp_path, settings(steps=1), lambda at, rows: (at * torch.tensor([0.03, 0.04])).sum())
    torch.testing.assert_close(state(tmp_path)["first_moment.at"], 0.1 * torch.tensor([0.03, 0.04]))


def test_parts_of_a_batch_equal_the_whole(tmp_path: Path) -> None:
    rows = torch.arange(8.0)

    def loss(at: Tensor, rows: Tensor) -> Tensor:
        return (at[0] * rows + at[1] - rows.sin()).square().mean()

    found, seen = {}, {}
    for parts in (1, 4):
        progress = Losses()
        found[parts] = fit_point(
            tmp_path / str(parts),
            settings(batch_size=8, gradient_accumulation=parts, max_grad_norm=1e9),
            loss,
            batch_at=lambda step: {"rows": rows + step},
            progress=progress,
        )
        seen[parts] = list(progress.of.values())
    torch.testing.assert_close(found[4], found[1], rtol=1e-6, atol=1e-6)
    assert seen[4] == pytest.approx(seen[1], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, bad: float) -> None:
    def loss(at: Tensor, rows: Tensor) -> Tensor:
        return at.square().sum() * (bad if rows[0] == 6 else 1.0)

    with pytest.raises(ConfigError) as caught:
        fit_point(tmp_path, settings(steps=20, save_every=4), loss)
    assert "the loss of stage 'point' is not a number at step 6 (" in str(caught.value)
    assert "point.safetensors keeps an earlier state); lower learning_rate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in state(tmp_path).values())  # of step 4, which was good


def test_a_gradient_that_is_no_number_stops(tmp_path: Path) -> None:
    def loss(at: Tensor, rows: Tensor) -> Tensor:
        return (at[0] - 1.0 + (rows[0] < 1)).abs().sqrt() + 0 * at.sum()  # infinite slope at 0

    with pytest.raises(ConfigError, match=r"the gradient of stage 'point' is not a number at step 1 \(no state was"):
        fit_point(tmp_path, settings(steps=3, learning_rate=1e-30), loss)


def test_a_state_of_another_recipe_or_damaged(tmp_path: Path) -> None:
    fit_point(tmp_path, settings(), lambda at, rows: at.sum())
    with pytest.raises(ConfigError, match=r"point\.safetensors was made with another config"):
        fit_point(tmp_path, settings(), lambda at, rows: at.sum(), recipe="other")
    file = tmp_path / "training" / "point.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"point\.safetensors is damaged .*delete it to begin this stage again"):
        fit_point(tmp_path, settings(), lambda at, rows: at.sum())


def test_a_full_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ldm_reference.state.safetensors.torch.save_file
    saves = []

    def fills(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        saves.append(metadata["step"])
        if len(saves) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, metadata)

    monkeypatch.setattr(ldm_reference.state.safetensors.torch, "save_file", fills)
    with pytest.raises(OSError, match="No space left"):
        fit_point(tmp_path, settings(save_every=2), lambda at, rows: at.sum())
    assert [file.name for file in (tmp_path / "training").iterdir()] == ["point.safetensors"]
    with safetensors.safe_open(tmp_path / "training" / "point.safetensors", "pt") as opened:
        assert opened.metadata()["step"] == "2"


def test_fp16_on_a_processor_is_refused(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(ConfigError, match="mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no' on a processor"):
        Run.begin(tmp_path, "fp16", Losses())


def test_bf16_computes_in_bf16_and_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Linear(4, 1)
            self.kinds: set[torch.dtype] = set()

        def forward(self, rows: Tensor) -> dict[str, Tensor]:
            out = self.at(rows)
            self.kinds.add(out.dtype)
            return {"loss": out.float().square().mean()}

    layer = Layer()
    run = Run.begin(tmp_path, "bf16", Losses())
    left = fit(run, Stage("point", layer, lambda step: {"rows": torch.ones(1, 4)}, settings(), "r", 0))
    assert layer.kinds == {torch.bfloat16}
    assert {tensor.dtype for tensor in left.values()} == {torch.float32}


# --- logs and pictures ----------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the last value of each step, but for what a later start purged."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data, position = file.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            if event.session_log.status == event.session_log.START and event.HasField("session_log"):
                found = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            position += 12 + length + 4
    return found


def test_logs_are_tensorboard_s_and_a_resumed_run_overwrites_what_it_repeats(tmp_path: Path) -> None:
    def loss(at: Tensor, rows: Tensor) -> Tensor:
        return at.square().sum() + rows[0]

    ours = settings(steps=40, save_every=15)
    whole = Losses()
    fit_point(tmp_path / "whole", ours, loss, progress=whole)
    with pytest.raises(KeyboardInterrupt):
        fit_point(tmp_path / "cut", ours, loss, progress=Losses(("point", 25)))
    assert max(scalars(tmp_path / "cut" / "logs" / "point")["loss"]) == 20
    fit_point(tmp_path / "cut", ours, loss)
    expected = scalars(tmp_path / "whole" / "logs" / "point")
    assert expected.keys() == {"loss", "height", "learning_rate", "gradient_norm"}
    assert expected["loss"] == pytest.approx({step: whole.of["point", step] for step in (10, 20, 30, 40)})
    assert expected["learning_rate"][30] == pytest.approx(ours.learning_rate_at(29))
    assert scalars(tmp_path / "cut" / "logs" / "point") == expected


def test_pictures_are_drawn_with_the_averaged_weights(tmp_path: Path) -> None:
    point = Point(lambda at, rows: at.sum())
    seen: list[tuple[list[float], bool]] = []

    def sample() -> Tensor:
        seen.append((point.at.tolist(), point.training))
        return torch.zeros(4, 6, 3, dtype=torch.uint8)

    ours = settings(steps=5, sample_every=2, save_every=2)
    left = fit_point(tmp_path, ours, lambda at, rows: at.sum(), objective=point, sample=sample)
    assert [file.name for file in sorted((tmp_path / "samples").iterdir())] == [
        f"point-{step:06d}.png" for step in (2, 4, 5)
    ]
    assert [training for _, training in seen] == [False] * 3
    assert point.training
    assert seen[-1][0] == left.tolist() != point.at.tolist()


# --- checkpointing --------------------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet2DConditionModel.from_config(
        {
            **{"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6},
            **{"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2},
            **{"attention_head_dim": 2, "dropout": 0.2},
        }
    ).train()
    calls = []
    forward = ResnetBlock2D.forward

    def counted(self: ResnetBlock2D, *inputs: Any) -> Tensor:
        calls.append(self)
        return forward(self, *inputs)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3]), torch.randn(2, 5, 6)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        unet.zero_grad()
        unet(*inputs).square().mean().backward()
        return [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]

    plain, once = gradients(), len(calls)
    recompute_activations(unet)
    recomputed = gradients()
    assert len(calls) - once == 2 * once  # each block again in the backward pass
    for one, other in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(one, other)
