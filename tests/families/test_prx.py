"""PRX: what replaces diffusers' own so that it traces everywhere, what a bundle says, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import onnx
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.errors import CheckpointError
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.prx import POSITIONS, RotaryTable
from ldm_export.families.tokenizers import WholeTokenizer

Kinds = Callable[[str], tuple[Path, Path]]


def test_positions_are_those_of_diffusers() -> None:
    transformer = diffusers.PRXTransformer2DModel(
        hidden_size=32, num_heads=2, depth=1, axes_dim=[4, 12], context_in_dim=8
    )
    ids = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(3.0), indexing="ij"), dim=-1).reshape(1, 21, 2)
    assert torch.equal(RotaryTable(transformer.pe_embedder)(ids), transformer.pe_embedder(ids))


def test_what_a_bundle_says(kinds: Kinds) -> None:
    bundle = Bundle.open(kinds("prx")[1])
    (encoder,) = bundle.roles.text_encoders
    assert (encoder.kind, encoder.length, bundle.roles.conditioner) == ("tokenizers", 24, None)
    model = bundle.manifest.model
    assert (model["patch_size"], model["largest_size"], model["height"]) == (2, 2 * 2 * POSITIONS, 16)
    graph = onnx.load(bundle.file("transformer/model.onnx"), load_external_data=False).graph
    doubles = [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE]
    assert doubles == []  # TensorRT has none


@pytest.mark.slow
def test_latents_of_a_deep_autoencoder_are_certain(kinds: Kinds) -> None:
    graphs = Bundle.open(kinds("prx with dc-ae")[1]).manifest.graphs
    assert [tensor.name for tensor in graphs["vae_encoder"].outputs] == ["latent_sample"]


def test_padding_comes_first_as_for_gemma(kinds: Kinds) -> None:
    (tokenizer,) = family_of(open_checkpoint(kinds("prx")[0])).tokenizers.values()
    assert tokenizer.open()(["a cat <pad>"])[0, -1] == tokenizer.open().pad_token_id  # written out, it is text
    assert isinstance(tokenizer, WholeTokenizer)
    assert tokenizer.pads_left


def test_an_encoder_of_another_width(kinds: Kinds, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kinds("prx")[0], tmp_path / "prx"))
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "context_in_dim": 48}))
    with pytest.raises(CheckpointError, match=r"gives states 32 wide; the transformer reads 48 \(context_in_dim\)"):
        family_of(open_checkpoint(folder)).check()
