"""Training at a tiny scale: data, tokenizer, optimisation, resuming, and the checkpoint that comes out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm_reference.fit
import ldm_reference.train
import pytest
import safetensors.torch
import torch
import transformers
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages, batch_indices, load_picture
from ldm_reference.fit import Optimisation, fit
from ldm_reference.losses import autoencoder_loss, diffusion_target
from ldm_reference.tokenizer import encode, save_tokenizer, train_tokenizer
from ldm_reference.train import TrainConfig, train
from PIL import Image
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from tests.tiny_recipe import CONFIG

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SHAPES = ("square", "bar")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 16 x 16, the first with two captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = [{"file_name": "red-square.png", "text": "the colour red"}]
    for colour in COLOURS:
        for shape in SHAPES:
            image = Image.new("RGB", (16, 16), "white")
            image.paste(colour, (4, 4, 12, 12) if shape == "square" else (1, 6, 15, 10))
            image.save(folder / f"{colour}-{shape}.png")
            lines.append({"file_name": f"{colour}-{shape}.png", "text": f"a {colour} {shape}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "config.toml").write_text(CONFIG)
    return TrainConfig.read(tmp_path / "config.toml")


class Losses:
    """A progress callback that remembers, and that may interrupt a stage after a number of steps."""

    def __init__(self, stop: tuple[str, int] | None = None):
        self.stop = stop
        self.of: dict[tuple[str, int], float] = {}

    def __call__(self, name: str, done: int, steps: int, loss: float) -> None:
        self.of[name, done] = loss
        if (name, done) == self.stop:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}.{key}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for key, tensor in safetensors.torch.load_file(file).items()
    }


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (12, 4), (7, 7), (5, 1)])
def test_batches_cover_each_epoch_once(count: int, batch: int) -> None:
    per_epoch = count // batch
    epochs = []
    for epoch in range(3):
        batches = [batch_indices(count, batch, epoch * per_epoch + i, seed=1) for i in range(per_epoch)]
        assert {len(indices) for indices in batches} == {batch}
        seen = [index for indices in batches for index in indices]
        assert len(set(seen)) == per_epoch * batch  # none twice; a remainder smaller than a batch is left out
        assert set(seen) <= set(range(count))
        epochs.append(seen)
    assert len({tuple(seen) for seen in epochs}) == 3


def test_batches_depend_on_the_arguments_alone() -> None:
    given = [batch_indices(100, 8, step, seed=2) for step in (40, 3, 40)]
    torch.manual_seed(9)
    torch.rand(5)
    assert batch_indices(100, 8, 40, seed=2) == given[0] == given[2] != given[1]
    assert batch_indices(100, 8, 40, seed=3) != given[0]


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(ConfigError, match="batch size 8 is larger than the 7 samples; lower it or add pictures"):
        batch_indices(7, 8, 0, seed=0)


def test_open_pictures(pictures: Path) -> None:
    data = CaptionedImages.open(pictures, 16)
    assert len(data.files) == 12
    assert len(data.captions) == 13
    assert data.files[0] == "red-square.png"
    assert data.captions[:2] == ((0, "the colour red"), (0, "a red square"))
    loaded = data.load([0, 3])
    assert loaded.shape == (2, 3, 16, 16)
    assert loaded.dtype == torch.float32
    assert loaded[0, :, 8, 8].tolist() == [1.0, -1.0, -1.0]
    assert loaded[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0]


METADATA_LIES = {
    "not JSON": ("file_name: a.png", "line 1: not an object with 'file_name' and 'text'"),
    "not an object": ("[1]", "line 1: not an object"),
    "no text": ('{"file_name": "red-bar.png"}', "line 1: not an object with 'file_name' and 'text' ('text')"),
    "no file name": ('\n{"text": "a"}', "line 2: not an object"),
    "text a number": ('{"file_name": "red-bar.png", "text": 5}', "'file_name' and 'text' must be strings"),
    "above the folder": ('{"file_name": "../a.png", "text": "a"}', "line 1: '../a.png' leaves the folder"),
    "absolute": ('{"file_name": "/etc/passwd", "text": "a"}', "line 1: '/etc/passwd' leaves the folder"),
    "no such file": ('{"file_name": "mauve.png", "text": "a"}', "line 1: 'mauve.png' is not in"),
    "empty": ("\n\n", "metadata.jsonl is empty"),
}


@pytest.mark.parametrize("lie", METADATA_LIES)
def test_metadata_that_lies(tmp_path: Path, pictures: Path, lie: str) -> None:
    text, sentence = METADATA_LIES[lie]
    (tmp_path / "red-bar.png").write_bytes((pictures / "red-bar.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        CaptionedImages.open(tmp_path, 16)
    assert sentence in str(caught.value)


def test_metadata_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metadata\.jsonl; one line a picture is needed"):
        CaptionedImages.open(tmp_path, 16)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is not readable text"):
        CaptionedImages.open(tmp_path, 16)


def test_captions_may_hold_any_character(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "red-bar.png").write_bytes((pictures / "red-bar.png").read_bytes())
    text = "one\u2028two\u0085three\x1cfour"
    line = json.dumps({"file_name": "red-bar.png", "text": text}, ensure_ascii=False).replace("\\u001c", "\x1c")
    line = line.replace("\x1c", "\\u001c")  # JSON escapes control characters, but not the other two
    (tmp_path / "metadata.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert CaptionedImages.open(tmp_path, 16).captions == ((0, text),)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 128))
    image = image.resize((16, 8), Image.Resampling.NEAREST)
    canvas = Image.new("RGBA", (16, 16))
    canvas.paste(image, (0, 0))
    canvas.save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", 16)
    assert picture[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(picture[:, 0, 15], torch.tensor([127, 127, 255]) / 127.5 - 1)
    Image.new("LA", (16, 16), (10, 0)).save(tmp_path / "grey.png")
    assert load_picture(tmp_path / "grey.png", 16).min() == 1.0


def test_pictures_are_cropped_to_a_square_the_right_way_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (8, 0, 24, 16))
    image.save(tmp_path / "wide.png")
    red = load_picture(tmp_path / "wide.png", 8)[0]
    assert red[:, 1:-1].max() < -0.95  # the blue middle; the filter mixes a little into its edges
    turned = Image.new("RGB", (16, 16), "white")
    turned.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    picture = load_picture(tmp_path / "turned.png", 16)
    assert (picture[0, 0, 0], picture[0, 15, 0]) == (1.0, -1.0)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture"):
        load_picture(tmp_path / "a.png", 16)


def test_truncated_picture(tmp_path: Path, pictures: Path) -> None:
    content = (pictures / "red-bar.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture"):
        load_picture(tmp_path / "a.png", 16)


# --- tokenizer ------------------------------------------------------------------------------------------------------

CAPTIONS = [
    *("grinning face with smiling eyes", "a photo of a cat sitting on a red chair", "flag of a far country"),
    *("it's the artist's best; they're sure we've seen it", "the café's naïve façade, für elise", "keycap 10"),
]


def strings() -> list[str]:
    """Captions, their pieces shuffled, odd spacing, other scripts and random characters: 400 texts."""
    draw = random.Random(0)
    words = " ".join(CAPTIONS).split()
    alphabets = ["abcXYZ 019'!?.,-_()", "éßñøçÅ žš", "字漢 かな한글", "🎨👩‍🚀❤️ ", "\t\n  a", "\u2028\xa0\u3000ǅİſ"]
    texts = ["", " ", "A  PHOTO\tof\n\na Cat", "<|endoftext|>", "a <|startoftext|>b", "don't'll", "x" * 40, *CAPTIONS]
    while len(texts) < 200:
        texts.append(" ".join(draw.choices(words, k=draw.randint(1, 12))))
    while len(texts) < 400:
        texts.append("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 15))))
    return texts


@pytest.mark.parametrize("vocab_size", [514, 600, 5000])
def test_tokenizer_is_transformers(tmp_path: Path, vocab_size: int) -> None:
    length = 20
    tokenizer = train_tokenizer(CAPTIONS, vocab_size)
    save_tokenizer(tokenizer, tmp_path, length)
    judge = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    given = encode(tokenizer, strings(), length)
    expected = judge(strings(), padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert judge.model_max_length == length
    for text, ids, others in zip(strings(), given.tolist(), expected.tolist(), strict=True):
        assert ids == others, text
    assert given.dtype == torch.int64
    assert int(given.max()) == tokenizer.get_vocab_size() - 1 <= vocab_size - 1


def test_tokenizer_is_the_same_in_every_process() -> None:
    """A resumed run learns its tokenizer anew: equally frequent pairs must not follow a hash table's order."""
    code = f"from ldm_reference.tokenizer import train_tokenizer as t;print(t({[*CAPTIONS, *COLOURS]!r}, 560).to_str())"
    folder = str(Path(ldm_reference.fit.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {folder!r}); {code}"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert other.decode() == train_tokenizer([*CAPTIONS, *COLOURS], 560).to_str() + "\n"
    assert train_tokenizer([*CAPTIONS, *COLOURS][::-1], 560).to_str() + "\n" == other.decode()


def test_tokenizer_of_too_few_symbols() -> None:
    with pytest.raises(ConfigError, match="vocab_size = 513 is below 514"):
        train_tokenizer(CAPTIONS, 513)


# --- losses and optimisation ----------------------------------------------------------------------------------------


def test_autoencoder_loss_is_reconstruction_and_divergence() -> None:
    class Perfect(nn.Module):
        def encode(self, pictures: Tensor) -> Tensor:
            return torch.cat([torch.full((1, 2, 4, 4), 3.0), torch.full((1, 2, 4, 4), -1.0)], dim=1)

        def decode(self, latents: Tensor) -> Tensor:
            self.latents = latents
            return torch.full((1, 3, 8, 8), 0.5)

    vae, noise = Perfect(), torch.randn(1, 2, 4, 4)
    loss = autoencoder_loss(vae, torch.zeros(1, 3, 8, 8), noise, 0.1)  # type: ignore[arg-type]
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(3.0, math.exp(-0.5)), torch.distributions.Normal(0.0, 1.0)
    )
    assert loss.item() == pytest.approx(0.25 + 0.1 * divergence.item(), rel=1e-6)
    torch.testing.assert_close(vae.latents, 3.0 + math.exp(-0.5) * noise)


def test_diffusion_targets() -> None:
    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    alphas_cumprod, timesteps = torch.tensor([0.9, 0.36]), torch.tensor([1, 0])
    assert diffusion_target("epsilon", latents, noise, alphas_cumprod, timesteps) is noise
    assert diffusion_target("sample", latents, noise, alphas_cumprod, timesteps) is latents
    v = diffusion_target("v_prediction", latents, noise, alphas_cumprod, timesteps)
    torch.testing.assert_close(v[0], 0.6 * noise[0] - 0.8 * latents[0])


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    settings = Optimisation(steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * 0.55)
    assert rates[100] == pytest.approx(0.2)
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))
    short = Optimisation(steps=5, batch_size=1, learning_rate=1.0, warmup_steps=10)
    assert [short.learning_rate_at(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps = 0 must hold integers of at least 1"),
        ({"warmup_steps": 0}, "warmup_steps = 0 must hold integers of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0 must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0 must be in [0, 1)"),
    ],
)
def test_optimisation_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Optimisation(**{"steps": 1, "batch_size": 1, "learning_rate": 1.0, **changes})
    assert str(caught.value) == sentence


class Point(nn.Module):
    """A model of two numbers, pulled to where the loss says."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([1.0, -2.0]))


def fit_point(
    folder: Path, settings: Optimisation, loss_at: Callable[[Point, int], Tensor], recipe: str = "r"
) -> Point:
    point = Point()
    state_file = folder / "s.safetensors"
    fit("point", {"point": point}, lambda step: loss_at(point, step), settings, state_file, recipe, Losses())
    return point


@pytest.mark.parametrize("steps", [5, 60])
def test_average_of_the_weights_is_what_is_left(tmp_path: Path, steps: int) -> None:
    """AdamW, clipping and the average, held against the formulas written out in numbers."""
    settings = Optimisation(
        steps=steps, batch_size=1, learning_rate=0.1, warmup_steps=1, ema_decay=0.8, weight_decay=0.1
    )
    pull = torch.tensor([3.0, 4.0])
    point = fit_point(tmp_path, settings, lambda point, step: (point.at * pull).sum() * (1 + step % 3))
    weight = Point().at.detach().clone()
    average, first, second = weight.clone(), torch.zeros(2), torch.zeros(2)
    for step in range(steps):
        gradient = pull / 5.0 * settings.max_grad_norm  # its norm, 5 to 15, is clipped to 1
        rate = settings.learning_rate_at(step)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        weight = weight * (1 - rate * 0.1)
        weight -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(point.at.detach(), average, rtol=1e-4, atol=1e-5)
    state = safetensors.torch.load_file(tmp_path / "s.safetensors")
    torch.testing.assert_close(state["weight.point.at"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["average.point.at"], average, rtol=1e-4, atol=1e-5)


def test_small_gradients_are_not_scaled_up(tmp_path: Path) -> None:
    settings = Optimisation(steps=1, batch_size=1, learning_rate=0.1, max_grad_norm=1.0)
    fit_point(tmp_path, settings, lambda point, step: (point.at * torch.tensor([0.03, 0.04])).sum())
    moment = safetensors.torch.load_file(tmp_path / "s.safetensors")["first_moment.point.at"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.03, 0.04]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    monkeypatch.setattr(ldm_reference.fit, "SAVE_EVERY", 4)
    settings = Optimisation(steps=20, batch_size=1, learning_rate=0.1)
    with pytest.raises(ConfigError, match=rf"loss of stage 'point' is {bad} at step 6; lower learning_rate") as caught:
        fit_point(tmp_path, settings, lambda point, step: point.at.square().sum() * (bad if step == 6 else 1.0))
    assert "\n" not in str(caught.value)
    state = safetensors.torch.load_file(tmp_path / "s.safetensors")  # of step 4, which was good
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_state_of_another_recipe_or_damaged(tmp_path: Path) -> None:
    settings = Optimisation(steps=2, batch_size=1, learning_rate=0.1)
    fit_point(tmp_path, settings, lambda point, step: point.at.sum())
    with pytest.raises(ConfigError, match=r"s\.safetensors was made with another config"):
        fit_point(tmp_path, settings, lambda point, step: point.at.sum(), recipe="other")
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"s\.safetensors is damaged .*delete it to begin this stage again"):
        fit_point(tmp_path, settings, lambda point, step: point.at.sum())


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.toml").write_text(CONFIG)
    losses = Losses()
    train(TrainConfig.read(folder / "config.toml"), pictures, folder / "out", resume=False, progress=losses)
    return folder / "out", losses


def test_a_run_leaves_a_checkpoint_and_nothing_else(whole_run: tuple[Path, Losses]) -> None:
    folder, losses = whole_run
    assert list(losses.of) == [("autoencoder", i + 1) for i in range(7)] + [("denoiser", i + 1) for i in range(9)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    )
    model = LatentDiffusion.open(folder)
    assert model.components == ("text_encoder", "unet", "vae")
    assert model.scheduler["prediction_type"] == "v_prediction"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("a red square", padding="max_length", return_tensors="pt").input_ids
    assert model.configs["text_encoder"]["vocab_size"] == len(tokenizer)
    assert model.configs["text_encoder"]["eos_token_id"] == tokenizer.eos_token_id
    with torch.no_grad():
        text = model.load("text_encoder")(ids)
        out = model.load("unet")(torch.randn(1, 4, 8, 8), torch.tensor([500]), text.last_hidden_state)
        picture = model.load("vae").decode(out)
    assert picture.shape == (1, 3, 16, 16)
    assert picture.isfinite().all()


def test_the_scaling_factor_gives_latents_unit_variance(whole_run: tuple[Path, Losses], pictures: Path) -> None:
    vae = LatentDiffusion.open(whole_run[0]).load("vae")
    assert isinstance(vae, AutoencoderKL)
    with torch.no_grad():
        mean = vae.encode(CaptionedImages.open(pictures, 16).load(range(12))).chunk(2, dim=1)[0]
    assert (mean * vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=5e-3)  # weights are saved as fp16


@pytest.mark.parametrize("stop", [("autoencoder", 5), ("autoencoder", 7), ("denoiser", 2), ("denoiser", 8)])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path,
    pictures: Path,
    config: TrainConfig,
    whole_run: tuple[Path, Losses],
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, int],
) -> None:
    """Bit for bit: every loss and every weight, with dropout, from a save that lies before the interruption."""
    monkeypatch.setattr(ldm_reference.fit, "SAVE_EVERY", 3)
    before, after = Losses(stop), Losses()
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=before)
    assert not (tmp_path / "out" / "model_index.json").exists()
    torch.manual_seed(12345)  # what another process may have drawn
    train(config, pictures, tmp_path / "out", resume=True, progress=after)
    saved = {"autoencoder": 0, "denoiser": 0, stop[0]: (stop[1] - 1) // 3 * 3}
    saved |= {"autoencoder": 7} if stop[0] == "denoiser" else {}
    assert min(done for name, done in after.of if name == "denoiser") == saved["denoiser"] + 1
    assert len(after.of) == 7 + 9 - saved["autoencoder"] - saved["denoiser"]
    folder, losses = whole_run
    assert before.of | after.of == losses.of
    given, expected = weights(tmp_path / "out"), weights(folder)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


def test_resume_with_another_config_is_refused(
    tmp_path: Path, pictures: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm_reference.fit, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=Losses(("denoiser", 5)))
    other = dataclasses.replace(config, unet_stage=dataclasses.replace(config.unet_stage, learning_rate=1e-3))
    losses = Losses()
    with pytest.raises(ConfigError, match=r"denoiser\.safetensors was made with another config"):
        train(other, pictures, tmp_path / "out", resume=True, progress=losses)
    assert losses.of == {}
    other = dataclasses.replace(config, seed=4)
    with pytest.raises(ConfigError, match=r"autoencoder\.safetensors was made with another config"):
        train(other, pictures, tmp_path / "out", resume=True, progress=losses)


def test_an_output_that_holds_something_is_refused(
    tmp_path: Path, pictures: Path, config: TrainConfig, whole_run: tuple[Path, Losses]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty; use --resume to go on with it, or name another folder"):
        train(config, pictures, tmp_path, resume=False, progress=Losses())
    with pytest.raises(ConfigError, match=r"holds no interrupted training"):
        train(config, pictures, tmp_path, resume=True, progress=Losses())
    with pytest.raises(ConfigError, match=r"holds no interrupted training"):  # else it would be trained from the start
        train(config, pictures, whole_run[0], resume=True, progress=Losses())
    with pytest.raises(ConfigError, match=r"notes\.txt is a file; name a folder"):
        train(config, pictures, tmp_path / "notes.txt", resume=False, progress=Losses())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "notes.txt"]


def test_a_batch_larger_than_the_captions_is_refused_before_any_step(
    tmp_path: Path, pictures: Path, config: TrainConfig
) -> None:
    losses = Losses()
    large = dataclasses.replace(config, unet_stage=dataclasses.replace(config.unet_stage, batch_size=14))
    with pytest.raises(ConfigError, match="batch size 14 is larger than the 13 samples"):
        train(large, pictures, tmp_path / "out", resume=False, progress=losses)
    assert losses.of == {}


@pytest.fixture
def seen_ids(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The token ids of every batch that the text encoder is given."""
    seen: list[Tensor] = []
    forward = ldm_reference.train.CLIPTextModel.forward

    def record(self: Any, input_ids: Tensor) -> Any:
        seen.append(input_ids)
        return forward(self, input_ids)

    monkeypatch.setattr(ldm_reference.train.CLIPTextModel, "forward", record)
    return seen


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_caption_dropout_drops_its_share(
    tmp_path: Path, pictures: Path, config: TrainConfig, seen_ids: list[Tensor], share: float
) -> None:
    stage = dataclasses.replace(config.unet_stage, steps=30, batch_size=12)
    config = dataclasses.replace(config, caption_dropout=share, unet_stage=stage)
    train(config, pictures, tmp_path / "out", resume=False, progress=Losses())
    rows = torch.cat(seen_ids)
    assert len(rows) == 360
    start, end = int(rows[0, 0]), int(rows.max())
    empty = (rows == torch.tensor([start] + [end] * 7)).all(dim=1)
    assert empty.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 360))


def test_both_losses_go_down(tmp_path: Path, pictures: Path, config: TrainConfig) -> None:
    """The denoiser's to well below 1, the variance of the noise, which is what predicting nothing costs."""
    stages = {
        "vae_stage": dataclasses.replace(config.vae_stage, steps=60, batch_size=6, learning_rate=4e-3),
        "unet_stage": dataclasses.replace(config.unet_stage, steps=120, batch_size=12, learning_rate=4e-3),
    }
    scheduler = {**config.scheduler, "prediction_type": "epsilon"}
    config = dataclasses.replace(config, unet={**config.unet, "dropout": 0.0}, scheduler=scheduler, **stages)
    losses = Losses()
    train(config, pictures, tmp_path / "out", resume=False, progress=losses)
    autoencoder, denoiser = (
        [loss for (name, _), loss in losses.of.items() if name == stage] for stage in ("autoencoder", "denoiser")
    )
    assert sum(autoencoder[-20:]) < 0.5 * sum(autoencoder[:20])
    assert sum(denoiser[-20:]) / 20 < 0.7


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seed = 3", "seed = [", "is not a readable TOML file"),
        ("seed = 3", "", "missing seed"),
        ("seed = 3", 'seed = "3"', "seed = '3' must be int"),
        ("seed = 3", "seed = 3\nspeed = 1", "unknown key 'speed'"),
        ("caption_dropout = 0.2", "caption_dropout = 1.0", "caption_dropout = 1.0 must be in [0, 1)"),
        ("resolution = 16", "resolution = 15", "resolution = 15 is not a multiple of the autoencoder's 2"),
        ("vocab_size = 540", "", "[tokenizer] lacks vocab_size"),
        ("vocab_size = 540", "vocab_size = 0", "vocab_size = 0 must hold integers of at least 1"),
        ("steps = 7", "", "[vae_stage] lacks steps"),
        ("steps = 7", "steps = 7.5", "steps = 7.5 must be int"),
        ("steps = 7", "stepz = 7\nsteps = 7", "unknown key 'stepz'"),
        ('"v_prediction"', '"velocity"', "prediction_type = 'velocity' is not supported"),
        ("cross_attention_dim = 16", "cross_attention_dim = 24", "unet cross_attention_dim = 24 must be 16 here"),
        ("dropout = 0.1", "in_channels = 3", "unet in_channels = 3 must be 4 here"),
        ("dropout = 0.1", "num_class_embeds = 3", "the unet must be conditioned on text"),
        ("num_hidden_layers = 1", "num_hidden_layers = 0", "num_hidden_layers = 0 must hold integers of at least 1"),
    ],
)
def test_config_that_cannot_be_trained(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in CONFIG
    (tmp_path / "config.toml").write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        TrainConfig.read(tmp_path / "config.toml")
    assert sentence in str(caught.value)


def test_config_missing_or_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a readable TOML file"):
        TrainConfig.read(tmp_path / "config.toml")
    flat = "".join(line + "\n" for line in CONFIG.splitlines() if line.startswith(("seed", "res", "kl", "cap")))
    names = ("vae_stage", "unet_stage", "vae", "tokenizer", "text_encoder", "unet", "scheduler")
    (tmp_path / "config.toml").write_text(flat + "".join(f"{name} = 5\n" for name in names))
    with pytest.raises(ConfigError, match="vae_stage = 5 must be a table"):
        TrainConfig.read(tmp_path / "config.toml")


def test_the_shipped_recipe_can_be_read() -> None:
    recipes = Path(ldm_reference.train.__file__).parent / "recipes"
    for recipe in recipes.glob("*.toml"):
        assert TrainConfig.read(recipe).resolution > 0
