"""Loop graphs against the runtime's own loop: the same latents and pictures from one ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from ldm_export.bundle import Bundle, create_bundle
from ldm_export.bundle.manifest import stale_loops
from ldm_export.bundle.plans import loop_of, read_plan
from ldm_export.cli.main import main
from ldm_export.contract import Guidance
from ldm_export.errors import BundleError, ExportError, InputError, ParityError
from ldm_export.export import loop as export_loop
from ldm_export.export.graphs import change_graphs, copy_bundle, copy_files
from ldm_export.export.loop import WEIGHTS, build_loop
from ldm_export.export.splicing import EXTERNAL_FROM_BYTES, GraphWriter, Weights
from ldm_export.families import open_checkpoint
from ldm_export.plan import SAMPLERS, Plan
from ldm_export.runtime import Pipeline
from ldm_export.runtime.loop_inputs import loop_inputs
from ldm_export.runtime.request import checked_request
from ldm_export.verify import loops as verify_loops
from ldm_export.verify.loops import add_loop
from tests.recipe.tiny import FAKE_PASSES

TOLERANCE = 1e-5
"""Of the largest value; 1e-6 is what was seen."""
STEPS = {"lcm": 4}
WISHES: dict[str, Any] = {
    "prompts": ["a red circle", "two green triangles"],
    "negative_prompt": ["a blue square", ""],
    "seed": [7, 11],
    "height": 16,
    "width": 16,
    "guidance": 4.0,
}
Array = np.ndarray[Any, Any]


def copy_of(source: Path, folder: Path) -> Bundle:
    return Bundle.open(shutil.copytree(source, folder))


@pytest.fixture(scope="module")
def text(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with loops; tests may add others."""
    bundle = copy_of(tiny_bundle, tmp_path_factory.mktemp("loops") / "text")
    return add_loop(add_loop(bundle, "ddim-20"), "euler-ancestral-10")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle, for a test to change."""
    return copy_of(tiny_bundle, tmp_path / "bundle")


def run_loop(bundle: Bundle, name: str, wishes: dict[str, Any]) -> tuple[Array, Array]:
    """Images and latents of a loop of the bundle, opened as any user of ONNX Runtime opens it."""
    spec = bundle.manifest.graphs[f"loops/{name}"]
    session = onnxruntime.InferenceSession(bundle.file(spec.path), providers=["CPUExecutionProvider"])
    sampler, steps = loop_of(name)
    request = checked_request(bundle, **wishes, sampler=sampler, steps=steps)
    images, latents = session.run(["images", "latents"], loop_inputs(bundle, spec, request))
    return images, latents


def assert_same(bundle: Bundle, name: str, wishes: dict[str, Any], drawn_with: dict[str, Any] | None = None) -> None:
    """The loop draws what the pipeline draws."""
    sampler, steps = loop_of(name)
    drawn = Pipeline(bundle, "cpu").generate(sampler=sampler, steps=steps, **(wishes | (drawn_with or {})))
    images, latents = run_loop(bundle, name, wishes)
    assert images.dtype == np.uint8
    assert images.shape == drawn.images.shape
    assert latents.shape == drawn.latents.shape
    assert np.abs(latents - drawn.latents).max() <= TOLERANCE * np.abs(drawn.latents).max()
    assert np.abs(images.astype(int) - drawn.images).max() <= 1


# --- the same pictures as the runtime -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(text: Bundle, sampler: str) -> None:
    name = f"{sampler}-{STEPS.get(sampler, 10)}"
    assert_same(add_loop(text, name), name, WISHES)


@pytest.mark.parametrize("name", ["ddim-calls4-10", "euler-ancestral-calls5-12", "heun-calls7-5", "unipc-calls1-3"])
def test_fewer_calls_than_steps(text: Bundle, name: str) -> None:
    made = add_loop(text, name)
    assert_same(made, name, WISHES)
    sampler, steps = loop_of(name)
    of_all, _, calls = sampler.rpartition("-calls")
    whole = Pipeline(made, "cpu").generate(sampler=of_all, steps=steps, calls=int(calls), whole=True, **WISHES)
    images, latents = run_loop(made, name, WISHES)
    np.testing.assert_array_equal(whole.images, images)
    np.testing.assert_array_equal(whole.latents, latents)


def test_a_loop_of_fewer_calls_on_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    def run(*command: str) -> None:
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output

    drawn_with = ("--steps", "10", "--calls", "4")
    run("plan", str(bundle.path), "--sampler", "ddim", *drawn_with, "--loop")
    assert {"plans/ddim-calls4-10.json", "loops/ddim-calls4-10.onnx"} <= Bundle.open(bundle.path).manifest.files.keys()
    for name, whole in {"whole": ["--whole"], "steps": []}.items():
        files = ["-o", str(tmp_path / f"{name}.png"), "--latents", str(tmp_path / f"{name}.npy")]
        run("generate", str(bundle.path), "a red circle", *drawn_with, *files, *whole)
    latents, expected = (np.load(tmp_path / f"{name}.npy") for name in ("whole", "steps"))
    assert np.abs(latents - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_plan_of_all_calls_draws_with_the_loop_of_its_sampler(text: Bundle) -> None:
    pipeline = Pipeline(text, "cpu")
    drawn, expected = (pipeline.generate(**WISHES, steps=20, calls=calls, whole=True) for calls in (20, None))
    np.testing.assert_array_equal(drawn.latents, expected.latents)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 9.0])
def test_guidance(text: Bundle, guidance: float) -> None:
    negative = {} if guidance > 1 else {"negative_prompt": None}
    assert_same(text, "ddim-20", WISHES | {"guidance": guidance} | negative)


@pytest.mark.parametrize("name", ["ddim-20", "euler-ancestral-10"])
def test_another_batch_and_size(text: Bundle, name: str) -> None:
    three = {"prompts": ["red", "green", "blue"], "negative_prompt": [""] * 3, "seed": [1, 2, 3]}
    assert_same(text, name, WISHES | three | {"height": 24, "width": 40})


def test_clipped_samples(bundle: Bundle) -> None:
    plan = read_plan(bundle, "dpmpp-2m", 10)
    rows = tuple(replace(row, clip=0.5 if k < 7 else 0.0) for k, row in enumerate(plan.rows))
    changed = bundle.add_file("plans/dpmpp-2m-10.json", replace(plan, rows=rows).to_json().encode())
    assert_same(add_loop(changed, "dpmpp-2m-10"), "dpmpp-2m-10", WISHES)


def test_guidance_in_the_model(tiny_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    with create_bundle(tmp_path / "folded") as writer:
        copy_files(opened, writer.path)
        manifest = opened.manifest
        folded = writer.seal(
            model=manifest.model,
            graphs=manifest.graphs,
            source=manifest.source,
            parity=manifest.parity,
            roles=replace(opened.roles, guidance=Guidance("none", 4.0)),
        )
    made = add_loop(folded, "ddim-10")
    assert [tensor.name for tensor in made.manifest.graphs["loops/ddim-10"].inputs] == ["input_ids", "noise"]
    wishes = {key: WISHES[key] for key in ("prompts", "seed", "height", "width")}
    assert_same(made, "ddim-10", wishes)


@pytest.mark.parametrize(
    ("kind", "name", "wishes"),
    [
        ("unconditional", "ddim-10", {}),
        ("unconditional", "euler-ancestral-10", {}),
        ("class-conditional", "dpmpp-2m-10", {"class_labels": [4, 0]}),
        ("lcm", "lcm-4", {"prompts": WISHES["prompts"], "guidance": 1.0}),
        ("lcm", "lcm-4", {"prompts": WISHES["prompts"], "guidance": 8.5}),
        ("sdxl", "euler-10", {key: WISHES[key] for key in ("prompts", "negative_prompt")} | {"guidance": 5.0}),
        ("sdxl", "euler-10", {"prompts": WISHES["prompts"], "guidance": 5.0}),
        ("refiner", "euler-10", {"prompts": WISHES["prompts"], "guidance": 5.0}),
    ],
)
def test_other_kinds_of_models(
    kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, name: str, wishes: dict[str, Any]
) -> None:
    made = add_loop(copy_of(kinds(kind)[1], tmp_path / "bundle"), name)
    assert_same(made, name, {"seed": [7, 11], "height": 16, "width": 24, **wishes})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("inpainting", "reads another picture's latents beside its own"),
        ("8 channels", "reads another picture's latents beside its"),
    ],
)
def test_models_without_loops(
    kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, message: str
) -> None:
    there = copy_of(kinds(kind)[1], tmp_path / "bundle")
    with pytest.raises(InputError, match=message):
        add_loop(there, "ddim-10")


# --- the files ------------------------------------------------------------------------------------------------------


def initializers(bundle: Bundle, name: str) -> Iterator[tuple[str, TensorProto]]:
    """Each tensor of a loop's graph, ``main``, and of its Loop's ``body``."""
    model = onnx.load(str(bundle.file(f"loops/{name}.onnx")), load_external_data=False)
    bodies = [a.g for node in model.graph.node if node.op_type == "Loop" for a in node.attribute if a.name == "body"]
    assert len(bodies) == 1
    for where, graph in (("main", model.graph), ("body", bodies[0])):
        for tensor in graph.initializer:
            yield where, tensor


def test_two_loops_share_their_weights(text: Bundle) -> None:
    places = {}
    for name in ("ddim-20", "euler-ancestral-10"):
        tensors = list(initializers(text, name))
        external = [tensor for _, tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
        places[name] = {tensor.name: [entry.value for entry in tensor.external_data] for tensor in external}
        inline = [tensor for _, tensor in tensors if tensor.data_location != TensorProto.EXTERNAL]
        assert max(len(tensor.raw_data) for tensor in inline) < EXTERNAL_FROM_BYTES
        assert {where for where, tensor in tensors if "unet/" in tensor.name} == {"body"}
    assert places["ddim-20"] == places["euler-ancestral-10"]
    listed = {path for path in text.manifest.files if path.startswith("loops/")}
    assert WEIGHTS in listed
    assert all(path == WEIGHTS or path.endswith(".onnx") for path in listed)


def test_a_loop_is_a_valid_standard_graph(text: Bundle) -> None:
    path = text.file("loops/ddim-20.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert Bundle.open(text.path, verify=True)


def test_the_manifest_says_what_it_takes_and_what_it_was_made_of(text: Bundle) -> None:
    spec = text.manifest.graphs["loops/euler-ancestral-10"]
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in (*spec.inputs, *spec.outputs)}
    latents = ("batch", 4, "height", "width")
    assert shapes == {
        "input_ids": ("int64", ("batch", 16)),
        "negative_input_ids": ("int64", ("batch", 16)),
        "noise": ("float32", latents),
        "step_noise": ("float32", (9, *latents)),  # the last of the ten steps adds none
        "guidance_scale": ("float32", ()),
        "images": ("uint8", ("batch", "image_height", "image_width", 3)),
        "latents": ("float32", latents),
    }
    records = {r["output"]: r for r in text.manifest.parity if r["graph"] == "loops/euler-ancestral-10"}
    assert records["latents"]["max_error"] < TOLERANCE
    assert records["images"]["passed"]
    files = text.manifest.files
    parts = ["plans/euler-ancestral-10.json", *(f"{n}/model.onnx" for n in ("text_encoder", "unet", "vae_decoder"))]
    assert records["latents"]["source_hashes"] == {path: files[path].sha256 for path in parts}


def test_the_same_graphs_give_the_same_bytes(text: Bundle, tmp_path: Path) -> None:
    plan = Plan.from_json(text.file("plans/ddim-20.json").read_text())
    built = build_loop(text, plan).save(tmp_path)
    assert built.read_bytes() == text.file("loops/ddim-20.onnx").read_bytes()
    assert (tmp_path / "weights.onnx_data").read_bytes() == text.file(WEIGHTS).read_bytes()


def test_a_loop_is_made_again(text: Bundle) -> None:
    before = text.manifest
    again = add_loop(Bundle.open(text.path), "ddim-20").manifest
    assert again.files["loops/ddim-20.onnx"] == before.files["loops/ddim-20.onnx"]
    assert sum(record["graph"] == "loops/ddim-20" for record in again.parity) == 2


def test_a_plan_that_the_bundle_has_not_is_added(bundle: Bundle) -> None:
    assert "plans/ddim-3.json" not in bundle.manifest.files
    assert {"plans/ddim-3.json", "loops/ddim-3.onnx"} <= add_loop(bundle, "ddim-3").manifest.files.keys()


def test_graphs_with_external_data(bundle: Bundle, tmp_path: Path) -> None:
    with create_bundle(tmp_path / "large") as writer:
        copy_files(bundle, writer.path)
        for name in ("unet", "text_encoder"):
            path = str(writer.path / name / "model.onnx")
            model = onnx.load(path)
            onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=2000)
        manifest = bundle.manifest
        large = writer.seal(model=manifest.model, graphs=manifest.graphs, source=manifest.source, roles=manifest.roles)
    of_large, of_small = add_loop(large, "ddim-10"), add_loop(bundle, "ddim-10")
    assert of_large.manifest.files[WEIGHTS] == of_small.manifest.files[WEIGHTS]
    source_hashes = next(record["source_hashes"] for record in of_large.manifest.parity if "source_hashes" in record)
    assert {"unet/model.onnx", "unet/model.onnx_data"} <= source_hashes.keys()


def test_graphs_inside_a_spliced_graph(tmp_path: Path) -> None:
    """A name is renamed wherever it is, and once."""

    def branch(operator: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"])], operator, [], [value])

    chosen = helper.make_node("If", ["c"], ["z"], then_branch=branch("Add"), else_branch=branch("Mul"))
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [2.0, 3.0])
    ends = [helper.make_tensor_value_info(*end) for end in (("c", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, [2]))]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    opsets = [helper.make_opsetid("", 20)]
    writer = GraphWriter()
    for name in ("first", "second"):
        model = helper.make_model(helper.make_graph([chosen], "g", ends, [output], [weight]), opset_imports=opsets)
        mapped = {"c": "flag", "x": "value"}
        given = writer.splice(name, model, mapped, Weights("none"), tmp_path)["z"]
        assert given == f"{name}/z"
    writer.graph.input.extend(
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, []), helper.make_tensor_value_info("value", 1, [2])]
    )
    writer.graph.output.append(helper.make_tensor_value_info("second/z", TensorProto.FLOAT, [2]))
    whole = helper.make_model(writer.graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(whole, full_check=True)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    value = np.array([5, 7], np.float32)
    for flag, expected in ((True, [7, 10]), (False, [10, 21])):
        np.testing.assert_array_equal(session.run(None, {"flag": np.array(flag), "value": value})[0], expected)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def without_one_term(bundle: Bundle, plan: Plan) -> export_loop.Loop:
    last = plan.rows[-1]
    return build_loop(bundle, replace(plan, rows=(*plan.rows[:-1], replace(last, keep=last.keep * 1.001))))


def test_a_wrong_table_is_not_added(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_loops, "build_loop", without_one_term)
    with pytest.raises(ParityError, match=r"loops/ddim-10 output '\w+' differs from the runtime by"):
        add_loop(bundle, "ddim-10")
    assert Bundle.open(bundle.path, verify=True).manifest == bundle.manifest
    assert [path.name for path in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_a_graph_that_is_not_valid_is_not_added(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_loop, "_levels", lambda main, sample: main.node("Round", "nothing"))
    with pytest.raises(ExportError, match=r"loops/ddim-10 is not valid ONNX"):
        add_loop(bundle, "ddim-10")
    assert Bundle.open(bundle.path, verify=True).manifest == bundle.manifest


@pytest.mark.parametrize("name", ["ddim", "ddim-", "-5", "ddim-x", "ddim-1000000", "ddim-٣", ""])
def test_names_of_no_plan(name: str) -> None:
    with pytest.raises(InputError, match=r"is not the name of a plan; it is SAMPLER-STEPS"):
        loop_of(name)


@pytest.mark.parametrize(("name", "message"), [("magic-10", "sampler 'magic' is not known"), ("ddim-0", "1 to 1000")])
def test_plans_that_cannot_be_compiled(bundle: Bundle, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_loop(bundle, name)


def test_a_loop_of_another_plan_is_known(bundle: Bundle) -> None:
    added = add_loop(bundle, "ddim-10")
    assert stale_loops(added.manifest) == {}
    other = read_plan(added, "plms", 10).to_json().encode()
    stale = added.add_file("plans/ddim-10.json", other)
    assert stale_loops(stale.manifest) == {"loops/ddim-10": ["plans/ddim-10.json"]}


def test_loops_of_other_graphs_take_no_more(bundle: Bundle) -> None:
    added = add_loop(bundle, "ddim-10")
    model = onnx.load(str(added.file("vae_decoder/model.onnx")))
    model.doc_string = "changed"
    changed = added.add_file("vae_decoder/model.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"loops/ddim-10 was made of another vae_decoder/model\.onnx"):
        add_loop(changed, "ddim-20")


def test_changed_graphs_leave_loops_behind(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    added = add_loop(bundle, "ddim-10")
    copied = copy_bundle(added, tmp_path / "copy", passes=[], force=False)
    assert copied.manifest.files == added.manifest.files
    assert copied.manifest.parity == added.manifest.parity
    step = next(kind() for kind in FAKE_PASSES if kind.name == "change")
    calls: dict[str, list[Any]] = {name: [] for name in step.graphs}
    checkpoint = open_checkpoint(tiny_checkpoint)
    changed, _ = change_graphs(added, tmp_path / "changed", step, calls, [], checkpoint)
    for names in (changed.manifest.files, changed.manifest.graphs, [r["graph"] for r in changed.manifest.parity]):
        assert not any(name.startswith("loops/") for name in names)
