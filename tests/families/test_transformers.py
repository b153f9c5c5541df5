"""DiT and PixArt: what replaces diffusers' own so that it traces, what a bundle says, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ldm_export.bundle import Bundle
from ldm_export.errors import CheckpointError, InputError
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.base import Padding
from ldm_export.families.patches import CrossAttention, make_traceable
from ldm_export.families.text_encoders import text_mask
from ldm_export.families.tokenizers import WholeTokenizer
from ldm_export.runtime import Pipeline
from tests.bundle_fixture import t5_tokenizer

Kinds = Callable[[str], tuple[Path, Path]]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def checkpoint(kinds: Kinds, tmp_path: Path) -> Callable[[str], Path]:
    """A function from a kind to a copy that a test may spoil."""
    return lambda kind: Path(shutil.copytree(kinds(kind)[0], tmp_path / kind))


@pytest.mark.parametrize("scale", [1, 2])
@torch.no_grad()
def test_positions_at_any_size_are_those_of_diffusers(scale: int) -> None:
    kinds = {"height": 16, "width": 16, "patch_size": 2, "in_channels": 4, "embed_dim": 24}
    theirs = diffusers.models.embeddings.PatchEmbed(**kinds, interpolation_scale=scale)
    ours = diffusers.models.embeddings.PatchEmbed(**kinds, interpolation_scale=scale)
    ours.load_state_dict(theirs.state_dict())
    make_traceable(ours)
    for height, width in ((16, 16), (16, 30), (2, 2), (64, 4)):
        latents = torch.randn(2, 4, height, width)
        torch.testing.assert_close(ours(latents), theirs(latents), rtol=0, atol=2e-6)


@torch.no_grad()
def test_attention_under_a_mask_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    attention = diffusers.models.attention_processor.Attention(24, cross_attention_dim=16, heads=4, dim_head=6)
    tokens, states = torch.randn(3, 10, 24), torch.randn(3, 7, 16)
    bias = torch.where(torch.rand(3, 1, 7) > 0.5, 0.0, -10000.0)
    given = [(tokens, states, bias), (tokens, states, None)]
    theirs = [attention(*each) for each in given]
    attention.set_processor(CrossAttention())
    for each, expected in zip(given, theirs, strict=True):
        torch.testing.assert_close(attention(*each), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_of_ids_is_the_tokenizers(tmp_path: Path, side: str) -> None:
    tokenizer = t5_tokenizer(tmp_path / "tokenizer")
    tokenizer.padding_side = side
    texts = ["", "a cat", "<pad> a <pad> cat", "one " * 40]
    encoded = tokenizer(texts, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    mask = text_mask(encoded.input_ids, Padding(0, side == "left"))
    rows = [0, 1, 3] if side == "left" else [0, 1, 2, 3]  # a text that begins with the padding's token is refused
    assert torch.equal(mask[rows], encoded.attention_mask.bool()[rows])
    nothing = torch.zeros(1, 20, dtype=torch.int64)
    assert not text_mask(nothing, Padding(0, side == "left")).any()


def test_prompts_are_read_as_the_pipeline_reads_them(kinds: Kinds) -> None:
    """Strips and makes lower case, as its ``_text_preprocessing`` does where it does not clean."""
    checkpoint = open_checkpoint(kinds("pixart")[0])
    (ours,) = family_of(checkpoint).tokenizers.values()
    theirs = transformers.T5Tokenizer.from_pretrained(kinds("pixart")[0] / "tokenizer")
    texts = ["  A Red\u00a0CIRCLE ", "ÄÖÜ Straße İ", "ΟΔΟΣ und <extra_id_3>!", "", "\x1fx\x1f", "ﬁne ＡＢＣ"]
    cleaned = [text.lower().strip() for text in texts]
    expected = theirs(cleaned, padding="max_length", max_length=300, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours.open()(texts), expected)


@pytest.mark.parametrize(
    ("kind", "length", "sources"),
    [("pixart", 300, 2), pytest.param("pixart alpha", 120, 4, marks=pytest.mark.slow)],
)
def test_what_a_bundle_of_pixart_says(kinds: Kinds, kind: str, length: int, sources: int) -> None:
    bundle = Bundle.open(kinds(kind)[1])
    (encoder,) = bundle.roles.text_encoders
    assert (encoder.kind, encoder.length, encoder.tokenizer) == ("tokenizers", length, "tokenizer")
    assert len(bundle.roles.conditions) == sources
    assert [name for name in bundle.manifest.files if name.startswith("tokenizer/")] == ["tokenizer/tokenizer.json"]
    assert bundle.manifest.model["patch_size"] == 2
    assert bundle.manifest.graphs["transformer"].outputs[0].shape == ("batch", 4, "height", "width")


def test_a_class_and_no_class(kinds: Kinds) -> None:
    pipeline = Pipeline.open(kinds("dit")[1], backend="cpu")
    assert pipeline.bundle.manifest.model["class_count"] == 1000
    plain, guided = (
        pipeline.generate(class_labels=[3], steps=2, guidance=scale, height=12, width=20) for scale in (1.0, 4.0)
    )
    assert plain.latents.shape == (1, 4, 6, 10)
    assert not np.allclose(plain.latents, guided.latents)
    for wrong in (1000, -1):
        with pytest.raises(InputError, match="this model has 0 to 999"):
            pipeline.generate(class_labels=[wrong], steps=2)
    with pytest.raises(InputError, match="A negative prompt was given"):
        pipeline.generate(class_labels=[3], steps=2, negative_prompt="a dog")


def test_sizes_are_whole_patches(kinds: Kinds) -> None:
    with pytest.raises(InputError, match=r"must be multiples of 4\. Use 16x16\."):
        Pipeline.open(kinds("dit")[1], backend="cpu").generate(class_labels=[3], steps=2, height=18, width=16)


def test_a_prompt_that_ends_with_padding(kinds: Kinds) -> None:
    """T5's texts end with a token of their own, so it is text like any other; without that it would look like none."""
    pipeline = Pipeline.open(kinds("pixart")[1], backend="cpu")
    plain, padded = (pipeline.generate(text, steps=1, guidance=1.0).latents for text in ("a cat", "a cat <pad>"))
    assert not np.array_equal(plain, padded)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "pixart",
            lambda folder: edit_json(folder / "model_index.json", text_encoder=[None, None]),
            "names no text_encoder; the transformer reads the states of a T5EncoderModel",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "transformer/config.json", caption_channels=64),
            r"gives states 32 wide; the transformer reads 64 \(caption_channels\)",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "vae/config.json", latent_channels=16),
            "takes 4 channels and gives 8, and the autoencoder has 16 of latents; it must take 16 and give 16 or 32",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "text_encoder/config.json", vocab_size=100),
            "has tokens with ids up to 599; the text_encoder knows 100",
        ),
        (
            "pixart",
            lambda folder: shutil.rmtree(folder / "tokenizer"),
            "tokenizer has neither tokenizer.json nor spiece.model nor tokenizer.model. Put the model",
        ),
        (
            "pixart",
            lambda folder: [file.unlink() for file in (folder / "tokenizer").glob("tokenizer.json")],
            "tokenizer has neither tokenizer.json nor spiece.model nor tokenizer.model. Put the model",
        ),
        (
            "pixart",
            lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"),
            "cannot be read as transformers' T5Tokenizer",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "tokenizer/tokenizer_config.json", truncation_side="left"),
            "cuts long texts off on the left; only 'right' is known",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "text_encoder/config.json", dense_act_fn="foo"),
            "describes a network that cannot be built",
        ),
        (
            "pixart",
            lambda folder: edit_json(folder / "text_encoder/config.json", d_model="32"),
            "describes a network that cannot be built",
        ),
        (
            "dit",
            lambda folder: edit_json(folder / "transformer/config.json", patch_size=0),
            "describes a network that cannot be built",
        ),
        (
            "dit",
            lambda folder: edit_json(folder / "transformer/config.json", out_channels=5),
            "takes 4 channels and gives 5",
        ),
        (
            "dit",
            lambda folder: edit_json(folder / "transformer/config.json", norm_type="layer_norm"),
            "describes a network that cannot be built",
        ),
    ],
)
def test_what_cannot_be_exported(
    checkpoint: Callable[[str], Path], kind: str, change: Callable[[Path], None], message: str
) -> None:
    folder = checkpoint(kind)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        family_of(open_checkpoint(folder)).check()


@pytest.mark.parametrize(("kind", "pipeline"), [("dit", "DiTPipeline"), ("pixart", "PixArtSigmaPipeline")])
def test_checkpoints_of_before_their_class(
    checkpoint: Callable[[str], Path], kinds: Kinds, kind: str, pipeline: str
) -> None:
    """Published ones are of a Transformer2DModel; the pipeline's class tells what that is."""
    folder = checkpoint(kind)
    edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit_json(folder / "transformer/config.json", _class_name="Transformer2DModel")
    opened, new = open_checkpoint(folder), open_checkpoint(kinds(kind)[0])
    assert opened.index["_class_name"] == pipeline
    assert (opened.kind, opened.configs) == (new.kind, new.configs)
    family_of(opened).check()
    edit_json(folder / "model_index.json", _class_name="OtherPipeline")
    with pytest.raises(CheckpointError, match="of a OtherPipeline, which is of no family that is known here"):
        open_checkpoint(folder)


def test_a_whole_t5_is_read_as_its_encoder(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("pixart")
    file = folder / "text_encoder/model.safetensors"
    save_file({**load_file(file), "decoder.block.0.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, file)
    open_checkpoint(folder).load("text_encoder")


def test_what_it_draws_with_by_default(kinds: Kinds) -> None:
    for kind, steps, guidance in (("dit", 50, 4.0), ("pixart", 20, 4.5)):
        bundle = Bundle.open(kinds(kind)[1])
        assert (bundle.manifest.model["default_steps"], bundle.roles.guidance.scale) == (steps, guidance)


def test_a_tokenizer_without_a_length(kinds: Kinds, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("pixart")
    edit_json(folder / "tokenizer/tokenizer_config.json", model_max_length=int(1e30))
    with pytest.raises(CheckpointError, match="does not say how many tokens a text has"):
        WholeTokenizer.of(open_checkpoint(folder), "text_encoder")
