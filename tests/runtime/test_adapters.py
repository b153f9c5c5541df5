"""Adapters that are given when a picture is drawn, against diffusers and PEFT, and against merged ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ldm_export.bundle import Bundle
from ldm_export.bundle.adapters import Adapter
from ldm_export.errors import InputError
from ldm_export.export.adapters import make_adapter
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.graph.branches import add_branches, branch_specs
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import split_concatenations
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.reading.hashes import sha256_of
from ldm_export.runtime import Pipeline
from ldm_export.runtime.prompts import Reading
from ldm_export.verify.metrics import psnr_db
from tests.adapters.peft_files import (
    CONFIGS,
    PIPELINES,
    SCALE,
    as_diffusers,
    as_kohya,
    components,
    fused,
    lora_factors,
    peft_adapter,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

Kinds = Callable[[str], tuple[Path, Path]]
DRAWN: dict[str, Any] = {"guidance": 4.0, "steps": 4, "seed": 5, "height": 16, "width": 16}


def copy_of(kind: str, kinds: Kinds, tiny_checkpoint: Path, tiny_bundle: Path, folder: Path) -> tuple[Path, Bundle]:
    """A checkpoint and a bundle of it that may be changed."""
    checkpoint, bundle = (tiny_checkpoint, tiny_bundle) if kind == "sd" else kinds(kind)
    return checkpoint, Bundle.open(shutil.copytree(bundle, folder / "bundle"))


def list_anew(bundle: Path, relative: str) -> None:
    """Let a manifest list a file as it is now."""
    manifest, file = json.loads((bundle / "manifest.json").read_text()), bundle / relative
    manifest["files"][relative] |= {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def factors(tiny_checkpoint: Path) -> dict[str, Any]:
    return lora_factors("sd", tiny_checkpoint)


@pytest.mark.parametrize("kind", PIPELINES)
def test_pictures_are_those_of_diffusers(
    kind: str, kinds: Kinds, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    checkpoint, bundle = copy_of(kind, kinds, tiny_checkpoint, tiny_bundle, tmp_path)
    file, made = tmp_path / "style.safetensors", tmp_path / "style.ldma"
    save_file(as_diffusers(lora_factors(kind, checkpoint)), file)
    adapter = make_adapter(bundle, file, made)
    assert adapter.error is not None
    assert adapter.error < 1e-5
    assert {*adapter.layers} == {*components(kind)}
    wish: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 4, "height": 16, "width": 16}
    pipe = fused(kind, checkpoint, (file, SCALE))
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    pixels = pipe("a red circle", generator=torch.Generator("cpu").manual_seed(5), output_type="np", **wish).images
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    bare = pipeline.generate("a red circle", **DRAWN).images
    drawn = pipeline.generate("a red circle", adapters=[(made, SCALE)], **DRAWN).images
    assert psnr_db(drawn[0], (pixels[0] * 255).round().astype(np.uint8)) > 80
    assert psnr_db(drawn[0], bare[0]) < 40
    assert np.array_equal(pipeline.generate("a red circle", **DRAWN).images, bare)


QUICK = ("lora", "dora", "loha", "lokr, Tucker")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS]
)
def test_kinds_of_peft(kind: str, bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    judge = peft_adapter(CONFIGS[kind](), tiny_checkpoint, tmp_path / "peft", SCALE)
    made = make_adapter(bundle, tmp_path / "peft", tmp_path / "style.ldma")
    assert not made.unmatched
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    denoiser, noise = pipeline.denoiser(
        "a red circle", adapters=[(tmp_path / "style.ldma", SCALE)], **{**DRAWN, "guidance": 1.0}
    )
    denoiser.sample[...] = noise
    given = denoiser(431.0)[0]
    encoder = pipeline._conditioning._encoders["text_encoder"]
    (row,) = encoder.read(["a red circle"], Reading())[0]
    states = encoder.encode([row])["last_hidden_state"]
    with torch.no_grad():
        exact = judge(torch.from_numpy(noise), 431.0, torch.from_numpy(states)).sample.numpy()
    assert np.abs(given - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("form", ["plain", "ort-cpu", "openvino"])
def test_batches_of_mixtures_are_the_single_pictures(
    form: str, bundle: Bundle, factors: dict[str, Any], tmp_path: Path
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(as_diffusers({"unet": factors["unet"]}), one)
    save_file({name: value.flip(0).contiguous() for name, value in as_kohya(factors, "sd").items()
               if not name.endswith("alpha")}, two)  # fmt: skip
    if form == "ort-cpu":
        build_ort_cpu(bundle)
    made = [make_adapter(bundle, file, file.with_suffix(".ldma")).path for file in (one, two)]
    mixtures = [[(made[0], 0.8)], [(made[1], -0.5)], [], [(made[0], 0.3), (made[1], 0.4)]]
    prompts = ["a red circle", "a blue square", "a red circle", "a blue square"]
    pipeline = Pipeline.open(bundle.path, backend="openvino" if form == "openvino" else "cpu")
    assert ("ort-cpu" in pipeline.backend) == (form == "ort-cpu")
    options = {**DRAWN, "seed": [5, 6, 7, 8]}
    batch = pipeline.generate(prompts, adapters=mixtures, **options)
    for number, mixture in enumerate(mixtures):
        single = pipeline.generate(prompts[number], adapters=mixture, **{**DRAWN, "seed": 5 + number})
        assert np.abs(single.latents - batch.latents[number]).max() < 1e-4 * np.abs(single.latents).max()
    swapped = pipeline.generate(prompts, adapters=mixtures[::-1], **options)
    assert np.abs(swapped.latents - batch.latents).max() > 0.1


def test_a_larger_set_of_layers_keeps_what_was_made(bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> None:
    unet = factors["unet"]
    some, others = tmp_path / "some.safetensors", tmp_path / "others.safetensors"
    save_file(as_diffusers({"unet": {name: value for name, value in unet.items() if "to_q" in name}}), some)
    save_file(as_diffusers({"unet": {name: value for name, value in unet.items() if "conv" in name}}), others)
    first = make_adapter(bundle, some, tmp_path / "some.ldma").path
    before = Pipeline.open(bundle.path, backend="cpu").generate("a red circle", adapters=[(first, 1.0)], **DRAWN)
    second = make_adapter(bundle, others, tmp_path / "others.ldma").path
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    after = pipeline.generate("a red circle", adapters=[(first, 1.0)], **DRAWN)
    assert np.abs(after.latents - before.latents).max() < 1e-4 * np.abs(before.latents).max()
    both = pipeline.generate("a red circle", adapters=[(first, 1.0), (second, 1.0)], **DRAWN)
    assert np.abs(both.latents - before.latents).max() > 0.1


@pytest.mark.parametrize("form", ["dynamic", "8 bits", "16 bits"])
def test_branches_beside_rounded_weights(form: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Whatever the weights are stored as, y' - y is the branch's own product, of what the layer reads."""
    plain = onnx.load(tiny_bundle / "unet/model.onnx")
    if form == "dynamic":
        changed = QuantizeDynamic(smallest=1).apply(plain, []).model
    elif form == "8 bits":
        changed = QuantizeWeights(smallest=1).apply(plain, []).model
    else:
        changed = plain
        for tensor in changed.graph.initializer:
            if tensor.name.endswith("to_q.weight.transposed"):
                half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
                cast = onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=onnx.TensorProto.FLOAT)
                tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{tensor.name}.half"))
                changed.graph.node.insert(0, cast)
    onnx.save(changed, tmp_path / "rounded.onnx")
    model = ir.load(tmp_path / "rounded.onnx")
    ir.passes.common.ShapeInferencePass()(model)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    add_branches(model, [layer])
    names = {str(value.name): value for node in model.graph for value in node.outputs}
    added = next(node for node in model.graph if node.op_type == "Add" and node.name == f"{layer}.Add_2")
    down = next(node for node in model.graph if node.name == f"{layer}.MatMul_0")
    assert added.inputs[0] is not None
    assert added.inputs[0].name in names
    read = [str(value.name) for value in (down.inputs[0], added.inputs[0], added.outputs[0]) if value is not None]
    ir.save(model, tmp_path / "branches.onnx")
    watched = onnx.load(tmp_path / "branches.onnx")
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in read)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    given: dict[str, Any] = {"timestep": np.float32([431, 17])}
    for value in session.get_inputs():
        sizes = {"batch": 2, "height": 8, "width": 8, "tokens": 16, f"{layer}.rank": 3, f"{layer}.rows": 2}
        shape = [sizes.get(size, 16) if isinstance(size, str) else size for size in value.shape]
        given.setdefault(value.name, generator.standard_normal(shape).astype(np.float32))
    x, y, total = session.run(read, given)
    specs = {spec.name.rpartition(".")[2]: given[spec.name] for spec in branch_specs(tmp_path / "branches.onnx")}
    expected = x @ specs["down"] @ specs["up"]
    assert np.abs(total - y - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_int8_bundle_takes_them_too(bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> None:
    """The change that an adapter makes to a dynamic int8 denoiser's output is the one of the exact denoiser."""
    file = tmp_path / "style.safetensors"
    save_file(as_diffusers({"unet": factors["unet"]}), file)
    exact = Pipeline.open(bundle.path, backend="cpu")
    made = make_adapter(bundle, file, tmp_path / "style.ldma").path
    path = bundle.file("unet/model.onnx")
    integer = QuantizeDynamic(smallest=1).apply(onnx.load(path), []).model
    copy = shutil.copytree(bundle.path, tmp_path / "integer.bundle", ignore=shutil.ignore_patterns("targets"))
    onnx.save(integer, copy / "unet/model.onnx")
    list_anew(copy, "unet/model.onnx")
    again = make_adapter(Bundle.open(copy), file, tmp_path / "again.ldma")
    assert again.error is None
    rounded = Pipeline.open(copy, backend="cpu")
    outputs = {}
    for name, pipeline in {"exact": exact, "rounded": rounded}.items():
        for strength in (0.0, 1.0):
            denoiser, noise = pipeline.denoiser("a red circle", adapters=[(made, strength)], **DRAWN)
            denoiser.sample[...] = noise
            outputs[name, strength] = denoiser(431.0)[0].copy()
    change = outputs["exact", 1.0] - outputs["exact", 0.0]
    off = outputs["rounded", 1.0] - outputs["rounded", 0.0] - change
    assert np.sqrt((off**2).mean()) < 0.1 * np.sqrt((change**2).mean())


class TestRefusals:
    def test_dora_beside_another(
        self, bundle: Bundle, tiny_checkpoint: Path, factors: dict[str, Any], tmp_path: Path
    ) -> None:
        peft_adapter(CONFIGS["dora"](), tiny_checkpoint, tmp_path / "peft", 1.0)
        save_file(as_diffusers({"unet": factors["unet"]}), tmp_path / "style.safetensors")
        files = tmp_path / "peft", tmp_path / "style.safetensors"
        dora, plain = (make_adapter(bundle, file, tmp_path / f"{file.stem}.ldma").path for file in files)
        pipeline = Pipeline.open(bundle.path, backend="cpu")
        with pytest.raises(InputError, match=r"is DoRA and another one change .* Give one of them, or merge them"):
            pipeline.generate("a red circle", adapters=[(dora, 1.0), (plain, 1.0)], **DRAWN)
        prompts, seeds = ["a red circle"] * 2, [5, 6]
        batch = pipeline.generate(prompts, adapters=[[(dora, 0.7)], [(plain, 0.7)]], **{**DRAWN, "seed": seeds})
        for number, adapter in enumerate((dora, plain)):
            single = pipeline.generate(prompts[0], adapters=[(adapter, 0.7)], **{**DRAWN, "seed": seeds[number]})
            assert np.abs(single.latents[0] - batch.latents[number]).max() < 1e-4 * np.abs(single.latents).max()

    def test_dora_that_a_branch_cannot_do(self, bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
        peft_adapter(CONFIGS["dora"](), tiny_checkpoint, tmp_path / "peft", 1.0)
        path = bundle.file("unet/model.onnx")
        onnx.save(QuantizeDynamic(smallest=1).apply(onnx.load(path), []).model, path)
        list_anew(bundle.path, "unet/model.onnx")
        with pytest.raises(InputError, match=r"is DoRA, and this bundle's weights are rounded.*Merge it"):
            make_adapter(Bundle.open(bundle.path), tmp_path / "peft", tmp_path / "style.ldma")
        assert not (tmp_path / "style.ldma").exists()
        assert not (bundle.path / "targets").exists()

    def test_convolutions_that_were_divided(self, bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> None:
        path = bundle.file("unet/model.onnx")
        model = onnx.load(path)
        assert split_concatenations(model)
        onnx.save(model, path)
        list_anew(bundle.path, "unet/model.onnx")
        file = tmp_path / "style.safetensors"
        save_file(as_diffusers({"unet": factors["unet"]}), file)
        with pytest.raises(InputError, match=r"changes up_blocks.*divided into a sum.*merge the adapter"):
            make_adapter(Bundle.open(bundle.path), file, tmp_path / "style.ldma")
        assert not (tmp_path / "style.ldma").exists()
        assert not (bundle.path / "targets").exists()

    def test_another_model(self, bundle: Bundle, kinds: Kinds, tmp_path: Path) -> None:
        file = tmp_path / "style.safetensors"
        save_file({"unet.nothing.of.this.lora_A.weight": torch.zeros(2, 2)}, file)
        with pytest.raises(InputError, match="is of a layer of this model"):
            make_adapter(bundle, file, tmp_path / "style.ldma")
        assert not (bundle.path / "targets").exists()

    def test_weights_without_names(self, bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> None:
        path = bundle.file("unet/model.onnx")
        model = ir.load(path)
        for number, value in enumerate(list(model.graph.initializers.values())):
            if str(value.name).endswith(".transposed"):
                value.name = f"unnamed_{number}"
        ir.save(model, path)
        list_anew(bundle.path, "unet/model.onnx")
        old = Bundle.open(bundle.path)
        file = tmp_path / "style.safetensors"
        save_file(as_diffusers({"unet": factors["unet"]}), file)
        with pytest.raises(InputError, match=r"exported by an older release. Export the bundle anew"):
            make_adapter(old, file, tmp_path / "style.ldma")

    @pytest.fixture
    def made(self, bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> Path:
        file = tmp_path / "style.safetensors"
        save_file(as_diffusers({"unet": factors["unet"]}), file)
        return make_adapter(bundle, file, tmp_path / "style.ldma").path

    @pytest.mark.parametrize(
        ("adapters", "why"),
        [
            ("style.ldma", "adapters"),
            ([("style.ldma",)], "give pairs such as"),
            ([["style.ldma", 1.0]], "give pairs such as"),
            ([("none.ldma", 1.0)], "none.ldma cannot be read"),
            ([("MADE", float("nan"))], "an adapter's strength"),
            ([("MADE", 1e9)], "an adapter's strength"),
            ([("MADE", 0.5), ("MADE", 0.5)], "was given twice"),
            ([[("MADE", 0.5)], []], "2 lists of adapters were given for 1 pictures"),
        ],
    )
    def test_what_is_no_list_of_adapters(self, adapters: Any, why: str, bundle: Bundle, made: Path) -> None:
        def named(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(named, value))
            return str(made) if value == "MADE" else value

        pipeline = Pipeline.open(bundle.path, backend="cpu")
        with pytest.raises(InputError, match=why):
            pipeline.generate("a red circle", adapters=named(adapters), **DRAWN)

    def test_a_bundle_of_other_networks(self, made: Path, kinds: Kinds) -> None:
        pipeline = Pipeline.open(kinds("sd2")[1], backend="cpu")
        with pytest.raises(InputError, match=r"was made for another unet than that of .*ldm-export lora"):
            pipeline.generate("a red circle", adapters=[(made, 1.0)], **DRAWN)

    def test_a_bundle_without_branches(self, made: Path, tiny_bundle: Path) -> None:
        pipeline = Pipeline.open(tiny_bundle, backend="cpu")
        with pytest.raises(InputError, match=r"takes no adapters of unet. Run: ldm-export lora"):
            pipeline.generate("a red circle", adapters=[(made, 1.0)], **DRAWN)

    @pytest.mark.parametrize(
        "what", ["cut", "pickle", "nan", "half", "shape", "axes", "rank", "nothing", "format", "key"]
    )
    def test_damaged_files(self, what: str, made: Path, bundle: Bundle, tmp_path: Path) -> None:
        bad, content = tmp_path / "bad.ldma", made.read_bytes()
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        arrays = load_arrays(made)
        first = min(arrays)
        if what == "cut":
            bad.write_bytes(content[:-100])
        elif what == "pickle":
            bad.write_bytes(b"\x80\x04\x95" + content[3:])
        else:
            if what == "nan":
                arrays[first] = np.full_like(arrays[first], np.nan)
            elif what == "half":
                del arrays[first]
            elif what == "shape":
                arrays[first] = np.ascontiguousarray(arrays[first][:-1])
            elif what == "axes":  # a linear layer's factors where the branch is a convolution's of one pixel
                layer = next(name[:-5] for name in arrays if "proj_in.down" in name)
                arrays |= {f"{layer}.{role}": np.ones((1, 1), np.float32) for role in ("down", "up")}
            elif what == "rank":
                layer = next(name[:-5] for name in arrays if "to_q.down" in name)
                empty = arrays[f"{layer}.down"][:, :0], arrays[f"{layer}.up"][:0]
                arrays |= dict(zip((f"{layer}.down", f"{layer}.up"), map(np.ascontiguousarray, empty), strict=True))
            elif what == "nothing":
                arrays, metadata["networks"] = {}, "{}"
            elif what == "format":
                metadata["format"] = "ldm_export adapter 2"
            else:
                arrays["unet/other.middle"] = arrays[first]
            save_arrays(arrays, bad, metadata)
        pipeline = Pipeline.open(bundle.path, backend="cpu")
        with pytest.raises(InputError, match=r"no adapter for bundles|other shapes"):
            pipeline.generate("a red circle", adapters=[(bad, 1.0)], **DRAWN)

    def test_paths_that_are_no_files(self, made: Path, bundle: Bundle, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.ldma")
        pipeline = Pipeline.open(bundle.path, backend="cpu")
        for path, why in ((tmp_path / "pipe.ldma", "no regular file"), ("a\0b", "null byte"), (tmp_path, "directory")):
            with pytest.raises(InputError, match=why):
                pipeline.generate("a red circle", adapters=[(path, 1.0)], **DRAWN)

    def test_whole_loops(self, made: Path, bundle: Bundle) -> None:
        pipeline = Pipeline.open(bundle.path, backend="cpu")
        with pytest.raises(InputError, match="a loop graph takes no adapters"):
            pipeline.generate("a red circle", adapters=[(made, 1.0)], whole=True, **DRAWN)


def test_a_file_that_was_replaced_is_read_anew(bundle: Bundle, factors: dict[str, Any], tmp_path: Path) -> None:
    file, made = tmp_path / "style.safetensors", tmp_path / "style.ldma"
    save_file(as_diffusers({"unet": factors["unet"]}), file)
    make_adapter(bundle, file, made)
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    first = pipeline.generate("a red circle", adapters=[(made, 1.0)], **DRAWN)
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    make_adapter(bundle, file, made)
    second = pipeline.generate("a red circle", adapters=[(str(made), 1.0)], **DRAWN)
    assert np.abs(second.latents - first.latents).max() > 0.1
    assert pipeline.generate("a red circle", adapters=[(Adapter.open(made), 1.0)], **DRAWN).seeds == (5,)
