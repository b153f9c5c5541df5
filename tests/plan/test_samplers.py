"""Which sampler a scheduler class of diffusers is, and how a config is read by the defaults of its own class."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ldm_export.errors import InputError
from ldm_export.plan import SAMPLERS, compile_plan, sampler_of
from ldm_export.plan.schedule import SHARED, SchedulerConfig
from ldm_export.plan.scheduler_classes import (
    CHOSEN_BY,
    CLIPPING,
    NETWORK,
    NEVER_ZERO_SNR,
    OF_THE_SAME_KIND,
    PARALLEL,
    as_trained,
)
from tests.scheduler_configs import noises, relative_error, run_diffusers, run_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]


MODULES = {"LMSDiscreteScheduler": "scheduling_lms_discrete", "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde"}
"""Classes that diffusers does not import where scipy or torchsde is missing."""


def defaults_of(name: str) -> dict[str, Any]:
    """The keys of a scheduler class's config, with their defaults, by the signature of its constructor."""
    if name in MODULES:
        tree = ast.parse((Path(diffusers.__file__).parent / "schedulers" / f"{MODULES[name]}.py").read_text())
        made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        keys = [argument.arg for argument in init.args.args[1:]]
        return dict(zip(keys, map(ast.literal_eval, init.args.defaults), strict=True))
    signature = inspect.signature(inspect.unwrap(getattr(diffusers, name).__init__))
    return {key: given.default for key, given in signature.parameters.items() if key != "self"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_key_of_the_class_is_read_refused_or_inert(sampler: str) -> None:
    spec, theirs = SAMPLERS[sampler], defaults_of(SAMPLERS[sampler].diffusers_class)
    chosen = {CHOSEN_BY[spec.diffusers_class][0]} if spec.diffusers_class in CHOSEN_BY else set()
    known = {*SHARED, *spec.defaults, *spec.only, *spec.inert, *chosen}
    assert theirs.keys() - known == set()
    assert {*spec.defaults, *spec.only, *spec.inert, *chosen} <= theirs.keys()
    ours = SchedulerConfig(**spec.defaults)
    for key in [*SHARED, *spec.defaults]:
        if key in theirs:
            assert (getattr(ours, key) or None) == (theirs[key] or None), key
    assert {key: allowed[0] for key, allowed in spec.only.items()} == {
        key: [] if key == "disable_corrector" else theirs[key] for key in spec.only
    }
    if chosen:
        key, default, _ = CHOSEN_BY[spec.diffusers_class]
        assert theirs[key] == default


@pytest.mark.parametrize(
    "name", [*dict.fromkeys(sampler.diffusers_class for sampler in SAMPLERS.values()), *OF_THE_SAME_KIND, *PARALLEL]
)
def test_what_a_network_was_trained_with_has_the_defaults_of_its_class(name: str) -> None:
    theirs = defaults_of(name)
    read = as_trained({"_class_name": name}, SAMPLERS["ddim"])
    assert {key: read[key] for key in NETWORK} == {key: theirs[key] for key in NETWORK}
    assert ("clip_sample" in theirs) == (PARALLEL.get(name, name) in CLIPPING) == ("clip_sample" not in read)
    if name in {sampler.diffusers_class for sampler in SAMPLERS.values()}:
        assert ("rescale_betas_zero_snr" in theirs) == (name not in NEVER_ZERO_SNR)


OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddim in parallel": ("DDIMParallelScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "plms with a leftover": ("PNDMScheduler", {"skip_prk_steps": True, "rescale_betas_zero_snr": True}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler with a leftover": ("EulerDiscreteScheduler", {"thresholding": True, "use_flow_sigmas": True}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"variance_type": "fixed_small"}),
    "dpmpp-2m of deis": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    ),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("betas", [{}, {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}])
def test_the_sampler_of_a_config_gives_what_its_own_class_gives(case: str, betas: dict[str, Any]) -> None:
    name, options = OWN[case]
    config = {"_class_name": name, **betas, **options}
    sampler = sampler_of(config)
    assert sampler == case.partition(" ")[0]
    scheduler = getattr(diffusers, name).from_config(config)
    expected = run_diffusers(scheduler, 12, 7, dtype=torch.float32)
    given = run_plan(compile_plan(config, sampler, 12).from_noise(), noises(7, torch.float32))
    assert relative_error(given, expected) < 1e-4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_class_name": "FlowMatchLCMScheduler"}, "'FlowMatchLCMScheduler'; a network with that scheduler cannot be"),
        ({"_class_name": "EDMEulerScheduler"}, "Use another checkpoint"),
        ({"_class_name": "SCMScheduler"}, "Use another checkpoint"),
        ({"_class_name": "DDIMInverseScheduler"}, "Use another checkpoint"),
        ({"_class_name": ["a", "b"]}, "Use another checkpoint"),
        ({"_class_name": {}}, "Use another checkpoint"),
        ({"_class_name": 5}, "Use another checkpoint"),
        ({"_class_name": "TCDScheduler"}, "the scheduler is TCDScheduler; none of .* equals it.*--sampler euler"),
        ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "KDPM2AncestralDiscreteScheduler"),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "DPMSolverSinglestepScheduler"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler with skip_prk_steps = False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": []}, "algorithm_type = "),
        ({}, "the scheduler is not named"),
    ],
)
def test_a_scheduler_that_no_sampler_equals(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        sampler_of(config)
    assert str(caught.value).endswith(".")
    if "Use another checkpoint" in str(caught.value):
        with pytest.raises(InputError, match="Use another checkpoint"):
            compile_plan(config, "ddim", 10)
    else:
        assert compile_plan(config, "ddim", 10).num_inference_steps == 10


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_what_its_own_class_does_not_clip_no_sampler_clips(name: str) -> None:
    for sampler in SAMPLERS:
        assert not any(row.clip for row in compile_plan({"_class_name": name}, sampler, 10).rows), sampler
    clipping = {"_class_name": name, "clip_sample": True}
    assert all(row.clip for row in compile_plan(clipping, "ddim", 10).rows)
    assert all(row.clip for row in compile_plan({"_class_name": "DDIMScheduler"}, "ddim", 10).rows)


def test_a_key_that_a_samplers_class_does_not_have_stops_only_the_others() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_exponential_sigmas": True, "thresholding": True}
    for sampler, spec in SAMPLERS.items():
        if {"use_exponential_sigmas", "thresholding"} & spec.only.keys():
            with pytest.raises(InputError, match=r"only False is supported\. Choose another sampler"):
                compile_plan(config, sampler, 10)
        else:
            assert compile_plan(config, sampler, 10).rows


@pytest.mark.parametrize("steps", [100_001, 10**7, 10**12, 10**30])
def test_more_training_timesteps_than_any_network_has(steps: int) -> None:
    with pytest.raises(InputError, match="at most 100,000 are supported"):
        compile_plan({"num_train_timesteps": steps}, "ddim", 10)
