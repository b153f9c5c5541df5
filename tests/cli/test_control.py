"""``--controlnet`` and ``--control``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.cli.control import controls_from
from ldm_export.pictures.files import read_picture_file
from ldm_export.pictures.text import requests_from
from tests.bundle_fixture import perturb
from tests.runtime.test_ip_adapter import write_adapter


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def canny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ControlNet."""
    folder = tmp_path_factory.mktemp("nets") / "canny"
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")
    names = inspect.signature(diffusers.ControlNetModel.__init__).parameters.keys() & unet.config.keys()
    config = {name: unet.config[name] for name in names}
    perturb(diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "edges, scale=2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def bundle(canny: Path, tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "controlled"
    done = ran("export", tiny_checkpoint, "-o", folder, "--controlnet", canny, "--target", "none")
    assert done.exit_code == 0, done.output
    return folder


def test_a_bundle_with_a_controlnet(bundle: Path, canny: Path, tiny_checkpoint: Path, edges: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.roles.controls == {"canny": "controlnet"}
    assert "controlnet" in opened.manifest.source["sha256"]
    assert "controlnet" in ran("inspect", bundle).output
    done = ran("verify", bundle, "--against", tiny_checkpoint, "--controlnet", canny, "--json")
    assert done.exit_code == 0, done.output
    assert {"controlnet", "unet"} <= {record["graph"] for record in json.loads(done.stdout)["parity"]}
    done = ran("verify", bundle, "--against", tiny_checkpoint)
    assert done.exit_code == 2
    assert "--controlnet canny=FOLDER" in " ".join(done.output.split())


def test_pictures_say_what_controlled_them(bundle: Path, edges: Path, tmp_path: Path) -> None:
    options = ["--steps", 4, "-o", tmp_path / "a.png", "--control", f"canny={edges},scale=0.8,end=0.6"]
    assert (done := ran("generate", bundle, "a red circle", *options)).exit_code == 0, done.output
    text = read_picture_file(tmp_path / "a.png").parameters or ""
    assert 'ControlNet 0: "Model: canny, Weight: 0.8, Guidance Start: 0, Guidance End: 0.6, Image hash: ' in text
    (request,) = requests_from(text)
    assert request.controls is not None
    assert (request.height, request.width) == (16, 24)
    into = ["--steps", 4, "-o", f"{tmp_path}/many/", "--control"]
    for control, drawn in ((f"canny={edges}", 1), (f"canny={edges}", 0)):
        done = ran("generate", bundle, "a red circle", *into, control, "--json")
        assert done.exit_code == 0, done.output
        assert len(json.loads(done.stdout)["drawn"]) == drawn
    assert "not the picture that was asked for" in " ".join(
        ran("generate", bundle, "a red circle", *into, f"canny={edges},scale=0.5").output.split()
    )


def test_controls_from_text(edges: Path) -> None:
    found = controls_from((f"canny={edges},end=0.5,scale=2", f"depth={edges}"))
    assert [(name, control.scale, control.start, control.end) for name, control in found.items()] == [
        ("canny", 2.0, 0.0, 0.5),
        ("depth", 1.0, 0.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("edges.png", "is none; give NAME=PICTURE"),
        ("canny=", "is none; give NAME=PICTURE"),
        ("canny={edges},scale=much", "scale is 'much', which is no number"),
        ("canny={edges},scale=nan", "scale of canny is nan; give a number from 0"),
        ("canny=none.png", "none.png"),
        ("pose={edges}", "this bundle has canny. Use one of them."),
    ],
)
def test_controls_that_are_none(bundle: Path, edges: Path, tmp_path: Path, control: str, message: str) -> None:
    given = control.replace("{edges}", str(edges))
    done = ran("generate", bundle, "a red circle", "-o", tmp_path / "a.png", "--control", given)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "a.png").exists()


def test_an_ip_adapter(tiny_checkpoint: Path, traced_once: None, edges: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")
    adapter = write_adapter(tmp_path, unet, "plain")
    encoder = (tmp_path / "image_encoder").rename(tmp_path / "elsewhere")
    given = ["--ip-adapter", adapter, "--image-encoder", encoder]
    bundle = tmp_path / "bundle"
    done = ran("export", tiny_checkpoint, "-o", bundle, *given, "--target", "none")
    assert done.exit_code == 0, done.output
    assert "image_encoder" in Bundle.open(bundle).manifest.source["sha256"]
    done = ran("verify", bundle, "--against", tiny_checkpoint, *given)
    assert done.exit_code == 0, done.output
    done = ran("verify", bundle, "--against", tiny_checkpoint)
    assert "--ip-adapter FILE" in " ".join(done.output.split())
    drawn = ["generate", bundle, "a red circle", "--steps", 4, "-o", tmp_path / "a.png"]
    assert (done := ran(*drawn, "--ip-adapter-image", f"{edges}=0.6")).exit_code == 0, done.output
    text = read_picture_file(tmp_path / "a.png").parameters or ""
    assert 'IP-Adapter: "Weight: 0.6, Image hash: ' in text
    (request,) = requests_from(text)
    assert request.ip_adapter is not None
    done = ran(*drawn, "--ip-adapter-image", f"{edges}=much")
    assert done.exit_code == 2
    assert "'much' is no number. Give PICTURE=SCALE" in " ".join(done.output.split())
    done = ran("export", tiny_checkpoint, "-o", tmp_path / "other", "--image-encoder", encoder)
    assert "--image-encoder was given without --ip-adapter" in " ".join(done.output.split())
    done = ran("export", tiny_checkpoint, "-o", tmp_path / "other", *given, "--recipe", "cpu-fast")
    assert "--ip-adapter was given with --recipe" in " ".join(done.output.split())
