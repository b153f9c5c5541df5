"""The quality report: a checkpoint and its bundle score alike, a broken model worse, bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from ldm_reference.train import train
from PIL import Image

from ldm_export.cli.main import main
from ldm_export.errors import InputError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.verify import quality
from ldm_export.verify.image_generators import SamplingSettings, open_image_generator
from ldm_export.verify.image_text_alignment import features_of, open_pictures
from ldm_export.verify.quality import choose_prompts, evaluate, open_judge
from tests.bundle_fixture import CLASSES
from tests.tiny_recipe import CONFIG
from tests.training import TEXT_STAGE, Losses, config_from, write_pictures

SETTINGS = SamplingSettings(prompts=10, steps=10, batch=4, seed=3)
FIGURES = {
    *("reconstruction_psnr_db", "reconstruction_ssim", "frechet_distance", "kernel_distance"),
    *("retrieval_at_1", "retrieval_at_5", "alignment", "alignment_with_another_prompt", "nearest_training_picture"),
    "nearer_than_95_percent_of_held_out",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(
        config_from(CONFIG.replace("max_length = 8", "max_length = 16") + TEXT_STAGE, folder),
        data,
        folder / "tiny",
        resume=False,
        progress=Losses(),
    )
    return folder / "tiny"


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_bundle(open_checkpoint(checkpoint), checkpoint.parent / "bundle").path


def measured(target: Path, data: Path, held_out: Path | None = None, judge: Path | None = None) -> dict[str, float]:
    found = open_judge(str(target), str(judge) if judge else None)
    report = evaluate(open_image_generator(str(target)), data, held_out, SETTINGS, found, lambda what, done, of: None)
    return {name: figure.value for name, figure in report.figures.items()}


def test_a_checkpoint_and_its_bundle_score_alike(checkpoint: Path, bundle: Path, data: Path) -> None:
    torch_figures = measured(checkpoint, data, data)
    assert torch_figures.keys() == FIGURES
    assert measured(bundle, data, data, judge=checkpoint) == pytest.approx(torch_figures, rel=1e-2, abs=2e-3)


def test_a_broken_decoder_scores_worse(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    torch.manual_seed(0)
    for key in weights:
        if key.startswith("decoder.conv_out"):
            weights[key] = torch.randn_like(weights[key])
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    good, bad = measured(checkpoint, data), measured(broken, data)
    assert bad["reconstruction_psnr_db"] < good["reconstruction_psnr_db"]
    assert bad["reconstruction_ssim"] < good["reconstruction_ssim"]


def test_real_pictures_are_recalled_and_aligned_best(checkpoint: Path, data: Path) -> None:
    """Painted by a cheat that shows the training picture of each prompt."""
    image_generator = open_image_generator(str(checkpoint))
    pictures = open_pictures(data, 16, 3, "text")
    by_caption = {said: pictures.images[index] for index, said in pictures.conditions}
    image_generator.draw = lambda conditions, seeds, settings: np.stack([by_caption[said] for said in conditions])  # type: ignore[method-assign]
    judge = open_judge(str(checkpoint), None)
    report = evaluate(image_generator, data, data, SETTINGS, judge, lambda what, done, of: None)
    figures = report.figures
    assert figures["retrieval_at_1"].value == figures["retrieval_at_5"].value == 1.0
    assert figures["nearest_training_picture"].value == pytest.approx(0.0, abs=1e-6)
    assert figures["nearer_than_95_percent_of_held_out"].value == 1.0
    assert report.judge == "tiny"
    assert report.counts == {"drawn": 10, "training": 12, "reference": 12}
    assert figures["alignment"].value == pytest.approx(report.floors["alignment"].value)
    assert figures["alignment"].value > figures["alignment_with_another_prompt"].value
    for name, figure in (*figures.items(), *report.floors.items()):
        assert figure.low <= figure.value <= figure.high, name


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional"])
def test_models_without_text(kinds: Callable[[str], tuple[Path, Path]], data: Path, tmp_path: Path, kind: str) -> None:
    """Checkpoint and bundle score alike; there is no alignment, and without classes no retrieval."""
    labelled = [
        {"file_name": name, "label": k % CLASSES} for k, name in enumerate(sorted(f.name for f in data.glob("*.png")))
    ]
    pictures = shutil.copytree(data, tmp_path / "data")
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    in_torch, in_bundle = (measured(target, pictures, pictures) for target in kinds(kind))
    missing = {"alignment", "alignment_with_another_prompt"}
    if kind == "unconditional":
        missing |= {"retrieval_at_1", "retrieval_at_5"}
    assert in_torch.keys() == FIGURES - missing
    assert in_bundle == pytest.approx(in_torch, rel=1e-2, abs=2e-3)
    (pictures / "metadata.jsonl").write_text(
        "".join(json.dumps({**line, "label": CLASSES}) + "\n" for line in labelled)
    )
    if kind == "class-conditional":
        for target in kinds(kind):
            with pytest.raises(InputError, match=rf"class label {CLASSES} is none; this model has 0 to {CLASSES - 1}"):
                measured(target, pictures)


def test_copies_are_counted(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Of ten pictures three are copies, which a median does not show; those held out are like nothing in the data."""
    draw = np.random.default_rng(0)
    lines = []
    for number in range(10):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "noise"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    image_generator = open_image_generator(str(checkpoint))
    copies, noise = open_pictures(data, 16, 3, "text").images, draw.integers(0, 256, (10, 16, 16, 3), np.uint8)
    drawn = iter([*copies[:3], *noise[3:]])
    image_generator.draw = lambda conditions, seeds, settings: np.stack([next(drawn) for _ in seeds])  # type: ignore[method-assign]
    report = evaluate(image_generator, data, tmp_path, SETTINGS, None, lambda what, done, of: None)
    assert 0.3 <= report.figures["nearer_than_95_percent_of_held_out"].value <= 0.5
    assert report.floors["nearer_than_95_percent_of_held_out"].value == 0.1  # of ten, the 5th percentile is below one
    assert report.figures["nearest_training_picture"].value > 0.1


def test_a_large_held_out_set_is_drawn_from(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MOST", 11)
    report = evaluate(open_image_generator(str(checkpoint)), data, data, SETTINGS, None, lambda what, done, of: None)
    assert report.counts["reference"] == 11
    assert "Of the 12 pictures to compare with, 11 were drawn and used." in report.notes


def test_prompts_are_of_different_pictures_and_of_the_seed(data: Path) -> None:
    pictures = open_pictures(data, 16, 3, "text")
    chosen = choose_prompts(pictures, SETTINGS, "text")
    assert len({picture for picture, _ in chosen}) == 10
    assert set(chosen) <= set(pictures.conditions)
    assert choose_prompts(pictures, SETTINGS, "text") == chosen
    assert choose_prompts(pictures, SamplingSettings(prompts=10, seed=4), "text") != chosen


def test_features_do_not_depend_on_the_chunk(data: Path) -> None:
    images = open_pictures(data, 16, 3, None).images
    many = features_of(np.concatenate([images] * 6))
    assert many.shape == (72, 1280)
    np.testing.assert_allclose(many[60:], features_of(images), rtol=1e-4, atol=1e-4)


def test_a_bundle_of_an_unknown_checkpoint_has_no_judge(bundle: Path) -> None:
    assert open_judge(str(bundle), None) is None


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command(bundle: Path, data: Path, tmp_path: Path) -> None:
    few = ("--prompts", "10", "--steps", "10")
    options = ("--held-out", data, "-o", tmp_path / "result.json", "--pictures", tmp_path / "grid.png", "--json")
    code, output = run(bundle, "--data", data, *few, *options)
    assert code == 0, output
    document = json.loads(output)
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert document["pictures"] == {"drawn": 10, "training": 12, "reference": 12}
    assert document["judge"] is None
    assert document["figures"].keys() == {name for name in FIGURES if not name.startswith("alignment")}
    assert "not Inception FID" in document["features"]
    assert any("alignment is left out" in note for note in document["notes"])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (4 * 16, 3 * 16)
    code, output = run(bundle, "--data", data, *few)
    assert code == 0, output
    assert "Retrieval R@5" in output
    assert "10 drawn, 12 training, 12 reference" in output
    assert "No held-out pictures were given" in output
    code, output = run(bundle, "--data", data, *few[:2], "--steps", "1011")
    assert code == 2
    assert "This bundle has no plan for 'ddim' with 1011 steps" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--prompts", "13"), "13 prompts are asked for and the data has 12 pictures; ask for fewer."),
        (("--prompts", "9"), "9 prompts are too few to measure anything; use at least 10."),
        (("--prompts", "10", "--held-out", "EMPTY"), "has no metadata.jsonl"),
        (("--prompts", "10", "--sampler", "best"), "sampler 'best' is not known; known are"),
        (("--prompts", "10", "--judge", "NONE"), "There is no checkpoint"),
        (("--prompts", "10", "--held-out", "NONE"), "has no metadata.jsonl"),
        (("--prompts", "10", "--held-out", "FEW"), "2 held-out pictures are too few to measure anything"),
        (("--prompts", "10", "-o", "EMPTY"), "cannot be written: it is a folder"),
        (("--prompts", "10", "-o", "UNDER_A_FILE"), "cannot be written (Not a directory). Name another file."),
    ],
)
def test_bad_input_is_one_sentence(
    checkpoint: Path, data: Path, tmp_path: Path, changes: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "few").mkdir()
    for name in ("red-square.png", "red-bar.png"):
        shutil.copy(data / name, tmp_path / "few")
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few" / "metadata.jsonl").write_text("".join(line for line in lines if '"red-' in line))
    places = {"EMPTY": str(tmp_path), "NONE": str(tmp_path / "none"), "FEW": str(tmp_path / "few")}
    places["UNDER_A_FILE"] = str(data / "metadata.jsonl" / "below" / "result.json")
    code, output = run(checkpoint, "--data", data, *(places.get(change, change) for change in changes))
    assert code == 2
    assert sentence in output
    assert output.count("\n") == 1


def test_a_damaged_judge(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "alignment" / "model.safetensors").write_bytes(b"no")
    code, output = run(damaged, "--data", data, "--prompts", "10")
    assert code == 2
    assert "alignment is damaged (" in output
    with pytest.raises(InputError):
        open_pictures(tmp_path / "none", 16, 3, "text")
