"""Tokenizers that a ``tokenizer.json`` of the Python package ``tokenizers`` describes whole.

A prompt, with U+FFFD for each lone surrogate, becomes a row of ids in this order:

1. Where ``lowercase_prompts`` is true, the prompt becomes ``prompt.strip().lower()``, with the added tokens in it.
2. Added tokens written out in the prompt, ``</s>`` say, are cut out and keep their own ids.
3. ``normalizer`` rewrites what is between them.
4. ``pre_tokenizer`` splits that into words.
5. ``model`` makes tokens of each word: the split of highest probability by a unigram model (Kudo, 1804.10959), or
   byte-pair encoding (Sennrich et al. 2016) of characters, of bytes where a character is none of the vocabulary.
6. The ids are cut off to ``truncation``, put between the special tokens of ``post_processor``, padded to ``padding``.

What the file may say, so that the C++ runtime reads it alike:

    truncation      max_length, from 2; on the right, with stride 0
    padding         Fixed, to the same length; pad_id is of a token that no text ends with
    normalizer      null, or one or a Sequence of Lowercase, NFC, Precompiled, Replace (a String), Strip, which together
                    make a text at most 1024 times as long
    pre_tokenizer   null, or one or a Sequence of Metaspace, Split (at a String, MergedWithPrevious), WhitespaceSplit
    model           Unigram, or BPE without dropout, prefix or suffix
    post_processor  null, or a TemplateProcessing, of which ``single`` is read
    added_tokens    each with the id that it gets when they are added in order; those that are looked for in normalised
                    text differ there, and none begins with white space where one takes it along on its right
    lowercase_prompts
                    missing, which is false, or false or true; a key that only this package knows

Whatever else it says is not read. The result equals that of transformers' tokenizer of the same file. Lower case is in
the C++ runtime what it is in Python 3.11, of Unicode 14; a later Python knows more letters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ldm_export.errors import InputError, warn
from ldm_export.reading.documents import MalformedError, json_text
from ldm_export.runtime.tokenizer_document import (
    SPACE,
    check_sought,
    check_tokenizer,
    length_and_padding,
    template,
    what_is_read,
)
from ldm_export.runtime.tokenizer_files import TokenizerFiles

FILE = "tokenizer.json"


class JsonTokenizer:
    """A tokenizer opened from a folder's ``tokenizer.json``.

    Parameters
    ----------
    files : the folder's; of a bundle `TokenizerFiles.of_bundle`

    Attributes
    ----------
    model_max_length : length of every row of ids
    pad_token_id : what rows are padded with
    pads_left : whether padding comes first

    Raises
    ------
    BundleError
        If the file is missing, is not what it should be, or has a part that is not read here.
    """

    length_file = FILE

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        document = files.json(FILE)
        if document is None:
            raise files.bad(FILE, "is missing")
        try:
            self.model_max_length, self.pad_token_id, self.pads_left = length_and_padding(document)
            vocabulary = check_tokenizer(document)
            before, after = template(document.get("post_processor"), vocabulary)
            if len(before) + len(after) >= self.model_max_length:
                raise MalformedError(f"has no room for text between its special tokens, in {self.model_max_length}")
            self._before, self._after = before, after
            try:
                self._backend = tokenizers.Tokenizer.from_str(json_text(what_is_read(document)))
            except Exception as error:  # what tokenizers raises has no narrower type
                raise MalformedError(f"is refused by tokenizers ({error})") from error
            self._lowercase = document.get("lowercase_prompts", False)
            check_sought(document.get("added_tokens", []), self._backend.normalizer.normalize_str)
        except MalformedError as fault:
            raise files.bad(FILE, str(fault)) from fault

    def __call__(self, prompts: str | Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts, as :meth:`ldm_export.runtime.tokenizer.Tokenizer.__call__` does.

        Raises
        ------
        InputError
            If a prompt is not a ``str``, or ends with the padding token written out.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = np.full((len(batch), self.model_max_length), self.pad_token_id, np.int64)  # (B, T)
        room = self.model_max_length - len(self._before) - len(self._after)
        for row, prompt in zip(ids, batch, strict=True):
            if not isinstance(prompt, str):
                raise InputError(f"A prompt is {prompt!r}, of type {type(prompt).__name__}; prompts are of type str.")
            text = prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if self._lowercase:
                text = text.strip().lower()
            encoding = self._backend.encode(text, add_special_tokens=False)
            body = encoding.ids
            if len(body) > room:
                cut = "".join(encoding.tokens[room:]).replace(SPACE, " ").strip()
                warn(
                    f"The prompt has {len(body)} tokens; this model reads {room}. Cut off: {cut!r}. Shorten the prompt."
                )
                body = body[:room]
            found = [*self._before, *body, *self._after]
            if found and found[0 if self.pads_left else -1] == self.pad_token_id:
                end, token = "begins" if self.pads_left else "ends", self._backend.id_to_token(self.pad_token_id)
                raise InputError(f"The prompt {end} with {token!r}, which stands for no text. Leave it out.")
            if self.pads_left:
                row[len(row) - len(found) :] = found
            else:
                row[: len(found)] = found
        return ids
