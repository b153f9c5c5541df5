"""The contract of each role takes every kind of model that export writes, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.contract import NONE, THREE_ROWS, GraphSpec, Guidance, Roles, TensorSpec, TextEncoder, loop_spec
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime.facts import check_graphs
from tests.bundle_fixture import in_kinds

Contract = tuple[dict[str, GraphSpec], Roles]
LABELS = TensorSpec("class_labels", "int64", ("batch",))
FEATURES = TensorSpec("class_labels", "float32", ("batch", 16))


@pytest.fixture
def contract(kinds: Callable[[str], tuple[Path, Path]], tiny_bundle: Path) -> Callable[[str], Contract]:
    """A function from a kind of model to its graphs and roles, as export writes them; ``text`` is Stable Diffusion."""

    def read(kind: str) -> Contract:
        bundle = Bundle.open(tiny_bundle if kind == "text" else kinds(kind)[1])
        return dict(bundle.manifest.graphs), bundle.roles

    return read


def channels_of(graphs: dict[str, GraphSpec], roles: Roles) -> int:
    """Channels of the latents."""
    channels = graphs[roles.denoiser].outputs[0].shape[1]
    assert isinstance(channels, int)
    return channels


# backwards, so that two processes do not wait for the same kind of all
@pytest.mark.parametrize("kind", ["text", *in_kinds()[::-1]])
def test_what_export_writes_is_taken(contract: Callable[[str], Contract], kind: str) -> None:
    graphs, roles = contract(kind)
    check_graphs(graphs, roles, channels_of(graphs, roles))


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("kind", ["text", *in_kinds("inpainting")])
def test_its_loops_are_taken(contract: Callable[[str], Contract], kind: str, draws: int) -> None:
    graphs, roles = contract(kind)
    loop, channels = loop_spec("ddim-2", graphs, roles, draws=draws), channels_of(graphs, roles)
    check_graphs({**graphs, loop.name: loop}, roles, channels)
    for side, left in (("outputs", loop.outputs[:1]), ("inputs", loop.inputs[1:])):
        with pytest.raises(MalformedError, match="loop"):
            check_graphs({**graphs, loop.name: replace(loop, **{side: left})}, roles, channels)


def changed(graphs: dict[str, GraphSpec], name: str, tensor: TensorSpec) -> dict[str, GraphSpec]:
    """The graphs with one tensor in place of that of its name."""
    sides = {
        side: tuple(tensor if each.name == tensor.name else each for each in getattr(graphs[name], side))
        for side in ("inputs", "outputs")
    }
    assert sides["inputs"] != graphs[name].inputs or sides["outputs"] != graphs[name].outputs
    return {**graphs, name: replace(graphs[name], **sides)}


@pytest.mark.parametrize(
    ("kind", "graph", "tensor"),
    [
        ("sdxl", "unet", TensorSpec("time_ids", "float32", ("batch", 5))),
        ("sdxl", "unet", TensorSpec("text_embeds", "float32", ("batch", 25))),
        ("sdxl", "unet", TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 32))),
        ("sdxl", "text_encoder_2", TensorSpec("input_ids", "int64", ("batch", 60))),
        ("sdxl", "text_encoder", TensorSpec("hidden_states.1", "float32", ("batch", 16, 31))),
        ("sdxl", "conditioner", TensorSpec("height", "float32", ("batch",))),
        ("sdxl", "conditioner", TensorSpec("has_prompt", "int64", ("batch",))),
        ("sdxl", "conditioner", TensorSpec("time_ids", "float32", (2, 6))),
        ("refiner", "conditioner", TensorSpec("is_negative", "float32", ())),
        ("lcm", "conditioner", TensorSpec("guidance_weight", "float64", ())),
        ("lcm", "unet", TensorSpec("timestep_cond", "float32", ("batch", 3))),
        ("class-conditional", "unet", TensorSpec("class_labels", "float32", ("batch",))),
        ("class-conditional", "unet", TensorSpec("class_labels", "int64", ("batch", 16))),
        ("text", "text_encoder", TensorSpec("last_hidden_state", "float32", ("batch", 16, 31))),
        ("text", "unet", TensorSpec("timestep", "float32", ())),
        ("inpainting", "unet", TensorSpec("image_latents", "int64", ("batch", 5, "height", "width"))),
        ("instruct-pix2pix", "unet", TensorSpec("image_latents", "float32", ("batch", 5, "height", "width"))),
    ],
)
def test_other_graphs_are_refused(
    contract: Callable[[str], Contract], kind: str, graph: str, tensor: TensorSpec
) -> None:
    graphs, roles = contract(kind)
    with pytest.raises(MalformedError):
        check_graphs(changed(graphs, graph, tensor), roles, 4)


def test_class_labels_are_numbers_or_features(contract: Callable[[str], Contract]) -> None:
    graphs, roles = contract("class-conditional")
    for labels in (LABELS, FEATURES):
        inputs = (*graphs["unet"].inputs[:2], labels)
        check_graphs({**graphs, "unet": replace(graphs["unet"], inputs=inputs)}, roles, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoders": ()}, "reads 'text_encoder.last_hidden_state', which nothing gives"),
        ({"conditions": {}}, "the input 'encoder_hidden_states'"),
        ({"conditions": {"encoder_hidden_states": "class_labels"}}, "'encoder_hidden_states', which is given class_l"),
        ({"conditions": {"encoder_hidden_states": "text_encoder.last_hidden_state", "x": "height"}}, "condition 'x'"),
        ({"text_encoders": (TextEncoder("text_encoder", "tokenizer", "t5", 16),)}, "of the kind 't5'"),
        ({"text_encoders": (TextEncoder("text_encoder", "tokenizer", "clip", 17),)}, "'input_ids'"),
        ({"conditioner": "vae_encoder"}, "reads 'sample', which nothing gives"),
        ({"guidance": Guidance(THREE_ROWS, 7.5)}, "guidance of three rows, and a denoiser that reads no image_latents"),
    ],
)
def test_roles_that_do_not_fit_the_graphs(
    contract: Callable[[str], Contract], changes: dict[str, Any], message: str
) -> None:
    graphs, roles = contract("text")
    with pytest.raises(MalformedError, match=message):
        check_graphs(graphs, replace(roles, **changes), 4)


def test_guidance_of_a_model_that_edits_takes_three_rows() -> None:
    scales = [(7.5, 1.5), (7.5, 1.0), (1.0, 1.5), (7.5, 0.99), (0.0, 0.0)]
    assert [Guidance(THREE_ROWS, 7.5).rows(*each) for each in scales] == [3, 3, 1, 1, 1]
    assert [Guidance("two_rows", 4.0).rows(scale, 0.0) for scale in (0.0, 1.0, 1.5)] == [1, 1, 2]
    assert not Guidance(THREE_ROWS, 7.5).takes_two_rows(7.5)


def test_guidance_takes_two_rows_above_1() -> None:
    rows = [Guidance("two_rows", 4.0).takes_two_rows(scale) for scale in (0.0, 1.0, 1.5)]
    assert rows == [False, False, True]
    assert not any(Guidance(kind, 4.0).takes_two_rows(7.0) for kind in ("input", NONE))
