"""The tokenizer against transformers' CLIPTokenizer on the same files, and against folders that lie."""

import json
import random
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from ldm_export.errors import BundleError, InputError
from ldm_export.runtime.tokenizer_clip import ClipTokenizer
from tests.hostile.base import tokenizer_files
from tests.hostile.tokenizers import MERGE_FILES

START, END = "<|startoftext|>", "<|endoftext|>"
PIECES = "a photo of cat dog smiling it's we're , . ! ? - ' \" ( ) 1 20 300 é ß 🎨 👩‍🚀 字 \t \n"


def flagged(content: str, **flags: bool) -> dict:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True} | flags


def typed(content: str, **flags: bool) -> dict:
    return {"__type": "AddedToken"} | flagged(content, **flags)


# The files beside vocab.json and merges.txt; the first three are as Stable Diffusion 1.5, 2.1 and SDXL have them.
VARIANTS = {
    "sd15": {
        "tokenizer_config": {
            "add_prefix_space": False,
            "bos_token": typed(START),
            "eos_token": typed(END),
            "unk_token": typed(END),
            "pad_token": END,
            "model_max_length": 77,
            "do_lower_case": True,
            "errors": "replace",
            "tokenizer_class": "CLIPTokenizer",
        },
        "special_tokens_map": {
            "bos_token": flagged(START),
            "eos_token": flagged(END),
            "unk_token": flagged(END),
            "pad_token": END,
        },
    },
    "sd21": {
        "tokenizer_config": {
            "bos_token": typed(START),
            "eos_token": typed(END),
            "unk_token": typed(END),
            "pad_token": END,
            "model_max_length": 77,
        },
        "special_tokens_map": {
            "bos_token": flagged(START),
            "eos_token": flagged(END),
            "unk_token": flagged(END),
            "pad_token": "!",
        },
    },
    "sdxl2": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "0": flagged("!", normalized=False, special=True),
                "{start}": flagged(START, special=True),
                "{end}": flagged(END, special=True),
            },
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": "!",
            "model_max_length": 77,
            "clean_up_tokenization_spaces": True,
        },
        "special_tokens_map": {"pad_token": END},
    },
    "short": {"tokenizer_config": {"model_max_length": 32}},
    "bare": {},
    "inverted": {
        "tokenizer_config": {
            "model_max_length": 24,
            "added_tokens_decoder": {"{next}": flagged("<style>", lstrip=True, special=False)},
        }
    },
    "added": {"tokenizer_config": {"model_max_length": 77}, "added_tokens": {"<cat-toy>": "{next}"}},
    "extra": {"tokenizer_config": {"model_max_length": 77, "additional_special_tokens": ["<sks>"]}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_tokenizer_folder, clip_vocabulary):
    """One folder for each variant, and one as transformers itself saves it, with ``tokenizer.json`` alone."""
    vocab, _ = clip_vocabulary
    numbers = {"start": vocab[START], "end": vocab[END], "next": len(vocab)}
    root = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, files in VARIANTS.items():
        text = json.dumps(files)
        for key, number in numbers.items():
            text = text.replace(f'"{{{key}}}": {{', f'"{number}": {{').replace(f'"{{{key}}}"', str(number))
        made[name] = make_tokenizer_folder(root / name, **json.loads(text))
    transformers = pytest.importorskip("transformers")
    saved = root / "saved"
    transformers.CLIPTokenizer.from_pretrained(made["sd21"]).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    return made | {"saved": saved}


def odd_prompts() -> list[str]:
    """Prompts by hand: the awkward ones."""
    words = "a photo of a cat sitting on a red chair "
    return [
        "", " ", "\t\n\r\x0b\x0c", "a", "A Photo of a CAT",
        "it's they're we've I'm she'll he'd don't IT'S 'S ''s 'tis o'clock", "wow!", "wow!!", "!", "! !",
        "a ! b", "!a!", "1234567890", "1st 2nd ½ Ⅷ ٣ 三", "under_score-dash—em…", "x" * 500, START, END,
        f"a {END} b", f"{START}{END}{START}", START.upper(), f"a{END.upper()}b", f"  {END}  x", "<|endoftext|",
        "|>", "<|endoftext|>" * 100, "< |endoftext| >", "<STYLE> cat", "a <style> b", "<cat-toy>",
        "a<Cat-Toy>b", "x <sks> y", "<style><sks>", "caf\u00e9", "cafe\u0301", "\u212b ngstr\u00f6m",
        "\u1e9b\u0323", "İstanbul", "ΣΊΣΥΦΟΣ", "ẞ ß", "ﬁ ligature", "한국어 텍스트", "日本語の絵",
        "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301\u0301\u0301", "\u200b\u200d\ufeff",
        "a\u00a0b\u3000c\u2028d\u2029e\u0085f", "\x00", "a\x00b", "\x01\x1f\x7f\x9f", "\ue000", "\U000f0000",
        "\ufffe\uffff", "\U0010ffff", "مرحبا بالعالم", "नमस्ते", "ไทย", "</w>", "a</w> b", "Ġ", words * 2,
        words * 9, words * 12, words * 40, "🎨" * 80, "🎨 " * 80, "a " * 75, "a " * 76, "a " * 74, "a " * 77,
        "a " * 30, "a " * 31,
    ]  # fmt: skip


def prompts_of_every_category(each: int) -> list[str]:
    by_category: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        by_category.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del by_category["Cs"]
    assert len(by_category) == 29
    rng = random.Random(0)
    picked = [rng.sample(letters, min(each, len(letters))) for letters in by_category.values()]
    return [f"a{letter}b {letter} cat{letter}{letter}" for letters in picked for letter in letters]


def random_prompts(count: int) -> list[str]:
    rng = random.Random(1)
    pieces = PIECES.split(" ")
    pieces += [START, END, " ", "  ", "<style>", "<cat-toy>", "<sks>", "\u0301", "\x00", "A", "SNOW", "Elise"]
    letters = [chr(code) for code in range(1, 0x30000) if not 0xD800 <= code < 0xE000]
    made = []
    for _ in range(count):
        parts = [rng.choice(pieces) if rng.random() < 0.8 else rng.choice(letters) for _ in range(rng.randrange(60))]
        made.append(rng.choice(["", " "]).join(parts))
    return made


def quietly(tokenizer: ClipTokenizer, prompts: list[str]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tokenizer(prompts)


def judged(folder, prompts: list[str]) -> np.ndarray:
    judge = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    length = min(judge.model_max_length, 10**6) if judge.model_max_length < 10**6 else 77
    return judge(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


@pytest.mark.parametrize("variant", [*VARIANTS, "saved"])
def test_equal_to_transformers(folders, variant):
    prompts = odd_prompts() + prompts_of_every_category(30) + random_prompts(1500)
    assert len(prompts) > 2000
    ids = quietly(ClipTokenizer(folders[variant]), prompts)
    expected = judged(folders[variant], prompts)
    assert ids.dtype == np.int64
    assert ids.shape == expected.shape
    wrong = [prompt for prompt, ours, theirs in zip(prompts, ids, expected, strict=True) if (ours != theirs).any()]
    assert not wrong


def test_equal_to_transformers_on_any_text(folders):
    ours = ClipTokenizer(folders["sd21"])
    judge = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folders["sd21"])

    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=60))
    def check(prompt):
        expected = judge([prompt], padding="max_length", truncation=True, return_tensors="np").input_ids
        np.testing.assert_array_equal(quietly(ours, [prompt]), expected)

    check()


@pytest.fixture
def folder(tmp_path, make_tokenizer_folder):
    return make_tokenizer_folder(tmp_path / "tokenizer", tokenizer_config={"model_max_length": 12, "pad_token": "!"})


def test_golden_row_without_transformers(folder, clip_vocabulary):
    vocab, _ = clip_vocabulary
    tokens = [START, "a</w>", "cat</w>", "'s</w>", "z", "z</w>", "!", END, "!", "!", "!", "!"]
    assert ClipTokenizer(folder)("A  Cat'S ZZ!").tolist() == [[vocab[token] for token in tokens]]


def test_batches(folder):
    tokenizer = ClipTokenizer(folder)
    assert tokenizer([]).shape == (0, 12)
    both = tokenizer(["a cat", ""])
    np.testing.assert_array_equal(both[:1], tokenizer("a cat"))
    assert both[1].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 10
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 12


def test_truncation_names_what_was_cut(folder):
    tokenizer = ClipTokenizer(folder)
    with pytest.warns(UserWarning, match=r"13 tokens; this model reads 10. Cut off: 'cat dogs snow'") as caught:
        ids = tokenizer("a " * 10 + "Cat dogs snow")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert ids[0, -1] == tokenizer.eos_token_id
    assert (ids[0, 1:-1] == ids[0, 1]).all()


def test_no_warning_where_the_prompt_just_fits(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipTokenizer(folder)("a " * 10)


def test_cut_inside_a_character_still_warns(folder):
    with pytest.warns(UserWarning, match="Cut off"):
        ClipTokenizer(folder)("🎨" * 7)


def test_lone_surrogates_count_as_replacement_characters(folder):
    tokenizer = ClipTokenizer(folder)
    for prompt, same in (
        ("\ud800", "\ufffd"),
        ("a\udc00b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("x\ud83d", "x\ufffd"),
    ):
        np.testing.assert_array_equal(tokenizer(prompt), tokenizer(same))


@pytest.mark.parametrize("prompts", [[1], [None], ["a", b"b"]])
def test_prompts_that_are_not_text(folder, prompts):
    with pytest.raises(InputError, match="of type str"):
        ClipTokenizer(folder)(prompts)


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


LIES = {
    "folder missing": (lambda f: shutil.rmtree(f), "vocab.json is missing"),
    "vocab missing": (lambda f: (f / "vocab.json").unlink(), "vocab.json is missing"),
    "merges missing": (lambda f: (f / "merges.txt").unlink(), "merges.txt is missing"),
    "vocab not JSON": (lambda f: (f / "vocab.json").write_text("{"), "vocab.json is not JSON"),
    "vocab a list": (lambda f: (f / "vocab.json").write_text("[]"), "vocab.json holds a JSON list"),
    "vocab not UTF-8": (lambda f: (f / "vocab.json").write_bytes(b"\xff\xfe\x00"), "vocab.json is not UTF-8 text"),
    "vocab a folder": (
        lambda f: ((f / "vocab.json").unlink(), (f / "vocab.json").mkdir()),
        "vocab.json cannot be read",
    ),
    "vocab nested too deep": (lambda f: (f / "vocab.json").write_text("[" * 200000), "vocab.json is not JSON"),
    "id of text": (lambda f: edit_json(f / "vocab.json", lambda v: v.update(a="1")), "id '1'"),
    "id negative": (lambda f: edit_json(f / "vocab.json", lambda v: v.update(a=-1)), "id -1"),
    "id true": (lambda f: edit_json(f / "vocab.json", lambda v: v.update(a=True)), "id True"),
    "id twice": (lambda f: edit_json(f / "vocab.json", lambda v: v.update(a=3)), "same id"),
    "no end token": (
        lambda f: edit_json(f / "vocab.json", lambda v: v.pop(END)),
        r"no '<\|endoftext\|>', the eos_token",
    ),
    "no start token": (lambda f: edit_json(f / "vocab.json", lambda v: v.pop(START)), "the bos_token"),
    "merge of unknown token": (
        lambda f: (f / "merges.txt").write_text("#version: 0.2\nqq zz\n"),
        "merges.txt has the merge 'qq zz', but 'qq' is not in the vocabulary",
    ),
    "merge to unknown token": (lambda f: (f / "merges.txt").write_text("q z\n"), "'qz' is not in the vocabulary"),
    "merge of one": (lambda f: (f / "merges.txt").write_text("a\n"), "a merge is two tokens"),
    "merges not UTF-8": (lambda f: (f / "merges.txt").write_bytes(b"\xff"), "merges.txt is not UTF-8 text"),
    "config not JSON": (lambda f: (f / "tokenizer_config.json").write_text("x"), "tokenizer_config.json is not JSON"),
    "length zero": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(model_max_length=1)),
        "model_max_length 1",
    ),
    "length text": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(model_max_length="77")),
        "model_max_length '77'",
    ),
    "padding left": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(padding_side="left")),
        "padding_side 'left'",
    ),
    "pad token unknown": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(pad_token="[PAD]")),
        r"no '\[PAD\]', the pad_token",
    ),
    "pad token a number": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(pad_token=5)),
        "pad_token is 5",
    ),
    "added token without id": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"x": {}})),
        "the id 'x'",
    ),
    "added token at a wrong id": (
        lambda f: edit_json(
            f / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"7": {"content": "<toy>"}})
        ),
        "give '<toy>' the id 7",
    ),
    "added tokens a list": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=[])),
        "has the added tokens '\\[\\]'; an object is needed",
    ),
    "special map a list": (lambda f: (f / "special_tokens_map.json").write_text("[]"), "special_tokens_map.json holds"),
    "tokenizer.json not CLIP's": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}'),
        "tokenizer.json is not CLIP's",
    ),
    "tokenizer.json without vocabulary": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"end_of_word_suffix": "</w>"}}'),
        "lacks the vocabulary",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_bad_folder(folder, lie):
    spoil, message = LIES[lie]
    spoil(folder)
    with pytest.raises(BundleError, match=message) as caught:
        ClipTokenizer(folder)
    assert str(folder) in str(caught.value)


def test_imports_no_torch_and_no_transformers():
    code = "import sys, ldm_export.runtime.tokenizer; assert not {'torch', 'onnx', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in MERGE_FILES if name != "empty lines"])  # which only we take
def test_merges_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    for file, data in {**tokenizer_files(), "merges.txt": MERGE_FILES[name][0]}.items():
        (tmp_path / file).write_bytes(data)
    if not MERGE_FILES[name][1]:
        with pytest.raises(Exception, match="BPE"):
            CLIPTokenizer.from_pretrained(tmp_path)
        with pytest.raises(BundleError, match=r"merges\.txt"):
            ClipTokenizer(tmp_path)
        return
    theirs = CLIPTokenizer.from_pretrained(tmp_path)("a cat ca")["input_ids"]
    assert ClipTokenizer(tmp_path)("a cat ca")[0, : len(theirs)].tolist() == theirs


@pytest.mark.parametrize(
    "prompt",
    [
        "a <fox> runs",
        "<fox><fox> and <owl>, a cat",
        "a <fox> <fox>_1 <fox>_2 runs",
        "a <fox>_1 alone, <FOX> and <one>",
        "fox <fo x>",
        "<fox>",
    ],
)
def test_a_textual_inversion_of_several_vectors_is_written_out(
    tmp_path, make_tokenizer_folder, clip_vocabulary, prompt
):
    loader = pytest.importorskip("diffusers").loaders.TextualInversionLoaderMixin
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer_folder(tmp_path / "tokenizer", tokenizer_config={"model_max_length": 24})
    judge = transformers.CLIPTokenizer.from_pretrained(folder)
    judge.add_tokens(["<fox>", "<fox>_1", "<fox>_2", "<owl>", "<owl>_1", "<one>", "<two>_1"])
    judge.save_pretrained(folder)
    written = loader._maybe_convert_prompt(None, prompt, judge)
    expected = judge([written], padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ClipTokenizer(folder)([prompt]), expected)
