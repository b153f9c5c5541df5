"""CLIP's tokenizer: a prompt to the fixed-length row of token ids that the text encoder reads.

The method is that of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021):
byte-level byte-pair encoding (Sennrich et al. 2016) of lower-cased text, in this order:

0. A token ``<fox>`` beside which ``<fox>_1``, ``<fox>_2`` … were added, a textual inversion (2208.01618) of several
   vectors, is replaced by all of them, a space between each: diffusers' ``maybe_convert_prompt``, quirks included.
1. Special and added tokens written out in the prompt, ``<|endoftext|>`` say, are cut out and keep their own ids.
2. The rest is normalised: Unicode NFC, each run of white space to one space, lower case.
3. It is split into words: an English contraction's ending, a run of letters, one numeral, or a run of other characters.
4. Each word's UTF-8 bytes are written as printable characters, the last one marked ``</w>``, and merged pair by pair.
5. The ids are put between ``<|startoftext|>`` and ``<|endoftext|>`` and padded on the right to ``model_max_length``.

Files read from the folder, in the Hugging Face layout: ``tokenizer.json`` where there is one, else ``vocab.json`` and
``merges.txt``; and, where present, ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.
The result equals that of transformers' ``CLIPTokenizer`` on the same folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ldm_export.errors import InputError, warn
from ldm_export.reading.documents import MalformedError, text_of
from ldm_export.runtime.tokenizer_files import TokenizerFiles

_END_OF_WORD = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NAMED = {  # role -> the token that has it unless a file says otherwise, in the order in which new ones get ids
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_DEFAULT_MAX_LENGTH = 77
_LONGEST_WRITTEN_OUT = 1 << 20  # characters; tokens that have one another in their names could make it endless
_LONGEST = 1 << 20  # transformers writes 10**30 for "no limit"
_MOST_DIGITS = 9


class ClipTokenizer:
    """A CLIP tokenizer opened from the files that the module's docstring names.

    Parameters
    ----------
    files : path, or TokenizerFiles
        The folder, such as a checkpoint's; of a bundle `TokenizerFiles.of_bundle`, which reads what is listed alone.

    Attributes
    ----------
    model_max_length : int
        Length of every row of ids; 77 if no file says otherwise.
    bos_token_id, eos_token_id, pad_token_id : int
        Some models pad with the end token, others with ``!``, id 0.
    config : dict
        What ``tokenizer_config.json`` says, or that and ``special_tokens_map.json``.
    added : dict
        Tokens outside the merges by id.

    Raises
    ------
    BundleError
        If a file is missing, is not what it should be, or contradicts another. The message names the file.
    """

    length_file = "tokenizer_config.json"

    def __init__(self, files: str | PathLike[str] | TokenizerFiles) -> None:
        files = files if isinstance(files, TokenizerFiles) else TokenizerFiles.of_folder(files)
        config = files.json("tokenizer_config.json") or {}
        whole = files.json("tokenizer.json")
        if "added_tokens_decoder" not in config:
            config = config | (files.json("special_tokens_map.json") or {})
        named = {role: _token(files, role, config.get(role) or default) for role, default in _NAMED.items()}
        vocab, merges = _vocabulary(files, whole)
        added = _added_tokens(files, config, whole, {token.content for token in named.values()})

        numbers = vocab | {token.content: number for number, token in added.items()}
        for role, token in named.items():
            if token.content not in numbers:
                raise files.bad("the vocabulary", f"has no {token.content!r}, the {role}")
        self.model_max_length = _max_length(files, config)
        self.files = files
        self._backend = _backend_from(files, vocab, merges, named["unk_token"].content)
        self._backend.add_tokens(_in_order(files, config, named, added))
        for number, token in added.items():
            actual = self._backend.token_to_id(token.content)
            if actual != number:
                raise files.bad(
                    "the added tokens", f"give {token.content!r} the id {number}; by the vocabulary it is {actual}"
                )
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            numbers[named[role].content] for role in ("bos_token", "eos_token", "pad_token")
        )
        self.config, self.added = config, added
        self._written_out = _written_out([token.content for token in added.values()])

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def __call__(self, prompts: str | Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts.

        Parameters
        ----------
        prompts : str or sequence of str
            Any text; one ``str`` is a batch of one. A lone surrogate, which no UTF-8 text holds, counts as U+FFFD.

        Returns
        -------
        ndarray, int64, shape (B, model_max_length)
            Token ids, 0 .. vocabulary size - 1.

        Raises
        ------
        InputError
            If a prompt is not a ``str``.

        Warns
        -----
        UserWarning
            For each prompt that does not fit, with the text that was cut off. Its row still ends with the end token.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.framed(self.cut(self.body(prompt))) for prompt in batch]
        return np.stack(rows) if rows else np.empty((0, self.model_max_length), np.int64)

    def body(self, prompt: str) -> list[int]:
        """Token ids of a prompt, without start, end and padding; raises InputError if it is no ``str``."""
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is {prompt!r}, of type {type(prompt).__name__}; prompts are of type str.")
        text = prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if self._written_out:
            text = self._with_vectors(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def cut(self, body: list[int]) -> list[int]:
        """Token ids that a row has room for; warns with the text of the others."""
        room = self.model_max_length - 2
        if len(body) > room:
            warn(
                f"The prompt has {len(body)} tokens; this model reads {room}. "
                f"Cut off: {self._text(body[room:])!r}. Shorten the prompt."
            )
        return body[:room]

    def framed(self, body: Sequence[int]) -> NDArray[np.int64]:
        """A row of ids, (model_max_length,): the tokens between start and end, and padding."""
        row = np.full(self.model_max_length, self.pad_token_id, np.int64)
        row[: len(body) + 2] = [self.bos_token_id, *body, self.eos_token_id]
        return row

    def _with_vectors(self, text: str) -> str:
        """Return a prompt with each of its added tokens of several vectors written out, wherever the text has it."""
        tokens = dict.fromkeys(self._backend.encode(text, add_special_tokens=False).tokens)
        for token in filter(self._written_out.__contains__, tokens):
            vectors = self._written_out[token]
            if len(text) + text.count(token) * (len(vectors) - len(token)) > _LONGEST_WRITTEN_OUT:
                raise InputError(
                    f"The prompt's tokens of several vectors are written out to more than {_LONGEST_WRITTEN_OUT} "
                    "characters. Shorten the prompt."
                )
            text = text.replace(token, vectors)
        return text

    def _text(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False).replace(_END_OF_WORD, " ").strip()


def _vocabulary(files: TokenizerFiles, whole: dict[str, Any] | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token -> id and the merges in order of rank, from ``tokenizer.json`` or from the pair of files."""
    if whole is not None:
        name = merges_name = "tokenizer.json"
        model = whole.get("model")
        if not isinstance(model, dict) or model.get("end_of_word_suffix") != _END_OF_WORD:
            raise files.bad(name, f"is not CLIP's, which has a BPE model with end_of_word_suffix {_END_OF_WORD!r}")
        vocab, lines = model.get("vocab"), model.get("merges")
    else:
        name, merges_name = "vocab.json", "merges.txt"
        vocab = files.json(name)
        if vocab is None:
            raise files.bad(name, "is missing")
        data = files.read(merges_name)
        if data is None:
            raise files.bad(merges_name, "is missing")
        try:
            text = text_of(data).replace("\r\n", "\n")
        except MalformedError as exc:
            raise files.bad(merges_name, f"is {exc}") from exc
        lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    if not isinstance(vocab, dict) or not isinstance(lines, list):
        raise files.bad(name, "lacks the vocabulary or the merges")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise files.bad(name, f"gives {token!r} the id {number!r}; ids are whole numbers from 0")
    if len(set(vocab.values())) < len(vocab):
        raise files.bad(name, "gives two tokens the same id")
    merges = []
    for line in lines:
        pair = line.split(" ") if isinstance(line, str) else line
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise files.bad(merges_name, f"has the merge {line!r}; a merge is two tokens")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise files.bad(merges_name, f"has the merge {line!r}, but {token!r} is not in the vocabulary")
        merges.append((pair[0], pair[1]))
    return vocab, merges


def _added_tokens(
    files: TokenizerFiles, config: dict[str, Any], whole: dict[str, Any] | None, special: set[str]
) -> dict[int, AddedToken]:
    """Return the tokens outside the merges by id; ``added_tokens_decoder`` makes the older places for them moot."""
    listed: Iterable[tuple[Any, Any]]
    if "added_tokens_decoder" in config:
        name, decoder = "tokenizer_config.json", config["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise files.bad(name, f"has the added tokens {str(decoder)[:40]!r}; an object is needed")
        listed = decoder.items()
    else:
        name = "added_tokens.json or tokenizer.json"
        older = (files.json("added_tokens.json") or {}).items()
        listed = [(i, {"content": t, "special": t in special, "normalized": t not in special}) for t, i in older]
        newer = (whole or {}).get("added_tokens") or []
        if not isinstance(newer, list):
            raise files.bad(name, f"has the added tokens {str(newer)[:40]!r}; a list is needed")
        listed += [(token.get("id") if isinstance(token, dict) else None, token) for token in newer]
    found = {}
    for number, token in listed:
        kind = str if "added_tokens_decoder" in config else int
        digits = str(number) if type(number) is kind else ""
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS):
            fault = f"gives an added token the id {str(number)[:40]!r}"
            raise files.bad(name, f"{fault}; ids are whole numbers from 0, of at most {_MOST_DIGITS} digits")
        found[int(digits)] = _token(files, name, token, special=False)
    return found


def _token(files: TokenizerFiles, name: str, value: object, special: bool = True) -> AddedToken:
    """Return a token given as text or as an object with ``content`` and how it is to be matched."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(value["content"], special=special or value.get("special") is True, **flags)
    raise files.bad(name, f"is {value!r}; a token is text, or an object with 'content' and true/false flags")


def _max_length(files: TokenizerFiles, config: dict[str, Any]) -> int:
    length = config.get("model_max_length") or _DEFAULT_MAX_LENGTH
    if isinstance(length, float) and length.is_integer():
        length = int(length)
    if type(length) is not int or length < 2:
        raise files.bad("tokenizer_config.json", f"has model_max_length {length!r}; a whole number from 2 is needed")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise files.bad("tokenizer_config.json", f"has {side} {config[side]!r}; only 'right' is known")
    return _DEFAULT_MAX_LENGTH if length > _LONGEST else length


def _written_out(added: Sequence[str]) -> dict[str, str]:
    """Return what each added token of several vectors is written out as, such as ``<fox> <fox>_1``."""
    known, found = {*added}, {}
    for token in added:
        vectors = [token]
        while (following := f"{token}_{len(vectors)}") in known:
            vectors.append(following)
        if len(vectors) > 1:
            found[token] = " ".join(vectors)
    return found


def _backend_from(
    files: TokenizerFiles, vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str
) -> tokenizers.Tokenizer:
    try:
        model = BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD, unk_token=unknown)
    except Exception as exc:  # what tokenizers raises has no narrower type
        raise files.bad("the vocabulary", f"is refused by tokenizers ({exc})") from exc
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _in_order(
    files: TokenizerFiles, config: dict[str, Any], named: dict[str, AddedToken], added: dict[int, AddedToken]
) -> list[AddedToken]:
    """Return all tokens in the order in which transformers registers them: of equal ones the last one's flags hold."""
    listed = {token.content for token in added.values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise files.bad("tokenizer_config.json", f"has the extra special tokens {extra!r}; a list is needed")
    special = {token.content for token in named.values()}
    later = [*named.values(), *(_token(files, "tokenizer_config.json", token) for token in extra)]
    tokens = [added[number] for number in sorted(added)] + [token for token in later if token.content not in listed]
    for token in tokens:
        token.special = token.special or token.content in special
    return tokens
