"""``manifest.json``: fields that are missing, of a wrong type or out of range, and what roles need of graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.hostile.base import SPECS, Draft, entry_of, spec
from tests.hostile.case import ASKS, MISSING, Case, manifest_value, place, rows

NO_COUNT = ("0", "-1", "1.0", "8.5", "true", "null", '"8"', "[8]", "{}", MISSING, "1048577", "1" + "0" * 30, "1e2")
"""What is no whole number from 1 to 2**20."""
NO_TEXT = ("null", "1", "true", "[]", "{}", MISSING)
PNG = {**ASKS, "image": True}


def _model() -> Iterator[Case]:
    for key in ("height", "width", "latent_channels", "pixels_per_latent", "default_steps"):
        yield from rows(manifest_value("model", key), refused=NO_COUNT)
    yield from rows(manifest_value("model", "height"), opened=("16", "4"), refused=("7",))
    yield from rows(manifest_value("model", "pixels_per_latent"), refused=("1", "4", "8", "3"))
    patches = ("0", "-1", "2.0", "true", "null", '"2"', "1048576", "1048577")
    yield from rows(manifest_value("model", "patch_size"), opened=("1", "2"), refused=patches)
    sizes = ("0", "-1", "2.0", "true", "null", '"2"', "1048577")
    yield from rows(manifest_value("model", "largest_size"), opened=("16", "1048576"), refused=sizes)
    counts = ("null", "0", "1", '"true"', "[]")
    yield from rows(manifest_value("model", "strength_rounds_up"), opened=("true", "false"), refused=counts)
    yield from rows(manifest_value("model", "latent_channels"), refused=("3", "5"))
    yield from rows(
        manifest_value("model", "default_sampler"),
        opened=('"euler"', '"no-such-sampler-2"'),
        refused=('"../x"', '"a/b"', '""', '"-"', '"a--b"', '"A"', '"\\u0000"', f'"{"a" * 101}"', *NO_TEXT),
    )
    yield from rows(
        manifest_value("model", "class_count"),
        opened=("null", "1", "1000", "1048576", MISSING),
        refused=("0", "-1", "2.0", '"5"', "true", "1048577"),
    )
    yield from rows(manifest_value("model"), refused=("{}", "[]", "null", MISSING))
    yield from rows(manifest_value("model", "x"), opened=("null", "[1]", '"anything"'))


def _whole() -> Iterator[Case]:
    yield from rows(manifest_value("format_version"), refused=("0", "1", "3", "2.0", '"2"', "true", "null", MISSING))
    yield from rows(manifest_value("ldm_export_version"), opened=('""', '"99"'), refused=NO_TEXT)
    yield from rows(manifest_value("source"), opened=("{}",), refused=("[]", "null", MISSING))
    yield from rows(
        manifest_value("passes"), opened=("[]", "[{}]", '[{"x": 1}]'), refused=("{}", "null", "[1]", "[[]]", MISSING)
    )
    yield from rows(manifest_value("x"), refused=("1", "null"))
    yield from rows(manifest_value("graphs"), refused=("{}", "[]", "null", MISSING))


def _parity() -> Iterator[Case]:
    yield from rows(manifest_value("parity"), opened=("[]",), refused=("{}", "null", "[1]", "[{}]", MISSING))
    for key in ("graph", "output"):
        yield from rows(manifest_value("parity", 0, key), refused=('""', '"none"', *NO_TEXT))
    for key in ("max_error", "tolerance"):
        yield from rows(
            manifest_value("parity", 0, key),
            opened=("0", "1e-30", "1", "0.5", "1048576"),
            refused=("-1e-9", "1048577", "1e308", "NaN", "Infinity", '"0"', "true", "null", "[0]", MISSING),
        )
    yield from rows(
        manifest_value("parity", 0, "passed"), opened=("true", "false"), refused=("1", '"yes"', "null", MISSING)
    )
    yield from rows(
        manifest_value("parity", 0, "source_hashes"),
        opened=("{}", f'{{"unet/model.onnx": "{"0" * 64}"}}'),
        refused=("[]", "null", "1", '{"unet/model.onnx": 1}', '{"unet/model.onnx": "x"}'),
    )
    yield from rows(manifest_value("parity", 0, "x"), opened=("1", "null"))


def _files() -> Iterator[Case]:
    entry = {"size_bytes": 2, "sha256": "0" * 64}
    for path in (
        "/etc/passwd",
        "../x",
        "a/../x",
        "./x",
        "a//x",
        "a/",
        "",
        "a\\b",
        "c:x",
        "x ",
        " x",
        "x.",
        "a*",
        "a?",
        'a"',
        "a<b",
        "a|b",
        "a\0b",
        "a\nb",
        "a\x1b[31m",
        "a\x7fb",
        "manifest.json",
        "targets/x",
        "x/" * 300 + "x",
        "missing.bin",
        "CON" * 100,
    ):
        yield Case(f"files lists {path[:20]!r}", False, _listing(path, entry))
    yield Case("files lists a file in another case", False, _listing("UNET/model.onnx", entry))
    yield Case("files lists a folder", False, _listing("unet", entry))
    for name in ("a file.txt", "\u00e9.txt", "\u65e5\u672c/x.txt", ".hidden", "a" * 200):
        yield Case(f"a file named {name[:20]!r}", True, _added(name))
    for what, opens, change in (
        ("size_bytes 3", False, {"size_bytes": 3}),
        ("size_bytes -1", False, {"size_bytes": -1}),
        ("size_bytes 2.0", False, {"size_bytes": 2.0}),
        ("size_bytes true", False, {"size_bytes": True}),
        ("size_bytes as text", False, {"size_bytes": "2"}),
        ("size_bytes 10**30", False, {"size_bytes": 10**30}),
        ("another sha256", True, {"sha256": "0" * 64}),
        ("a sha256 in capitals", False, {"sha256": "A" * 64}),
        ("a short sha256", False, {"sha256": "0" * 63}),
        ("a long sha256", False, {"sha256": "0" * 65}),
        ("a sha256 that ends a line", False, {"sha256": "0" * 64 + "\n"}),
        ("a sha256 of full-width digits", False, {"sha256": "\uff10" * 64}),
        ("no sha256", False, {"sha256": None}),
    ):
        yield Case(f"an entry of files with {what}", opens, _entry(change))
    yield Case("another sha256, verified", False, _entry({"sha256": "0" * 64}), verify=True)
    yield Case("an entry of files that is text", False, _listing("model_index.json", "x"))
    yield from rows(manifest_value("files"), refused=("{}", "[]", "null"))


def _listing(path: str, entry: Any) -> Any:
    return lambda draft: draft.entries.update({path: entry})


def _added(path: str) -> Any:
    return lambda draft: draft.files.update({path: b"{}"})


def _entry(change: dict[str, Any]) -> Any:
    def spoil(draft: Draft) -> None:
        draft.files["more.txt"] = b"{}"
        entry = {**entry_of(b"{}"), **change}
        draft.entries["more.txt"] = {key: value for key, value in entry.items() if value is not None}

    return spoil


def _graph_entries() -> Iterator[Case]:
    for key in ("path", "inputs", "outputs"):
        yield from rows(manifest_value("graphs", "unet", key), refused=("null", "1", "{}", '""', MISSING))
    yield from rows(
        manifest_value("graphs", "unet", "path"),
        refused=('"vae_decoder/model.onnx"', '"model_index.json"', '"../x.onnx"', '"unet"'),
    )
    yield from rows(manifest_value("graphs", "unet"), refused=("[]", "null", MISSING))
    tensor = ("graphs", "unet", "inputs", 0)
    yield from rows(manifest_value(*tensor, "name"), refused=('""', '"x"', '"timestep"', *NO_TEXT))
    yield from rows(manifest_value(*tensor, "dtype"), refused=('"float64"', '"float16"', '"int64"', '""', *NO_TEXT))
    for number in range(4):
        yield from rows(
            manifest_value(*tensor, "shape", number), refused=("-1", "1.0", "true", "null", "[]", '""', "1" + "0" * 30)
        )
    yield from rows(
        manifest_value(*tensor, "shape"),
        refused=("[]", "null", '"batch"', "[1, 2]", '["batch", 4, "height"]', '["b", 4, "h", "w", 1]', MISSING),
    )


def _role_entries() -> Iterator[Case]:
    yield from rows(manifest_value("roles"), refused=("{}", "[]", "null", '"unet"', MISSING))
    yield from rows(manifest_value("roles", "x"), refused=("1", "null"))
    for key in ("denoiser", "vae_decoder", "vae_encoder"):
        yield from rows(
            manifest_value("roles", key),
            refused=('"none"', '""', '"text_encoder"', '"scheduler"', '"../unet"', '"unet/model"', *NO_TEXT),
        )
    yield from rows(
        manifest_value("roles", "conditioner"),
        opened=("null",),
        refused=('""', '"none"', '"unet"', '"text_encoder"', "0", "false", "[]", "{}", MISSING),
    )
    yield from rows(
        manifest_value("roles", "guidance", "scale"),
        opened=("0", "1", "7.5", "1048576"),
        refused=("-1", "1048577", "1e308", "1" + "0" * 300, '"4"', "true", "null", "NaN", MISSING),
    )
    yield from rows(
        manifest_value("roles", "guidance", "kind"),
        opened=('"two_rows"', '"input"', '"none"'),
        refused=('""', '"TWO_ROWS"', '"three_rows"', '"four_rows"', *NO_TEXT),
    )
    yield from rows(manifest_value("roles", "guidance", "x"), refused=("1",))
    yield from rows(manifest_value("roles", "guidance"), refused=("{}", "[]", "null", "4", MISSING))
    yield from rows(manifest_value("roles", "text_encoders"), refused=("[]", "{}", "null", "[1]", "[{}]", MISSING))
    encoder = ("roles", "text_encoders", 0)
    yield from rows(manifest_value(*encoder, "graph"), refused=('"none"', '""', '"unet"', '"loops/x"', *NO_TEXT))
    yield from rows(
        manifest_value(*encoder, "tokenizer"), refused=('"none"', '""', '"../x"', '"/etc"', '"a//b"', *NO_TEXT)
    )
    yield from rows(manifest_value(*encoder, "kind"), refused=('"t5"', '""', '"CLIP"', *NO_TEXT))
    yield from rows(manifest_value(*encoder, "length"), refused=("9", "7", *NO_COUNT))
    yield from rows(manifest_value(*encoder, "x"), refused=("1",))
    condition = ("roles", "conditions")
    yield from rows(
        manifest_value(*condition, "encoder_hidden_states"),
        refused=(
            '"text_encoder.pooler_output"',
            '"text_encoder.none"',
            '"text_encoder"',
            '"conditioner.encoder_hidden_states"',
            '"vae_decoder.sample"',
            '"class_labels"',
            '"height"',
            '"image_latents"',
            '""',
            *NO_TEXT,
        ),
    )
    for name in ("sample", "timestep", "none", ""):
        yield from rows(manifest_value(*condition, name), refused=('"height"', '"text_encoder.last_hidden_state"'))
    yield from rows(manifest_value(*condition), refused=("{}", "[]", "null", MISSING))


REFUSED_ROLES: dict[str, list[tuple[str, str]]] = {
    "no inputs of the UNet": [("graphs.unet.inputs", "[]")],
    "no outputs of the UNet": [("graphs.unet.outputs", "[]")],
    "a UNet's output of another name": [("graphs.unet.outputs.0.name", '"foo"')],
    "a UNet that gives fewer channels": [("graphs.unet.outputs.0.shape", '["batch", 3, "height", "width"]')],
    "a UNet with a fixed batch": [("graphs.unet.inputs.0.shape", '[1, 4, "height", "width"]')],
    "a UNet with a fixed height": [("graphs.unet.inputs.0.shape", '["batch", 4, 4, "width"]')],
    "a UNet with free channels": [("graphs.unet.inputs.0.shape", '["batch", "c", "height", "width"]')],
    "a UNet whose height is its width": [
        ("graphs.unet.inputs.0.shape", '["batch", 4, "side", "side"]'),
        ("graphs.unet.outputs.0.shape", '["batch", 4, "side", "side"]'),
    ],
    "a UNet's timestep of rank 0": [("graphs.unet.inputs.1.shape", "[]")],
    "a UNet's timestep of one row": [("graphs.unet.inputs.1.shape", "[1]")],
    "a UNet's timestep of another batch": [("graphs.unet.inputs.1.shape", '["rows"]')],
    "a UNet's timestep of whole numbers": [("graphs.unet.inputs.1.dtype", '"int64"')],
    "a UNet without a timestep": [("graphs.unet.inputs.1", MISSING)],
    "a UNet that reads states of another width": [("graphs.unet.inputs.2.shape", '["batch", "tokens", 7]')],
    "a UNet that reads fewer tokens": [("graphs.unet.inputs.2.shape", '["batch", 7, 6]')],
    "a UNet that reads states of rank 2": [("graphs.unet.inputs.2.shape", '["batch", 6]')],
    "a UNet's input of no known name": [("graphs.unet.inputs.2.name", '"hidden"')],
    "a UNet's two inputs of one name": [("graphs.unet.inputs.2.name", '"sample"')],
    "no text encoder": [("graphs.text_encoder", MISSING)],
    "no VAE decoder": [("graphs.vae_decoder", MISSING)],
    "no VAE encoder": [("graphs.vae_encoder", MISSING)],
    "a text encoder without inputs": [("graphs.text_encoder.inputs", "[]")],
    "a text encoder that reads int32": [("graphs.text_encoder.inputs.0.dtype", '"int32"')],
    "a text encoder that reads any length": [("graphs.text_encoder.inputs.0.shape", '["batch", "length"]')],
    "a text encoder that reads another length": [("graphs.text_encoder.inputs.0.shape", '["batch", 9]')],
    "a text encoder that reads 2**21 tokens": [("graphs.text_encoder.inputs.0.shape", '["batch", 2097152]')],
    "a text encoder of another input": [("graphs.text_encoder.inputs.0.name", '"tokens"')],
    "a text encoder without states": [("graphs.text_encoder.outputs.0.name", '"states"')],
    "a text encoder of wider states": [("graphs.text_encoder.outputs.0.shape", '["batch", 8, 7]')],
    "a text encoder of fewer states": [("graphs.text_encoder.outputs.0.shape", '["batch", 7, 6]')],
    "a decoder of other latents": [("graphs.vae_decoder.inputs.0.shape", '["batch", 5, "height", "width"]')],
    "a decoder's input of another name": [("graphs.vae_decoder.inputs.0.name", '"latents"')],
    "a decoder of half precision": [("graphs.vae_decoder.outputs.0.dtype", '"float16"')],
    "a decoder of four channels": [("graphs.vae_decoder.outputs.0.shape", '["batch", 4, "h", "w"]')],
    "a decoder of pictures of one size": [("graphs.vae_decoder.outputs.0.shape", '["batch", 3, 8, 8]')],
    "a decoder of grey pictures, and a colour encoder": [
        ("graphs.vae_decoder.outputs.0.shape", '["batch", 1, "h", "w"]')
    ],
    "a decoder without outputs": [("graphs.vae_decoder.outputs", "[]")],
    "an encoder without inputs": [("graphs.vae_encoder.inputs", "[]")],
    "an encoder of free channels": [("graphs.vae_encoder.inputs.0.shape", '["a", "b", "c", "d"]')],
    "an encoder of empty names": [("graphs.vae_encoder.inputs.0.shape", '["", 3, "", ""]')],
    "an encoder of other latents": [("graphs.vae_encoder.outputs.0.shape", '["batch", 4, "height", "width"]')],
    "an encoder's output of another name": [("graphs.vae_encoder.outputs.0.name", '"latents"')],
}
"""Changes of the manifest alone, by path and raw value, after which no picture may come."""


def _roles() -> Iterator[Case]:
    for what, changes in REFUSED_ROLES.items():
        yield Case(f"manifest: {what}", False, _changing(changes), asks=PNG)
    renamed = json.dumps(
        {**SPECS["unet"], "inputs": [spec(["n", 4, "h", "w"], "sample"), *SPECS["unet"]["inputs"][1:]]}
    )
    yield from rows(manifest_value("graphs", "unet"), refused=(renamed,))
    yield Case("manifest: sizes of other names throughout", True, _other_names, asks=PNG)
    yield Case("manifest: a second graph of the UNet's file", True, _second_of_one_file)
    any_width = _changing([("graphs.unet.inputs.2.shape", '["batch", "tokens", "w"]')])
    yield Case("manifest: a UNet that reads states of any width", True, any_width)
    yield Case("manifest: a loop of no inputs", False, _loop_of_nothing)


def _changing(changes: list[tuple[str, str]]) -> Any:
    def change(draft: Draft) -> None:
        draft.manifest = json.loads(json.dumps(draft.manifest))
        for path, raw in changes:
            keys = [int(key) if key.isdigit() else key for key in path.split(".")]
            holder, last = place(draft.manifest, keys)
            if raw == MISSING:
                del holder[last]
            else:
                holder[last] = json.loads(raw)

    return change


def _other_names(draft: Draft) -> None:
    text = json.dumps(draft.manifest["graphs"])
    for old, new in (("batch", "n"), ("height", "h"), ("width", "w"), ("tokens", "length")):
        text = text.replace(f'["{old}"', f'["{new}"').replace(f', "{old}"', f', "{new}"')
    draft.manifest["graphs"] = json.loads(text)


def _second_of_one_file(draft: Draft) -> None:
    draft.manifest["graphs"]["other"] = draft.manifest["graphs"]["unet"]


def _loop_of_nothing(draft: Draft) -> None:
    draft.files["loops/ddim-2.onnx"] = draft.files["unet/model.onnx"]
    draft.manifest["graphs"]["loops/ddim-2"] = {"path": "loops/ddim-2.onnx", "inputs": [], "outputs": []}


def cases() -> Iterator[Case]:
    """All of this part."""
    for part in (_whole, _model, _files, _parity, _graph_entries, _role_entries, _roles):
        yield from part()
