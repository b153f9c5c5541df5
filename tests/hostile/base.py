"""A small sound bundle, made by hand in milliseconds, and how a case changes it before it is written to disk.

Latents are 4 x h x w, pictures RGB of twice the size, 8 x 8 by default; the text encoder reads 8 tokens of width 6. The
graphs are a few operators each, so that a session opens in a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

from ldm_export.plan import compile_plan

TOKENS, WIDTH, VOCABULARY = 8, 6, 514
PLANS = (("ddim", 2), ("dpmpp-2m", 3), ("euler-ancestral", 2))
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
GRAPHS = {
    "text_encoder": """<ir_version: 9, opset_import: ["" : 18]>
        g (int64[batch, 8] input_ids) => (float[batch, 8, 6] last_hidden_state, float[batch, 6] pooler_output)
        <int64[1] tokens = {1}> {
            last_hidden_state = Gather <axis = 0> (table, input_ids)
            pooler_output = ReduceMean <keepdims = 0> (last_hidden_state, tokens)
        }""",
    "unet": """<ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 4, height, width] sample, float[batch] timestep, float[batch, tokens, 6] encoder_hidden_states)
          => (float[batch, 4, height, width] out_sample)
        <float tenth = {0.1}, int64[2] words = {1, 2}, int64[1] last = {3}> {
            mean = ReduceMean <keepdims = 1> (encoder_hidden_states, words)
            told = Unsqueeze (mean, last)
            small = Mul (sample, tenth)
            out_sample = Add (small, told)
        }""",
    "vae_decoder": """<ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 4, height, width] latent_sample) => (float[batch, 3, image_height, image_width] sample)
        <int64[1] from = {0}, int64[1] to = {3}, int64[1] axis = {1}, float[4] by = {1, 1, 2, 2}> {
            three = Slice (latent_sample, from, to, axis)
            sample = Resize <mode = "nearest"> (three, , by)
        }""",
    "vae_encoder": """<ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 3, image_height, image_width] sample) => (float[batch, 8, height, width] latent_parameters)
        <int64[1] from = {0}, int64[1] to = {2}, int64[1] axis = {1}> {
            small = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (sample)
            two = Slice (small, from, to, axis)
            latent_parameters = Concat <axis = 1> (small, small, two)
        }""",
}
"""Text of each graph; the text encoder's ``table`` is added, float32 (`VOCABULARY`, `WIDTH`)."""


def spec(shape: list[int | str], name: str, dtype: str = "float32") -> dict[str, Any]:
    """A tensor as the manifest lists it."""
    return {"name": name, "dtype": dtype, "shape": shape}


_LATENTS: list[int | str] = ["batch", 4, "height", "width"]
_PICTURE: list[int | str] = ["batch", 3, "image_height", "image_width"]
SPECS = {
    "text_encoder": {
        "path": "text_encoder/model.onnx",
        "inputs": [spec(["batch", TOKENS], "input_ids", "int64")],
        "outputs": [spec(["batch", TOKENS, WIDTH], "last_hidden_state"), spec(["batch", WIDTH], "pooler_output")],
    },
    "unet": {
        "path": "unet/model.onnx",
        "inputs": [
            spec(_LATENTS, "sample"),
            spec(["batch"], "timestep"),
            spec(["batch", "tokens", WIDTH], "encoder_hidden_states"),
        ],
        "outputs": [spec(_LATENTS, "out_sample")],
    },
    "vae_decoder": {
        "path": "vae_decoder/model.onnx",
        "inputs": [spec(_LATENTS, "latent_sample")],
        "outputs": [spec(_PICTURE, "sample")],
    },
    "vae_encoder": {
        "path": "vae_encoder/model.onnx",
        "inputs": [spec(_PICTURE, "sample")],
        "outputs": [spec(["batch", 8, "height", "width"], "latent_parameters")],
    },
}
MODEL = {
    "class_name": "StableDiffusionPipeline",
    "default_sampler": "ddim",
    "default_steps": 2,
    "height": 8,
    "width": 8,
    "latent_channels": 4,
    "class_count": None,
    "pixels_per_latent": 2,
    "prediction_type": "epsilon",
}
ROLES = {
    "denoiser": "unet",
    "vae_decoder": "vae_decoder",
    "vae_encoder": "vae_encoder",
    "conditioner": None,
    "text_encoders": [{"graph": "text_encoder", "tokenizer": "tokenizer", "kind": "clip", "length": TOKENS}],
    "conditions": {"encoder_hidden_states": "text_encoder.last_hidden_state"},
    "guidance": {"kind": "two_rows", "scale": 4.0},
}


@dataclass
class Draft:
    """A bundle that is not written yet.

    Attributes
    ----------
    files : content of every listed file, by path
    manifest : ``manifest.json`` without ``files``
    entries : what the manifest says of files otherwise than they are; None leaves a file out
    manifest_bytes : takes the manifest's text, gives the file
    unlisted : content of files that the manifest does not list
    target : content of ``target.json`` but for its files; None writes no target
    target_files : files of the target, by path in its folder
    after : what is done to the folder in the end
    pieces : raw JSON by the text that stands for it
    """

    files: dict[str, bytes]
    manifest: dict[str, Any]
    entries: dict[str, Any] = field(default_factory=dict)
    manifest_bytes: Callable[[str], bytes] = str.encode
    unlisted: dict[str, bytes] = field(default_factory=dict)
    target: dict[str, Any] | None = None
    target_files: dict[str, bytes] = field(default_factory=dict)
    target_bytes: Callable[[str], bytes] = str.encode
    after: list[Callable[[Path], object]] = field(default_factory=list)
    pieces: dict[str, str] = field(default_factory=dict)

    def raw(self, text: str) -> str:
        """What to put where ``text`` is to stand in a JSON document, unquoted."""
        mark = f"@@{len(self.pieces)}@@"
        self.pieces[mark] = text
        return mark

    def dumped(self, document: Any) -> str:
        text = json.dumps(document)
        for mark, piece in self.pieces.items():
            text = text.replace(json.dumps(mark), piece)
        return text

    def document(self, path: str) -> Any:
        """The JSON document that a listed file has."""
        return json.loads(self.files[path])

    def put(self, path: str, document: Any) -> None:
        """Make a listed file of a JSON document, which may have raw pieces."""
        self.files[path] = self.dumped(document).encode()

    def model(self, name: str) -> onnx.ModelProto:
        return onnx.load_from_string(self.files[f"{name}/model.onnx"])

    def graph(self, name: str, text: str) -> None:
        """Make a graph of text, its initializers being those that the text has."""
        self.files[f"{name}/model.onnx"] = parser.parse_model(text).SerializeToString()

    def write(self, folder: Path) -> None:
        for path, data in (self.files | self.unlisted).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        listed = {path: entry_of(data) for path, data in self.files.items()} | self.entries
        files = {path: entry for path, entry in listed.items() if entry is not None}
        text = self.dumped({**self.manifest, "files": files} if "files" not in self.manifest else self.manifest)
        (folder / "manifest.json").write_bytes(self.manifest_bytes(text))
        if self.target is not None:
            self._write_target(folder / "targets" / "ort-cpu", self.target)
        for change in self.after:
            change(folder)

    def _write_target(self, folder: Path, target: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        for path, data in self.target_files.items():
            (folder / path).write_bytes(data)
        files = {path: entry_of(data) for path, data in self.target_files.items()}
        (folder / "target.json").write_bytes(self.target_bytes(self.dumped({"files": files, **target})))


def entry_of(data: bytes) -> dict[str, Any]:
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sound() -> Draft:
    """A bundle in which nothing is wrong."""
    return deepcopy(_sound())


def with_target(draft: Draft) -> None:
    """Add an ``ort-cpu`` target for this machine, whose graphs are the bundle's own."""
    import onnxruntime

    from ldm_export.bundle.targets.base import needs_of

    graphs = {name: f"{name}.onnx" for name in SPECS}
    draft.target = {
        "format_version": 2,
        "kind": "ort-cpu",
        "source_hashes": {
            f"{name}/model.onnx": entry_of(draft.files[f"{name}/model.onnx"])["sha256"] for name in SPECS
        },
        "needs": needs_of(onnxruntime.__version__),
        "graphs": {
            name: {"path": path, "hoisted": {}, "shallow": "", "deep_channels": 0} for name, path in graphs.items()
        },
        "report": {},
    }
    draft.target_files = {path: draft.files[f"{name}/model.onnx"] for name, path in graphs.items()}


def with_length(draft: Draft, length: int) -> None:
    """Let texts have so many token ids, as far as the text encoder and the manifest are concerned."""
    encoder = draft.model("text_encoder")
    draft.manifest = json.loads(json.dumps(draft.manifest))
    draft.manifest["roles"]["text_encoders"][0]["length"] = length
    spec = draft.manifest["graphs"]["text_encoder"]
    for value, tensor in ((encoder.graph.input[0], spec["inputs"][0]), (encoder.graph.output[0], spec["outputs"][0])):
        value.type.tensor_type.shape.dim[1].dim_value = tensor["shape"][1] = length
    draft.files["text_encoder/model.onnx"] = encoder.SerializeToString()


def with_tokenizer_json(draft: Draft, document: Any) -> None:
    """Let a ``tokenizer.json`` of the kind "tokenizers" be the tokenizer."""
    for path in [path for path in draft.files if path.startswith("tokenizer/")]:
        del draft.files[path]
    draft.put("tokenizer/tokenizer.json", document)
    draft.manifest = json.loads(json.dumps(draft.manifest))
    draft.manifest["roles"]["text_encoders"][0]["kind"] = "tokenizers"


CONDITIONER = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[batch, 8, 6] states, float[batch] has_prompt, float height) => (float[batch, 8, 6] encoder_hidden_states)
    <int64[2] last = {1, 2}, float none = {0}> {
        rows = Unsqueeze (has_prompt, last)
        told = Mul (states, rows)
        nothing = Mul (height, none)
        encoder_hidden_states = Add (told, nothing)
    }"""


def with_conditioner(draft: Draft, text: str = CONDITIONER, source: str = "text_encoder.last_hidden_state") -> None:
    """Add a conditioner, for which no prompt is zeros; ``source`` is what its first input is."""
    model = parser.parse_model(text)
    first = model.graph.input[0]
    for node in model.graph.node:
        node.input[:] = [source if name == first.name else name for name in node.input]
    first.name = source
    draft.files["conditioner/model.onnx"] = model.SerializeToString()
    sides = {
        side: [
            spec(
                [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim],
                value.name,
                np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
            )
            for value in values
        ]
        for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output))
    }
    draft.manifest["graphs"] = {**draft.manifest["graphs"], "conditioner": {"path": "conditioner/model.onnx", **sides}}
    draft.manifest["roles"]["conditioner"] = "conditioner"
    draft.manifest["roles"]["conditions"] = {"encoder_hidden_states": "conditioner.encoder_hidden_states"}


def with_outside_weights(draft: Draft) -> None:
    """Move the text encoder's table to ``text_encoder/model.onnx_data``."""
    model = draft.model("text_encoder")
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    draft.files["text_encoder/model.onnx_data"] = table.raw_data
    length = len(table.raw_data)
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx_data", "offset": 0, "length": length}.items():
        table.external_data.add(key=key, value=str(value))
    draft.files["text_encoder/model.onnx"] = model.SerializeToString()


@cache
def _sound() -> Draft:
    files = {f"{name}/model.onnx": parser.parse_model(text).SerializeToString() for name, text in GRAPHS.items()}
    encoder = onnx.load_from_string(files["text_encoder/model.onnx"])
    table = np.sin(np.arange(VOCABULARY * WIDTH, dtype=np.float32)).reshape(VOCABULARY, WIDTH)
    encoder.graph.initializer.append(numpy_helper.from_array(table, "table"))
    files["text_encoder/model.onnx"] = encoder.SerializeToString()
    for sampler, steps in PLANS:
        plan = compile_plan(SCHEDULER, sampler, steps)
        files[f"plans/{plan.file_name}"] = plan.to_json().encode()
    files["scheduler/scheduler_config.json"] = json.dumps(SCHEDULER).encode()
    files["model_index.json"] = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
    files |= {f"tokenizer/{name}": data for name, data in tokenizer_files().items()}
    return Draft(
        files,
        {
            "format_version": 2,
            "ldm_export_version": "0.1.0",
            "model": dict(MODEL),
            "roles": deepcopy(ROLES),
            "graphs": SPECS,
            "source": {"checkpoint": "hand"},
            "passes": [],
            "parity": [
                {"graph": "unet", "output": "out_sample", "max_error": 1e-6, "tolerance": 1e-4, "passed": True},
            ],
        },
    )


def tokenizer_files() -> dict[str, bytes]:
    """CLIP's byte alphabet with two merges."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in shown] + [chr(256 + k) for k in range(256 - len(shown))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    vocab |= {"ca": 512, "cat</w>": 513, "<|startoftext|>": 510, "<|endoftext|>": 511}
    for letter in letters[-2:]:  # two letters that no prompt has make room for the special tokens
        del vocab[letter + "</w>"]
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\nc a\nca t</w>\n",
        "tokenizer_config.json": json.dumps(
            {"model_max_length": TOKENS, "unk_token": "<|endoftext|>", **named}
        ).encode(),
        "special_tokens_map.json": json.dumps(named).encode(),
    }


def sparse(relative: str, size_bytes: int) -> Callable[[Path], object]:
    """A change that makes a file that long, which takes no room on the disk."""
    return lambda folder: os.truncate(folder / relative, size_bytes)
