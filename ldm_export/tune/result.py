"""What a tuning leaves: the chosen bundle, and beside it the recipe that makes it again from the checkpoint.

A recipe says passes and the default plan; the bundle has them, and the target. What neither can hold, the library,
threads and DeepCache, is in the command that generates with it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import write_whole
from ldm_export.bundle.plans import with_plan
from ldm_export.errors import InputError
from ldm_export.export.graphs import copy_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.recipe.settings import GRAPH_PASSES, TORCH_PASSES
from ldm_export.tune.search import Found, Point
from ldm_export.tune.session import Document
from ldm_export.tune.variants import UNTOUCHED, Variants

RECIPE, PROMPTS, PLAN = ".recipe.toml", ".prompts.txt", ".plan.json"
"""Endings of what is written beside a bundle."""
MOST_GUIDANCE = 50.0
"""Largest guidance of a recipe's teacher."""


@dataclass(frozen=True)
class Written:
    """Where everything is; ``command`` generates with it."""

    bundle: Bundle
    recipe: Path
    command: str


def beside(output: Path, ending: str) -> Path:
    """``tuned.recipe.toml`` of ``tuned.bundle``."""
    return output.with_name(f"{output.name.removesuffix('.bundle')}{ending}")


def write_result(found: Found, variants: Variants, document: Document, output: Path, *, force: bool) -> Written:
    """Write the chosen bundle to ``output``, with its target, and the recipe and what it names beside it.

    Raises
    ------
    LdmExportError
        If something cannot be written.
    """
    point = found.chosen
    chosen = point.configuration
    made = variants.bundle_of(chosen)
    if not chosen.bundle:  # others are not ours to change
        made, _ = with_plan(made, chosen.sampler, chosen.steps)
    records = [*(made.manifest.passes or [{"name": UNTOUCHED, "kept": True}]), *variants.records(chosen.passes)]
    held_out = {name: figure["value"] for name, figure in point.held_out.items()}
    budgets = [f"{gate['key']}={gate['limit']:g}" for gate in document["budgets"]]
    asked = {"goal": document["goal"], "budgets": budgets, "chosen": point.name}
    records.append({"name": "tune", "kept": True, "options": asked, "held_out": held_out})
    bundle = copy_bundle(made, output, passes=records, force=force, drawing=(chosen.sampler, chosen.steps))
    if chosen.target or chosen.bundle:
        build_ort_cpu(bundle)
    conditions = document["pictures"]["tuning"]
    command = generate_command(point, output, conditions)
    plan = None if chosen.bundle else variants.kept_plan(chosen)
    files = {beside(output, RECIPE): recipe_text(bundle, command, document, plan_is_file=plan is not None)}
    if bundle.roles.text_encoders:
        files[beside(output, PROMPTS)] = "".join(f"{text}\n" for text in dict.fromkeys(conditions))
    if plan is not None:
        files[beside(output, PLAN)] = plan.to_json()
    for file, text in files.items():
        try:
            write_whole(file, text.encode())
        except OSError as error:
            raise InputError(f"{file} cannot be written ({error.strerror}). Make room, or name another.") from error
    return Written(bundle, beside(output, RECIPE), command)


def recipe_text(bundle: Bundle, command: str, document: Document, *, plan_is_file: bool) -> str:
    """The recipe of a bundle that was tuned, as TOML: for the checkpoint that its manifest names as its source."""
    truth, model = document["truth"], bundle.manifest.model
    lines = [
        f"# Found by: {_one_line(document['command'])}",
        f"# For the checkpoint: {_one_line(str(bundle.manifest.source.get('checkpoint')))}",
        f"# As it was measured: {_one_line(command)}",
        'target = "cpu"',
    ]
    if bundle.roles.text_encoders:
        lines.append(f"prompts = {_toml(beside(bundle.path, PROMPTS).name)}")
    guidance = min(max(float(truth["guidance"]), 1.0), MOST_GUIDANCE)
    lines += ["", "[teacher]", f"steps = {truth['steps']}", f"guidance = {guidance}"]
    ratio = next((gate["limit"] for gate in document["budgets"] if gate["key"] == "frechet_ratio"), 0)
    lines += ["", "[budget]", f"frechet_ratio = {float(ratio)}"] if ratio >= 1 else []
    for record in bundle.manifest.passes:
        if record.get("name") in {*GRAPH_PASSES, *TORCH_PASSES} and record.get("kept", True):
            lines += ["", "[[pass]]", f"name = {_toml(record['name'])}"]
            lines += [f"{key} = {_toml(value)}" for key, value in record["options"].items()]
    lines += ["", "[plan]", f"sampler = {_toml(model['default_sampler'])}", f"steps = {model['default_steps']}"]
    lines += [f"file = {_toml(beside(bundle.path, PLAN).name)}"] if plan_is_file else []
    return "\n".join(lines) + "\n"


def generate_command(point: Point, output: Path, conditions: Sequence[str | int]) -> str:
    """The command that generates with the chosen bundle as it was measured."""
    chosen = point.configuration
    words = ["ldm-export", "generate", str(output), "-o", "picture.png", "--backend", chosen.backend]
    words += [] if chosen.deepcache == 1 else ["--deepcache", f"{chosen.deepcache}"]
    words += [] if chosen.threads is None else ["--threads", f"{chosen.threads}"]
    first = next(iter(conditions), "")
    words += ["--class-label", f"{first}"] if isinstance(first, int) else ["--", first] if first else []
    return shlex.join(words)


def _toml(value: Any) -> str:
    """A text, number, truth value, or list of them: JSON and TOML write those alike."""
    return json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
