"""Bundles with a loop, with a target, and with both meet everything that a plain one meets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import is_loop
from ldm_export.cli.main import main
from ldm_export.export.graphs import change_graphs, copy_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.recipe.pictures import draw_gallery
from ldm_export.recipe.score import Judge
from ldm_export.runtime import Pipeline
from tests.conftest import VARIANTS
from tests.graph.test_whole_graphs import draw
from tests.recipe.tiny import judge_cheaply
from tests.scheduler_configs import relative_error

GRAPHS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
PROMPTS = ["a red circle", "a blue square"]
Variants = Callable[[str], Path]

pytestmark = pytest.mark.parametrize(
    "variant",
    ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loop", "target")), "loop and target"],
)
assert {"plain", "loop", "target", "loop and target"} == {*VARIANTS}


def run(*arguments: object) -> Result:
    """A command that must succeed."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_it_generates_what_the_plain_one_does(variants: Variants, variant: str) -> None:
    pipeline = Pipeline.open(variants(variant), verify=True)
    ours, plain = (each.generate(PROMPTS, seed=3, steps=10) for each in (pipeline, Pipeline.open(variants("plain"))))
    assert ("ort-cpu" in pipeline.backend) == ("target" in variant)
    assert relative_error(ours.latents, plain.latents) < 1e-5
    if "loop" in variant:
        whole = pipeline.generate(PROMPTS, seed=3, steps=10, whole=True)
        assert relative_error(whole.latents, plain.latents) < 1e-5


def test_bench_and_its_report(variants: Variants, variant: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Loops are made of the bundle's graphs and are not compared with networks."""
    bundle = variants(variant)
    told = ["--against", tiny_checkpoint, "--prompt", "red", "--steps", 10, "--repeats", 1, "--warm-up", 0, "--json"]
    done = run("bench", bundle, "-o", tmp_path / "report.html", *told)
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    records = results[f"parity of {bundle.name}"]
    assert {record["graph"] for record in records} == GRAPHS
    assert all(record["same_weights"] and record["passed"] for record in records)
    assert max(results["pictures"][bundle.name]["drift"]["worst"]) < 1e-5
    assert bundle.name in (tmp_path / "report.html").read_text()


def test_inspect_verify_and_doctor(variants: Variants, variant: str, tiny_checkpoint: Path) -> None:
    assert ("loops/ddim-10" in run("inspect", variants(variant)).stdout) == ("loop" in variant)
    assert "unet" in run("verify", variants(variant), "--against", tiny_checkpoint).stdout
    assert ("targets/ort-cpu" in run("doctor", variants(variant)).stdout) == ("target" in variant)


def test_a_recipe_judges_it(variants: Variants, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_cheaply(monkeypatch)
    bundle, plain = Bundle.open(variants(variant)), Bundle.open(variants("plain"))
    nothing: Callable[..., None] = lambda *told: None  # noqa: E731
    gallery, reference = draw_gallery(plain, PROMPTS * 6, 12, tmp_path, nothing)
    judge = Judge(gallery, reference, None, 12, nothing)
    (ours, _, images), (theirs, _, expected) = (judge.score(each, None, None) for each in (bundle, plain))
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert ours.frechet_distance == pytest.approx(theirs.frechet_distance, rel=1e-2)


def test_graphs_that_a_pass_changes_leave_loops_and_targets_behind(
    variants: Variants, variant: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """They were made of the graphs as they were, and would still generate the old pictures."""
    bundle = Bundle.open(variants(variant))
    calls: dict[str, Any] = {"unet": [draw(bundle.manifest.graphs["unet"], seed) for seed in range(2)]}
    step = QuantizeWeights(smallest=500, graphs=("unet",))
    changed, _ = change_graphs(bundle, tmp_path / "changed", step, calls, PROMPTS, open_checkpoint(tiny_checkpoint))
    assert changed.manifest.graphs.keys() == GRAPHS
    assert not any(is_loop(name) for name in changed.manifest.files)
    assert not (changed.path / "targets").exists()
    ours, old = (Pipeline.open(each.path).generate(PROMPTS, seed=3, steps=10) for each in (changed, bundle))
    assert relative_error(ours.latents, old.latents) > 1e-4


def test_a_copy_keeps_loops_and_leaves_targets_to_be_built(variants: Variants, variant: str, tmp_path: Path) -> None:
    bundle = Bundle.open(variants(variant))
    copy = copy_bundle(bundle, tmp_path / "copy", passes=[], force=False)
    assert copy.manifest.graphs == bundle.manifest.graphs
    assert not (copy.path / "targets").exists()


def test_plans_loops_and_targets_are_added_to_it(variants: Variants, variant: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants(variant), tmp_path / "copy"))
    run("plan", folder, "--sampler", "euler", "--steps", 7, "--loop")
    build_ort_cpu(Bundle.open(folder))
    pipeline = Pipeline.open(folder, verify=True)
    assert "ort-cpu" in pipeline.backend
    whole, steps = (
        pipeline.generate(PROMPTS, sampler="euler", steps=7, seed=1, whole=whole) for whole in (True, False)
    )
    assert relative_error(whole.latents, steps.latents) < 1e-4
