"""Adds a loop graph to a bundle, once it draws what the runtime draws."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import stale_loops
from ldm_export.bundle.parity import PICTURE_TOLERANCE, RUNTIME, TOLERANCE, Parity, check_parity, largest_error
from ldm_export.bundle.plans import loop_of, read_plan, with_plan
from ldm_export.contract import GraphSpec
from ldm_export.errors import BundleError, ExportError
from ldm_export.export.loop import WEIGHTS, Loop, build_loop, check_loopable
from ldm_export.families import family_of
from ldm_export.graph.running import session_options
from ldm_export.plan import compile_plan
from ldm_export.runtime import Pipeline
from ldm_export.runtime.loop_inputs import loop_inputs
from ldm_export.runtime.request import checked_request

PROMPTS, NEGATIVE = ("red apple", "cat"), "blue"
SEEDS = (0, 1)
GUIDANCE = 4.0
LARGEST_SIDE = 16
"""Latents are compared at the model's own size, but no larger than this a side where the graphs are of any size."""

if TYPE_CHECKING:
    from ldm_export.checkpoint import LatentDiffusion


def check_loops(checkpoint: LatentDiffusion, names: Sequence[str]) -> None:
    """Refuse, before anything is exported, loops that a checkpoint cannot have.

    Raises
    ------
    InputError
        For a plan that cannot be compiled, or a model that there are no loops of.
    """
    for name in names:
        compile_plan(checkpoint.scheduler, *loop_of(name), tokens=checkpoint.tokens)
    family = family_of(checkpoint)
    check_loopable({graph.spec.name: graph.spec for graph in family.graphs}, family.roles)


def records_of(bundle: Bundle, loops: Sequence[str]) -> list[dict[str, Any]]:
    """The parity records of loops, by their names."""
    graphs = {f"loops/{name}" for name in loops}
    return [dict(record) for record in bundle.manifest.parity if record["graph"] in graphs]


def add_loop(bundle: Bundle, name: str, progress: Callable[[str], None] = lambda stage: None) -> Bundle:
    """Build ``loops/NAME.onnx``, compare it with the runtime, and add it to the bundle, with its plan's file.

    Raises
    ------
    InputError
        If there is no such plan and none can be compiled, or no loop of such a model.
    BundleError
        If the bundle has loops that were made of other graphs.
    ParityError
        If what the loop draws differs from what the runtime draws by more than the tolerance. Nothing is added.
    """
    plan = read_plan(bundle, *loop_of(name))
    for other, changed in stale_loops(bundle.manifest).items():
        if any(path.endswith(".onnx") for path in changed):
            raise BundleError(
                f"Bundle {bundle.path}: {other} was made of another {changed[0]} than the bundle has, and loops share "
                "their weights. Export the bundle anew."
            )
    progress(f"{name}: building")
    loop = build_loop(bundle, plan)
    with tempfile.TemporaryDirectory(prefix=f".{bundle.path.name}.loop-", dir=bundle.path.resolve().parent) as folder:
        path = loop.save(Path(folder))
        progress(f"{name}: comparing with the runtime")
        records = compare_loop(bundle, loop, path)
        check_parity(records, "The loop was not added.")
        bundle, _ = with_plan(bundle, *loop_of(name))
        if WEIGHTS not in bundle.manifest.files:
            bundle = bundle.add_file(WEIGHTS, path.with_name(Path(WEIGHTS).name))
        return bundle.add_file(loop.spec.path, path, graph=loop.spec, parity=[record.to_dict() for record in records])


def compare_loop(bundle: Bundle, loop: Loop, path: Path) -> list[Parity]:
    """The loop graph at ``path``, in ONNX Runtime on the CPU, against the runtime, which draws the same without it.

    Returns
    -------
    A record of each output, its ``max_error`` relative to the largest value of the latents, and to 255 of the images.
    """
    sampler, steps = loop_of(loop.spec.name.removeprefix("loops/"))
    wishes = {**example_wishes(bundle, loop.spec), "sampler": sampler, "steps": steps}
    if read_plan(bundle, sampler, steps).tokens:  # the loop draws with this plan at no other size
        wishes |= {side: bundle.manifest.model[side] for side in ("height", "width")}
    inputs = loop_inputs(bundle, loop.spec, checked_request(bundle, **wishes))
    drawn = Pipeline(bundle, "cpu").generate(**wishes)
    options = session_options()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        images, latents = session.run([tensor.name for tensor in loop.spec.outputs], inputs)
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime refuses {loop.spec.name}: {error}. Nothing was added.") from error
    of_pictures = float(np.abs(images.astype(int) - drawn.images).max()) / 255
    name = loop.spec.name
    of_latents = largest_error([drawn.latents], [latents])
    return [
        Parity(name, "images", of_pictures, PICTURE_TOLERANCE, reference=RUNTIME),
        Parity(name, "latents", of_latents, TOLERANCE, reference=RUNTIME, source_hashes=loop.source_hashes),
    ]


def example_wishes(bundle: Bundle, loop: GraphSpec) -> dict[str, Any]:
    """Two pictures to ask the runtime for: options of `Pipeline.generate`."""
    facts = bundle.manifest.model
    takes = {tensor.name: tensor for tensor in loop.inputs}
    largest = LARGEST_SIDE * facts["pixels_per_latent"]
    wishes: dict[str, Any] = {"seed": list(SEEDS)}
    wishes |= {side: min(facts[side], largest) for side in ("height", "width")}
    if "input_ids" in takes:
        wishes["prompts"] = PROMPTS
    if "negative_input_ids" in takes:
        wishes["negative_prompt"] = [NEGATIVE] * len(PROMPTS)
    if "guidance_scale" in takes:
        wishes["guidance"] = own if (own := bundle.roles.guidance.scale) > 1 else GUIDANCE
    if "class_labels" in takes:
        labels = takes["class_labels"]
        last = (facts.get("class_count") or 2) - 1
        features = np.eye(2, int(labels.shape[1]), dtype=np.float32) if len(labels.shape) == 2 else None
        wishes["class_labels"] = [0, last] if features is None else features
    return wishes
