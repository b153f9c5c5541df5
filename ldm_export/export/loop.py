"""A whole sampling loop as one ONNX graph: token ids and noise in, pictures out, wherever ONNX runs.

    input_ids, negative_input_ids -> text encoders -> conditioner -+
    noise * init_scale -> Loop over a plan's rows [ denoiser -> guidance -> one row ] -> VAE decoder -> images, latents

The plan is a constant of the Loop's body, a table of which each iteration gathers its row; what it remembers, ``h``,
goes from iteration to iteration beside the latents (``ldm_export.plan.table`` has the formula). Terms come in the order
of `ldm_export.plan.Stepper`, in float32; those that are zero in every row are left out. A guidance of 1 or less is off,
as in the runtime. The denoiser's weights belong to the body, not to the graph around it, so that a runtime can fold and
repack them.

Weights of 1 KiB and more are in ``loops/weights.onnx_data``, which all loops of a bundle share: which they are and
where depends on the graphs, not on the plan. They are a copy. References into the graphs' own files, such as
``../unet/model.onnx`` with an offset, would need none, but onnx.checker and ONNX Runtime 1.32 refuse a location outside
the model's folder. A file beside the model opens in ONNX Runtime with no option. onnxruntime-web 1.30 has no files, and
the ones that it is given it does not find for nested graphs; ``examples/web`` puts the weights into the model's bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import source_hashes_of
from ldm_export.contract import (
    ROW_FIELDS,
    WEIGHT_FIELDS,
    GraphSpec,
    Roles,
    TensorSpec,
    conditions_of,
    loop_spec,
    loop_suffixes,
)
from ldm_export.errors import ExportError, InputError
from ldm_export.export.splicing import GraphWriter, Weights
from ldm_export.export.step import guide, update
from ldm_export.graph.files import check_links
from ldm_export.plan import Plan

WEIGHTS = "loops/weights.onnx_data"


@dataclass(frozen=True)
class Loop:
    """A loop graph that was built, and not written yet.

    Attributes
    ----------
    spec : where it goes in the bundle, its inputs and outputs
    model : the graph; its weights are external data
    weights : the file that they are in
    source_hashes : SHA-256 of each file of the bundle that went into it, its plan's among them
    """

    spec: GraphSpec
    model: ModelProto
    weights: Weights
    source_hashes: Mapping[str, str]

    def save(self, folder: Path) -> Path:
        """Write the graph and its weights to ``folder``, check the graph, and give its path.

        Raises
        ------
        ExportError
            If it is not valid ONNX.
        """
        path = folder / Path(self.spec.path).name
        self.weights.write(folder)
        path.write_bytes(self.model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{self.spec.name} is not valid ONNX ({error}). Nothing was added.") from error
        return path


def check_loopable(graphs: Mapping[str, GraphSpec], roles: Roles) -> None:
    """Raise InputError unless a loop can be made of a model with these graphs."""
    if "image_latents" in roles.sources(graphs):
        raise InputError(
            "A loop was asked for of a model that reads another picture's latents beside its own; "
            "loop graphs generate from noise alone. Leave the loop out."
        )
    if roles.controls or roles.image_encoder is not None:
        raise InputError(
            "A loop was asked for of a model with ControlNets or an IP-Adapter, whose pictures a loop graph does not "
            "take. Leave the loop out."
        )


def build_loop(bundle: Bundle, plan: Plan) -> Loop:
    """Build the loop graph of a plan, of which the bundle has or will have the file, from the bundle's own graphs.

    Raises
    ------
    InputError
        If the model is of a kind that loops cannot be made for, such as inpainting.
    BundleError
        If the bundle has no roles, or a graph's weights are in a file of several hard links.
    """
    files, graphs, roles = bundle.manifest.files, bundle.manifest.graphs, bundle.roles
    check_loopable(graphs, roles)
    guided = roles.guidance.takes_two_rows()
    draws = sum(bool(row.noise) for row in plan.rows)
    spec = loop_spec(Path(plan.file_name).stem, graphs, roles, draws=draws)
    parts = {name: bundle.file(graphs[name].path) for name in roles.graphs if name != roles.vae_encoder}
    for path in parts.values():
        check_links(path)
    models = {name: onnx.load(str(path), load_external_data=False) for name, path in parts.items()}
    weights = Weights(Path(WEIGHTS).name)

    def splice(writer: GraphWriter, name: str, inputs: Mapping[str, str]) -> dict[str, str]:
        return writer.splice(name, models[name], inputs, weights, parts[name].parent)

    main = GraphWriter()
    given = {tensor.name: main.input(tensor) for tensor in spec.inputs}
    scale = given.get("guidance_scale", "")
    sources = _request(main, given, roles.sources(graphs), guided, bundle.manifest.model["pixels_per_latent"])
    for encoder, suffix in zip(roles.text_encoders, loop_suffixes(roles), strict=True):
        ids = given[f"input_ids{suffix}"]
        if guided:
            ids = main.node("Concat", given[f"negative_input_ids{suffix}"], ids, axis=0)
        outputs = splice(main, encoder.graph, {"input_ids": ids})
        sources |= {f"{encoder.graph}.{name}": value for name, value in outputs.items()}
    conditions = conditions_of(roles, graphs, sources, partial(splice, main))
    if guided:
        scale = main.node("Max", scale, main.constant("guidance_off", np.float32(1)))

    body = GraphWriter("step")

    def predict(sample: str, timestep: str) -> str:
        if guided:
            sample = body.node("Concat", sample, sample, axis=0)
        timestep = body.node("Expand", timestep, body.node("Shape", sample, start=0, end=1))
        out = splice(body, roles.denoiser, {"sample": sample, "timestep": timestep, **conditions})["out_sample"]
        if guided:
            negative, prompted = body.node("Split", out, axis=0, num_outputs=2, outputs=2)
            out = guide(body, negative, prompted, scale)
        return out

    remembered = _step(body, plan, spec.outputs[1].shape, predict, given.get("step_noise", ""))
    start = main.node("Mul", given["noise"], main.constant("init_scale", np.float32(plan.init_scale)))
    history = [main.node("ConstantOfShape", main.node("Shape", given["noise"]))] * remembered if remembered else []
    rows = main.constant("rows", np.int64(len(plan.rows)))
    on = main.constant("on", np.bool_(True))  # TensorRT's parser knows the body's condition only where one is given
    latents, *_ = main.node("Loop", rows, on, start, *history, outputs=1 + remembered, body=body.graph)
    sample = splice(main, roles.vae_decoder, {"latent_sample": latents})["sample"]
    main.output(spec.outputs[0], _levels(main, sample), "Cast", to=TensorProto.UINT8)
    main.output(spec.outputs[1], latents)
    main.graph.name = spec.name
    its_file = f"plans/{plan.file_name}"  # which may yet be added
    its_sha256 = hashlib.sha256(plan.to_json().encode()).hexdigest()
    source_hashes = {its_file: files[its_file].sha256 if its_file in files else its_sha256}
    for name in parts:
        source_hashes |= source_hashes_of(bundle.manifest, graphs[name].path)
    return Loop(spec, _model(main, models), weights, source_hashes)


def _request(
    main: GraphWriter, given: Mapping[str, str], sources: Collection[str], guided: bool, pixels_per_latent: int
) -> dict[str, str]:
    """What a request gives to graphs (`ldm_export.contract.REQUEST_SOURCES`), as far as it is read."""
    noise, made = given["noise"], dict[str, str]()
    for axis, side in ((2, "height"), (3, "width")):
        if side in sources:
            size = main.node("Cast", main.node("Shape", noise, start=axis, end=axis + 1), to=TensorProto.FLOAT)
            factor = main.constant(f"{side}_per_latent", np.float32(pixels_per_latent))
            made[side] = main.node("Squeeze", main.node("Mul", size, factor))
    if "guidance" in sources:
        made["guidance"] = given["guidance_scale"]
    if "guidance_weight" in sources:
        made["guidance_weight"] = main.node("Sub", given["guidance_scale"], main.constant("one", np.float32(1)))
    if "class_labels" in sources:
        labels = given["class_labels"]
        made["class_labels"] = main.node("Concat", labels, labels, axis=0) if guided else labels
    if not {"has_prompt", "is_negative"}.isdisjoint(sources):
        shape = main.node("Shape", noise, start=0, end=1)
        zeros, ones = (
            main.node("Expand", main.constant(name, np.full(1, value, np.float32)), shape)
            for name, value in (("absent", 0), ("present", 1))
        )
        if "has_prompt" in sources:
            made["has_prompt"] = main.node("Concat", given["has_negative_prompt"], ones, axis=0) if guided else ones
        if "is_negative" in sources:
            made["is_negative"] = main.node("Concat", ones, zeros, axis=0) if guided else zeros
    return made


def _step(
    body: GraphWriter, plan: Plan, shape: tuple[int | str, ...], predict: Callable[[str, str], str], step_noise: str
) -> int:
    """The Loop's body: one row of the plan. Gives the number of remembered values that go from step to step."""
    table = {name: [getattr(row, name) for row in plan.rows] for name in ROW_FIELDS}
    table["clip"] = [clip or np.inf for clip in table["clip"]]
    history = max(len(row.weights) for row in plan.rows)
    for age in range(history):
        table[WEIGHT_FIELDS[age]] = [row.weights[age] if age < len(row.weights) else 0.0 for row in plan.rows]
    absent = {"input_scale": 1.0, "clip": np.inf}
    table = {
        name: column for name, column in table.items() if {*column} != {absent.get(name, 0.0)} or name == "timestep"
    }

    index = body.input(TensorSpec("step/index", "int64", ()))
    going = body.input(TensorSpec("step/going", "bool", ()))
    x = body.input(TensorSpec("step/latents", "float32", shape))
    h = [body.input(TensorSpec(f"step/remembered_{age}", "float32", shape)) for age in range(1, history)]
    numbers = np.array([*table.values()], np.float32).T  # (rows, columns)
    row = body.node("Gather", body.constant("table", numbers), index, axis=0)
    cells = body.node("Split", row, axis=0, num_outputs=len(table), outputs=len(table))
    cell = dict(zip(table, cells, strict=True))  # (1,) each

    out = predict(body.node("Mul", x, cell["input_scale"]) if "input_scale" in cell else x, cell["timestep"])
    z = ""
    if step_noise:
        number = np.cumsum([bool(row.noise) for row in plan.rows]) - 1
        number = np.maximum(number, 0).astype(np.int64)  # a row that draws nothing multiplies any by zero
        z = body.node("Gather", step_noise, body.node("Gather", body.constant("draws", number), index, axis=0), axis=0)
    latents, h = update(body, cell, x, out, h if history else None, z)
    body.output(TensorSpec("step/still_going", "bool", ()), going)
    body.output(TensorSpec("step/next_latents", "float32", shape), latents)
    for age, value in enumerate(h[: history - 1] if history else [], start=1):
        body.output(TensorSpec(f"step/next_remembered_{age}", "float32", shape), value)
    return max(history - 1, 0)


def _levels(main: GraphWriter, sample: str) -> str:
    """The decoder's output, about [-1, 1], as whole numbers from 0 to 255, (B, H, W, C), still in float32.

    Nothing may follow the cast to uint8: TensorRT has that type for outputs alone.
    """
    halved = main.node("Div", sample, main.constant("two", np.float32(2)))
    moved = main.node("Add", halved, main.constant("grey", np.float32(0.5)))
    clipped = main.node("Clip", moved, main.constant("black", np.float32(0)), main.constant("white", np.float32(1)))
    levels = main.node("Round", main.node("Mul", clipped, main.constant("levels", np.float32(255))))
    return str(main.node("Transpose", levels, perm=[0, 2, 3, 1]))


def _model(main: GraphWriter, models: Mapping[str, ModelProto]) -> ModelProto:
    """The graph as a model of the newest operator set among those that it is made of."""
    opsets: dict[str, int] = {}
    for model in models.values():
        for opset in model.opset_import:
            opsets[opset.domain] = max(opsets.get(opset.domain, 0), opset.version)
    made = helper.make_model(
        main.graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items())],
        ir_version=max(model.ir_version for model in models.values()),
    )
    for model in models.values():
        made.functions.extend(model.functions)
    return made
