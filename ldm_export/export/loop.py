"""A whole sampling loop as one ONNX graph: token ids and noise in, pictures out, wherever ONNX runs.

    input_ids, negative_input_ids -> text encoder -+
    noise * init_scale -> Loop over the plan's rows [ UNet -> guidance -> one row ] -> VAE decoder -> images, latents

The plan is a constant of the Loop's body, a table of which each iteration gathers its row; what it remembers, ``h``,
goes from iteration to iteration beside the latents (``ldm_export.plan.table`` has the formula). Terms come in the order
of `ldm_export.plan.Stepper`, in float32; those that are zero in every row are left out. A guidance of 1 or less is off,
as in the runtime. The UNet's weights belong to the body, not to the graph around it, so that a runtime can fold and
repack them.

Weights of 1 KiB and more are in ``loops/weights.onnx_data``, which all loops of a bundle share: which they are and
where depends on the graphs, not on the plan. They are a copy. References into the graphs' own files, such as
``../unet/model.onnx`` with an offset, would need none, but onnx.checker and ONNX Runtime 1.32 refuse a location outside
the model's folder. A file beside the model opens in ONNX Runtime with no option. onnxruntime-web 1.30 has no files, and
the ones that it is given it does not find for nested graphs; ``examples/web`` puts the weights into the model's bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from ldm_export.bundle import Bundle
from ldm_export.contract import ROW_FIELDS, WEIGHT_FIELDS, GraphSpec, TensorSpec, loop_spec, takes_two_rows
from ldm_export.errors import ExportError, InputError
from ldm_export.export.splicing import GraphWriter, Weights
from ldm_export.export.step import guide, update
from ldm_export.graph.files import check_links
from ldm_export.plan import Plan
from ldm_export.plan.guidance import guidance_frequencies

WEIGHTS = "loops/weights.onnx_data"
UNET_INPUTS = {"sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond"}
"""What a loop can feed a UNet with."""


@dataclass(frozen=True)
class Loop:
    """A loop graph that was built, and not written yet.

    Attributes
    ----------
    spec : where it goes in the bundle, its inputs and outputs
    model : the graph; its weights are external data
    weights : the file that they are in
    made_of : SHA-256 of each file of the bundle that went into it, its plan's among them
    """

    spec: GraphSpec
    model: ModelProto
    weights: Weights
    made_of: Mapping[str, str]

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


def check_loopable(unet: GraphSpec, latent_channels: int, *, zeros_for_empty_prompt: bool = False) -> None:
    """Raise InputError unless loops can be made for a model with this UNet."""
    others = sorted({tensor.name for tensor in unet.inputs} - UNET_INPUTS)
    if others or zeros_for_empty_prompt:
        told = f"the UNet is told {' and '.join(others)}" if others else "empty prompts become zeros"
        raise InputError(
            f"A loop was asked for of a model in which {told} (SDXL); loop graphs are of models that read one text "
            "encoder's states, class labels or nothing. Leave the loop out: the runtimes draw with the graphs."
        )
    channels = next(tensor.shape[1] for tensor in unet.inputs if tensor.name == "sample")
    if channels != latent_channels:
        raise InputError(
            f"A loop was asked for of a UNet with {channels} input channels for {latent_channels} of latents (an "
            "inpainting model); loop graphs draw from noise alone. Leave the loop out."
        )


def build_loop(bundle: Bundle, plan: Plan) -> Loop:
    """Build the loop graph of a plan, of which the bundle has or will have the file, from the bundle's own graphs.

    Raises
    ------
    InputError
        If the model is of a kind that loops cannot be made for, such as SDXL.
    BundleError
        If a graph's weights lie in a file of several hard links.
    """
    files, graphs, facts = bundle.manifest.files, bundle.manifest.graphs, bundle.manifest.model
    empty = bool(facts.get("zeros_for_empty_prompt"))
    check_loopable(graphs["unet"], facts["latent_channels"], zeros_for_empty_prompt=empty)
    told = {tensor.name: tensor for tensor in graphs["unet"].inputs}
    reads_text = "encoder_hidden_states" in told
    guided = takes_two_rows(graphs["unet"], facts)
    draws = sum(bool(row.noise) for row in plan.rows)
    spec = loop_spec(Path(plan.file_name).stem, graphs, guided=guided, draws=draws)
    parts = {name: bundle.file(graphs[name].path) for name in _parts(reads_text)}
    for path in parts.values():
        check_links(path)
    models = {name: onnx.load(str(path), load_external_data=False) for name, path in parts.items()}
    weights = Weights(Path(WEIGHTS).name)

    def splice(writer: GraphWriter, name: str, inputs: Mapping[str, str]) -> dict[str, str]:
        return writer.splice(name, models[name], inputs, weights, parts[name].parent)

    main = GraphWriter()
    given = {tensor.name: main.input(tensor) for tensor in spec.inputs}
    scale = given.get("guidance_scale", "")
    conditions = {}
    if reads_text:
        ids = given["input_ids"]
        if guided:
            ids = main.node("Concat", given["negative_input_ids"], ids, axis=0)
        conditions["encoder_hidden_states"] = splice(main, "text_encoder", {"input_ids": ids})["last_hidden_state"]
    if "class_labels" in told:
        labels = given["class_labels"]
        conditions["class_labels"] = main.node("Concat", labels, labels, axis=0) if guided else labels
    if "timestep_cond" in told:
        conditions["timestep_cond"] = _guidance_embedding(main, scale, told["timestep_cond"], given["noise"])
    if guided:
        scale = main.node("Max", scale, main.constant("guidance_off", np.float32(1)))

    body = GraphWriter("step")

    def predict(sample: str, timestep: str) -> str:
        if guided:
            sample = body.node("Concat", sample, sample, axis=0)
        out = splice(body, "unet", {"sample": sample, "timestep": timestep, **conditions})["out_sample"]
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
    unscaled = main.node("Div", latents, main.constant("scaling_factor", np.float32(facts["scaling_factor"])))
    sample = splice(main, "vae_decoder", {"latent_sample": unscaled})["sample"]
    main.output(spec.outputs[0], _levels(main, sample), "Cast", to=TensorProto.UINT8)
    main.output(spec.outputs[1], latents)
    main.graph.name = spec.name
    read = [path for path in files if any(path.startswith(graphs[name].path) for name in parts)]  # and its _data
    its_file = f"plans/{plan.file_name}"  # which may yet be added
    its_sha256 = hashlib.sha256(plan.to_json().encode()).hexdigest()
    made_of = {its_file: files[its_file].sha256 if its_file in files else its_sha256}
    made_of |= {path: files[path].sha256 for path in read}
    return Loop(spec, _model(main, models), weights, made_of)


def _parts(reads_text: bool) -> tuple[str, ...]:
    """The graphs that a loop is made of; their order is that of their weights."""
    return ("text_encoder", "unet", "vae_decoder") if reads_text else ("unet", "vae_decoder")


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

    timestep = body.node("Squeeze", cell["timestep"])
    out = predict(body.node("Mul", x, cell["input_scale"]) if "input_scale" in cell else x, timestep)
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


def _guidance_embedding(main: GraphWriter, scale: str, told: TensorSpec, noise: str) -> str:
    """What a guidance-distilled UNet is told, as `ldm_export.plan.guidance.guidance_embedding`: (B, dim)."""
    dim = int(told.shape[1])
    frequencies = guidance_frequencies(dim)
    above = main.node("Sub", main.node("Cast", scale, to=TensorProto.DOUBLE), main.constant("one", np.float64(1)))
    angles = main.node("Mul", above, main.constant("frequencies", frequencies))
    odd = [main.constant("odd", np.zeros(1))] if dim % 2 else []
    waves = main.node("Concat", main.node("Sin", angles), main.node("Cos", angles), *odd, axis=0)
    batch = main.node("Shape", noise, start=0, end=1)
    shape = main.node("Concat", batch, main.constant("dim", np.array([dim])), axis=0)
    return str(main.node("Expand", main.node("Cast", waves, to=TensorProto.FLOAT), shape))


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
