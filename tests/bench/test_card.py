"""The fidelity card on tiny models: its rows, a rerun that gives the same figures, and nothing measured twice."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ldm_export.bench import card as card_module
from ldm_export.bench.card import Card, Document, judged, read_card, value_of
from ldm_export.bench.card_page import card_page
from ldm_export.bench.card_rows import CardOptions, open_rows
from ldm_export.bench.image_similarity import pictures_of
from ldm_export.cli import main
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.pictures.files import grid
from ldm_export.verify import latency
from ldm_export.verify.gates import Gate
from ldm_export.verify.image_generators import TorchImageGenerator
from tests.training import write_pictures

PROMPTS = ("a red circle", "a <b>blue</b> & green square", "-1")
OPTIONS = CardOptions(prompts=PROMPTS, pictures=10, steps=(6, 2), truth_steps=6)
FEW = replace(OPTIONS, pictures=3)
ROWS = ["PyTorch tiny ddim 6", "tiny ddim 6", "tiny ddim 2"]
NEEDS = {"cold_start_ms": 900.0, "cold_starts_ms": [900.0], "peak_rss_bytes": 20_000_000, "device_bytes": None}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Any:
    """No new processes, no pauses, one round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_module, "processes_in_turn", lambda rows, rounds, progress: dict.fromkeys(rows, NEEDS))
        patch.setattr(card_module, "ROUNDS", 2)
        patch.setattr(latency.time, "sleep", lambda seconds: None)
        yield


def assert_drawn(row: Document, folder: Path) -> None:
    """The row's command, run as it stands, draws the pictures that the row shows."""
    program, *words = shlex.split(row["command"])
    words[words.index("pictures.png")] = str(folder / "pictures.png")
    done = CliRunner().invoke(main, words)
    assert (program, done.exit_code) == ("ldm-export", 0), done.output
    drawn = np.asarray(Image.open(folder / "pictures.png"))
    np.testing.assert_array_equal(drawn, np.asarray(grid(pictures_of(row["png"]))))


def run(card: Card, path: Path, gates: tuple[Gate, ...] = (), *, resume: bool = False) -> Document:
    return card.run(path, "ldm-export card <tiny>", gates, resume=resume, progress=lambda what: None)


@pytest.fixture(scope="module")
def card(tiny_checkpoint: Path, tiny_bundle: Path) -> Card:
    return Card([tiny_bundle], open_checkpoint(tiny_checkpoint), OPTIONS)


@pytest.fixture(scope="module")
def document(card: Card, tmp_path_factory: pytest.TempPathFactory) -> Document:
    path = tmp_path_factory.mktemp("card") / "card.json"
    made = run(card, path)
    assert read_card(path) == json.loads(json.dumps(made))
    assert {file.name for file in path.parent.iterdir()} == {"card.json", "card.truth.npz"}
    return made


# --- what is found --------------------------------------------------------------------------------------------------


def test_rows_are_judged_against_the_truth(document: Document) -> None:
    assert [row["name"] for row in document["rows"]] == ROWS
    truth, same, fewer = (row["figures"] for row in document["rows"])
    assert truth["psnr_worst_db"]["value"] == 100.0
    assert same["psnr_worst_db"]["value"] > 60 > fewer["psnr_db"]["value"]
    assert 0 <= same["perceptual_distance"]["value"] < fewer["perceptual_distance"]["value"]
    assert same["frechet_ratio"]["value"] == pytest.approx(1.0, abs=1e-2)
    assert (
        same.keys()
        == fewer.keys()
        == {
            *("psnr_db", "psnr_worst_db", "ssim", "perceptual_distance", "frechet_distance", "frechet_ratio"),
            "retrieval_at_5",
        }
    )
    for row in document["rows"][1:]:
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in row["figures"].values())
        assert row["passes"] == []
        assert row["backend"].startswith("onnxruntime")
    assert (
        "No checkpoint with alignment/ is known for this model: alignment is left out." in document["rows"][1]["notes"]
    )
    assert document["complete"] is True


def test_latency_and_memory_are_of_every_row_and_apart(document: Document) -> None:
    performance = document["performance"]
    assert list(performance["latency"]) == list(performance["memory"]) == ROWS
    assert [performance["latency"][name]["calls"] for name in ROWS] == [6, 6, 2]
    assert performance["latency"][ROWS[0]]["faster"] == 1.0
    assert performance["machine"] == document["machine"]
    row = document["rows"][2]
    assert "latency_ms" not in row["figures"]
    assert value_of(document, row, "latency_ms") == performance["latency"][ROWS[2]]["stages"]["total"]["median_ms"]
    assert value_of(document, row, "memory_mb") == 20.0


def test_a_rerun_gives_the_same_quality_figures(document: Document, card: Card, tmp_path: Path) -> None:
    again = run(Card([Path(card.rows[0][1].target)], card._checkpoint, OPTIONS), tmp_path / "again.json")
    assert again["rows"] == document["rows"]
    assert again["performance"]["latency"] != document["performance"]["latency"]


def test_a_row_s_command_draws_its_pictures(document: Document, tmp_path: Path) -> None:
    for row in document["rows"][1:]:
        assert_drawn(row, tmp_path)


def test_rows_of_fewer_calls_than_steps(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    card = Card(
        [tiny_bundle], open_checkpoint(tiny_checkpoint), replace(FEW, steps=(12, 4), calls=(6,), truth_steps=12)
    )
    document = run(card, tmp_path / "card.json")
    names = [row["name"] for row in document["rows"]]
    assert names == ["PyTorch tiny ddim 12", "tiny ddim 12", "tiny ddim 4", "tiny ddim 12 with 6 calls"]
    assert [document["performance"]["latency"][name]["calls"] for name in names] == [12, 12, 4, 6]
    all_calls, _, forecast = document["rows"][1:]
    assert (forecast["steps"], forecast["calls"], all_calls["calls"]) == (12, 6, None)
    assert forecast["figures"]["psnr_worst_db"]["value"] < all_calls["figures"]["psnr_worst_db"]["value"]
    assert_drawn(forecast, tmp_path)
    with pytest.raises(InputError, match="12"):
        opened([tiny_bundle], tiny_checkpoint, steps=(12,), calls=(13,), truth_steps=12)


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional"])
def test_models_without_text(kinds: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path) -> None:
    checkpoint, bundle = kinds(kind)
    card = Card([bundle], open_checkpoint(checkpoint), CardOptions(pictures=7, steps=(4,), truth_steps=4))
    assert card.conditions == ([0, 1, 2, 3, 4, 0, 1] if kind == "class-conditional" else [""] * 7)
    document = run(card, tmp_path / "card.json")
    row = document["rows"][1]
    assert row["figures"]["psnr_worst_db"]["value"] > 50
    assert ("retrieval_at_5" in row["figures"]) is (kind == "class-conditional")
    assert_drawn(row, tmp_path)
    with pytest.raises(InputError, match=r"1 prompts were given; checkpoint .* reads no text"):
        Card([bundle], open_checkpoint(checkpoint), CardOptions(prompts=("red",)))


def test_real_pictures_give_the_prompts_and_the_reference(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    options = CardOptions(pictures=10, steps=(2,), truth_steps=2, data=write_pictures(tmp_path / "data"))
    card = Card([tiny_bundle], open_checkpoint(tiny_checkpoint), options)
    assert len(set(card.conditions)) == 10
    document = run(card, tmp_path / "card.json")
    assert document["rows"][1]["figures"]["frechet_ratio"]["value"] == pytest.approx(1.0, abs=1e-2)
    assert document["rows"][1]["notes"][0].startswith("Fréchet distances are to 12 pictures of the data")
    with np.load(tmp_path / "card.truth.npz") as kept:
        assert len(kept.files) == 1  # nothing was drawn with other seeds


# --- which rows -----------------------------------------------------------------------------------------------------


def opened(bundles: list[Path], checkpoint: Path, **options: Any) -> list[str]:
    found = open_rows(bundles, open_checkpoint(checkpoint), CardOptions(pictures=2, **options))
    return [variant.name for _, variant in found.rows]


def test_rows_by_default_are_of_the_own_steps_and_the_truth_s(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    assert opened([tiny_bundle], tiny_checkpoint) == ["tiny ddim 20", "tiny ddim 50"]
    assert opened([tiny_bundle], tiny_checkpoint, samplers=("euler", "heun"), steps=(4,)) == [
        "tiny euler 4",
        "tiny heun 4",
    ]


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 50), ({"steps": (20,)}, 50), ({"steps": (60, 9)}, 60), ({"truth_steps": 8}, 8)]
)
def test_the_truth_has_at_least_as_many_steps_as_any_row(
    tiny_checkpoint: Path, tiny_bundle: Path, options: dict[str, Any], steps: int
) -> None:
    found = open_rows([tiny_bundle], open_checkpoint(tiny_checkpoint), CardOptions(pictures=2, **options))
    (truth, _), *_ = found.truths.values()
    assert truth.settings.steps == steps


def test_rows_of_other_sizes_have_a_truth_of_their_own(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    options = replace(FEW, steps=(2,), truth_steps=2, sizes=((16, 16), (16, 24)))
    card = Card([tiny_bundle], open_checkpoint(tiny_checkpoint), options)
    document = run(card, tmp_path / "card.json")
    names = [row["name"] for row in document["rows"]]
    assert names == [f"{name} ddim 2 {size}" for name in ("PyTorch tiny", "tiny") for size in ("16x16", "16x24")]
    assert pictures_of(document["rows"][3]["png"]).shape[1:3] == (16, 24)
    assert "--size 16x24" in document["rows"][3]["command"]
    assert "--size" not in document["rows"][2]["command"]
    assert all(row["figures"]["psnr_worst_db"]["value"] > 50 for row in document["rows"][2:])
    assert card_page(document).count("<img ") == 12


def student(bundle: Path, folder: Path) -> Path:
    """The bundle, as if it had been taught to draw in 4 steps."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["model"]["default_steps"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_student_keeps_the_steps_that_it_was_taught(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    taught = student(tiny_bundle, tmp_path / "student.bundle")
    rows = opened([tiny_bundle, taught], tiny_checkpoint, steps=(10, 6))
    assert rows == ["tiny ddim 10", "tiny ddim 6", "student ddim 4"]
    assert opened([taught], tiny_checkpoint) == ["student ddim 4"]
    with pytest.raises(InputError, match=r"steps 10 is asked for, and .* was taught to draw with ddim in 4 steps"):
        opened([taught], tiny_checkpoint, steps=(10,))


def test_the_truth_of_a_few_step_checkpoint_is_its_own(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = kinds("lcm")
    found = open_rows([bundle], open_checkpoint(checkpoint), CardOptions(pictures=2))
    own = TorchImageGenerator(open_checkpoint(checkpoint)).defaults
    (truth, _), *_ = found.truths.values()
    assert (truth.settings.sampler, truth.settings.steps) == ("lcm", own.steps)
    assert len(found.rows) == 1


def test_what_one_bundle_cannot_draw_is_left_out(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan for 'magic'"):
        opened([tiny_bundle], tiny_checkpoint, samplers=("ddim", "magic"))
    with pytest.raises(InputError, match="no plan for 'ddim' with 1001 steps"):
        opened([tiny_bundle], tiny_checkpoint, steps=(1001, 4))
    with pytest.raises(InputError, match="17"):
        opened([tiny_bundle], tiny_checkpoint, sizes=((16, 17),))
    with pytest.raises(InputError, match="was given twice"):
        opened([tiny_bundle, tiny_bundle], tiny_checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": 0}, "pictures is 0; at least 1"),
        ({"steps": (4, 4)}, "The steps 4, 4 were given. Name each once"),
        ({"steps": (0,)}, "steps is 0; at least 1"),
        ({"truth_steps": 0}, "truth_steps is 0; at least 1"),
        ({"calls": (-2,)}, "calls is -2; at least 1"),
        ({"held_out": Path("x")}, "without data"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CardOptions(**options)


# --- resuming -------------------------------------------------------------------------------------------------------


def noted(card: Card, patch: pytest.MonkeyPatch, stop: str | None = None) -> list[str]:
    """The names of what is drawn from here on; ``stop`` is interrupted."""
    drawn: list[str] = []
    draw = card._drawn

    def note(variant: Any, name: str, progress: Any) -> Any:
        if name == stop:
            raise KeyboardInterrupt
        drawn.append(name)
        return draw(variant, name, progress)

    patch.setattr(card, "_drawn", note)
    return drawn


def test_an_interrupted_card_resumes(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checkpoint = tmp_path / "card.json", open_checkpoint(tiny_checkpoint)
    first = Card([tiny_bundle], checkpoint, FEW)
    noted(first, monkeypatch, stop="tiny ddim 2")
    with pytest.raises(KeyboardInterrupt):
        run(first, path)
    kept = read_card(path)
    assert kept is not None
    assert [row["name"] for row in kept["rows"]] == ROWS[:2]
    assert not kept["complete"]
    second = Card([tiny_bundle], checkpoint, FEW)
    drawn = noted(second, monkeypatch)
    whole = run(second, path)
    assert drawn == ["tiny ddim 2"]
    assert json.loads(json.dumps(whole["rows"][:2])) == kept["rows"]
    third = Card([tiny_bundle], checkpoint, replace(FEW, steps=(6, 3, 2)))
    drawn = noted(third, monkeypatch)
    more = run(third, path, resume=True)
    assert drawn == ["tiny ddim 3"]
    assert [more["rows"][k] for k in (0, 1, 3)] == json.loads(json.dumps(whole["rows"]))
    fourth = Card([tiny_bundle], checkpoint, FEW)
    drawn = noted(fourth, monkeypatch)
    run(fourth, path)
    assert drawn == ["the truth", "tiny ddim 6", "tiny ddim 2"]  # complete, so measured anew


def test_rows_of_other_pictures_are_not_taken_up(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checkpoint = tmp_path / "card.json", open_checkpoint(tiny_checkpoint)
    run(Card([tiny_bundle], checkpoint, FEW), path)
    for options in (replace(FEW, seed=1), replace(FEW, prompts=PROMPTS[:2])):
        other = Card([tiny_bundle], checkpoint, options)
        drawn = noted(other, monkeypatch)
        run(other, path, resume=True)
        assert drawn == ["the truth", "tiny ddim 6", "tiny ddim 2"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "rows": []}', '{"format": 1, "kind": "fidelity card"}'])
def test_a_file_that_is_no_card_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    assert read_card(tmp_path / "card.json") is None


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "pickle"])
def test_truths_that_cannot_be_read_are_drawn_again(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path, file = tmp_path / "card.json", tmp_path / "card.truth.npz"
    card = Card([tiny_bundle], open_checkpoint(tiny_checkpoint), FEW)
    run(card, path)
    if content is None:
        stream = io.BytesIO()
        np.savez(stream, a=np.array([{}], dtype=object))
        content = stream.getvalue()
    file.write_bytes(content)
    other = Card([tiny_bundle], open_checkpoint(tiny_checkpoint), replace(FEW, steps=(6, 3)))
    drawn = noted(other, monkeypatch)
    run(other, path, resume=True)
    assert drawn == ["the truth", "tiny ddim 3"]


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_hold_for_every_row(document: Document) -> None:
    found = judged(document, [Gate("psnr", 60.0), Gate("memory_mb", 20.0)])
    assert [(gate["key"], gate["row"], gate["passed"]) for gate in found] == [
        ("psnr", "tiny ddim 6", True),
        ("psnr", "tiny ddim 2", False),
        ("memory_mb", "tiny ddim 6", True),
        ("memory_mb", "tiny ddim 2", True),
    ]
    assert found[1]["says"].startswith("the median PSNR of tiny ddim 2 is ")
    assert found[1]["says"].endswith(" dB; at least 60 dB is asked for")
    with pytest.raises(InputError, match=r"alignment=0\.2 cannot be judged: no row has that figure"):
        judged(document, [Gate("alignment", 0.2)])


def test_limits_that_no_row_can_be_judged_by_are_refused_before_any(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card([tiny_bundle], open_checkpoint(tiny_checkpoint), FEW)
    drawn = noted(card, monkeypatch)
    with pytest.raises(InputError, match=r"--fail-under frechet=9 cannot be judged\. Sets of 3 and 3 pictures are too"):
        run(card, tmp_path / "card.json", (Gate("frechet", 9.0),))
    assert drawn == ["the truth"]


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Open tags, and that all that are opened are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_every_row_and_runs_nothing(document: Document) -> None:
    text = card_page({**document, "gates": judged(document, [Gate("psnr", 60.0)])})
    assert "a &lt;b&gt;blue&lt;/b&gt; &amp; green square" in text
    assert "<b>blue" not in text
    assert "ldm-export card &lt;tiny&gt;" in text
    for row in document["rows"]:
        assert row["name"] in text
    assert f"{document['rows'][2]['figures']['ssim']['value']:.4f}" in text
    assert "✗ the median PSNR of tiny ddim 2 is" in text
    found = Page(text)
    assert "script" not in found.tags
    assert found.tags.count("img") == 3 * 8
    assert found.open == []
    assert "http" not in text


def test_a_page_of_one_row(document: Document) -> None:
    one = {**document, "rows": document["rows"][:2]}
    assert "What speed costs" not in card_page(one)
