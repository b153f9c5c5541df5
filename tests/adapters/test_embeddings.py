"""Textual inversions put into text encoders and tokenizers, with diffusers' ``load_textual_inversion`` as the judge."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.errors import InputError
from ldm_export.export import chain
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.tokenizers import open_tokenizer
from ldm_export.runtime import Pipeline
from ldm_export.verify.parity import compare_with_checkpoint
from tests.diffusers_pipelines import assert_same, judged, opened

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Kinds = Callable[[str], tuple[Path, Path]]
WIDTH = 32
PROMPTS = ["a red <fox> circle", "two <fox>, <owl> eyes"]
SEEDS = [7, 11]
OPTIONS: dict[str, Any] = {"steps": 4, "guidance": 4.0, "height": 16, "width": 24}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn((*shape, WIDTH), generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, name: str, **tensors: Tensor) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def judge(pipe: Any, prompts: list[str], negatives: list[str]) -> Tensor:
    return judged(pipe, "ddim", prompts, SEEDS, negative_prompt=negatives, **OPTIONS)


def test_pictures_of_one_encoder_are_those_of_diffusers(
    tiny_checkpoint: Path, traced_once: None, tmp_path: Path
) -> None:
    """A token of three vectors in diffusers' format, and one of one in the webui's, in half precision."""
    fox = saved(tmp_path, "style", **{"<fox>": vectors(3)})
    owl = saved(tmp_path, "<owl>", emb_params=vectors(seed=1).half())
    ours = open_checkpoint(tiny_checkpoint, embeddings=[(fox, None), (owl, None)])
    bundle = chain.export_bundle(ours, tmp_path / "bundle")
    pipe = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)
    pipe.load_textual_inversion(fox)
    pipe.load_textual_inversion(owl, token="<owl>")
    negatives = ["<owl>", "blue"]
    result = Pipeline.open(bundle.path, backend="cpu").generate(
        PROMPTS, negative_prompt=negatives, seed=SEEDS, sampler="ddim", **OPTIONS
    )
    assert_same(result, judge(pipe, PROMPTS, negatives), pipe.vae)
    source = bundle.manifest.source
    assert [(each["token"], each["vectors"]) for each in source["embeddings"]] == [
        ("<fox>", {"text_encoder": 3}),
        ("<owl>", {"text_encoder": 1}),
    ]
    bare = open_checkpoint(tiny_checkpoint)
    assert source["sha256"]["text_encoder"] == ours.sha256("text_encoder") != bare.sha256("text_encoder")
    assert source["sha256"]["unet"] == bare.sha256("unet")
    assert all(record.passed for record in compare_with_checkpoint(bundle, ours, lambda _: None))
    failed = {record.graph for record in compare_with_checkpoint(bundle, bare, lambda _: None) if not record.passed}
    assert failed == {"text_encoder"}


def test_pictures_of_two_encoders_are_those_of_diffusers(kinds: Kinds, tmp_path: Path) -> None:
    checkpoint = kinds("sdxl")[0]
    file = saved(tmp_path, "<fox>", clip_l=vectors(2), clip_g=vectors(2, seed=1))
    ours = open_checkpoint(checkpoint, embeddings=[(file, None)])
    bundle = chain.export_bundle(ours, tmp_path / "bundle")
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{number}"), getattr(pipe, f"tokenizer{number}")
        tensors = {"<fox>": vectors(2, seed=int(key == "clip_g"))}
        pipe.load_textual_inversion(tensors, text_encoder=encoder, tokenizer=tokenizer)
    result = Pipeline.open(bundle.path, backend="cpu").generate(
        PROMPTS, negative_prompt=["", "<fox>"], seed=SEEDS, sampler="ddim", **OPTIONS
    )
    assert_same(result, judge(pipe, PROMPTS, ["", "<fox>"]), pipe.vae)


def test_ids_are_those_of_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers reads the added tokens from the folder that is written, also where the tokenizer had some before."""
    pipe = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)
    pipe.load_textual_inversion({"<first>": vectors(2)})
    pipe.save_pretrained(tmp_path / "with-one")
    file = saved(tmp_path, "<fox>", **{"<fox>": vectors(3)})
    pipe.load_textual_inversion(file)
    ours = open_checkpoint(tmp_path / "with-one", embeddings=[(file, None)])
    tokenizer = family_of(ours).tokenizers["text_encoder"]
    tokenizer.write(tmp_path / "written")
    read = type(pipe.tokenizer).from_pretrained(tmp_path / "written")
    for prompt in ["a <fox> and <first>", "<FOX>", "foxes <fox>_1 <fox>_9", "<first><fox>"]:
        written_out = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        expected = pipe.tokenizer(written_out, padding="max_length", truncation=True).input_ids
        assert tokenizer.open()(prompt)[0].tolist() == expected
        assert open_tokenizer(tmp_path / "written")(prompt)[0].tolist() == expected
        assert read(written_out, padding="max_length", truncation=True).input_ids == expected


def test_the_end_of_a_text_is_found_among_new_ids(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Older configs know it as the highest id, which a new token then has."""
    old = shutil.copytree(tiny_checkpoint, tmp_path / "old")
    config = json.loads((old / "text_encoder/config.json").read_text())
    (old / "text_encoder/config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    file = saved(tmp_path, "<fox>", **{"<fox>": vectors(1)})
    pooled = []
    for folder in (old, tiny_checkpoint):
        model = open_checkpoint(folder, embeddings=[(file, None)])
        ids = family_of(model).tokenizers["text_encoder"].open()("a <fox> circle")
        pooled.append(model.load("text_encoder")(torch.from_numpy(ids)).pooled)
    assert torch.equal(*pooled)


def ran(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command(tiny_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:
    file = saved(tmp_path, "a=b", **{"<fox>": vectors(2)})
    embedding = ("--embedding", f"{file}=<my=fox>")
    done = ran("export", tiny_checkpoint, "-o", tmp_path / "bundle", "--target", "none", *embedding)
    assert done.exit_code == 0, done.output
    assert Bundle.open(tmp_path / "bundle").manifest.source["embeddings"][0]["token"] == "<my=fox>"
    for given, passed in ((embedding, True), ((), False)):
        done = ran("verify", tmp_path / "bundle", "--against", tiny_checkpoint, *given)
        assert done.exit_code == (not passed), done.output
    done = ran("verify", tmp_path / "bundle", *embedding)
    assert done.exit_code == 2
    assert "--embedding changes the checkpoint of --against, which was not given" in " ".join(done.output.split())


def bad(value: float) -> Tensor:
    found = vectors(2)
    found[1, 3] = value
    return found


@pytest.mark.parametrize(
    ("name", "tensors", "token", "message"),
    [
        ("x", {"<fox>": torch.zeros(2, 48)}, None, "the width of this model's text_encoder has 32"),
        ("x", {"clip_l": torch.zeros(2, 48)}, None, "has vectors of shape (2, 48) for text_encoder; (32,) or (n, 32)"),
        ("x", {"<fox>": torch.zeros(1, 2, 32)}, None, "has vectors of shape (1, 2, 32)"),
        ("x", {"<fox>": torch.zeros(0, 32)}, None, "has vectors of shape (0, 32)"),
        ("x", {"<fox>": bad(float("nan"))}, None, "has NaN or infinity for text_encoder"),
        ("x", {"<fox>": bad(float("inf"))}, None, "has NaN or infinity for text_encoder"),
        ("x", {"<fox>": torch.zeros(2, 32, dtype=torch.int8)}, None, "is of I8"),
        ("x", {"clip_g": torch.zeros(2, 32)}, None, "has vectors for clip_g, and the model has text_encoder"),
        ("x", {"<a>": vectors(1), "<b>": vectors(1)}, None, "has 2 tensors (<a>, <b>)"),
        ("x", {"<fox>": vectors(1)}, "", "is empty or has space at an end"),
        ("x", {"<fox>": vectors(1)}, "fox ", "is empty or has space at an end"),
        (
            "red",
            {"emb_params": vectors(1)},
            None,
            "is to be called 'red', and the tokenizer of the text_encoder has 're",
        ),
        ("x", {"<|endoftext|>": vectors(1)}, None, "has '<|endoftext|>' already"),
        ("x", {"<first>": vectors(1)}, None, "has '<first>' already"),
        ("x", {"<first>_1": vectors(1)}, None, "has '<first>_1' already"),
        ("x", {"<first>_2": vectors(1)}, None, "the token '<first>' of the text_encoder could be mistaken for"),
        ("x", {"first": vectors(1)}, None, "the token '<first>' of the text_encoder could be mistaken for"),
        ("x", {"my<first>": vectors(1)}, None, "the token '<first>' of the text_encoder could be mistaken for"),
    ],
)
def test_what_is_refused(
    name: str, tensors: dict[str, Tensor], token: str | None, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first = saved(tmp_path, "first", **{"<first>": vectors(2)})
    file = saved(tmp_path, name, **tensors)

    def export() -> None:
        model = open_checkpoint(tiny_checkpoint, embeddings=[(first, None), (file, token)])
        chain.export_bundle(model, tmp_path / "bundle")

    with pytest.raises(InputError, match=re.escape(message)):
        export()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_pickles_are_refused(ending: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / f"fox.{ending}"
    file.write_bytes(pickle.dumps({"string_to_param": {"*": np.zeros((1, WIDTH), np.float32)}}))
    with pytest.raises(InputError, match=r"is a pickle, which .* safetensors\.torch\.save_file"):
        open_checkpoint(tiny_checkpoint, embeddings=[(file, None)])
    with pytest.raises(InputError, match="There is no embedding"):
        open_checkpoint(tiny_checkpoint, embeddings=[(tmp_path / "none.safetensors", None)])


def test_other_models_and_passes(kinds: Kinds, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, "x", **{"<fox>": vectors(1)})
    with pytest.raises(InputError, match="a model without a text encoder of CLIP's kind"):
        open_checkpoint(kinds("unconditional")[0], embeddings=[(file, None)])
    with pytest.raises(InputError, match="of the width of both text_encoder and text_encoder_2"):
        open_checkpoint(kinds("sdxl")[0], embeddings=[(file, None)])
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = ["--recipe", "cpu-small", "--prompts", tmp_path / "prompts.txt", "--embedding", file]
    done = ran("export", tiny_checkpoint, "-o", tmp_path / "bundle", *given)
    assert done.exit_code == 2
    assert "A recipe was given with --embedding" in " ".join(done.output.split())
