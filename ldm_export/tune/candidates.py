"""The space that a search goes through: configurations, and the tables of choices that change them.

A configuration is one way to draw with a model. A choice sets some of its fields; two choices of one axis exclude each
other, all others combine. Each says what it needs, and whether pictures stay the same but for rounding: those that do
not are judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.errors import InputError
from ldm_export.graph.base import GraphPass
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.plan import CALLS
from ldm_export.plan.forecast import forecast_of
from ldm_export.tune.fit import FITTED

PASSES: Mapping[str, GraphPass] = {
    "int8 convolutions of the denoiser": QuantizeStatic(operators=("Conv",), graphs=("denoiser",)),
    "int8 decoder": QuantizeStatic(operators=("Conv",), graphs=("vae_decoder",)),
    "int8 products of the denoiser": QuantizeDynamic(graphs=("denoiser",)),
    "int8 products of the text encoder": QuantizeDynamic(graphs=("text_encoder",)),
    "weights of 8 bits": QuantizeWeights(bits=8),
    "weights of 4 bits": QuantizeWeights(bits=4),
    "half precision": Half(),
}
"""What is done to which graphs, by name, in the order in which passes of a recipe are applied."""
STORED = ("weights of 8 bits", "weights of 4 bits", "half precision")
"""Those that change how weights are stored, of which one at most is chosen."""
FORECAST_CALLS = (25, 16, 12, 10, 8, 6, 4)
"""Network calls of forecast plans, in the steps of the truth."""
FEWER_STEPS: Mapping[str, tuple[int, ...]] = {"dpmpp-2m": (25, 15, 10), "unipc": (10, 6)}
"""Samplers with the numbers of steps that are tried, where the model's scheduler config has them."""
DEEPCACHE = (2, 3)
GOALS = ("fastest", "smallest")


@dataclass(frozen=True)
class Configuration:
    """One way to draw with a model.

    Attributes
    ----------
    sampler, steps : the plan
    passes : keys of :data:`PASSES`, in its order
    target : whether the graphs are those of the target ``ort-cpu``
    deepcache : the whole denoiser runs in every so many steps
    backend, threads : what runs it; None is the library's own number
    bundle : folder of another bundle, which is drawn as it stands; empty for the one that is tuned
    """

    sampler: str
    steps: int
    passes: tuple[str, ...] = ()
    target: bool = False
    deepcache: int = 1
    backend: str = "cpu"
    threads: int | None = None
    bundle: str = ""

    @property
    def drawn(self) -> dict[str, Any]:
        """What pictures depend on: all but the number of threads."""
        return {**asdict(self), "threads": None}


@dataclass(frozen=True)
class Choice:
    """One thing that can be done.

    Attributes
    ----------
    axis : what it is a choice of
    fields : what it sets of a configuration; passes are added to those that are there
    exact : whether pictures stay the same but for rounding
    fitted : network calls of a plan that is made for the model first; 0 for all other choices
    """

    axis: str
    name: str
    fields: Mapping[str, Any]
    exact: bool = False
    fitted: int = 0

    def applied(self, to: Configuration) -> Configuration:
        fields = dict(self.fields)
        if "passes" in fields:
            chosen = {*to.passes, *fields["passes"]}
            fields["passes"] = tuple(name for name in PASSES if name in chosen)
        return replace(to, **fields)


@dataclass(frozen=True)
class Space:
    """All choices of a model on this machine, and what is left out -> why."""

    choices: tuple[Choice, ...]
    left_out: Mapping[str, str]


def space_of(
    bundle: Bundle,
    truth: Configuration,
    *,
    goal: str,
    checkpoint_is_known: bool,
    openvino: bool,
    cores: int,
    taught: bool = False,
    fitted: Sequence[int] = (),
) -> Space:
    """The choices that there are for a bundle whose truth is drawn so.

    Parameters
    ----------
    goal : one of :data:`GOALS`; passes that save bytes and no time are choices of the second alone
    taught : whether the model was taught to draw in its few steps and no others, so that it keeps its plan
    fitted : numbers of network calls of plans to fit
    """
    found = [Choice("run by", "target ort-cpu", {"target": True}, exact=True)]
    left_out: dict[str, str] = {}
    if openvino:
        found.append(Choice("run by", "OpenVINO", {"backend": "openvino", "target": False}, exact=True))
    else:
        left_out["OpenVINO"] = "it is not installed: pip install 'ldm_export[openvino]'"
    found += [
        Choice("threads", f"{count} thread{'s' * (count > 1)}", {"threads": count}, exact=True)
        for count in dict.fromkeys((1, cores // 2))
        if 0 < count < cores
    ]
    if taught:
        left_out["other plans"] = f"the model was taught to draw with {truth.sampler} in {truth.steps} steps"
    else:
        found += _plans(bundle, truth, left_out)
        found += [Choice("plan", f"fitted plan of {calls} calls", {}, fitted=calls) for calls in fitted]
    found += [
        Choice("deepcache", f"DeepCache {every}", {"deepcache": every, "target": True, "backend": "cpu"})
        for every in DEEPCACHE
    ]
    for name, step in PASSES.items():
        if not checkpoint_is_known:
            left_out[name] = "it is compared with PyTorch, and no checkpoint was given (--against)"
        elif goal == "smallest" or step.purpose == "speed":
            found.append(Choice("stored weights" if name in STORED else name, name, {"passes": (name,)}))
    return Space(tuple(found), left_out)


def _plans(bundle: Bundle, truth: Configuration, left_out: dict[str, str]) -> list[Choice]:
    """Plans of fewer network calls than the truth's: of its own sampler, of others, and with forecast outputs."""
    sampler, steps = truth.sampler, truth.steps
    most = len(read_plan(bundle, sampler, steps).rows)
    model = bundle.manifest.model
    own, base = (model["default_sampler"], model["default_steps"]), forecast_of(sampler)[0]
    tried = [own, *((base, count) for count in (steps // 2, 20, 10))]
    tried += [(name, count) for name, counts in FEWER_STEPS.items() if name != base for count in counts]
    tried = [plan for plan in tried if 0 < plan[1] < steps]
    tried += [(f"{base}{CALLS}{count}", steps) for count in FORECAST_CALLS if count < most]
    found = []
    for plan in dict.fromkeys(tried):
        name = plan_name(*plan)
        try:
            rows = len(read_plan(bundle, *plan).rows)
        except InputError as error:
            left_out[name] = str(error)
            continue
        if rows < most:
            found.append(Choice("plan", name, {"sampler": plan[0], "steps": plan[1]}))
    return found


def plan_name(sampler: str, steps: int) -> str:
    """``ddim, 50 steps, 16 calls`` of ``ddim-calls16`` and 50; ``fitted, 8 calls`` of a fitted plan."""
    if sampler.startswith(FITTED):
        return f"{FITTED}, {steps} calls"
    base, forecast = forecast_of(sampler)
    return f"{base}, {steps} steps" + ("" if forecast is None else f", {forecast.calls} calls")


def merged_passes(names: Sequence[str]) -> list[GraphPass]:
    """The passes of these names as a recipe has them: those that only differ in their graphs are one."""
    merged: dict[str, Any] = {}
    for step in (PASSES[name] for name in PASSES if name in names):
        there = merged.get(step.name)
        merged[step.name] = step if there is None else replace(there, graphs=(*there.graphs, *step.graphs))
    return list(merged.values())


def words_for(configuration: Configuration, truth: Configuration) -> str:
    """What a configuration is, for people: all that differs from the untouched bundle, or ``untouched``."""
    if configuration.bundle:
        return configuration.bundle
    parts = []
    if (configuration.sampler, configuration.steps) != (truth.sampler, truth.steps):
        parts.append(plan_name(configuration.sampler, configuration.steps))
    if configuration.deepcache > 1:
        parts.append(f"DeepCache {configuration.deepcache}")
    parts += configuration.passes
    parts += ["target ort-cpu"] * configuration.target
    parts += ["OpenVINO"] * (configuration.backend == "openvino")
    if configuration.threads is not None:
        parts.append(f"{configuration.threads} thread{'s' * (configuration.threads > 1)}")
    return " + ".join(parts) or "untouched"
