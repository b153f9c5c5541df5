"""The tokenizer that reads a tokenizer.json whole, against transformers on the same file, and what it refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from ldm_export.errors import BundleError, InputError
from ldm_export.runtime.tokenizer_files import TokenizerFiles
from ldm_export.runtime.tokenizer_json import FILE, JsonTokenizer
from tests.tokenizer_fixtures import (
    LENGTH,
    added_token,
    bare_document,
    charsmap,
    document_of,
    documents_by_hand,
    gemma_tokenizer,
    prompts_in_capitals,
    prompts_of_every_category,
    t5_tokenizer,
    unigram,
)


def opened(document: Any) -> JsonTokenizer:
    data = json.dumps(document).encode()
    return JsonTokenizer(TokenizerFiles(Path("tokenizer"), {FILE: data}.get))


@pytest.mark.filterwarnings("ignore:The prompt has")
@pytest.mark.parametrize("kind", ["t5", "gemma", "gemma, padded left"])
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = t5_tokenizer(tmp_path / "t5") if kind == "t5" else gemma_tokenizer()
    side = "Left" if "left" in kind else "Right"
    theirs.padding_side = side.lower()
    prompts = prompts_of_every_category(10_000)
    texts = [prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for prompt in prompts]
    expected = theirs(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np").input_ids
    ids = opened(document_of(theirs, side=side))(prompts)
    assert ids.dtype == np.int64
    wrong = np.flatnonzero((ids != expected).any(1))
    assert not len(wrong), f"{len(wrong)}: {prompts[wrong[0]]!a}"


@pytest.mark.filterwarnings("ignore:The prompt has")
@pytest.mark.parametrize("kind", ["t5", "gemma"])
def test_prompts_in_lower_case(kind: str, tmp_path: Path) -> None:
    """The whole prompt is lower case before added tokens are looked for in it."""
    theirs = t5_tokenizer(tmp_path / "t5") if kind == "t5" else gemma_tokenizer()
    theirs.padding_side = "right"
    theirs.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("\n", "<b>", "<C>")])
    prompts = ["A cat\n", "A <B>cat</B>", "a <C> b", "\x1f\u039f\u0394\u039f\u03a3", *prompts_in_capitals(2_000)]
    prompts += prompts_of_every_category(10_000)
    texts = [prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for prompt in prompts]
    texts = [text.strip().lower() for text in texts]
    expected = theirs(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np").input_ids
    document = document_of(theirs)
    ids = opened(document | {"lowercase_prompts": True})(prompts)
    wrong = np.flatnonzero((ids != expected).any(1))
    assert not len(wrong), f"{len(wrong)}: {prompts[wrong[0]]!a}"
    as_they_are = opened(document | {"lowercase_prompts": False})(prompts)
    np.testing.assert_array_equal(as_they_are, opened(document)(prompts))
    assert (as_they_are[:3] != ids[:3]).any(1).all()


def test_a_row_of_ids() -> None:
    document = bare_document(unigram("a", "b", "ab", "</s>", "<s>"), length=6)
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
        "special_tokens": {"<s>": {"ids": [5]}, "</s>": {"ids": [4]}},
    }
    document["padding"]["pad_id"] = 1
    assert opened(document)(["abb", ""]).tolist() == [[5, 3, 2, 4, 1, 1], [5, 4, 1, 1, 1, 1]]
    document["padding"]["direction"] = "Left"
    assert opened(document)("abb").tolist() == [[1, 1, 5, 3, 2, 4]]


def test_what_is_cut_off_is_told() -> None:
    document = bare_document(unigram("▁a", "▁b", "▁c"), length=2)
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    with pytest.warns(
        UserWarning, match=r"^The prompt has 3 tokens; this model reads 2\. Cut off: 'c'\. Shorten the prompt"
    ):
        assert opened(document)("a b c").tolist() == [[1, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(document)("a b")


def test_what_cannot_be_told_from_padding_is_refused() -> None:
    document = bare_document(unigram("a"), added_tokens=[added_token(2, "<pad>")])
    document["padding"]["pad_id"] = 2
    tokenizer = opened(document)
    assert tokenizer("<pad>a")[0, :3].tolist() == [2, 1, 2]
    with pytest.raises(InputError, match=r"^The prompt ends with '<pad>', which stands for no text\. Leave it out\.$"):
        tokenizer("a<pad>")
    document["padding"]["direction"] = "Left"
    with pytest.raises(InputError, match="begins with '<pad>'"):
        opened(document)("<pad>a")
    with pytest.raises(InputError, match="prompts are of type str"):
        tokenizer([1])  # type: ignore[list-item]


def test_clusters_are_looked_up_whole_where_they_are_short() -> None:
    map_ = {"type": "Precompiled", "precompiled_charsmap": charsmap({b"e": "a", "\u0301".encode(): "b"})}
    tokenizer = opened(bare_document(unigram(*"abc"), normalizer=map_, length=8))
    assert tokenizer("e").tolist()[0][:2] == [1, 0]
    assert tokenizer("e\u0301c").tolist()[0][:3] == [1, 3, 0]
    assert tokenizer("e\u0301\u0301\u0301c").tolist()[0][:6] == [1, 2, 2, 2, 3, 0]


def test_documents_by_hand_are_read() -> None:
    for name, document in documents_by_hand().items():
        assert opened(document)("a b").any(), name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "NFD"}}, "has the normalizer 'NFD', which is not read here"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "has the pre_tokenizer 'ByteLevel'"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "has a post_processor that is no TemplateProcessing"),
        ({"added_tokens": [added_token(3, "x")]}, "gives the added token 'x' the id 3, not 2"),
        ({"lowercase_prompts": 1}, "has lowercase_prompts = 1; a bool is needed"),
        ({"truncation": None}, "lacks truncation or padding"),
        ({"model": {"type": "WordPiece"}}, "has no model of the type Unigram or BPE"),
    ],
)
def test_what_is_not_read_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=f"^Tokenizer folder tokenizer: tokenizer.json {message}"):
        opened(bare_document(unigram("a")) | parts)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        JsonTokenizer(TokenizerFiles.of_folder(tmp_path))
