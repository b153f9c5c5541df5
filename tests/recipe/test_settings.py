"""Recipes are checked whole: what could not run is refused in one sentence, before anything runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ldm_export.errors import InputError
from ldm_export.plan import compile_plan
from ldm_export.reading.options import KINDS
from ldm_export.recipe import Recipe, read_recipe
from ldm_export.recipe.settings import GRAPH_PASSES, TORCH_PASSES, Budget, DefaultPlan, Teacher, shipped_recipes
from tests.recipe.tiny import PROMPTS, write_recipe

WEIGHTS = '[[pass]]\nname = "quantize-weights"\n'


def read(folder: Path, text: str) -> Recipe:
    (folder / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "recipe.toml")


# --- good recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.torch_passes or recipe.graph_passes
    assert len(recipe.prompts) > 2000


def test_the_shipped_recipes_are_these() -> None:
    assert {"cpu-fast", "cpu-small", "gpu"} <= shipped_recipes().keys()


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, WEIGHTS)
    assert recipe == Recipe("recipe", "cpu", Teacher(), Budget(), (), (), (GRAPH_PASSES["quantize-weights"](),))


def test_everything_is_read(tmp_path: Path) -> None:
    text = """
    target = "gpu"
    prompts = "prompts.txt"
    teacher = { steps = 20, guidance = 2, latents = 100, mixed_precision = "bf16", latents_from = "data" }
    budget = { frechet_ratio = 2, retrieval_drop = 0, pictures = 50 }
    [[pass]]
    name = "distill-guidance"
    method = "conditioned"
    [[pass]]
    name = "distill-decoder"
    blocks = [2, 0]
    [[pass]]
    name = "quantize-static"
    [[pass]]
    name = "half"
    format = "bf16"
    """
    recipe = read(tmp_path, text)
    assert recipe.prompts == ("a cat", "a dog")
    assert recipe.teacher == Teacher(20, 2, "data", 100, "bf16")
    assert recipe.budget == Budget(2, 0, 50)
    assert [step.name for step in recipe.torch_passes] == ["distill-guidance", "distill-decoder"]
    assert [step.name for step in recipe.graph_passes] == ["quantize-static", "half"]
    assert recipe.torch_passes[1].blocks == (2, 0)
    assert recipe.graph_passes[1].format == "bf16"


def test_prompts_lie_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_recipe(tmp_path / "recipes", WEIGHTS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_recipe("../recipes/recipe.toml").prompts == PROMPTS


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu").write_text(WEIGHTS)
    monkeypatch.chdir(tmp_path)
    assert read_recipe("gpu").target == "cpu"


@pytest.mark.parametrize("kind", [Teacher, Budget, *TORCH_PASSES.values(), *GRAPH_PASSES.values()])
def test_every_option_is_of_a_kind_that_can_be_checked(kind: type) -> None:
    assert {str(field.type).partition("[")[0] for field in dataclasses.fields(kind)} <= KINDS.keys()
    assert all(isinstance(getattr(kind, fact), str) for fact in ("name", "purpose") if kind not in (Teacher, Budget))


# --- bad recipes ----------------------------------------------------------------------------------------------------


def step(name: str, options: str = "") -> str:
    return f'[[pass]]\nname = "{name}"\n{options}\n'


BAD = {
    "not TOML": ("target = ", r"recipe\.toml is no readable TOML \(Invalid value"),
    "no passes": ('target = "cpu"', r"has no \[\[pass\]\]; export without --recipe, or add one\."),
    "unknown key": (
        f"speed = 1\n{WEIGHTS}",
        "has the unknown key 'speed'; known are budget, pass, plan, prompts, target,",
    ),
    "target of a wrong type": (f"target = 1\n{WEIGHTS}", "target = 1 must be text"),
    "unknown target": (f'target = "tpu"\n{WEIGHTS}', "target = 'tpu' is not supported; allowed are 'cpu', 'gpu'"),
    "teacher of a wrong type": (f"teacher = 50\n{WEIGHTS}", "teacher = 50 must be a table"),
    "one pass": ('[pass]\nname = "half"', r"pass = .* must be .*\[\[pass\]\]"),
    "a pass that is no table": ('pass = ["half"]', "pass 1 has no name; passes are "),
    "a pass without a name": ("[[pass]]\nbits = 4", "pass 1 has no name; passes are "),
    "unknown pass": (step("magic"), "pass 1: there is no pass 'magic'; passes are "),
    "a name that is no text": ("[[pass]]\nname = [1]", r"pass 1: there is no pass \[1\]; passes are "),
    "unknown option": (step("half", "bits = 4"), r"pass 1 \(half\) has the unknown key 'bits'; known are format, "),
    "option of a wrong type": (step("distill-decoder", "updates = 1.5"), "updates = 1.5 must be a whole number"),
    "text for a number": (step("half", 'loss = "low"'), "loss = 'low' must be a number"),
    "true for a number": (f"[teacher]\nsteps = true\n{WEIGHTS}", r"\[teacher\]: steps = True must be a whole number"),
    "number for true": (step("quantize-static", "only_faster = 1"), "only_faster = 1 must be true or false"),
    "number for a list": (step("half", "graphs = 1"), "graphs = 1 must be a list"),
    "list of numbers": (step("half", "graphs = [1]"), r"graphs = \[1\] must be some of text_encoder, "),
    "list of text": (
        step("distill-decoder", 'blocks = ["a"]'),
        r"blocks = \['a'\] must be whole numbers",
    ),
    "ratio below 1": (f"[budget]\nfrechet_ratio = 0.9\n{WEIGHTS}", r"\[budget\]: frechet_ratio = 0.9 must be at lea"),
    "ratio that is no number": (f"[budget]\nfrechet_ratio = nan\n{WEIGHTS}", "frechet_ratio = nan must be at least 1"),
    "endless ratio": (f"[budget]\nfrechet_ratio = inf\n{WEIGHTS}", "frechet_ratio = inf must be at least 1"),
    "drop above 1": (f"[budget]\nretrieval_drop = 5\n{WEIGHTS}", "retrieval_drop = 5 must be from 0 to 1"),
    "too few pictures": (f"[budget]\npictures = 9\n{WEIGHTS}", "pictures = 9 must be at least 10"),
    "no steps": (f"[teacher]\nsteps = 0\n{WEIGHTS}", "steps = 0 must be at least 1"),
    "guidance below 1": (f"[teacher]\nguidance = 0.5\n{WEIGHTS}", "guidance = 0.5 must be from 1 to 50"),
    "too few latents": (f"[teacher]\nlatents = 1\n{WEIGHTS}", "latents = 1 must be at least 16"),
    "unknown latents": (f'[teacher]\nlatents_from = "disk"\n{WEIGHTS}', "allowed are 'drawn', 'data'"),
    "unknown precision": (f'[teacher]\nmixed_precision = "int8"\n{WEIGHTS}', "allowed are 'no', 'bf16', 'fp16'"),
    "precision of a pass": (step("distill-decoder", 'mixed_precision = "x"'), "mixed_precision = 'x' is not supported"),
    "no updates": (step("distill-decoder", "updates = 0"), "updates = 0 must be at least 1"),
    "no batch": (step("distill-decoder", "batch_size = 0"), "batch_size = 0 must hold integers of at least 1"),
    "rate that is no number": (step("distill-decoder", "learning_rate = nan"), "learning_rate = nan must be a number"),
    "no blocks": (step("distill-decoder", "blocks = []"), r"blocks = \[\] must be whole numbers"),
    "unknown method": (step("distill-steps", 'method = "magic"'), "allowed are 'progressive', 'consistency'"),
    "more steps than at first": (step("distill-steps", "start = 4\nto = 4"), "start = 4 must be at least 5"),
    "steps that do not halve": (
        step("distill-steps", "start = 20\nto = 4"),
        r"recipe\.toml, pass 1 \(distill-steps\): start = 20 cannot be halved to 4 steps; use 4 times a power of 2\.",
    ),
    "scales in wrong order": (
        step("distill-guidance", 'method = "conditioned"\nlowest = 9'),
        "lowest = 9 must be from 1 to 8",
    ),
    "bits": (step("quantize-weights", "bits = 5"), "bits = 5 is not supported; allowed are 4 and 8"),
    "error of a layer": (step("quantize-static", "layer_error = 1"), "layer_error = 1 must be between 0 and 1, with"),
    "unknown format": (step("half", 'format = "fp8"'), "format = 'fp8' is not supported; allowed are 'fp16', 'bf16'"),
    "unknown graph": (
        step("half", 'graphs = ["net"]'),
        r"graphs = \['net'\] must be some of text_encoder, ",
    ),
    "no graphs": (step("half", "graphs = []"), r"pass 1 \(half\): graphs = \[\] must be some of"),
    "a pass twice": (WEIGHTS * 2, "has quantize-weights 2 times; once is enough"),
    "graphs before networks": (
        WEIGHTS + step("distill-decoder"),
        "distill-decoder changes networks and stands behind a pass that changes graphs; put it first",
    ),
    "guidance behind steps": (
        step("distill-steps") + step("distill-guidance"),
        "distill-guidance stands behind distill-steps; put it first",
    ),
    "a pass that the target cannot run": (
        f'target = "gpu"\n{step("quantize-dynamic")}',
        "what quantize-dynamic makes runs on cpu, not on gpu; leave it out",
    ),
    "missing prompts": (f'prompts = "absent.txt"\n{WEIGHTS}', r"prompts = 'absent\.txt' cannot be read \("),
    "prompts that are a folder": (f'prompts = "."\n{WEIGHTS}', r"prompts = '\.' cannot be read \("),
    "empty prompts": (f'prompts = "empty.txt"\n{WEIGHTS}', r"empty\.txt has no prompts; write one a line"),
}
"""Recipes that are refused, and what the message says."""


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path, text)
    assert "recipe.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"is no readable TOML \("),
        (b'prompts = "latin.txt"\n[[pass]]\nname = "half"', r"prompts = 'latin\.txt' cannot be read \("),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "recipe.toml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    shipped = re.escape(", ".join(shipped_recipes()))
    with pytest.raises(InputError, match=rf"There is no recipe '.*absent'; give a TOML file or one of {shipped}\."):
        read_recipe(tmp_path / "absent")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no readable TOML"):
        read_recipe(tmp_path)


# --- the default plan -----------------------------------------------------------------------------------------------


def test_a_recipe_may_be_a_plan_alone(tmp_path: Path) -> None:
    recipe = read(tmp_path, '[plan]\nsampler = "ddim-calls16"\nsteps = 50\n')
    assert recipe.plan is not None
    assert (recipe.plan[0].sampler, recipe.plan[0].steps, recipe.plan[1]) == ("ddim-calls16", 50, None)
    assert (recipe.torch_passes, recipe.graph_passes) == ((), ())


def test_a_plan_of_a_file_is_read_with_the_recipe(tmp_path: Path) -> None:
    plan = compile_plan({"_class_name": "DDIMScheduler"}, "ddim", 4)
    (tmp_path / "mine.json").write_text(plan.to_json())
    text = '[plan]\nsampler = "ddim"\nsteps = 4\nfile = "mine.json"\n'
    assert read(tmp_path, text).plan == (DefaultPlan("ddim", 4, "mine.json"), plan)
    with pytest.raises(InputError, match=r"mine.json has the plan ddim-4, and sampler = 'ddim', steps = 5"):
        read(tmp_path, text.replace("steps = 4", "steps = 5"))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(InputError, match=r"\[plan\]: file = 'mine.json' cannot be read"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('sampler = "ddim"', r"\[plan\] lacks 'steps'"),
        ("steps = 4", r"\[plan\] lacks 'sampler'"),
        ('sampler = "ddim"\nsteps = 0', "steps = 0 must be at least 1"),
        ('sampler = "ddim"\nsteps = 4\neta = 1', "unknown key 'eta'"),
        ('sampler = "ddim"\nsteps = 4\nfile = "absent.json"', "file = 'absent.json' cannot be read"),
    ],
)
def test_plans_that_are_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, f"[plan]\n{table}\n")
