"""What engines are built from is compared with what it shall compute, and what computes something else is found out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import loop_of, with_plan
from ldm_export.errors import ParityError
from ldm_export.export import step
from ldm_export.verify.engines import sources
from ldm_export.verify.engines.proof import recorded


def compared(bundle: Bundle, name: str, precision: str, folder: Path) -> list[dict[str, Any]]:
    """What the graph of an engine was compared with."""
    if name.startswith("loops/"):
        copy = Bundle.open(shutil.copytree(bundle.path, folder / "with plan"))
        bundle, _ = with_plan(copy, *loop_of(name.removeprefix("loops/")))
    source = sources.source_of(bundle, name)
    made, reports = sources.converted(bundle, sources.parts_of(bundle, [source]), precision, folder, lambda stage: None)
    file, report = sources.onnx_of(bundle, made, source, reports, folder)
    assert file.is_file()
    return list(report["compared"])


def test_a_plain_graph_is_what_the_bundle_says(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    (found,) = compared(bundle, "text_encoder", "fp32", tmp_path)
    records = [record for record in bundle.manifest.parity if record["graph"] == "text_encoder"]
    assert len(records) == 2
    assert found["error"] == max(record["max_error"] for record in records)
    silent = replace(bundle, manifest=replace(bundle.manifest, parity=()))
    nothing = "nothing, since the bundle has no record of it"
    assert recorded(silent, "unet") == {"graph": "unet", "against": nothing}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("ddim-10", precision) for precision in ("fp32", "fp16", "int8")),
        *((name, "fp32") for name in ("euler-ancestral-10", "dpmpp-2m-10", "ddim-calls4-10")),
    ],
)
def test_loops_are_as_their_graphs(tiny_bundle: Path, tmp_path: Path, name: str, precision: str) -> None:
    *parts, images, latents = compared(Bundle.open(tiny_bundle), f"loops/{name}", precision, tmp_path)
    assert len(parts) == 3 * (1 if precision == "fp32" else 2)
    assert (images["graph"], latents["graph"]) == (f"images of loops/{name}", f"latents of loops/{name}")
    assert all(each["error"] <= each["allowed"] for each in (images, latents))
    assert latents["allowed"] == 1e-4


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional", "lcm"])
def test_loops_of_other_kinds(kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    bundle = Bundle.open(kinds(kind)[1])
    *_, images, latents = compared(bundle, "loops/lcm-4" if kind == "lcm" else "loops/ddim-10", "fp32", tmp_path)
    assert images["error"] <= images["allowed"]
    assert latents["error"] <= latents["allowed"]


@pytest.mark.parametrize(("name", "against"), [("step", "its formula"), ("loops/ddim-10", "its graphs, called one by")])
def test_guidance_the_other_way_is_found(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, against: str
) -> None:
    guide = step.guide
    for module in ("step", "loop"):
        monkeypatch.setattr(f"ldm_export.export.{module}.guide", lambda writer, a, b, scale: guide(writer, b, a, scale))
    with pytest.raises(ParityError, match=rf"{name} differs from {against} .* is allowed\. Nothing was kept\."):
        compared(Bundle.open(tiny_bundle), name, "fp32", tmp_path)


def test_a_step_that_remembers_wrongly_is_found(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = step.update

    def backwards(*told: Any) -> Any:
        latents, h = update(*told)
        return latents, h[::-1]

    monkeypatch.setattr(step, "update", backwards)
    with pytest.raises(ParityError, match=r"^step differs from its formula in float64 by"):
        compared(Bundle.open(tiny_bundle), "step", "fp32", tmp_path)
