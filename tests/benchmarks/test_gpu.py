"""``benchmarks/gpu.py`` where there is no GPU: what is left out and why, and that what was measured is kept. With one,
all of it on the tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu import HALF, Kept, Row, bundle_of, engines_of, error_of, half_of, print_tables, rows_of, run
from benchmarks.peers.peer import Setup
from benchmarks.peers.run import OURS, REFERENCE
from ldm_export.bench.image_similarity import LARGEST
from ldm_export.bench.machine import machine, versions
from ldm_export.bundle import Bundle
from ldm_export.errors import BackendError, InputError
from ldm_export.runtime.backends import cuda
from ldm_export.runtime.backends.providers import PROVIDERS
from ldm_export.runtime.pipeline import Pipeline

HEADER = {"device": "cpu", "machine": machine(), "versions": versions(), "rounds": 2}
ENGINES = Row("tensorrt-rtx", OURS, Setup(backend="tensorrt-rtx"))
ON_CPU = Row("cpu", OURS, Setup(backend="cpu"))
EAGER = Row(REFERENCE, REFERENCE, Setup())
no_gpu = pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a workload ``tiny``."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(tiny_checkpoint, folder / "tiny" / "checkpoint")
    shutil.copytree(tiny_bundle, folder / "tiny" / "bundle")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Path:
    """What is measured of one UNet call on the CPU, with a row that cannot run here."""
    path = folder / "results" / "gpu.json"
    rows = lambda precision, device: [ENGINES, ON_CPU, EAGER]  # noqa: E731
    run(Kept(path, HEADER), ["tiny"], folder, 2, "cpu", "", rows, kinds=["unet"], precisions=["fp32"])
    return path


@no_gpu
def test_without_a_gpu_nothing_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--result", str(tmp_path / "a" / "gpu.json"), "--folder", str(tmp_path / "build")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: CUDA")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["sd16"], ["--rounds", "0"], ["--device", "tpu"], ["--kinds", "vae"], ["--precisions", "fp32,fp8"]]
)
def test_what_cannot_be_measured(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu.main(arguments)
    assert left.value.code == 2


def test_rows() -> None:
    names = [row.name for row in rows_of("fp16", "cuda")]
    assert len(set(names)) == len(names) == 12
    assert names[:3] == ["tensorrt-rtx", "tensorrt-rtx, no CUDA graphs", "tensorrt-rtx, whole loop"]
    by_name = {row.name: row.setup for row in rows_of("fp16", "cuda")}
    assert by_name["tensorrt"].bundle == "fp16.bundle"
    assert not by_name["tensorrt, no CUDA graphs"].cuda_graphs
    assert by_name["ort-tensorrt"].bundle == HALF
    assert [by_name[name].cuda_graphs for name in ("cuda", "cuda, CUDA graphs")] == [False, True]
    assert by_name["torch.compile"] == Setup(device="cuda", precision="fp16")
    assert [row.setup.device for row in rows_of("fp32", "cpu")] == ["cpu"] * 3
    assert [row.name for row in rows_of("fp32", "cpu")] == ["cpu", REFERENCE, "torch.compile"]


@no_gpu
def test_rows_are_measured_or_left_out(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(result.read_text())
    rows = document["rows"]
    assert list(rows) == [f"tiny unet fp32 {name}" for name in ("tensorrt-rtx", "cpu", REFERENCE)]
    missing, ours, eager = rows.values()
    assert "CUDA does not run here" in missing["left_out"]
    assert missing.keys() == {"workload", "kind", "precision", "name", "left_out"}
    assert 0 < ours["error"] < 1e-4
    assert eager["error"] == 0
    assert "ours" not in ours
    assert eager["ours"] == "cpu"
    assert eager["ours_is_faster"] > 0
    for row in (ours, eager):
        assert len(row["ms"]) == 2
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["device_bytes"] is None
        assert row["peak_bytes"] > 2**24
    assert list(document["builds"]) == ["tiny bundle", "tiny reference unet"]
    assert document["builds"]["tiny reference unet"]["seconds"] > 0
    print_tables(document)
    table = capsys.readouterr().out
    assert f"| tiny unet fp32 cpu | {ours['median_ms']:.2f} | {ours['min_ms']:.2f} |  | {ours['error']:.1e} |" in table
    assert "| tiny unet fp32 tensorrt-rtx | left out: " in table
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1


def test_only_what_is_missing_is_measured_again(result: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tried = json.loads(result.read_text()), []

    def figures(row: Row, ours: Row | None, *_: Any) -> dict[str, Any]:
        tried.append((row.name, ours and ours.name, list(json.loads(result.read_text())["rows"])))
        raise BackendError("still\nmissing")

    monkeypatch.setattr(gpu, "figures_of", figures)
    other = replace(ENGINES, name="other")
    rows = lambda precision, device: [ENGINES, ON_CPU, EAGER, other]  # noqa: E731
    run(Kept(result, HEADER), ["tiny"], folder, 2, "cpu", "", rows, kinds=["unet"], precisions=["fp32"])
    assert [(name, ours) for name, ours, _ in tried] == [("tensorrt-rtx", None), ("other", "cpu")]
    after = json.loads(result.read_text())
    assert after["rows"]["tiny unet fp32 other"]["left_out"] == "still missing"
    assert after["rows"]["tiny unet fp32 cpu"] == before["rows"]["tiny unet fp32 cpu"]
    assert after["builds"] == before["builds"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "gpu.json", HEADER)
    kept.make("rows", {"name": "a"}, lambda: {"ms": [1.0]})
    with pytest.raises(KeyboardInterrupt):
        kept.make("rows", {"name": "b"}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Kept(tmp_path / "gpu.json", HEADER).document["rows"] == {"a": {"name": "a", "ms": [1.0]}}


def test_after_its_time_nothing_is_begun(tmp_path: Path) -> None:
    late = Kept(tmp_path / "gpu.json", HEADER, seconds=0)
    assert late.make("rows", {"name": "a"}, lambda: {"ms": [1.0]}) == {"name": "a", "left_out": "no time was left"}
    again = Kept(tmp_path / "gpu.json", HEADER)
    assert again.make("rows", {"name": "a"}, lambda: {"ms": [1.0]}) == {"name": "a", "ms": [1.0]}
    again._deadline = 0.0
    assert again.make("rows", {"name": "a"}, lambda: {}) == {"name": "a", "ms": [1.0]}


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**HEADER, "rounds": 3, "builds": {}, "rows": {}})])
def test_another_result_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(InputError, match=r"gpu\.json is of another machine, .* Move it away, or name another"):
        Kept(tmp_path / "gpu.json", HEADER)
    assert (tmp_path / "gpu.json").read_text() == text


def test_a_workload_that_cannot_be_made_leaves_the_others(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "gpu.json", HEADER)
    run(kept, ["absent", "lost"], tmp_path, 1, "cpu", "")
    assert kept.document["builds"].keys() == {"absent bundle", "lost bundle"}
    assert all(row["left_out"] for row in kept.document["builds"].values())
    assert kept.document["rows"] == {}


@pytest.mark.slow
def test_engines_and_halves_are_built(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    place = folder / "tiny"
    bundle_of("tiny", place, "cpu")
    built = engines_of(place, "fp32", "tensorrt_rtx", "8.9")
    assert built["engines"].keys() == {"text_encoder", "unet", "step", "vae_decoder", "vae_encoder"}
    assert built["bytes"] == sum(engine["engine_bytes"] for engine in built["engines"].values())
    loop = engines_of(place, "fp32", "tensorrt_rtx", "8.9", ("ddim-20",))
    assert loop["engines"].keys() == {"loops/ddim-20"}
    assert engines_of(place, "fp32", "tensorrt_rtx", "8.9") == built
    with pytest.raises(InputError, match="H100 needs the data-centre flavour"):
        engines_of(place, "fp32", "tensorrt_rtx", "9.0")
    half = half_of(place)
    assert half["bytes"] < 0.7 * bundle_of("tiny", place, "cpu")["bytes"]
    assert half_of(place) == {"bytes": half["bytes"]}
    drawn = [Pipeline.open(place / name, backend="cpu").generate("red", steps=10).latents for name in (HALF, "bundle")]
    assert 0 < np.abs(drawn[0] - drawn[1]).max() < 0.05 * np.abs(drawn[1]).max()
    assert not (place / "bundle" / "targets" / "rtx-sm89-fp32").exists()
    made = Bundle.open(place / HALF, verify=True)
    assert PROVIDERS["ort-tensorrt"].options_for(made, None)["trt_fp16_enable"] == "1"


def test_an_error_that_is_no_number(tmp_path: Path) -> None:
    reference = np.array([1.0, -2.0], np.float32)
    assert error_of(reference, tmp_path / "r.npy") is None
    np.save(tmp_path / "r.npy", reference)
    assert error_of(np.array([1.0, -1.0], np.float32), tmp_path / "r.npy") == 0.5
    assert error_of(np.array([np.nan, 0], np.float32), tmp_path / "r.npy") == LARGEST


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.driver_is_there(), reason="NVIDIA's driver is not installed")
def test_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "gpu.json", HEADER)
    run(kept, ["tiny"], folder, 2, "cuda", cuda.gpus()[0].compute_capability)
    measured = [row for row in kept.document["rows"].values() if "left_out" not in row]
    assert {row["name"] for row in measured} & {"tensorrt-rtx", "tensorrt", "cuda"}
    for row in measured:
        assert row["device_bytes"] > 0
        assert row["error"] < (0.01 if row["precision"] == "fp32" else 0.1), row["name"]
