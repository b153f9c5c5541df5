"""``recipe.toml``: what is done to a model, in which order, and how much quality it may cost. Checked before it runs.

target = "cpu"                     # cpu or gpu: what the passes must be able to run on
prompts = "prompts.txt"            # one a line, beside this file; what the teacher draws for its students
                                   # (not needed with latents_from = "data" under [teacher])

[teacher]                          # how the model is drawn before any pass: what everything is compared with
steps = 50
guidance = 4.0

[budget]                           # what a pass may leave of the teacher's quality
frechet_ratio = 1.15               # Fréchet distance, as a multiple of the teacher's
retrieval_drop = 0.05              # share of pictures that are no longer among the five nearest of their caption

[[pass]]                           # applied in this order; the keys are the options of the pass
name = "distill-guidance"
updates = 1000

[plan]                             # what the bundle is drawn with by default; without it, as the passes leave it
sampler = "ddim-calls16"
steps = 50
file = "my-plan.json"              # beside this file, of a plan that is not compiled; none by default
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ldm_export.errors import InputError
from ldm_export.graph.base import GraphPass
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.passes.base import PRECISIONS, TorchPass
from ldm_export.passes.distill_decoder import DistillDecoder
from ldm_export.passes.distill_guidance import DistillGuidance
from ldm_export.passes.distill_steps import DistillSteps
from ldm_export.passes.distill_student import DistillStudent
from ldm_export.passes.prune_channels import PruneChannels
from ldm_export.passes.prune_weights import PruneWeights
from ldm_export.plan import Plan
from ldm_export.reading.options import check_between, check_least, check_one_of, options_from_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

TARGETS = ("cpu", "gpu")
LATENTS_FROM = ("drawn", "data")
TORCH_PASSES: Mapping[str, type[Any]] = {
    kind.name: kind
    for kind in (DistillStudent, PruneChannels, DistillGuidance, DistillSteps, DistillDecoder, PruneWeights)
}
GRAPH_PASSES: Mapping[str, type[Any]] = {
    kind.name: kind for kind in (QuantizeStatic, QuantizeDynamic, QuantizeWeights, Half)
}
GRAPHS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder", "text_encoder_2", "unet", "transformer")
"""What ``graphs`` of a pass may name: roles, and graphs by the names that they have in bundles."""
MUST_PRECEDE = (
    ("distill-guidance", "distill-steps"),
    *((name, "prune-weights") for name in ("distill-student", "prune-channels", "distill-guidance", "distill-steps")),
    *((name, "quantize-weights") for name in ("quantize-static", "quantize-dynamic")),
    *((name, "half") for name in ("quantize-static", "quantize-dynamic", "quantize-weights")),
)
"""Pairs of which the first, where a recipe has both, comes first."""


@dataclass(frozen=True)
class Teacher:
    """How the model is drawn before any pass, and what its students learn from.

    Attributes
    ----------
    latents_from : "drawn", by the teacher, at most ``latents``, one a prompt; or "data", the pictures and captions of a
        folder that is given to the command
    mixed_precision : of drawing them: no, bf16, or fp16 (on a GPU)
    """

    steps: int = 50
    guidance: float = 4.0
    latents_from: str = "drawn"
    latents: int = 4096
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        check_least("steps", self.steps, 1)
        check_between("guidance", self.guidance, 1.0, 50.0)
        check_least("latents", self.latents, 16)
        check_one_of("latents_from", self.latents_from, LATENTS_FROM)
        check_one_of("mixed_precision", self.mixed_precision, PRECISIONS)


@dataclass(frozen=True)
class Budget:
    """What may be lost, against the teacher, and on how many ``pictures`` that is judged."""

    frechet_ratio: float = 1.15
    retrieval_drop: float = 0.05
    pictures: int = 200

    def __post_init__(self) -> None:
        check_least("frechet_ratio", self.frechet_ratio, 1.0)
        check_between("retrieval_drop", self.retrieval_drop, 0.0, 1.0)
        check_least("pictures", self.pictures, 10)


@dataclass(frozen=True)
class DefaultPlan:
    """What the bundle is drawn with by default; its passes are judged as the teacher is drawn.

    Attributes
    ----------
    file : of a plan that no sampler compiles to, read with the recipe; empty for others
    """

    sampler: str
    steps: int
    file: str = ""

    def __post_init__(self) -> None:
        check_least("steps", self.steps, 1)


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    Attributes
    ----------
    name : of its file
    prompts : what the teacher draws; empty for models that read no text
    torch_passes, graph_passes : in order; all of the first run before the first of the second
    plan : what the bundle is drawn with by default, and the plan itself if that is a file's
    """

    name: str
    target: str
    teacher: Teacher
    budget: Budget
    prompts: tuple[str, ...]
    torch_passes: tuple[TorchPass, ...]
    graph_passes: tuple[GraphPass, ...]
    plan: tuple[DefaultPlan, Plan | None] | None = None


@dataclass(frozen=True)
class _Table:
    """The keys of the file itself."""

    target: str = "cpu"
    prompts: str = ""
    teacher: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("ldm_export") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def read_recipe(given: str | Path, prompts: Path | None = None) -> Recipe:
    """Read and check a file, or one of the shipped by its name; ``prompts`` is a file that takes the place of its own.

    Raises
    ------
    InputError
        For anything that could not run: an unknown pass or key, a wrong type, range or order, a target that cannot run
        what a pass makes.
    """
    file = Path(given)
    if not file.exists() and str(given) in shipped_recipes():
        file = shipped_recipes()[str(given)]
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"There is no recipe {str(given)!r}; give a TOML file or one of {', '.join(shipped_recipes())}."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no readable TOML ({error}).") from error
    where = file.name
    for key, value in table.items():
        known = {"pass", *(known.name for known in dataclasses.fields(_Table))}
        if key not in known:
            raise InputError(f"{where} has the unknown key {key!r}; known are {', '.join(sorted(known))}.")
        kinds = {"pass": list, "target": str, "prompts": str}.get(key, dict)
        if not isinstance(value, kinds):
            called = {str: "text", list: "tables that begin with [[pass]]", dict: "a table"}[kinds]
            raise InputError(f"{where}: {key} = {value!r} must be {called}.")
    target = table.get("target", "cpu")
    check_one_of(f"{where}: target", target, TARGETS)
    passes = [_pass(entry, f"{where}, pass {number}") for number, entry in enumerate(table.get("pass", []), 1)]
    if not passes and "plan" not in table:
        raise InputError(f"{where} has no [[pass]]; export without --recipe, or add one.")
    _check_order(passes, target, where)
    return Recipe(
        name=file.stem,
        target=target,
        teacher=options_from_table(Teacher, table.get("teacher", {}), f"{where}, [teacher]"),
        budget=options_from_table(Budget, table.get("budget", {}), f"{where}, [budget]"),
        prompts=_prompts(file, table.get("prompts") if prompts is None else prompts.absolute()),
        torch_passes=tuple(step for step in passes if step.name in TORCH_PASSES),
        graph_passes=tuple(step for step in passes if step.name in GRAPH_PASSES),
        plan=_plan(file, table["plan"]) if "plan" in table else None,
    )


def _plan(recipe: Path, table: Mapping[str, Any]) -> tuple[DefaultPlan, Plan | None]:
    chosen = options_from_table(DefaultPlan, table, f"{recipe.name}, [plan]")
    if not chosen.file:
        return chosen, None
    try:
        plan = Plan.from_json((recipe.parent / chosen.file).read_bytes())
    except (OSError, InputError) as error:
        raise InputError(f"{recipe.name}, [plan]: file = {chosen.file!r} cannot be read ({error}).") from error
    if (plan.sampler, plan.num_inference_steps) != (chosen.sampler, chosen.steps):
        raise InputError(
            f"{recipe.name}, [plan]: {chosen.file} has the plan {plan.file_name.removesuffix('.json')}, and sampler = "
            f"{chosen.sampler!r}, steps = {chosen.steps}. Name the plan that it has."
        )
    return chosen, plan


def _pass(entry: object, where: str) -> Any:
    if not isinstance(entry, dict) or "name" not in entry:
        raise InputError(f"{where} has no name; passes are {', '.join((*TORCH_PASSES, *GRAPH_PASSES))}.")
    options = dict(entry)
    name = options.pop("name")
    kind = {**TORCH_PASSES, **GRAPH_PASSES}.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"{where}: there is no pass {name!r}; passes are {', '.join((*TORCH_PASSES, *GRAPH_PASSES))}.")
    step: Any = options_from_table(kind, options, f"{where} ({name})")
    if name in GRAPH_PASSES and not (step.graphs and set(step.graphs) <= set(GRAPHS)):
        raise InputError(f"{where} ({name}): graphs = {list(step.graphs)!r} must be some of {', '.join(GRAPHS)}.")
    return step


def _check_order(passes: Sequence[Any], target: str, where: str) -> None:
    names = [step.name for step in passes]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where} has {name} {names.count(name)} times; once is enough.")
    kinds = [name in GRAPH_PASSES for name in names]
    if kinds != sorted(kinds):
        late = next(name for index, name in enumerate(names) if not kinds[index] and any(kinds[:index]))
        raise InputError(
            f"{where}: {late} changes networks and stands behind a pass that changes graphs; put it first."
        )
    for first, second in MUST_PRECEDE:
        if first in names and second in names and names.index(first) > names.index(second):
            raise InputError(f"{where}: {first} stands behind {second}; put it first.")
    for step in passes:
        if step.name in GRAPH_PASSES and target not in step.targets:
            raise InputError(
                f"{where}: what {step.name} makes runs on {' and '.join(step.targets)}, not on {target}; leave it out."
            )


def _prompts(recipe: Path, given: str | Path | None) -> tuple[str, ...]:
    if given is None:
        return ()
    file = recipe.parent / given
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{recipe.name}: prompts = {str(given)!r} cannot be read ({error}).") from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InputError(f"{recipe.name}: {file} has no prompts; write one a line.")
    return prompts
