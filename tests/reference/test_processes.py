"""Several processes, and processes that are killed: the losses are those of one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ldm_reference.train import train

from tests.tiny_recipe import CONFIG
from tests.training import TEXT_STAGE, Losses, config_from, weights

ROOT = Path(__file__).parents[2]
RECIPE = CONFIG.replace("dropout = 0.1\n", "\n").replace("batch_size = 5", "batch_size = 4") + TEXT_STAGE
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from ldm_reference.train import train
from ldm_reference.train_config import TrainConfig

data, output, config, die_at = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
losses = {}

def progress(name, done, steps, loss):
    losses[f"{name} {done}"] = loss
    with open(output.with_suffix(".losses"), "a") as file:
        print(json.dumps([name, done, loss]), file=file, flush=True)
    if f"{name} {done}" == die_at:
        os.kill(os.getpid(), 9)

train(TrainConfig.read(config), data, output, resume=output.exists(), progress=progress)
"""


def launch(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'reference'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def losses_of(output: Path) -> dict[tuple[str, int], float]:
    lines = output.with_suffix(".losses").read_text().splitlines()
    return {(name, done): loss for name, done, loss in map(json.loads, lines)}


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """One process that runs through, on one thread as :func:`launch` has it: sums in another order round otherwise."""
    folder, losses = tmp_path_factory.mktemp("alone"), Losses()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config_from(RECIPE, folder), pictures, folder / "out", resume=False, progress=losses)
    finally:
        torch.set_num_threads(threads)
    return folder / "out", losses


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_give_the_losses_of_one(
    tmp_path: Path, pictures: Path, alone: tuple[Path, Losses], sharded: bool
) -> None:
    """All three stages, the contrastive one across processes, on processors (gloo), with the global batch of one."""
    config_from(f"sharded = {str(sharded).lower()}\n{RECIPE}", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "out"
    ran = launch(tmp_path / "program.py", pictures, out, tmp_path / "config.toml", "", processes=2)
    assert ran.returncode == 0, ran.stderr[-2000:]
    folder, losses = alone
    assert losses_of(out) == pytest.approx(losses.of, abs=1e-4)
    given, expected = weights(out), weights(folder)
    assert given.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(given[key], tensor, rtol=2e-3, atol=2e-4, msg=key)  # saved as fp16


def test_resuming_after_kill_9_repeats_the_uninterrupted_losses(
    tmp_path: Path, pictures: Path, alone: tuple[Path, Losses]
) -> None:
    """Killed in every stage, between two states; the steps after the last state are made again, alike."""
    config_from(RECIPE.replace("warmup_steps = 3", "warmup_steps = 3\nsave_every = 2"), tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "out"
    for die_at in ("autoencoder 5", "denoiser 3", ""):
        ran = launch(tmp_path / "program.py", pictures, out, tmp_path / "config.toml", die_at)
        assert ran.returncode == (-signal.SIGKILL if die_at else 0), ran.stderr[-2000:]
        assert (out / "model_index.json").exists() == (not die_at)
    folder, losses = alone
    assert losses_of(out) == losses.of
    repeated = [line for line in out.with_suffix(".losses").read_text().splitlines() if '["autoencoder", 5,' in line]
    assert len(repeated) == 2
    given, expected = weights(out), weights(folder)
    assert all(torch.equal(given[key], tensor) for key, tensor in expected.items())


def test_a_batch_that_the_processes_cannot_share(tmp_path: Path, pictures: Path) -> None:
    config_from(RECIPE.replace("batch_size = 4", "batch_size = 5", 1), tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    ran = launch(tmp_path / "program.py", pictures, tmp_path / "out", tmp_path / "config.toml", "", processes=2)
    assert ran.returncode != 0
    assert "batch_size = 5 cannot be cut into 2 equal parts (2 processes x gradient_accumulation 1)" in ran.stderr
    assert not (tmp_path / "out").exists()
