"""The bench on tiny models: what it finds, that it tells a disturbed bundle, and that nothing is measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ldm_export.bench import harness, process
from ldm_export.bench.gates import KINDS, judge
from ldm_export.bench.harness import Bench, BenchOptions, Document, read_document, results_by_variant, write_document
from ldm_export.bench.image_similarity import LARGEST, compare_pictures, drift, pictures_of
from ldm_export.bench.report import page
from ldm_export.bundle import Bundle, create_bundle
from ldm_export.errors import BackendError, BundleError, InputError
from ldm_export.export.graphs import copy_files
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.pipeline import Timings
from ldm_export.verify import latency
from ldm_export.verify.gates import Gate, gate_from_text
from ldm_export.verify.image_generators import Sample
from ldm_export.verify.latency import stages, times_as_fast

OPTIONS = BenchOptions(
    prompts=("a red circle", "a <b>blue</b> & green square"), steps=10, repeats=2, warm_up=1, backends=("cpu",)
)
PARTS = {"bytes", "latency", "pictures", "parity of tiny", "parity of disturbed", "process"}


@pytest.fixture(scope="module")
def disturbed_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, and one weight of its UNet off by a fifth."""
    bundle, folder = Bundle.open(tiny_bundle), tmp_path_factory.mktemp("other") / "disturbed.bundle"
    manifest = bundle.manifest
    with create_bundle(folder) as writer:
        copy_files(bundle, writer.path)
        file = writer.path / "unet" / "model.onnx"
        model = onnx.load(file)
        weight = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
        file.write_bytes(model.SerializeToString(deterministic=True))
        facts = {"model": manifest.model, "graphs": manifest.graphs, "source": manifest.source}
        return writer.seal(**facts, parity=manifest.parity, roles=manifest.roles).path


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Path, tiny_bundle: Path, disturbed_bundle: Path) -> Bench:
    return Bench([tiny_bundle, disturbed_bundle], open_checkpoint(tiny_checkpoint), OPTIONS)


@pytest.fixture(scope="module")
def document(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Document:
    told: list[str] = []
    path = tmp_path_factory.mktemp("bench") / "report.json"
    made = bench.run(path, "ldm-export bench tiny", resume=False, progress=told.append)
    assert {"latency, round 3 of 3", "picture 2 of 2, tiny", "cold start 2 of 2, PyTorch tiny"} <= set(told)
    assert read_document(path) == made
    return made


# --- what is found --------------------------------------------------------------------------------------------------


def test_everything_is_measured_of_every_side(document: Document) -> None:
    assert document["complete"] is True
    assert document["results"].keys() == PARTS
    variants = ["PyTorch tiny", "tiny", "disturbed"]
    assert document["baseline"] == variants[0]
    for part in ("bytes", "latency", "pictures", "process"):
        assert list(document["results"][part]) == variants
    latencies, needs = document["results"]["latency"], document["results"]["process"]
    for variant in variants:
        assert latencies[variant]["calls"] == document["variants"][variant]["steps"] == 10
        stages = dict(latencies[variant]["stages"])
        assert stages.pop("whole") == {"median_ms": 0, "p90_ms": 0}  # no picture is one call of a loop graph
        assert all(0 < spent["median_ms"] <= spent["p90_ms"] for spent in stages.values())
        assert len(latencies[variant]["totals_ms"]) == 2
        assert len(needs[variant]["cold_starts_ms"]) == 2
        assert needs[variant]["cold_start_ms"] > 0
    assert needs["PyTorch tiny"]["peak_rss_bytes"] > needs["tiny"]["peak_rss_bytes"] > 2**24
    assert document["versions"].keys() >= {"ldm_export", "python", "numpy", "torch"}


def test_the_same_weights_do_not_drift(document: Document) -> None:
    found = document["results"]["pictures"]["tiny"]
    assert len(found["drift"]["worst"]) == 10
    assert 0 < max(found["drift"]["worst"]) < 1e-5
    assert all(middle <= worst for middle, worst in zip(*found["drift"].values(), strict=True))
    assert min(found["psnr_db"]) > 60
    assert all(record["passed"] and record["same_weights"] for record in document["results"]["parity of tiny"])


def test_a_disturbed_bundle_drifts_and_fails(document: Document) -> None:
    found = document["results"]["pictures"]["disturbed"]
    assert max(found["drift"]["worst"]) > 1e-3
    records = {record["graph"]: record["passed"] for record in document["results"]["parity of disturbed"]}
    assert records == {"text_encoder": True, "unet": False, "vae_decoder": True, "vae_encoder": True}
    gates = [Gate("drift", 1e-4), Gate("parity", 1.0)]
    judged = judge(gates, results_by_variant(document), document["baseline"])
    assert {(gate["key"], gate["variant"]): gate["passed"] for gate in judged} == {
        ("drift", "tiny"): True,
        ("drift", "disturbed"): False,
        ("parity", "tiny"): True,
        ("parity", "disturbed"): False,
    }


def test_the_pictures_are_those_of_the_pipeline(document: Document, tiny_bundle: Path) -> None:
    drawn = pictures_of(document["results"]["pictures"]["tiny"]["png"])
    for k, prompt in enumerate(OPTIONS.prompts):
        expected = Pipeline.open(tiny_bundle, backend="cpu").generate(prompt, steps=10, seed=k).images[0]
        np.testing.assert_array_equal(drawn[k], expected)


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional", "sd2", "sdxl", "lcm"])
def test_other_kinds(kinds: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path, quick: None) -> None:
    """Each by the sampler that is its own."""
    checkpoint, bundle = kinds(kind)
    bench = Bench([bundle], open_checkpoint(checkpoint), BenchOptions(repeats=1, warm_up=0))
    theirs, ours = bench.variants
    assert ours.drawing == theirs.drawing
    assert ours.settings.sampler == {"sdxl": "euler", "lcm": "lcm"}.get(kind, "ddim")
    assert [variant.guided for variant in bench.variants] == [kind in ("sd2", "sdxl")] * 2
    results = bench.run(tmp_path / "r.json", "", resume=False, progress=lambda what: None)["results"]
    assert results["latency"][theirs.name]["calls"] == results["latency"][ours.name]["calls"] == ours.settings.steps
    assert max(results["pictures"][ours.name]["drift"]["worst"]) < 2e-5
    assert min(results["pictures"][ours.name]["psnr_db"]) > 50


def test_what_a_process_of_its_own_is_told_draws_there(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = kinds("sdxl")
    bench = Bench([bundle], open_checkpoint(checkpoint), BenchOptions(prompts=("red",)))
    children = {variant.name: variant.child("red", 0) for variant in bench.variants}
    found = process.processes_in_turn(children, 1, lambda what: None)
    assert all(needs["cold_start_ms"] > 0 for needs in found.values())


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional"])
def test_models_without_text(kinds: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    checkpoint, bundle = kinds(kind)
    bench = Bench([bundle], open_checkpoint(checkpoint), BenchOptions())
    assert bench.conditions == ([0, 1, 2, 3, 4] if kind == "class-conditional" else [""] * 8)
    with pytest.raises(InputError, match=r"1 prompts were given; PyTorch .* reads no text"):
        Bench([bundle], open_checkpoint(checkpoint), BenchOptions(prompts=("red",)))


def test_one_bundle_alone_has_nothing_to_compare_with(tiny_bundle: Path, tmp_path: Path, quick: None) -> None:
    bench = Bench([tiny_bundle], None, OPTIONS)
    document = bench.run(tmp_path / "r.json", "", resume=False, progress=lambda what: None)
    assert document["baseline"] is None
    assert document["results"].keys() == {"bytes", "latency", "pictures", "process"}
    assert "psnr_db" not in document["results"]["pictures"]["tiny"]
    with pytest.raises(InputError, match="psnr=40 compares, and there is one bundle alone"):
        bench.check_gates([Gate("psnr", 40)])


# --- going on where it was ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new processes and no pauses."""
    found = {"cold_start_ms": 1.0, "cold_starts_ms": [1.0], "peak_rss_bytes": None, "device_bytes": None}
    monkeypatch.setattr(harness, "processes_in_turn", lambda variants, rounds, progress: dict.fromkeys(variants, found))
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: None)


def counted(bench: Bench, monkeypatch: pytest.MonkeyPatch, stop: str | None = None) -> list[str]:
    """The measurements that are made from here on; ``stop`` is interrupted."""
    made: list[str] = []
    measurements = bench._measurements()

    def measure(name: str) -> Callable[[Any], Any]:
        def noted(progress: Any) -> Any:
            if name == stop:
                raise KeyboardInterrupt
            made.append(name)
            return measurements[name](progress)

        return noted

    monkeypatch.setattr(bench, "_measurements", lambda: {name: measure(name) for name in measurements})
    return made


def test_an_interrupted_bench_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    path = tmp_path / "report.json"
    with monkeypatch.context() as patch:
        made = counted(bench, patch, stop="pictures")
        with pytest.raises(KeyboardInterrupt):
            bench.run(path, "", resume=False, progress=lambda what: None)
    assert made == ["bytes", "latency"]
    kept = read_document(path)
    assert kept is not None
    assert kept["results"].keys() == set(made)
    assert not kept["complete"]
    with monkeypatch.context() as patch:
        made = counted(bench, patch)
        whole = bench.run(path, "", resume=False, progress=lambda what: None)
    assert set(made) == PARTS - {"bytes", "latency"}
    assert whole["results"]["latency"] == kept["results"]["latency"]
    with monkeypatch.context() as patch:
        made = counted(bench, patch)
        assert bench.run(path, "", resume=True, progress=lambda what: None)["results"] == whole["results"]
        assert made == []
        bench.run(path, "", resume=False, progress=lambda what: None)  # complete, so measured anew
        assert set(made) == PARTS
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_another_bench_is_not_gone_on_with(bench: Bench, document: Document, tmp_path: Path) -> None:
    write_document({**document, "key": "another", "complete": False}, tmp_path / "report.json")
    with pytest.raises(InputError, match="holds a bench of other bundles, options, versions or another machine"):
        bench.run(tmp_path / "report.json", "", resume=True, progress=lambda what: None)
    assert bench._begin(tmp_path / "report.json", "", resume=False)["results"] == {}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0, "results": {}}', '{"format": 1}'])
def test_a_file_that_is_no_bench_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    assert read_document(tmp_path / "r.json") is None


# --- what cannot be measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0; at least 1 is needed"),
        ({"repeats": -3}, "repeats is -3"),
        ({"warm_up": -1}, "warm_up is -1; at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"backends": ("cpu", "cuda", "cpu")}, "backends cpu, cuda, cpu were given. Name each once"),
        ({"batch": 0}, "batch is 0"),
        ({"held_out": Path("x")}, "without data"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchOptions(**options)


def test_sides_that_do_not_fit(
    tiny_bundle: Path, disturbed_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, bundle = kinds("class-conditional")
    with pytest.raises(InputError, match="has other inputs or outputs than the bundle"):
        Bench([tiny_bundle], open_checkpoint(checkpoint), OPTIONS)
    with pytest.raises(InputError, match=r"\(label condition, 3 channels, 16x16\) and .* draw different pictures"):
        Bench([tiny_bundle, bundle], None, BenchOptions())
    with pytest.raises(InputError, match="was given twice"):
        Bench([tiny_bundle, tiny_bundle], None, OPTIONS)
    with pytest.raises(InputError, match="no plan for 'ddim' with 1001 steps"):
        Bench([tiny_bundle, disturbed_bundle], None, BenchOptions(steps=1001))
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        Bench([tmp_path], None, OPTIONS)


def test_gates_that_cannot_be_judged(tiny_bundle: Path, disturbed_bundle: Path, tiny_checkpoint: Path) -> None:
    alone = Bench([tiny_bundle, disturbed_bundle], None, BenchOptions(steps=10))
    alone.check_gates([Gate("drift", 1.0), Gate("faster", 1.0)])
    with pytest.raises(InputError, match="Name a checkpoint with --against"):
        alone.check_gates([Gate("parity", 1.0)])
    other = Bench([tiny_bundle], open_checkpoint(tiny_checkpoint), BenchOptions(sampler="euler", steps=10))
    other.check_gates([Gate("drift", 1.0)])  # PyTorch takes the same steps
    other.variants[1].settings = replace(other.variants[1].settings, sampler="ddim")
    with pytest.raises(InputError, match=r"drift=1 compares step by step; tiny with .*ddim.* take other steps"):
        other.check_gates([Gate("drift", 1.0)])


@pytest.mark.parametrize("text", ["", "psnr", "psnr=", "psnr=high", "psnr=nan", "speed=2", "=3"])
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(InputError, match="it is KEY=NUMBER with a KEY of psnr, faster, smaller, drift, parity"):
        gate_from_text(text, KINDS)


def test_a_process_that_cannot_draw() -> None:
    with pytest.raises(BackendError, match=r"could not draw with variant \(ldm_export\.errors\.BundleError: .*absent"):
        process.processes_in_turn(
            {"variant": {"bundle": "absent", "backend": "cpu", "given": {}}}, 1, lambda what: None
        )


def test_several_backends_and_one_that_is_missing(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    options = replace(OPTIONS, repeats=1, warm_up=0, backends=("cuda", "cpu", "tensorrt-rtx", "openvino"))
    bench = Bench([tiny_bundle], open_checkpoint(tiny_checkpoint), options)
    assert [variant.name for variant in bench.variants] == ["PyTorch tiny", "tiny cpu", "tiny openvino"]
    document = bench.run(tmp_path / "r.json", "", resume=False, progress=lambda what: None)
    assert document["left_out"].keys() == {"tiny cuda", "tiny tensorrt-rtx"}
    assert "cuda was asked for; the installed ONNX Runtime" in document["left_out"]["tiny cuda"]
    assert [name for name in document["results"] if name.startswith("parity")] == ["parity of tiny cpu"]
    assert "openvino" in document["variants"]["tiny openvino"]["backend"]
    drifts = document["results"]["pictures"]
    assert all(0 < max(drifts[variant]["drift"]["worst"]) < 1e-5 for variant in ("tiny cpu", "tiny openvino"))
    assert "Left out: tiny tensorrt-rtx" in page(document)
    with pytest.raises(
        InputError, match="psnr=40 is asked of every variant, and tiny cuda is left out: cuda was asked"
    ):
        bench.check_gates([Gate("psnr", 40.0)])
    with pytest.raises(BackendError, match="cuda was asked for; the installed ONNX Runtime"):
        Bench([tiny_bundle], None, replace(options, backends=("cuda",)))


def test_memory_of_the_device_is_what_the_process_adds(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1000, 5000, 1000, 4000, None, 9000])
    monkeypatch.setattr(process, "used_device_bytes", lambda: next(used))
    told = {"bundle": str(tiny_bundle), "backend": "cpu", "given": {"prompts": ["red"], "seed": [0], "steps": 10}}
    found = process.processes_in_turn({"variant": told}, 2, lambda what: None)["variant"]
    assert found["device_bytes"] == 4000
    assert process.processes_in_turn({"variant": told}, 1, lambda what: None)["variant"]["device_bytes"] is None


# --- figures --------------------------------------------------------------------------------------------------------


def test_stages_and_ratios() -> None:
    ours = [Timings(text_ms=t, denoiser_ms=[t, 3 * t], loop_ms=1.0, decode_ms=2.0) for t in (1.0, 2.0, 3.0)]
    theirs = [Timings(text_ms=run.total_ms * 2) for run in ours]
    found = stages(ours)
    assert found["text"] == {"median_ms": 2.0, "p90_ms": pytest.approx(2.8)}
    assert found["denoiser"]["median_ms"] == 8.0
    assert found["denoiser_call"]["median_ms"] == 3.0
    assert found["total"]["median_ms"] == 13.0
    assert times_as_fast(theirs, ours) == 2.0
    assert stages(ours[:1])["decode"] == {"median_ms": 2.0, "p90_ms": 2.0}


def test_drift_is_relative_and_a_number() -> None:
    reference = np.full((2, 1, 1, 2, 2), 2.0, np.float32)
    ours = reference.copy()
    ours[1] *= 1.5
    np.testing.assert_allclose(drift(ours, reference), [0.0, 0.5])
    ours[0, 0, 0, 0, 0] = np.nan
    assert drift(ours, reference)[0] == LARGEST


def test_equal_pictures_and_other_steps() -> None:
    def draw(k: int) -> Sample:
        return Sample(np.full((1, 4, 4, 1), k, np.uint8), np.ones((3, 1, 1, 2, 2), np.float32), Timings())

    found = compare_pictures({"base": draw, "same": draw, "other": draw}, 2, "base", ["same"], lambda what: None)
    assert found["same"]["psnr_db"] == found["other"]["psnr_db"] == [LARGEST, LARGEST]
    assert found["same"]["drift"] == {"median": [0.0] * 3, "worst": [0.0] * 3}
    assert found["other"]["drift"] is None
    assert pictures_of(found["base"]["png"]).shape == (2, 4, 4, 1)
    assert json.dumps(found, allow_nan=False)
