"""Weights in prompts and prompts in chunks: the common parser's own results, and diffusers' pipelines as the judge."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.prompts import MOST_CHUNKS, MOST_NESTED, weighted_parts, weighted_states
from tests.diffusers_pipelines import assert_same, opened
from tests.runtime.host_gpu import add_engines, host_gpu
from tests.scheduler_configs import diffusers_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Kinds = Callable[[str], tuple[Path, Path]]
Parts = Sequence[tuple[str, float]]
A = 1.1
PARSED: dict[str, Parts] = {
    "": [],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", A), (" word", 1)],
    "(unbalanced": [("unbalanced", A)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", A)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1), ("house", 1.5730000000000004), (" ", A), ("on", 1), (" a ", A), ("hill", 0.55)),
        *((", sun, ", A), ("sky", 1.4641000000000006), (".", A)),
    ],
    "stray) and ] and :1.5) here": [("stray) and ] and :1.5) here", 1)],
    "[(a:2)": [("a", 2 / A)],
    "(a: +1.5 ) (b:-.5) (c:2.)": [("a", 1.5), (" ", 1), ("b", -0.5), (" ", 1), ("c", 2)],
    r"\\ \a \(x:2\)": [("\\ a (x:2)", 1)],
    "a:b (c:d) [e:1.2]": [("a:b ", 1), ("c:d", A), (" ", 1), ("e:1.2", 1 / A)],
    "(a [b) c]": [("a ", A), ("b", 1), (" c", 1 / A)],
}
"""What ``parse_prompt_attention`` of AUTOMATIC1111's stable-diffusion-webui gives, without pieces of no text."""
LONG = "two green triangles on white, smiling eyes, a red circle and a blue square, grinning face, a red circle"
WEIGHTED: dict[str, Parts] = {
    "a (red:1.4) circle [on] white": [("a ", 1), ("red", 1.4), (" circle ", 1), ("on", 1 / 1.1), (" white", 1)],
    "((smiling)) eyes, (circle:0.3)": [("smiling", 1.1 * 1.1), (" eyes, ", 1), ("circle", 0.3)],
}
THIRD = 256
"""Tokens of Stable Diffusion 3's third text encoder."""
STEPS, SIZE, SEEDS = 4, (16, 24), [7, 11]


@pytest.mark.parametrize("prompt", PARSED)
def test_parts_are_those_of_the_common_parser(prompt: str) -> None:
    parts = weighted_parts(prompt)
    assert [text for text, _ in parts] == [text for text, _ in PARSED[prompt]]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in PARSED[prompt]], rel=1e-15)


def test_a_number_that_is_none_is_text() -> None:
    assert weighted_parts("(a:1.2.3)") == [("a:1.2.3", 1.1)]
    assert weighted_parts("(a:\u0663)") == [("a:\u0663", 1.1)]


@pytest.mark.parametrize("prompt", ["(red:101)", "((red:-20):20)", "(red:" + "9" * 400 + ")", "(a" * (MOST_NESTED + 1)])
def test_what_no_weight_is(prompt: str, tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    with pytest.raises(InputError, match=r"weights are from -100 to 100|more than 100 brackets"):
        pipeline.steps(prompt, prompt_weights=True)
    with pytest.raises(InputError, match=r"weights are from -100 to 100|more than 100 brackets"):
        pipeline.steps("red", negative_prompt=prompt, prompt_weights=True)
    pipeline.generate(prompt[:8], steps=1)


def test_a_mean_that_is_none_is_not_restored() -> None:
    states = np.array([[1, -1], [2, -2]], np.float32)
    assert np.array_equal(weighted_states(states, np.array([1, 3], np.float32)), states * [[1], [3]])


def rows_of(tokenizer: Any, parts: Parts) -> list[tuple[list[int], list[float]]]:
    """Token ids and weights of each chunk of a prompt, by transformers' tokenizer."""
    bodies = [(tokenizer(text, add_special_tokens=False).input_ids, weight) for text, weight in parts]
    ids = [number for body, _ in bodies for number in body]
    weights = [weight for body, weight in bodies for _ in body]
    length = tokenizer.model_max_length
    found = []
    for start in range(0, max(len(ids), 1), length - 2):
        body, weighing = ids[start : start + length - 2], weights[start : start + length - 2]
        padding = length - 2 - len(body)
        framed = [tokenizer.bos_token_id, *body, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
        found.append((framed, [1.0, *weighing, 1.0, *[1.0] * padding]))
    return found


def states_of(encoder: Any, rows: list[tuple[list[int], list[float]]], *, last: bool) -> tuple[Any, Any]:
    """Weighted states of all chunks, (1, tokens, width), and what is pooled of the first."""
    states, pooled = [], []
    for ids, weights in rows:
        given = encoder(torch.tensor([ids]), output_hidden_states=True)
        own = given.last_hidden_state if last else given.hidden_states[-2]
        scaled = own * torch.tensor(weights)[None, :, None]
        states.append(scaled * (own.double().mean() / scaled.double().mean()).float())
        pooled.append(given[0])
    return torch.cat(states, dim=1), pooled[0]


@torch.no_grad()
def embeds(pipe: Any, prompts: Sequence[Parts], negatives: Sequence[Parts]) -> dict[str, Any]:
    """The arguments of a diffusers pipeline that stand for prompts and negative prompts."""
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    large = hasattr(pipe, "text_encoder_2")
    encoders += [(pipe.tokenizer_2, pipe.text_encoder_2)] if large else []
    both = [*prompts, *negatives]
    rows = [[rows_of(tokenizer, parts) for parts in both] for tokenizer, _ in encoders]
    count = max(len(chunks) for own in rows for chunks in own)
    found = []
    for number in range(len(both)):
        made = []
        for own, (tokenizer, encoder) in zip(rows, encoders, strict=True):
            filled = own[number] + rows_of(tokenizer, []) * (count - len(own[number]))
            made.append(states_of(encoder, filled, last=not large))
        states, pooled = torch.cat([states for states, _ in made], dim=-1), made[-1][1]
        if hasattr(pipe, "transformer"):  # pads, and has zeros for the third encoder, which is absent
            width = pipe.transformer.config.joint_attention_dim
            parts = torch.nn.functional.pad(states, (0, width - states.shape[-1])).chunk(count, dim=1)
            third = torch.zeros(1, THIRD, width)
            states = torch.cat([each for part in parts for each in (part, third)], dim=1)
            pooled = torch.cat([own for _, own in made], dim=-1)
        found.append((states, pooled))
    of = {"": found[: len(prompts)], "negative_": found[len(prompts) :]}
    given = {f"{name}prompt_embeds": torch.cat([states for states, _ in own]) for name, own in of.items()}
    if large:
        given |= {f"{name}pooled_prompt_embeds": torch.cat([pooled for _, pooled in own]) for name, own in of.items()}
    return given


def judge(pipe: Any, given: dict[str, Any]) -> torch.Tensor:
    pipe.scheduler = diffusers_scheduler({**pipe.scheduler.config}, "euler")  # or its like for flow matching
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    options: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": 4.0}
    return pipe(generator=generators, output_type="latent", num_inference_steps=STEPS, **options, **given).images


def ours(bundle: Path, prompts: list[str], negatives: list[str], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a prompt that is cut off
        plan: dict[str, Any] = {"sampler": "euler", "steps": STEPS, "height": SIZE[0], "width": SIZE[1]}
        pipeline = Pipeline.open(bundle, backend="cpu")
        return pipeline.generate(prompts, negative_prompt=negatives, seed=SEEDS, guidance=4.0, **plan, **options)


def model(kind: str, kinds: Kinds, tiny_checkpoint: Path, variants: Callable[[str], Path]) -> tuple[Any, Path]:
    """A diffusers pipeline and the bundle of its checkpoint, of the small one with its target."""
    if kind == "sd":
        return opened(diffusers.StableDiffusionPipeline, tiny_checkpoint), variants("target")
    checkpoint, bundle = kinds(kind)
    found = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd3": diffusers.StableDiffusion3Pipeline}[kind]
    return opened(found, checkpoint), bundle


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("reading", ["weights", "chunks", "both"])
def test_pictures_are_those_of_diffusers(
    kind: str, reading: str, kinds: Kinds, tiny_checkpoint: Path, variants: Callable[[str], Path]
) -> None:
    pipe, bundle = model(kind, kinds, tiny_checkpoint, variants)
    texts, negatives = dict(WEIGHTED), {LONG: [(LONG, 1.0)], "a blue square": [("a blue square", 1.0)]}
    if reading == "weights":
        negatives = {"(eyes:0.5)": [("eyes", 0.5)], "": [("", 1.0)]}
    elif reading == "chunks":  # brackets are signs like any other
        texts = {text: [(text, 1.0)] for text in texts}
    else:
        texts = {f"(red:2) {LONG}": [("red", 2.0), (f" {LONG}", 1.0)], "circle": [("circle", 1.0)]}
    given = embeds(pipe, [*texts.values()], [*negatives.values()])
    length = pipe.tokenizer.model_max_length + THIRD * (kind == "sd3")
    assert (given["prompt_embeds"].shape[1] > length) == (reading != "weights")
    options = {"prompt_weights": reading != "chunks", "long_prompts": reading != "weights"}
    result = ours(bundle, [*texts], [*negatives], **options)
    assert_same(result, judge(pipe, given), pipe.vae)


def test_prompts_are_read_as_they_stand_unless_asked(tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    options: dict[str, Any] = {"steps": 2, "negative_prompt": "[circle]"}
    plain, weighted = (pipeline.generate("(red:1.4)", prompt_weights=on, **options).latents for on in (False, True))
    assert not np.array_equal(plain, weighted)
    no_brackets = [pipeline.generate("a red circle", steps=2, prompt_weights=on).latents for on in (False, True)]
    assert np.array_equal(*no_brackets)
    short = [pipeline.generate("a red circle", steps=2, long_prompts=on).latents for on in (False, True)]
    assert np.array_equal(*short)
    with pytest.warns(UserWarning, match="this model reads 14"):
        pipeline.generate(f"({LONG}:1.3)", steps=2, prompt_weights=True)


def test_no_negative_prompt_is_none_in_every_chunk(kinds: Kinds) -> None:
    """Zeros, of SDXL's kind."""
    checkpoint, bundle = kinds("sdxl")
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    given = embeds(pipe, [[(LONG, 1.0)]] * 2, [[("", 1.0)]] * 2)
    given |= {name: torch.zeros_like(value) for name, value in given.items() if name.startswith("negative")}
    options: dict[str, Any] = {"sampler": "euler", "steps": STEPS, "height": SIZE[0], "width": SIZE[1]}
    pipeline = Pipeline.open(bundle, backend="cpu")
    result = pipeline.generate([LONG] * 2, seed=SEEDS, guidance=4.0, long_prompts=True, **options)
    assert_same(result, judge(pipe, given), pipe.vae)


@pytest.mark.parametrize("option", ["prompt_weights", "long_prompts"])
def test_models_that_cannot(option: str, kinds: Kinds, variants: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {option: True}
    for kind, prompt, message in (
        ("pixart", "a red circle", f"{option} was asked for; it is for tokenizers of the kind 'clip'"),
        ("unconditional", None, f"{option} was asked for; this model reads no text"),
    ):
        with pytest.raises(InputError, match=message):
            Pipeline.open(kinds(kind)[1], backend="cpu").generate(prompt, **options)
    with pytest.raises(InputError, match="a loop graph reads each prompt as it stands"):
        Pipeline.open(variants("loop"), backend="cpu").generate("a", sampler="ddim", steps=10, whole=True, **options)
    with pytest.raises(InputError, match=f"{option} is 1; give True or False"):
        Pipeline.open(variants("plain"), backend="cpu").generate("a", **{option: 1})


def test_too_many_chunks(tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    with pytest.raises(InputError, match=f"at most {MOST_CHUNKS} are read"):
        next(pipeline.steps("red " * (MOST_CHUNKS * 14 + 1), steps=2, long_prompts=True))


def test_engines_take_one_number_of_tokens(tiny_bundle: Path, tmp_path: Path) -> None:
    made = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_engines(made, "tensorrt")
    with host_gpu("tensorrt"):
        pipeline = Pipeline(made, "tensorrt")
        pipeline.generate("a red circle", steps=2, long_prompts=True)
        with pytest.raises(InputError, match=r"in chunks have 96 tokens; .* was built for another number"):
            pipeline.generate("red " * 80, steps=2, long_prompts=True)
