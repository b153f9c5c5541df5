"""The judge of pictures against the truth: what is equal, what is worse, what is absent, and that it repeats itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.features import feature_network
from ldm_reference.losses import perceptual_distance
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.verify import image_text_alignment
from ldm_export.verify.fidelity import (
    KINDS,
    OTHER_SEEDS,
    FidelityJudge,
    Reference,
    own_pictures,
    own_reference,
    real_pictures,
)
from ldm_export.verify.gates import Gate, gate_from_text
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings, TorchImageGenerator
from ldm_export.verify.image_text_alignment import Pictures, features_of, perceptual_distances
from ldm_export.verify.metrics import DELETED, Figure, frechet_distance, jackknifes
from tests.conftest import CAPTIONS
from tests.training import write_pictures

COUNT = 12
EXACT = {"psnr_db": 100.0, "psnr_worst_db": 100.0, "ssim": 1.0, "perceptual_distance": 0.0, "frechet_ratio": 1.0}


def blobs(seed: int, count: int = COUNT, side: int = 24) -> np.ndarray:
    """Smooth pictures of many colours, unlike noise neither alike to a network nor without structure."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in coarse]
    )


class Aligned:
    """Stands in for the towers of a checkpoint: what is brighter fits its prompt better."""

    name = "stand-in"

    def score(self, features: np.ndarray, prompts: list[str]) -> np.ndarray:
        assert len(features) == len(prompts)
        return features[:, 0]


@pytest.fixture(scope="module")
def judge() -> FidelityJudge:
    conditions = tuple(f"blob {k % 6}" for k in range(COUNT))
    return FidelityJudge(blobs(0), conditions, own_reference(blobs(1), conditions, "text"), None)


def noisy(images: np.ndarray, by: float) -> np.ndarray:
    noise = np.random.default_rng(5).normal(size=images.shape) * by
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def test_the_truth_is_equal_to_itself(judge: FidelityJudge) -> None:
    figures = judge.figures(judge.truth.copy())
    for name, value in EXACT.items():
        assert figures[name] == Figure(value, value, value), name
    distance = figures["frechet_distance"]
    assert distance.value == frechet_distance(features_of(judge.truth), features_of(judge.reference.images))
    assert distance.low < distance.value < distance.high


def test_every_figure_gets_worse_with_the_pictures(judge: FidelityJudge) -> None:
    """More noise is further from the truth by each judge; half of the pictures may be left as they are."""
    by_noise = [judge.figures(noisy(judge.truth, by)) for by in (1.0, 8.0, 60.0)]
    for better, worse in itertools.pairwise(by_noise):
        for name in ("psnr_db", "psnr_worst_db", "ssim"):
            assert better[name].value > worse[name].value, name
        for name in ("perceptual_distance", "frechet_distance", "frechet_ratio"):
            assert better[name].value < worse[name].value, name
    for figures in by_noise:
        assert all(figure.low <= figure.value <= figure.high for figure in figures.values())
    assert by_noise[0]["psnr_db"].value == pytest.approx(20 * math.log10(255), abs=0.6)  # a deviation of 1, rounded
    assert by_noise[-1]["frechet_ratio"].low > 1.0


def test_the_worst_picture_is_told_apart(judge: FidelityJudge) -> None:
    one_off = judge.truth.copy()
    one_off[3] = 255 - one_off[3]
    figures = judge.figures(one_off)
    assert figures["psnr_db"].value == 100.0
    assert figures["psnr_worst_db"].value < 15
    assert figures["psnr_worst_db"].low == figures["psnr_worst_db"].high == figures["psnr_worst_db"].value
    assert figures["perceptual_distance"].value == 0.0
    assert figures["frechet_ratio"].value != 1.0


def test_the_ratio_leaves_out_the_same_pictures(judge: FidelityJudge) -> None:
    """Its interval is the jackknife's over ratios of paired sets, tighter than the distances' own."""
    images = noisy(judge.truth, 0.5)
    ours, truth, other = (features_of(x) for x in (images, judge.truth, judge.reference.images))
    generator, ratios = np.random.default_rng(0), []
    for _ in range(100):
        kept, others = generator.permutation(COUNT)[:10], generator.permutation(COUNT)[:10]
        ratios.append(frechet_distance(ours[kept], other[others]) / frechet_distance(truth[kept], other[others]))
    half = 1.96 * np.std(ratios) * math.sqrt((1 - DELETED) / DELETED)
    figures = judge.figures(images)
    ratio, distance = figures["frechet_ratio"], figures["frechet_distance"]
    assert ratio.high - ratio.value == pytest.approx(half, rel=1e-9)
    assert (ratio.high - ratio.low) / ratio.value < 0.5 * (distance.high - distance.low) / distance.value
    assert jackknifes(frechet_distance, ours, other).tolist() == jackknifes(frechet_distance, ours, other).tolist()


def test_the_same_pictures_give_the_same_figures_to_the_bit(judge: FidelityJudge) -> None:
    """Also where they lie otherwise in memory, as pictures from PyTorch do."""
    images = noisy(judge.truth, 6.0)
    found = judge.figures(images)
    for there in (np.ascontiguousarray, channels_first):
        again = FidelityJudge(
            there(judge.truth),
            judge.conditions,
            own_reference(there(judge.reference.images), judge.conditions, "text"),
            None,
        )
        image_text_alignment._remembered.clear()
        assert again.figures(there(images)) == found


def channels_first(images: np.ndarray) -> np.ndarray:
    """Equal pictures (N, H, W, C) that lie in memory as (N, C, H, W)."""
    there = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert not there.flags["C_CONTIGUOUS"]
    return there


def test_perceptual_distances_are_of_each_pair() -> None:
    """Their mean is the distance of the batches, as training computes it; grey pictures count as coloured ones."""
    a, b = blobs(2, 3), blobs(3, 3)
    tensors = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1.0 for x in (a, b)]
    batch = float(perceptual_distance(feature_network(), *tensors))
    assert perceptual_distances(a, b).mean() == pytest.approx(batch, rel=1e-5)
    grey = a[..., :1]
    assert perceptual_distances(grey, b[..., :1]).tolist() == pytest.approx(
        perceptual_distances(grey.repeat(3, axis=-1), b[..., :1].repeat(3, axis=-1)).tolist()
    )


def test_retrieval_looks_for_pictures_of_the_own_prompt(judge: FidelityJudge) -> None:
    """Found where the gallery has the same picture of the same prompt, and not where those are of other prompts."""
    own = replace(judge, reference=own_reference(judge.truth, judge.conditions, "text"))
    assert own.figures(judge.truth)["retrieval_at_5"].value == 1.0
    far = Pictures(
        np.concatenate([judge.truth, blobs(9)]),
        ((0, "none of them"), *((k + COUNT, said) for k, said in enumerate(judge.conditions))),
    )
    others = replace(judge, reference=Reference(far, judge.reference.images, ""))
    assert others.figures(judge.truth)["retrieval_at_5"].value < 1.0


def test_alignment_is_the_judge_s_of_each_picture_and_prompt(judge: FidelityJudge) -> None:
    aligned = replace(judge, alignment=Aligned())  # type: ignore[arg-type]
    found = aligned.figures(judge.truth)["alignment"]
    assert found.value == pytest.approx(features_of(judge.truth)[:, 0].mean())
    assert not any("alignment" in note for note in aligned.notes)


def test_what_cannot_be_judged_is_absent_and_said(judge: FidelityJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "alignment" not in judge.figures(judge.truth)
    assert "No checkpoint with alignment/ is known for this model: alignment is left out." in judge.notes
    few = FidelityJudge(blobs(0, 3, 8), ("", "", ""), own_reference(blobs(1, 3, 8), ("", "", ""), None), None)
    assert few.figures(few.truth).keys() == {"psnr_db", "psnr_worst_db", "perceptual_distance"}
    assert few.notes == (
        "No real pictures were given: Fréchet distances are to 3 pictures of the truth's own with other seeds, and "
        "retrieval looks among them.",
        "Pictures of 8x8 are too small for SSIM; 11 pixels a side are needed.",
        "Sets of 3 and 3 pictures are too small for a Fréchet distance; 10 of each are needed.",
        "The model is unconditional: there is no retrieval and no alignment.",
    )
    labels = tuple(range(COUNT))
    classes = FidelityJudge(judge.truth, labels, own_reference(blobs(1), labels[::-1], "label"), None)
    assert "retrieval_at_5" in classes.figures(judge.truth)
    assert "The model reads no text: there is no alignment." in classes.notes
    lacking = replace(judge, conditions=("unheard of", *judge.conditions[1:]))
    assert "retrieval_at_5" not in lacking.figures(judge.truth)
    assert "No picture to retrieve is of 'unheard of': there is no retrieval." in lacking.notes

    def without_weights() -> None:
        raise ConfigError("the features need a package")

    monkeypatch.setattr(image_text_alignment, "feature_network", without_weights)
    bare = replace(judge)
    assert bare.figures(judge.truth).keys() == {"psnr_db", "psnr_worst_db", "ssim"}
    assert bare.notes[1:] == ("the features need a package.",)


def test_other_pictures_than_the_truth_s_are_refused(judge: FidelityJudge) -> None:
    for images in (judge.truth[1:], judge.truth[:, 1:], judge.truth.astype(np.float32)):
        with pytest.raises(InputError, match=r"the truth's are \(12, 24, 24, 3\) uint8\. Draw the same conditions"):
            judge.figures(images)


def test_a_bundle_is_near_its_checkpoint_at_shared_noise(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """In the same steps the same pictures; in fewer others, which are further by every judge that tells pictures."""
    truth, bundle = (
        TorchImageGenerator(open_checkpoint(tiny_checkpoint)),
        BundleImageGenerator(Bundle.open(tiny_bundle)),
    )
    settings = replace(truth.defaults, steps=8)
    judge = FidelityJudge(
        truth.draw(CAPTIONS, range(4), settings),
        CAPTIONS,
        own_pictures(truth, CAPTIONS, settings, lambda *_: None),
        None,
    )
    assert not np.array_equal(judge.truth, judge.reference.images)
    np.testing.assert_array_equal(
        judge.reference.images, truth.draw(CAPTIONS, [OTHER_SEEDS + k for k in range(4)], settings)
    )
    same, fewer = (judge.figures(bundle.draw(CAPTIONS, range(4), replace(settings, steps=steps))) for steps in (8, 2))
    assert same["psnr_worst_db"].value > 60
    assert same["psnr_worst_db"].value > fewer["psnr_worst_db"].value
    assert same["perceptual_distance"].value < fewer["perceptual_distance"].value


def test_a_size_of_its_own_is_drawn_by_both(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    truth = TorchImageGenerator(open_checkpoint(tiny_checkpoint))
    settings = replace(truth.defaults, steps=2, size=(16, 24))
    drawn = [
        each.draw(CAPTIONS[:2], [0, 1], settings) for each in (truth, BundleImageGenerator(Bundle.open(tiny_bundle)))
    ]
    assert drawn[0].shape == drawn[1].shape == (2, 16, 24, 3)
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    with pytest.raises(InputError, match="Pictures of 16x24 cannot be compared with a folder's"):
        real_pictures(tiny_bundle, None, (16, 24), 3, "text")


def test_fewer_calls_than_steps_are_a_bundle_s(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    settings = SamplingSettings(steps=8, calls=4)
    with pytest.raises(InputError, match="4 calls were asked for of checkpoint tiny, which calls its network in every"):
        TorchImageGenerator(open_checkpoint(tiny_checkpoint)).given(["red"], [0], settings)
    bundle = BundleImageGenerator(Bundle.open(tiny_bundle))
    assert bundle.given(["red"], [0], settings)["calls"] == 4
    assert "calls" not in bundle.given(["red"], [0], SamplingSettings())


# --- limits ---------------------------------------------------------------------------------------------------------


def test_every_limit_names_a_figure_and_says_it_with_its_number(judge: FidelityJudge) -> None:
    aligned = replace(judge, alignment=Aligned())  # type: ignore[arg-type]
    figures = aligned.figures(judge.truth).keys() | {"latency_ms", "memory_mb"}
    assert {kind.figure for kind in KINDS.values()} == figures
    for key, kind in KINDS.items():
        found = Gate(key, kind.example).judged(kind, kind.example, row="ddim 8")
        assert found["passed"], "a limit that is met to the digit is met"
        assert f"{kind.example:.3g}{kind.unit}" in found["says"]
        assert "ddim 8" in found["says"]
        beyond = kind.example * (0.9 if kind.at_least else 1.1)
        assert not Gate(key, kind.example).judged(kind, beyond, row="")["passed"]
        assert not Gate(key, kind.example).judged(kind, math.nan, row="")["passed"]


@pytest.mark.parametrize("text", ["", "psnr", "psnr=high", "psnr=inf", "speed=2"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(
        InputError, match=r"^--budget .*cannot be judged; it is KEY=NUMBER .* as psnr=45 or psnr_worst=38\."
    ):
        gate_from_text(text, KINDS, "--budget")


def test_real_pictures_are_read_of_folders(tmp_path: Path) -> None:
    folders = []
    for name in ("data", "held-out"):
        (tmp_path / name).mkdir()
        folders.append(write_pictures(tmp_path / name))
    reference = real_pictures(*folders, (16, 16), 3, "text")
    assert reference.gallery is not None
    assert reference.gallery.conditions[0] == (0, "the colour red")
    assert reference.says == "Fréchet distances are to 12 held-out pictures."
    alone = real_pictures(folders[0], None, (16, 16), 3, None)
    assert alone.gallery is None
    assert alone.says == "Fréchet distances are to 12 pictures of the data, which the model may have seen in training."
