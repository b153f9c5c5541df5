"""What the teacher makes for a recipe: two folders of pictures, and the inputs of every graph over whole drawings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.contract import check_inputs
from ldm_export.recipe.pictures import GALLERY_SEED, REFERENCE_SEED, draw_gallery
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import open_backend
from ldm_export.verify.calibration import (
    CALIBRATION_PICTURES,
    RecordingBackend,
    calibration_calls,
    calibration_conditions,
)
from ldm_export.verify.image_text_alignment import open_pictures
from tests.bundle_fixture import CLASSES
from tests.recipe.tiny import PROMPTS, files_of

STEPS = 20
Kinds = Callable[[str], tuple[Path, Path]]


def quiet(what: str, done: int, of: int) -> None:
    pass


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the gallery ----------------------------------------------------------------------------------------------------


def test_two_folders_of_captioned_pictures(tiny_bundle: Path, tmp_path: Path) -> None:
    folders = draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 4, tmp_path, quiet)
    assert folders == (tmp_path / "gallery", tmp_path / "reference")
    told = [[line["text"] for line in lines_of(folder)] for folder in folders]
    assert len(set(told[0] + told[1])) == 8  # there are enough prompts for all to differ
    assert set(told[0] + told[1]) <= set(PROMPTS)
    pictures = open_pictures(folders[0], 16, 3, "text")
    assert pictures.images.shape == (4, 16, 16, 3)
    assert [said for _, said in pictures.conditions] == told[0]


@pytest.mark.parametrize(("name", "seed"), [("gallery", GALLERY_SEED), ("reference", REFERENCE_SEED)])
def test_a_picture_is_what_its_caption_and_seed_give(tiny_bundle: Path, tmp_path: Path, name: str, seed: int) -> None:
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 3, tmp_path, quiet)
    line = lines_of(tmp_path / name)[2]
    expected = Pipeline.open(tiny_bundle).generate(line["text"], seed=seed + 2).images[0]
    given = np.asarray(Image.open(tmp_path / name / line["file_name"]))
    assert np.abs(given.astype(int) - expected).max() <= 1  # drawn three at a time


def test_few_prompts_come_again_with_other_seeds(tiny_bundle: Path, tmp_path: Path) -> None:
    folders = draw_gallery(Bundle.open(tiny_bundle), ["red", "blue"], 3, tmp_path, quiet)
    files = [file.read_bytes() for folder in folders for file in folder.glob("*.png")]
    assert len(set(files)) == 6
    assert {line["text"] for line in lines_of(folders[0])} == {"red", "blue"}


def test_what_is_there_is_not_drawn_again(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 3, tmp_path, quiet)
    before = files_of(tmp_path)
    monkeypatch.setattr(Pipeline, "generate", None)
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 3, tmp_path, quiet)
    assert files_of(tmp_path) == before


def test_another_drawing_takes_the_place_of_what_is_there(tiny_bundle: Path, kinds: Kinds, tmp_path: Path) -> None:
    """Pictures of another model, or fewer than are asked for, are nothing to judge by."""
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 2, tmp_path / "same", quiet)
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 3, tmp_path / "new", quiet)
    draw_gallery(Bundle.open(tiny_bundle), PROMPTS, 3, tmp_path / "same", quiet)
    assert files_of(tmp_path / "same") == files_of(tmp_path / "new")
    draw_gallery(Bundle.open(kinds("unconditional")[1]), [], 3, tmp_path / "same", quiet)
    changed, before = files_of(tmp_path / "same"), files_of(tmp_path / "new")
    assert changed.keys() == before.keys()
    assert not any(changed[name] == before[name] for name in changed if name.endswith(".png"))


def test_an_interrupted_gallery_is_drawn_whole(tiny_bundle: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, of: int) -> None:
        if what.endswith("reference") and done:
            raise KeyboardInterrupt

    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(KeyboardInterrupt):
        draw_gallery(bundle, PROMPTS, 9, tmp_path / "interrupted", interrupt)
    assert not (tmp_path / "interrupted" / "reference" / "metadata.jsonl").exists()
    for folder in ("interrupted", "whole"):
        draw_gallery(bundle, PROMPTS, 9, tmp_path / folder, quiet)
    assert files_of(tmp_path / "interrupted") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "told", "keys"),
    [
        ("class-conditional", list(range(CLASSES)), {"file_name", "label"}),
        ("unconditional", [], {"file_name"}),
    ],
)
def test_models_without_text(kinds: Kinds, tmp_path: Path, kind: str, told: list[int], keys: set[str]) -> None:
    folders = draw_gallery(Bundle.open(kinds(kind)[1]), told, 6, tmp_path, quiet)
    lines = lines_of(folders[0])
    assert all(line.keys() == keys for line in lines)
    assert len({(folders[0] / line["file_name"]).read_bytes() for line in lines}) == 6
    if told:
        assert {line["label"] for line in lines} == set(told)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_is_of_a_few_prompts_the_same_each_time() -> None:
    told = [f"prompt {number}" for number in range(100)]
    chosen = calibration_conditions(told)
    assert len(set(chosen)) == CALIBRATION_PICTURES
    assert set(chosen) <= set(told)
    assert chosen == calibration_conditions(told)
    assert sorted(calibration_conditions(told[:3])) == told[:3]
    assert calibration_conditions([]) == []


def test_calls_of_every_graph_over_whole_drawings(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    calls = calibration_calls(bundle, calibration_conditions(PROMPTS))
    assert calls.keys() == bundle.manifest.graphs.keys()
    for name, graph in bundle.manifest.graphs.items():
        for call in calls[name]:
            check_inputs(graph, call)
    counts = {name: len(calls[name]) for name in ("unet", "vae_decoder", "vae_encoder")}
    pictures = CALIBRATION_PICTURES  # decoded once as they are drawn, once when they are encoded again
    assert counts == {"unet": pictures * STEPS, "vae_decoder": 2 * pictures, "vae_encoder": pictures}
    timesteps = [float(call["timestep"][0]) for call in calls["unet"][:STEPS]]
    assert timesteps == sorted(timesteps, reverse=True)
    assert len(set(timesteps)) == STEPS
    samples = {call["sample"].tobytes() for call in calls["unet"]}
    assert len(samples) == pictures * STEPS  # copies, though the pipeline writes into one buffer


@pytest.mark.parametrize(("kind", "told"), [("class-conditional", [0, 3]), ("unconditional", [])])
def test_calls_of_models_without_text(kinds: Kinds, kind: str, told: list[int]) -> None:
    calls = calibration_calls(Bundle.open(kinds(kind)[1]), told)
    assert len(calls["unet"]) == CALIBRATION_PICTURES * STEPS
    labels = {int(label) for call in calls["unet"] for label in call.get("class_labels", [])}
    assert labels == set(told)


def test_recording_changes_no_picture(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    backend = RecordingBackend(open_backend(bundle, "cpu", None))
    recorded = Pipeline(bundle, backend).generate("red", steps=10)
    plain = Pipeline(bundle, "cpu").generate("red", steps=10)
    np.testing.assert_array_equal(recorded.latents, plain.latents)
    assert recorded.backend == plain.backend
    assert {name: len(calls) for name, calls in backend.calls.items()} == {
        "unet": 10,
        "vae_decoder": 1,
        "text_encoder": 2,
    }
