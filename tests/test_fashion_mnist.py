"""The data of the grey example: idx files, whole and damaged, and the recipe that goes with them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_reference import fashion_mnist
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages
from ldm_reference.fashion_mnist import CLASSES, build, main, read_idx
from ldm_reference.train import TrainConfig
from ldm_reference.unet import UNet2DConditionModel

RECIPE = Path(fashion_mnist.__file__).parent / "recipes" / "fashion_mnist.toml"
COUNTS = {"train": 12, "t10k": 5}


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def pictures_of(prefix: str) -> np.ndarray:
    count = COUNTS[prefix]
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The four files with a few pictures of noise; the label of picture k is k modulo 10."""
    folder = tmp_path / "source"
    folder.mkdir()
    for prefix, count in COUNTS.items():
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures_of(prefix))))
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_pictures_labels_and_names(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    main([str(folder), "--source", str(source)])
    assert capsys.readouterr().out == f"{folder}: 12 pictures to train on, 5 held out\n"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        data = CaptionedImages.open(folder / split, 28, 1, condition="label", classes=len(CLASSES))
        assert data.labels == tuple(k % 10 for k in range(COUNTS[prefix]))
        expected = torch.from_numpy(pictures_of(prefix))[:, None].float() / 127.5 - 1
        assert torch.equal(data.load(range(COUNTS[prefix])), expected)
    lines = (folder / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[9]) == {"file_name": "00009.png", "label": 9, "text": "ankle boot"}


def test_a_limit_takes_the_first_of_each_split(source: Path, tmp_path: Path) -> None:
    assert build(source, tmp_path / "data", limit=6) == {"train": 6, "test": 5}
    assert len(list((tmp_path / "data" / "train").glob("*.png"))) == 6


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "not gzip": (IMAGES, lambda raw: raw, "is not a readable gzip file"),
    "cut gzip": (IMAGES, lambda raw: gzip.compress(raw)[:-20], "is not a readable gzip file"),
    "bits of the gzip": (LABELS, lambda raw: gzip.compress(raw)[:-8] + bytes(8), "is not a readable gzip file"),
    "empty": (IMAGES, lambda raw: gzip.compress(b""), "begins with nothing; 00000803 and 3 sizes are needed"),
    "another array": (IMAGES, lambda raw: gzip.compress(b"\0\0\x08\1" + raw[4:]), "begins with 00000801; 00000803"),
    "another type": (LABELS, lambda raw: gzip.compress(b"\0\0\x0d\1" + raw[4:]), "begins with 00000d01; 00000801"),
    "cut header": (IMAGES, lambda raw: gzip.compress(raw[:10]), "3 sizes are needed"),
    "short": (IMAGES, lambda raw: gzip.compress(raw[:-1]), r"has 9407 bytes of data; .* 9408 \(12 x 28 x 28\)"),
    "long": (LABELS, lambda raw: gzip.compress(raw + b"\0"), r"has 6 bytes of data; its header promises 5 \(5\)"),
    "label 10": (LABELS, lambda raw: gzip.compress(raw[:-1] + b"\x0a"), "labels up to 10 .* from 0 to 9"),
    "too few labels": (LABELS, lambda raw: gzip.compress(idx(np.zeros(4, np.uint8))), "5 pictures and 4 labels"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_sentence_and_nothing_is_written(
    source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, message = DAMAGE[kind]
    (source / name).write_bytes(damage(gzip.decompress((source / name).read_bytes())))
    with pytest.raises(ConfigError, match=message):
        build(source, tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "data"), "--source", str(source)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "dataset-fashion-mnist" in error
    assert not (tmp_path / "data").exists()


def test_a_missing_source_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is missing; .* \(apt-get install dataset-fashion-mnist\), or .* --source"):
        read_idx(tmp_path / IMAGES, 3)


def test_a_limit_of_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--limit", "0"])
    assert "--limit 0 must be at least 1" in capsys.readouterr().err


def test_the_recipe_is_valid_and_fits_the_data() -> None:
    config = TrainConfig.read(RECIPE)
    assert (config.resolution, config.channels, config.classes) == (28, 1, len(CLASSES))
    assert config.unet["sample_size"] == 7  # halved to 4 and brought back to 7 within the UNet
    assert config.scheduler["prediction_type"] == "epsilon"
    with torch.device("meta"):
        assert not UNet2DConditionModel.from_config(config.unet).config.reads_text


def test_the_recipe_by_flow_matching_trains_the_same_networks() -> None:
    flow, plain = TrainConfig.read(RECIPE.with_name("fashion_mnist_flow.toml")), TrainConfig.read(RECIPE)
    assert (flow.unet, flow.vae, flow.vae_stage) == (plain.unet, plain.vae, plain.vae_stage)
    assert flow.scheduler == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    }
