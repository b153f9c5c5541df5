"""What ``doctor`` says of a bundle's targets and of a GPU."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ldm_export.bundle import Bundle
from ldm_export.cli import doctor, main
from ldm_export.export.ort_cpu import build_ort_cpu

pytest.importorskip("cuda.bindings.runtime", reason="CUDA's bindings (extra rtx) are not installed")
from tests.runtime.host_gpu import VERSION, add_engines, host_gpu

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_doctor_of_a_bundle(run: Run, bundle: Path) -> None:
    folder = add_engines(Bundle.open(bundle), "tensorrt_rtx")
    build_ort_cpu(Bundle.open(bundle))
    found = json.loads(run("doctor", bundle, "--json").stdout)
    made, here = "it was made with tensorrt_rtx 1.0", found["packages"]["tensorrt-rtx"]
    if here is not None:
        assert found["targets"]["rtx-sm89"].startswith(f"{made}, and this is {here}")
    assert found["targets"]["ort-cpu"] == ""
    assert re.search(r"targets/ort-cpu +runs here$", run("doctor", bundle).stdout, re.MULTILINE)
    assert re.search(r"targets/rtx-sm89 +does not run here: ", run("doctor", bundle).stdout, re.MULTILINE)
    (folder / "unet.plan").write_bytes(b"short")
    assert "unet.plan has 5 bytes" in json.loads(run("doctor", bundle, "--json").stdout)["targets"]["rtx-sm89"]
    assert run("doctor", bundle / "unet").exit_code == 2


@pytest.mark.parametrize("flavour", ["tensorrt_rtx", "tensorrt"])
def test_doctor_knows_a_gpu(run: Run, bundle: Path, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = add_engines(Bundle.open(bundle), flavour).name
    monkeypatch.setattr(doctor, "_version", lambda package: VERSION)
    with host_gpu(flavour):
        told = run("doctor", bundle).stdout
        assert re.search(r"^ +GPU +the host, compute capability 8\.9$", told, re.MULTILINE)
        assert re.search(r"^ +CUDA of its driver +13\.0$", told, re.MULTILINE)
        assert re.search(rf"^ +targets/{kind} +runs here$", told, re.MULTILINE)
        monkeypatch.setattr(doctor, "_version", lambda package: "1.1")
        told = run("doctor", bundle).stdout
        assert re.search(rf"targets/{kind} +does not run here: .* this is 1\.1\. Run: ldm-export build ", told)
        monkeypatch.setattr(doctor, "_version", lambda package: VERSION)
        file = bundle / "targets" / kind / "target.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"stripped": True}))
        told = run("doctor", bundle).stdout
        refit = f"ldm-export refit {bundle} --target {kind}"
        assert re.search(rf"targets/{kind} +does not run here: its engines have no weights\. Run: {refit}$", told, re.M)
