"""What a recipe meets while it runs and cannot use: one sentence, and what was done so far stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_export.contract import TWO_ROWS, Guidance
from ldm_export.errors import BundleError, ExportError, InputError, LdmExportError
from ldm_export.families import open_checkpoint
from ldm_export.recipe import read_recipe, run_recipe
from tests.recipe.conftest import Make
from tests.recipe.tiny import DECODER, GUIDANCE, WEIGHTS, Interrupt, files_of, recipe_of, write_recipe
from tests.training import write_pictures

Kinds = Callable[[str], tuple[Path, Path]]
PRUNE = """
[[pass]]
name = "prune-weights"
ratio = 0.3
updates = 0
"""
STEPS = """
[[pass]]
name = "distill-steps"
updates = 1
start = 2
to = 1
"""

# --- the teacher's latents ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the latents of a recipe that was interrupted behind them. Read-only."""
    folder = tmp_path_factory.mktemp("drawn")
    work = Path(shutil.copytree(begun, folder / "work"))
    checkpoint, stop = open_checkpoint(tiny_checkpoint), Interrupt("distill-decoder: loss")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(checkpoint, recipe_of(folder, DECODER), folder / "bundle", work, progress=stop)
    (file,) = (work / "teacher").glob("latents*.safetensors")
    return file


@pytest.fixture
def latents(drawn: Path, work: Path) -> Path:
    """A copy in `work`, which a test may change."""
    (work / "teacher").mkdir()
    return Path(shutil.copy(drawn, work / "teacher"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def replace_by_text(file: Path) -> None:
    file.write_text("no latents")


def change(file: Path, key: str, value: torch.Tensor | str) -> None:
    tensors, made = load_file(file), {"made": "another teacher"} if isinstance(value, str) else None
    if isinstance(value, torch.Tensor):
        tensors = {key: value}
    save_file(tensors, file, made)


def lose_a_number(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata, values = opened.metadata(), opened.get_tensor("latents")
    values[0, 0, 0, 0] = torch.nan
    save_file({"latents": values}, file, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"latents\S*\.safetensors is damaged \(.*\)\. Delete it, and it is drawn anew\."),
        (replace_by_text, r"latents\S*\.safetensors is damaged \(.*\)\. Delete it, and it is drawn anew\."),
        (
            lambda file: change(file, "latents", "x"),
            r"latents\S*\.safetensors was drawn by another teacher or another recipe\. Use another --work folder\.",
        ),
        (
            lambda file: change(file, "other", torch.zeros(1)),
            r"latents\S*\.safetensors is damaged \(.*\)\. Delete it",
        ),
        (
            lose_a_number,
            r"latents\S*\.safetensors holds values that are no numbers\. Delete it, and it is drawn anew\.",
        ),
    ],
    ids=["cut off", "text", "another teacher", "another file", "NaN"],
)
def test_damaged_latents_are_refused(make: Make, latents: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(latents)
    with pytest.raises(InputError, match=message) as raised:
        make(DECODER)
    assert "\n" not in str(raised.value)


def test_latents_that_were_deleted_are_drawn_anew(make: Make, drawn: Path, latents: Path) -> None:
    """As the messages above say."""
    latents.unlink()
    told = Interrupt("distill-decoder: loss")
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, progress=told)
    assert told.heard("teacher draws")
    assert latents.read_bytes() == drawn.read_bytes()


def test_latents_that_are_there_are_not_drawn_anew(make: Make, latents: Path) -> None:
    told = Interrupt("distill-decoder: loss")
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, progress=told)
    assert not told.heard("teacher draws")


def test_another_teacher_draws_its_own(make: Make, latents: Path) -> None:
    told, whole = Interrupt("distill-decoder: loss"), latents.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, teacher="steps = 3", progress=told)
    assert told.heard("teacher draws")
    assert latents.read_bytes() == whole
    assert len(list(latents.parent.iterdir())) == 2


def test_a_damaged_state_of_a_training_is_refused(make: Make, work: Path, saved_often: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(DECODER, progress=Interrupt("distill-decoder: loss", 3))
    (state,) = work.glob("01-*/training/distill-decoder.safetensors")
    cut(state)
    with pytest.raises(InputError, match=r"distill-decoder\.safetensors is damaged \(.*\); delete it to begin"):
        make(DECODER)


# --- models that a recipe does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (GUIDANCE, "distill-guidance: tiny is drawn without guidance; leave this pass out"),
        (STEPS, r"has distill-steps for tiny, which is drawn with guidance 4; put distill-guidance, with"),
        (DECODER.replace("[1, 0]", "[1, 0, 0]"), r"blocks = \[1, 0, 0\], and tiny has 2 resolutions; give each"),
    ],
    ids=["guidance off", "guidance on", "resolutions"],
)
def test_passes_that_do_not_fit_the_teacher(make: Make, passes: str, message: str, tmp_path: Path) -> None:
    teacher = "guidance = 1.0\nsteps = 2" if "distill-guidance" in passes else "steps = 2"
    with pytest.raises(InputError, match=message):
        make(passes, teacher=teacher)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("kind", "passes", "message"),
    [
        ("unconditional", GUIDANCE, "distill-guidance: unconditional is drawn without guidance; leave this pass out"),
        (
            "unconditional",
            '[[pass]]\nname = "quantize-weights"\ngraphs = ["text_encoder"]',
            "quantize-weights is for text_encoder; this bundle has unet, vae_decoder, vae_encoder",
        ),
        (
            "unconditional",
            DECODER.replace('name = "distill-decoder"', 'name = "distill-decoder"\nmixed_precision = "fp16"'),
            "mixed_precision = 'fp16' needs a GPU",
        ),
    ],
    ids=["guidance", "text encoder", "precision"],
)
def test_models_without_text(
    kinds: Kinds, cheap_judge: None, tmp_path: Path, kind: str, passes: str, message: str
) -> None:
    if "fp16" in passes and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU, which has the precision")
    checkpoint = open_checkpoint(kinds(kind)[0])
    with pytest.raises(InputError, match=message):
        run_recipe(checkpoint, recipe_of(tmp_path, passes), tmp_path / "bundle", tmp_path / "work")
    assert not (tmp_path / "bundle").exists()
    assert (tmp_path / "work" / "00-teacher" / "stage.json").is_file()


def test_a_model_without_text_has_a_recipe_too(kinds: Kinds, cheap_judge: None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(kinds("unconditional")[0])
    recipe = recipe_of(tmp_path, DECODER)
    bundle, records = run_recipe(checkpoint, recipe, tmp_path / "bundle", tmp_path / "work")
    assert [record["kept"] for record in records] == [True, True]
    assert records[0]["score"]["retrieval_at_5"] is None
    assert bundle.roles.guidance.scale == 1.0


def test_a_transformer_takes_graph_passes_alone(kinds: Kinds, cheap_judge: None, tmp_path: Path) -> None:
    dit = open_checkpoint(kinds("dit")[0])
    message = "has distill-guidance, for a UNet2DConditionModel; dit has a DiTTransformer2DModel. Leave them out"
    with pytest.raises(InputError, match=message):
        run_recipe(dit, recipe_of(tmp_path, GUIDANCE), tmp_path / "bundle", tmp_path / "work")
    assert not (tmp_path / "work").exists()
    recipe = recipe_of(tmp_path, PRUNE + WEIGHTS, budget="frechet_ratio = 1e9")
    made, records = run_recipe(dit, recipe, tmp_path / "bundle", tmp_path / "work")
    assert made.roles.guidance == Guidance(TWO_ROWS, recipe.teacher.guidance)
    report = records[1]["report"]
    assert (records[1]["name"], records[1]["kept"]) == ("prune-weights", True)
    assert report["zeros"] == pytest.approx(0.3 * report["of"], rel=1e-3)
    assert 0 < report["weight_error"] < 0.2


def test_a_unet_trained_by_flow_matching_takes_every_pass(kinds: Kinds, cheap_judge: None, tmp_path: Path) -> None:
    flow = open_checkpoint(kinds("flow")[0])
    recipe = recipe_of(tmp_path, GUIDANCE + WEIGHTS, budget="frechet_ratio = 1e9")
    made, records = run_recipe(flow, recipe, tmp_path / "bundle", tmp_path / "work")
    assert [record["name"] for record in records] == ["teacher", "distill-guidance", "quantize-weights"]
    assert records[1]["report"] == {"calls_a_step": {"before": 2, "after": 1}}
    assert made.manifest.model["default_sampler"] == "euler"
    assert made.manifest.model["prediction_type"] == "flow_prediction"


def test_a_text_model_needs_prompts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(WEIGHTS)
    recipe = read_recipe(tmp_path / "recipe.toml")
    message = "tiny reads text and the recipe recipe has no prompts; add prompts = FILE"
    with pytest.raises(InputError, match=message):
        run_recipe(open_checkpoint(tiny_checkpoint), recipe, tmp_path / "bundle", tmp_path / "work")
    assert not (tmp_path / "work").exists()


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_bundle_that_is_there_is_replaced_only_by_force(make: Make, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    told = Interrupt()
    with pytest.raises(BundleError, match=r"bundle exists; use --force to replace it, or choose another folder"):
        make(WEIGHTS, force=False, progress=told)
    assert told.told == []
    assert files_of(bundle) == files_of(tiny_bundle)
    made, _ = make(WEIGHTS, force=True)
    assert [record["name"] for record in made.manifest.passes] == ["teacher", "quantize-weights"]


def test_nothing_but_a_bundle_is_replaced(make: Make, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("years of work")
    told = Interrupt()
    with pytest.raises(BundleError, match="is not a bundle"):
        make(WEIGHTS, force=True, progress=told)
    assert told.told == []
    assert (tmp_path / "bundle" / "thesis.tex").read_text() == "years of work"


def test_held_out_pictures_alone_are_refused(make: Make, tmp_path: Path) -> None:
    told = Interrupt()
    with pytest.raises(InputError, match="was given without --data; give the pictures that prompts are of, too"):
        make(WEIGHTS, held_out=tmp_path, progress=told)
    assert told.told == []


@pytest.mark.parametrize("method", ["none", "conditioned"])
def test_guidance_must_be_in_the_network_before_its_steps_are_distilled(make: Make, method: str) -> None:
    """Said before anything is drawn."""
    guidance = "" if method == "none" else GUIDANCE + f'method = "{method}"\n'
    told = Interrupt()
    with pytest.raises(InputError, match="put distill-guidance, with the method fixed, before it"):
        make(guidance + STEPS, progress=told)
    assert told.told == []


def test_a_stage_without_its_bundle_is_made_again(make: Make, work: Path) -> None:
    made, _ = make(WEIGHTS)
    before = files_of(made.path)
    shutil.rmtree(next(work.glob("01-*")) / "bundle")
    made, _ = make(WEIGHTS)
    graphs = [name for name in before if name.endswith(".onnx")]
    assert [files_of(made.path)[name] for name in graphs] == [before[name] for name in graphs]
    assert (next(work.glob("01-*")) / "bundle").is_dir()


def test_a_work_folder_that_is_a_file(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, ExportError), match="cannot be written") as raised:
        make(WEIGHTS, work=tmp_path / "file")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["pictures", "teacher", "01-*"])
def test_a_work_folder_that_cannot_be_written_to(make: Make, begun: Path, tmp_path: Path, place: str) -> None:
    """A file is where a folder should be, since root may write anywhere."""
    work = Path(shutil.copytree(begun, tmp_path / "other"))
    if place == "01-*":
        with pytest.raises(KeyboardInterrupt):
            make(DECODER, work=work, progress=Interrupt("distill-decoder: loss"))
        (stage,) = work.glob(place)
        shutil.rmtree(stage)
        stage.write_text("")
    else:
        for folder in work.glob(f"{place}*"):
            shutil.rmtree(folder)
        (work / place).write_text("")
    with pytest.raises(LdmExportError, match="cannot be written") as raised:
        make(DECODER, work=work)
    assert "\n" not in str(raised.value)


def test_a_stage_file_that_is_damaged_is_made_anew(make: Make, work: Path) -> None:
    _, first = make(WEIGHTS)
    (stage,) = work.glob("01-*/stage.json")
    stage.write_text(stage.read_text(encoding="utf-8")[:-20])
    _, second = make(WEIGHTS)
    assert second[1]["score"] == first[1]["score"]
    assert json.loads(stage.read_text(encoding="utf-8"))["key"] == first[1]["key"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"has no metadata\.jsonl; one line a picture is needed"),
        (lambda folder: (folder / "red-bar.png").write_text("no picture"), r"red-bar\.png"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "red-bar.png"}'), "metadata.jsonl, line"),
    ],
    ids=["no folder", "no picture", "no captions"],
)
def test_pictures_to_judge_by_that_cannot_be_read(
    make: Make, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "data").mkdir()
    data = write_pictures(tmp_path / "data")
    damage(data)
    with pytest.raises(InputError, match=message) as raised:
        make(WEIGHTS, data=data)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_pictures_to_judge_by_are_told_apart(make: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = write_pictures(tmp_path / "data")
    _, own = make(WEIGHTS)
    _, given = make(WEIGHTS, data=data)
    assert own[1]["judged_on"] != given[1]["judged_on"]
    assert own[1]["score"]["frechet_distance"] != given[1]["score"]["frechet_distance"]


def test_a_recipe_lies_where_it_was_written(tmp_path: Path) -> None:
    assert write_recipe(tmp_path / "new", WEIGHTS).is_file()
