"""``--lora`` of the commands that read a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from ldm_export.bench.variants import same_weights
from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.families import open_checkpoint


def ran(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def style(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    start = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{start}.lora_down.weight": torch.randn(2, 32), f"{start}.lora_up.weight": torch.randn(32, 2)}
    save_file({**tensors, "lora_te_none.alpha": torch.tensor(1.0)}, tmp_path / "style=1.safetensors")
    return tmp_path / "style=1.safetensors"


def test_a_bundle_with_an_adapter(style: Path, tiny_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = ran("export", tiny_checkpoint, "-o", bundle, "--lora", f"{style}=0.5", "--target", "none")
    assert done.exit_code == 0, done.output
    assert "1 layers are used; 1 names are of no layer of this model and left out: lora_te_none" in " ".join(
        done.output.split()
    )
    source = Bundle.open(bundle).manifest.source
    assert [(each["name"], each["scale"]) for each in source["adapters"]] == [("style=1.safetensors", 0.5)]
    for lora, passed in ((("--lora", f"{style}=0.5"), True), ((), False), (("--lora", style), False)):
        done = ran("verify", bundle, "--against", tiny_checkpoint, *lora, "--json")
        assert done.exit_code == (not passed), done.output
        records = json.loads(done.stdout)["parity"]
        assert {each["graph"] for each in records if not each["passed"]} == (set() if passed else {"text_encoder"})
    same = same_weights(Bundle.open(bundle), open_checkpoint(tiny_checkpoint))
    assert {name for name, each in same.items() if not each} == {"text_encoder"}
    options = ["--prompt", "a red circle", "--steps", 2, "--repeats", 1, "--warm-up", 0, "--fail-under", "psnr=80"]
    lora = ["--lora", f"{style}=0.5", "-o", tmp_path / "report.html"]
    done = ran("bench", bundle, "--against", tiny_checkpoint, *lora, *options)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "report.json").read_text())["results"]
    assert all(record["same_weights"] for record in found["parity of bundle"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "{style}=much"], "is no number. Give FILE=SCALE"),
        (["--lora", "{style}=inf"], "The scale inf of"),
        (["--lora", "nowhere.safetensors"], "There is no adapter 'nowhere.safetensors'"),
        (
            ["--lora", "{style}=0.5", "--recipe", "cpu-small", "--prompts", "{prompts}"],
            "A recipe was given with",
        ),
    ],
)
def test_what_is_refused(
    style: Path, tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [text.format(style=style, prompts=tmp_path / "prompts.txt") for text in arguments]
    done = ran("export", tiny_checkpoint, "-o", tmp_path / "bundle", *given)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "bundle").exists()


def test_without_a_checkpoint(style: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for command in (["verify"], ["bench", "-o", tmp_path / "report.html"]):
        done = ran(*command, tiny_bundle, "--lora", style)
        assert done.exit_code == 2
        assert "--lora changes the checkpoint of --against, which was not given" in " ".join(done.output.split())
