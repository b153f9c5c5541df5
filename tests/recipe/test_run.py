"""A recipe from end to end: stages, their records, and runs that go on where they were interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import folder as checkpoints
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.passes.distill_decoder import DistillDecoder
from ldm_export.passes.distill_guidance import DistillGuidance
from ldm_export.passes.teacher import TeacherData
from ldm_export.recipe import run_recipe, score
from ldm_export.runtime import Pipeline
from ldm_export.verify.image_generators import BundleImageGenerator
from ldm_export.verify.image_text_alignment import features_of, open_pictures
from ldm_export.verify.metrics import frechet_distance
from ldm_export.verify.quality import evaluate
from tests.recipe.conftest import Make
from tests.recipe.tiny import DECODER, GUIDANCE, WEIGHTS, Interrupt, files_of, judge_cheaply, plain, recipe_of
from tests.training import write_pictures

ALL = GUIDANCE + DECODER + WEIGHTS


@pytest.fixture(scope="module")
def whole(
    tiny_checkpoint: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with the work folder and the bundle of a recipe of three passes, and its records. Read-only."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(begun, folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        judge_cheaply(patch)
        _, records = run_recipe(
            open_checkpoint(tiny_checkpoint), recipe_of(folder, ALL), folder / "bundle", folder / "work"
        )
    return folder, records


def fail(*_: object, **__: object) -> None:
    raise AssertionError("this was done before")


def latest(work: Path, name: str) -> Path:
    """The folder of a pass."""
    (folder,) = work.glob(f"*-{name}-*")
    return folder


def decoder_of(work: Path) -> dict[str, bytes]:
    return files_of(latest(work, "distill-decoder") / "checkpoint" / "vae")


# --- what a recipe gives --------------------------------------------------------------------------------------------


def test_the_bundle_is_drawn_as_the_passes_left_it(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = whole
    bundle = Bundle.open(folder / "bundle", verify=True)
    model = bundle.manifest.model
    assert (model["default_sampler"], model["default_steps"], bundle.roles.guidance.scale) == ("ddim", 2, 4.0)
    assert bundle.roles.guidance.kind == "none"
    drawn = Pipeline(bundle).generate("a red circle", seed=3)
    assert drawn.images.shape == (1, 16, 16, 3)
    assert len(drawn.timings.denoiser_ms) == 2
    assert all(record["passed"] for record in bundle.manifest.parity)


def test_the_manifest_holds_the_records(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = whole
    assert [record["name"] for record in records] == [
        "teacher",
        "distill-guidance",
        "distill-decoder",
        "quantize-weights",
    ]
    assert list(Bundle.open(folder / "bundle").manifest.passes) == plain(records)
    teacher, *passes = records
    assert teacher.keys() == {"name", "options", "key", "judged_on", "kept", "score"}
    expected = {"name", "options", "key", "judged_on", "kept", "faster", "seconds", "report", "score"}
    assert all(record.keys() == expected for record in passes)
    assert len({record["key"] for record in records}) == len(records)
    assert all(record["kept"] for record in records)
    assert passes[0]["report"] == {"calls_a_step": {"before": 2, "after": 1}}
    sizes = passes[1]["report"]["parameters"]
    assert sizes["after"] < sizes["before"] / 10
    assert passes[2]["options"]["smallest"] == 64


def test_scores_follow_the_stages(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    """Each stage is measured on its own bundle, and timed against the stage before."""
    folder, records = whole
    stages = [Bundle.open(path / "bundle") for path in sorted((folder / "work").glob("0*"))]
    assert [record["score"]["bytes"] for record in records] == [stage.size_bytes for stage in stages]
    totals = [record["score"]["latency"]["total_ms"] for record in records]
    for number, record in enumerate(records[1:], 1):
        assert record["faster"] == pytest.approx(totals[number - 1] / totals[number])
        assert record["faster"] > 1
        assert record["score"]["psnr_to_teacher_db"] < 100
    assert records[0]["score"]["psnr_to_teacher_db"] is None


def test_every_stage_is_a_bundle_and_trained_ones_are_checkpoints(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = whole
    for number, name in enumerate(("distill-guidance", "distill-decoder"), 1):
        stage = latest(folder / "work", name)
        checkpoint = open_checkpoint(stage / "checkpoint")
        assert checkpoint.passes == plain(records[: number + 1])
        assert checkpoint.drawing.guidance_distilled
        source = Bundle.open(stage / "bundle").manifest.source["sha256"]
        assert source == {component: checkpoint.sha256(component) for component in checkpoint.components}
        assert json.loads((stage / "stage.json").read_text(encoding="utf-8")) == plain(records[number])
        assert np.load(stage / "pictures.npy").shape == (10, 16, 16, 3)
    assert not (latest(folder / "work", "quantize-weights") / "checkpoint").exists()


@pytest.mark.slow
def test_students_may_learn_from_pictures(
    make: Make, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``latents_from = "data"`` the teacher draws nothing, and the latents are those that its encoder makes."""
    seen: list[TeacherData] = []
    apply = DistillGuidance.apply
    monkeypatch.setattr(DistillGuidance, "apply", lambda self, to: (seen.append(to.data), apply(self, to))[1])
    (tmp_path / "data").mkdir()
    pictures, told = write_pictures(tmp_path / "data"), Interrupt()
    teacher = 'steps = 2\nlatents_from = "data"'
    _, records = make(GUIDANCE, teacher=teacher, data=pictures, progress=told)
    assert records[1]["kept"]
    assert not told.heard("teacher draws")
    (data,) = seen
    assert data.latents.shape == (13, 4, 8, 8)  # a row a caption: the first picture has two
    torch.testing.assert_close(data.latents[0], data.latents[1])
    vae = open_checkpoint(tiny_checkpoint).load("vae")
    image = torch.from_numpy(np.asarray(Image.open(pictures / "blue-bar.png"), np.float32)) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(image.permute(2, 0, 1)[None]).chunk(2, dim=1)[0] * vae.config.scaling_factor
    torch.testing.assert_close(data.latents[6:7], mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"latents_from = \"data\", and no pictures were given; add --data FOLDER"):
        make(GUIDANCE, teacher=teacher)


@pytest.mark.slow
def test_weights_that_are_zero_stay_though_nothing_is_faster(make: Make) -> None:
    """What is for zeros is undone neither for its speed nor for its size."""
    passes = '[[pass]]\nname = "prune-weights"\nratio = 0.5\nupdates = 2\nbatch_size = 4\n'
    bundle, records = make(passes)
    assert records[1]["kept"]
    assert records[1]["faster"] == pytest.approx(1.0, abs=0.01)
    weights = onnx.load(str(bundle.path / "unet" / "model.onnx")).graph.initializer
    kernels = [onnx.numpy_helper.to_array(tensor) for tensor in weights if len(tensor.dims) in (2, 4)]
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
    assert 0.4 < zeros / sum(kernel.size for kernel in kernels) < 0.55


def test_a_whole_recipe_with_the_real_judge(tiny_checkpoint: Path, begun: Path, tmp_path: Path) -> None:
    """Nothing replaced: EfficientNet's features, and wall-clock times."""
    recipe = recipe_of(tmp_path, WEIGHTS)
    told = Interrupt()
    bundle, records = run_recipe(
        open_checkpoint(tiny_checkpoint), recipe, tmp_path / "bundle", tmp_path / "work", progress=told
    )
    teacher, quantized = records
    assert told.heard("features of drawn pictures")
    assert quantized["kept"], quantized
    assert quantized["score"]["bytes"] < teacher["score"]["bytes"] / 2
    assert quantized["score"]["psnr_to_teacher_db"] > 20
    folders = [tmp_path / "work" / "pictures" / name for name in ("gallery", "reference")]
    reference = features_of(open_pictures(folders[1], 16, 3, "text").images)
    drawn = np.load(tmp_path / "work" / "00-teacher" / "pictures.npy")
    distance = frechet_distance(features_of(drawn), reference)
    assert teacher["score"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    image_generator = BundleImageGenerator(bundle, "cpu")
    settings = replace(image_generator.defaults, prompts=recipe.budget.pictures)
    images = evaluate(image_generator, *folders, settings, None, lambda what, done, of: None).images
    distance = frechet_distance(features_of(images), reference)
    assert quantized["score"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert all(record["score"]["latency"]["denoiser_ms"] > 0 for record in records)
    assert b"DequantizeLinear" in (bundle.path / "unet" / "model.onnx").read_bytes()


# --- again ----------------------------------------------------------------------------------------------------------


def test_a_second_run_repeats_nothing(
    tiny_checkpoint: Path,
    whole: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, records = whole
    times = {file: file.stat().st_mtime_ns for file in (folder / "work").rglob("*")}
    for kind in (DistillGuidance, DistillDecoder, QuantizeWeights):
        monkeypatch.setattr(kind, "apply", fail)
    monkeypatch.setattr(score, "evaluate", fail)
    told = Interrupt()
    bundle, again = run_recipe(
        open_checkpoint(tiny_checkpoint),
        recipe_of(tmp_path, ALL),
        tmp_path / "bundle",
        folder / "work",
        progress=told,
    )
    assert again == plain(records)
    assert told.told == []
    assert {file: file.stat().st_mtime_ns for file in (folder / "work").rglob("*")} == times
    assert files_of(bundle.path) == files_of(folder / "bundle")


def test_other_options_begin_anew(make: Make, work: Path) -> None:
    _, first = make(DECODER)
    before = decoder_of(work)
    _, second = make(DECODER.replace("width = 4", "width = 5"))
    assert first[0] == second[0]
    assert first[1]["key"] != second[1]["key"]
    assert first[1]["report"] != second[1]["report"]
    folders = sorted(work.glob("01-distill-decoder-*"))
    assert len(folders) == 2
    (old,) = (folder for folder in folders if folder.name.endswith(first[1]["key"][:8]))
    assert files_of(old / "checkpoint" / "vae") == before  # and the first ones are there again for the asking


def test_a_pass_put_first_changes_the_keys_of_those_behind(make: Make, work: Path) -> None:
    _, alone = make(WEIGHTS)
    _, behind = make(DECODER + WEIGHTS)
    assert alone[1]["name"] == behind[2]["name"] == "quantize-weights"
    assert alone[1]["key"] != behind[2]["key"]
    assert len(list(work.glob("*-quantize-weights-*"))) == 2


def test_another_teacher_is_judged_anew(make: Make, work: Path) -> None:
    _, first = make(WEIGHTS)
    drawn = files_of(work / "pictures")
    bundle, second = make(WEIGHTS, teacher="steps = 3")
    assert first[0]["key"] != second[0]["key"]
    assert second[0]["score"]["steps"] == 3
    assert bundle.manifest.model["default_steps"] == 3
    assert files_of(work / "pictures") != drawn  # and by its own pictures


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("saved_often")
def test_an_interrupted_training_gives_the_same_weights(make: Make, begun: Path, tmp_path: Path) -> None:
    works = [Path(shutil.copytree(begun, tmp_path / name)) for name in ("uninterrupted", "interrupted")]
    make(DECODER, work=works[0])
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, work=works[1], progress=Interrupt("distill-decoder: loss", 3))
    told = Interrupt()
    _, records = make(DECODER, work=works[1], progress=told)
    steps = [done for what, done in told.told if what.startswith("distill-decoder: loss")]
    assert steps == [3, 4, 5, 6]  # from the state of step 2 on
    assert records[1]["kept"]
    assert decoder_of(works[0]) == decoder_of(works[1])


@pytest.mark.parametrize(
    "place", ["distill-decoder: unet: exporting", "drawing", "quantize-weights: unet: quantize-weights"]
)
def test_a_run_interrupted_behind_a_training_does_not_train_again(
    make: Make,
    work: Path,
    whole: tuple[Path, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(DECODER + WEIGHTS, progress=Interrupt(place))
    assert not (work.parent / "bundle").exists()
    before = decoder_of(work)
    monkeypatch.setattr(DistillDecoder, "apply", fail)
    bundle, records = make(DECODER + WEIGHTS)
    assert [record["kept"] for record in records] == [True, True, True]
    assert decoder_of(work) == before
    assert (bundle.path / "vae_decoder" / "model.onnx").stat().st_size < 20_000


def test_a_checkpoint_half_written_is_written_again(make: Make, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a pass, so that the folder that is copied has a record of passes itself."""
    second = DECODER + GUIDANCE
    with monkeypatch.context() as patch:
        saved: list[str] = []
        save = checkpoints.save_component

        def interrupted(network: Any, folder: Path) -> None:
            saved.append(folder.name)
            if len(saved) == 2:
                raise KeyboardInterrupt
            save(network, folder)

        patch.setattr(checkpoints, "save_component", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(second)
    assert saved == ["vae", "unet"]
    bundle, records = make(second)
    assert [record["kept"] for record in records] == [True, True, True]
    assert bundle.roles.guidance.kind == "none"


def test_an_interrupted_judging_of_the_teacher(tiny_checkpoint: Path, cheap_judge: None, tmp_path: Path) -> None:
    places = ("teacher: unet: exporting", "teacher draws the gallery", "reconstructing")
    for place in places:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(
                open_checkpoint(tiny_checkpoint),
                recipe_of(tmp_path, WEIGHTS),
                tmp_path / "bundle",
                tmp_path / "work",
                progress=Interrupt(place),
            )
        assert not (tmp_path / "work" / "00-teacher" / "stage.json").exists()
    told = Interrupt()
    checkpoint = open_checkpoint(tiny_checkpoint)
    run_recipe(checkpoint, recipe_of(tmp_path, WEIGHTS), tmp_path / "bundle", tmp_path / "work", progress=told)
    assert not told.heard("teacher: unet")
    assert not told.heard("teacher draws")
    assert told.heard("drawing")


def test_the_default_plan_is_the_recipe_s(make: Make, tmp_path: Path) -> None:
    bundle, _ = make(WEIGHTS + '[plan]\nsampler = "ddim-calls3"\nsteps = 6\n')
    model = bundle.manifest.model
    assert (model["default_sampler"], model["default_steps"]) == ("ddim-calls3", 6)
    assert "plans/ddim-calls3-6.json" in bundle.manifest.files
    drawn = Pipeline(bundle, "cpu").generate("a red circle", seed=1)
    assert len(drawn.timings.denoiser_ms) == 3
    with pytest.raises(InputError, match="no plan for 'magic' with 6 steps"):
        make(WEIGHTS + '[plan]\nsampler = "magic"\nsteps = 6\n')
