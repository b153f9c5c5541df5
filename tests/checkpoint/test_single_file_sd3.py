"""Single files of Stable Diffusion 3: diffusers' own conversion of the same file is the judge."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner
from diffusers.loaders import single_file_utils as judge
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_export.checkpoint.key_maps import sd3_key, vae_key
from ldm_export.checkpoint.single_file_sd3 import PREFIXES
from ldm_export.cli.main import main
from ldm_export.errors import CheckpointError
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.sd3 import StableDiffusion3
from tests.bundle_fixture import perturb, stable_diffusion_3

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in diffusers' layout."""
    path = tmp_path_factory.mktemp("sd3") / "folder"
    stable_diffusion_3(path, tiny_checkpoint, third=True)
    diffusers.AutoencoderKL(  # norms of 32 groups, as all have of which a file is known
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(path / "vae")
    config = diffusers.SD3Transformer2DModel.load_config(path / "transformer")
    pooled = 32 + 24  # the first is as wide as its states
    perturb(diffusers.SD3Transformer2DModel.from_config(config, pooled_projection_dim=pooled)).save_pretrained(
        path / "transformer"
    )
    return path


def transformer_as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformer of diffusers in Stability AI's layout."""
    written: dict[str, Tensor] = {}
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    for name, tensor in state.items():
        key = sd3_key(name)
        if joint := re.search(r"\.(to_|add_)([qkv])", name):
            begin, end = name[: joint.start(2)], name[joint.end(2) :]
            tensor = torch.cat([state[f"{begin}{part}{end}"] for part in "qkv"])
        if name.startswith(("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        written[key] = tensor.contiguous()
    return written


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Write:
    """Write the file, of some components, with tokenizers beside it."""

    def written(*left_out: str) -> Path:
        tensors: dict[str, Tensor] = {}
        for component, prefix in PREFIXES.items():
            if component in left_out:
                continue
            state = {}
            for file in sorted((folder / component).glob("*.safetensors")):
                state |= load_file(file)
            if component == "transformer":
                state = transformer_as_published(state)
            elif component == "vae":
                keys = {name: vae_key(name, 2) for name in state}
                square = re.compile(r".*attn_1\.(q|k|v|proj_out)\.weight")
                state = {
                    key: state[name][:, :, None, None] if square.fullmatch(key) else state[name]
                    for name, key in keys.items()
                }
            tensors |= {prefix + name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, tmp_path / "sd3.safetensors")
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            shutil.copytree(folder / name, tmp_path / name)
        return tmp_path / "sd3.safetensors"

    return written


def test_the_transformer_is_what_diffusers_converts(write: Write, folder: Path) -> None:
    file = write()
    opened, whole = open_checkpoint(file), open_checkpoint(folder)
    assert opened.kind is StableDiffusion3.kind
    theirs = judge.convert_sd3_transformer_checkpoint_to_diffusers(load_file(file))
    ours = opened.load("transformer").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    same = ("num_layers", "num_attention_heads", "attention_head_dim", "pos_embed_max_size", "qk_norm", "patch_size")
    for key in (*same, "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim", "out_channels"):
        assert opened.configs["transformer"][key] == whole.configs["transformer"][key], key
    assert [*opened.configs["transformer"]["dual_attention_layers"]] == [0]


def test_the_other_networks_are_those_of_the_folder(write: Write, folder: Path) -> None:
    opened, whole = open_checkpoint(write()), open_checkpoint(folder)
    for component in ("vae", "text_encoder_2", "text_encoder_3"):
        ours, theirs = opened.load(component).state_dict(), whole.load(component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(opened.load("text_encoder").state_dict()["text_projection.weight"], torch.eye(32))
    assert (opened.configs["vae"]["scaling_factor"], opened.configs["vae"]["shift_factor"]) == (1.5305, 0.0609)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(opened.scheduler)
    assert scheduler.config.shift == 3.0


def test_without_t5(write: Write) -> None:
    assert open_checkpoint(write("text_encoder_3")).text_encoders == ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "text_encoder_2"])
def test_a_file_of_some_networks(write: Write, missing: str) -> None:
    with pytest.raises(CheckpointError, match=rf"has no {re.escape(PREFIXES[missing])}\*; .* a diffusers folder"):
        open_checkpoint(write(missing))


def test_a_transformer_that_lacks_a_weight(write: Write) -> None:
    file = write()
    tensors = load_file(file)
    del tensors["model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="3 missing"):
        open_checkpoint(file).load("transformer")
    del tensors["model.diffusion_model.x_embedder.proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lacks or misshapes .*x_embedder\.proj\.weight"):
        _ = open_checkpoint(file).configs


@pytest.mark.slow
def test_a_single_file_goes_through_the_chain(write: Write, tmp_path: Path) -> None:
    command = ["export", str(write()), "-o", str(tmp_path / "bundle"), "--target", "none"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert family_of(open_checkpoint(tmp_path / "sd3.safetensors")).notes == []
