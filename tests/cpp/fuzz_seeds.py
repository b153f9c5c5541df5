"""What ``fuzz.cpp`` begins with: real files of a bundle, and small tokenizers of each layout that is read."""

import itertools
import json
from pathlib import Path
from typing import Any

from ldm_export.plan import SAMPLERS, compile_plan
from tests.plan_cases import wrong
from tests.tokenizer_fixtures import documents_by_hand

MANIFEST, PLAN, ONNX, TARGET, TOKENIZER, PROMPT, ENGINES, SCHEDULER = range(8)
"""The first byte, which says what the rest is."""

PLANS = (("lcm", 1), ("lcm", 4), ("ddim", 10), ("plms", 10), ("heun", 10))
PROMPTS = (
    "a red circle",
    "it's <|endoftext|> e\u0301 \u1112\u1161\u11ab  12 we'll",
    "\U0001f600\ufe0f \ufdfa \u00df\u0130",
)
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = {
    text: i for i, text in enumerate(["a", "b", "c", "c</w>", "b</w>", "ab", "ab</w>", "abc</w>", START, END])
}
MERGES = "#version: 0.2\na b\na b</w>\nab c</w>\n"
WHOLE = {
    "model": {"end_of_word_suffix": "</w>", "vocab": VOCABULARY, "merges": ["a b", ["a", "b</w>"], ["ab", "c</w>"]]},
    "added_tokens": [{"id": 10, "content": "dog", "special": False, "lstrip": True, "normalized": True}],
}
DECODER = {"9": {"content": END, "special": True, "rstrip": True}, "10": {"content": "cat", "single_word": True}}


def _tokenizer(prompt: str, special: Any = "", added: Any = "", whole: Any = "", **config: Any) -> bytes:
    parts: list[Any] = [prompt, {"model_max_length": 8, **config}, MERGES, VOCABULARY, special, added, whole]
    return "\0".join(part if isinstance(part, str) else json.dumps(part) for part in parts).encode()


def _whole_tokenizer(prompt: str, document: Any) -> bytes:
    return "\0".join([prompt, *[""] * 5, json.dumps(document)]).encode()


def write_seeds(bundle: Path, folder: Path) -> None:
    """Fill a folder with seeds from a bundle that has the target ort-cpu."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    graphs = {graph["path"] for graph in manifest["graphs"].values()}
    manifest["files"] = {path: entry for path, entry in manifest["files"].items() if path in graphs}
    target = bundle / "targets" / "ort-cpu"
    document = json.loads((target / "target.json").read_text())
    seeds = [
        (MANIFEST, json.dumps(manifest | {"passes": [], "parity": [], "source": {}}).encode()),
        (TARGET, json.dumps(document | {"report": {}}).encode()),
        (TOKENIZER, _tokenizer("abc ab", special={"bos_token": START, "eos_token": {"content": END}})),
        (TOKENIZER, _tokenizer("a dog<x>", added={"dog": 10}, additional_special_tokens=["<x>"])),
        (TOKENIZER, _tokenizer("a cat<|endoftext|> b", added_tokens_decoder=DECODER, extra_special_tokens=["<x>"])),
        (TOKENIZER, _tokenizer("abc dog", whole=WHOLE)),
        *((TOKENIZER, _whole_tokenizer(prompt, whole)) for whole in documents_by_hand().values() for prompt in PROMPTS),
    ]
    scheduler = (bundle / "scheduler" / "scheduler_config.json").read_bytes()
    seeds += [(PLAN, compile_plan(json.loads(scheduler), *plan).to_json().encode()) for plan in PLANS]
    seeds += [(SCHEDULER, bytes([number, 5]) + scheduler) for number in range(5 * len(SAMPLERS))]  # of 0 to 4 calls
    for number, (config, _, _) in enumerate(itertools.islice(wrong(0), 0, 1500, 37)):
        seeds.append((SCHEDULER, bytes([number % len(SAMPLERS), 9]) + json.dumps(config).encode()))
    seeds += [(ONNX, path.read_bytes()) for path in target.glob("unet.*.onnx")]
    seeds += [(PROMPT, prompt.encode()) for prompt in PROMPTS]
    folder.mkdir()
    for number, (kind, content) in enumerate(seeds):
        (folder / str(number)).write_bytes(bytes([kind]) + content)
