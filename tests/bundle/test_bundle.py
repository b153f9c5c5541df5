"""The bundle on disk: what it holds, each way it can lie, and that it is made whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_export.bundle import Bundle, create_bundle
from ldm_export.bundle import bundle as bundle_module
from ldm_export.contract import GraphSpec, TensorSpec
from ldm_export.errors import BundleError, ExportError, LdmExportError

GRAPH = GraphSpec(
    "unet/model.onnx",
    (TensorSpec("sample", "float32", ("batch", 4, "height", "width")), TensorSpec("timestep", "int64", ())),
    (TensorSpec("out_sample", "float32", ("batch", 4, "height", "width")),),
)
ABOUT = {
    "model": {"kind": "latent-diffusion", "unet": "UNet2DConditionModel"},
    "graphs": {"unet": GRAPH},
    "source": {"checkpoint": "emoji64", "dtype": "float32"},
    "passes": [{"name": "fuse", "count": 3}],
    "parity": [{"graph": "unet", "output": "out_sample", "max_error": 1e-6, "tolerance": 1e-4, "passed": True}],
}


def save_model(path: Path, location: str | None = "model.onnx_data") -> None:
    """Write a small model whose one weight is external, wherever ``location`` claims it to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "model.onnx_data").unlink(missing_ok=True)  # onnx.save would append to it
    weight = numpy_helper.from_array(np.arange(256, dtype=np.float32), "weight")
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [256])
    node = helper.make_node("Identity", ["weight"], ["out_sample"])
    model = helper.make_model(helper.make_graph([node], "g", [], [output], initializer=[weight]))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    if location != "model.onnx_data":
        model = onnx.load(path, load_external_data=False)
        tensor = model.graph.initializer[0]
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)
        path.write_bytes(model.SerializeToString())


def fill(folder: Path, location: str = "model.onnx_data") -> None:
    save_model(folder / "unet" / "model.onnx", location)
    (folder / "plans").mkdir()
    (folder / "plans" / "ddim-20.json").write_text("{}\n")
    (folder / "model_index.json").write_text("{}\n")


def make(path: Path, filling=fill, about=ABOUT, **options) -> Bundle:
    with create_bundle(path, **options) as writer:
        filling(writer.path)
        return writer.seal(**about)


def fill_and_raise(error):
    def filling(folder: Path) -> None:
        fill(folder)
        raise error

    return filling


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    changed = change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest if changed is None else changed))


def relist(path: Path, relative: str) -> None:
    """Make the manifest agree with a file as it now is: what a forger would do."""
    data = (path / relative).read_bytes()
    entry = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"].update({relative: entry}))


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make(tmp_path / "bundle").path


class TestHonest:
    def test_round_trip(self, bundle):
        opened = Bundle.open(bundle, verify=True)
        assert opened.path == bundle
        manifest = opened.manifest
        assert set(manifest.files) == {
            "model_index.json",
            "plans/ddim-20.json",
            "unet/model.onnx",
            "unet/model.onnx_data",
        }
        assert manifest.files["model_index.json"].size_bytes == 3
        assert manifest.files["model_index.json"].sha256 == hashlib.sha256(b"{}\n").hexdigest()
        assert manifest.graphs == {"unet": GRAPH}
        assert manifest.model == ABOUT["model"]
        assert manifest.source == ABOUT["source"]
        assert list(manifest.passes) == ABOUT["passes"]
        assert list(manifest.parity) == ABOUT["parity"]
        assert opened.file("unet/model.onnx") == bundle / "unet" / "model.onnx"

    def test_a_file_that_is_not_listed(self, bundle):
        with pytest.raises(BundleError, match=r"has no vae/model.onnx; it has model_index.json"):
            Bundle.open(bundle).file("vae/model.onnx")

    def test_manifest_text(self, bundle):
        text = (bundle / "manifest.json").read_text(encoding="utf-8")
        assert text.endswith("}\n")
        assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        assert json.loads(text)["format_version"] == 2
        assert str(bundle.parent) not in text

    def test_equal_content_gives_equal_bytes(self, bundle, tmp_path):
        other = make(tmp_path / "elsewhere" / "other").path
        time.sleep(0.01)
        for file in (file for file in bundle.rglob("*") if file.is_file()):
            assert file.read_bytes() == (other / file.relative_to(bundle)).read_bytes()

    def test_a_bundle_can_be_moved_and_reached_through_a_link(self, bundle, tmp_path):
        moved = shutil.move(bundle, tmp_path / "moved")
        (tmp_path / "latest").symlink_to(moved)
        Bundle.open(tmp_path / "latest", verify=True)

    def test_targets_live_on_their_own(self, bundle):
        save_model(bundle / "targets" / "ort-cpu" / "model.onnx")
        Bundle.open(bundle, verify=True)
        shutil.rmtree(bundle / "targets")
        Bundle.open(bundle, verify=True)

    def test_targets_are_not_listed(self, tmp_path):
        with create_bundle(tmp_path / "b") as writer:
            fill(writer.path)
            save_model(writer.path / "targets" / "ort-cpu" / "model.onnx")
            sealed = writer.seal(**ABOUT)
        assert not [path for path in sealed.manifest.files if path.startswith("targets")]
        assert (sealed.path / "targets" / "ort-cpu" / "model.onnx").exists()

    def test_graphs_may_share_external_data(self, tmp_path):
        with create_bundle(tmp_path / "b") as writer:
            fill(writer.path)
            save_model(writer.path / "unet" / "shallow.onnx")
            writer.seal(**ABOUT)
        Bundle.open(tmp_path / "b", verify=True)

    def test_imports_no_onnx_and_no_torch(self):
        code = "import sys, ldm_export.bundle; assert not {'torch', 'onnx', 'numpy'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


def replace_by_link(path: Path, outside: Path) -> None:
    shutil.move(path, outside)
    path.symlink_to(outside)


def wrong_hash(path: Path) -> None:
    data = bytearray((path / "unet" / "model.onnx_data").read_bytes())
    data[7] ^= 1
    (path / "unet" / "model.onnx_data").write_bytes(data)


def foreign_manifest(path: Path) -> None:
    with create_bundle(path.parent / "other") as writer:
        fill(writer.path)
        (writer.path / "model_index.json").write_text("[]\n")
        writer.seal(**ABOUT)
    shutil.copy(path.parent / "other" / "manifest.json", path / "manifest.json")


def external_to(location: str):
    def lie(path: Path) -> None:
        save_model(path / "unet" / "model.onnx", location)
        relist(path, "unet/model.onnx")

    return lie


def unlisted_external_data(path: Path) -> None:
    edit_manifest(path, lambda m: m["files"].pop("unet/model.onnx_data") and None)


def external_data_too_short(path: Path) -> None:
    (path / "unet" / "model.onnx_data").write_bytes(b"short")
    relist(path, "unet/model.onnx_data")


def not_onnx(path: Path) -> None:
    (path / "unet" / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    relist(path, "unet/model.onnx")


def rename_listed(new: str):
    def lie(manifest: dict) -> None:
        manifest["files"][new] = manifest["files"].pop("model_index.json")

    return lambda path: edit_manifest(path, lie)


def edited(**changes):
    return lambda path: edit_manifest(path, lambda manifest: manifest.update(changes))


def without(key: str):
    return lambda path: edit_manifest(path, lambda manifest: manifest.pop(key) and None)


def graph_with(**changes):
    return lambda path: edit_manifest(path, lambda manifest: manifest["graphs"]["unet"].update(changes))


FILE = {"size_bytes": 3, "sha256": "0" * 64}
LIES = {  # name -> (what to do to the folder, what the message says); the first group is found without hashing
    "no folder": (shutil.rmtree, "no such folder"),
    "a file, not a folder": (lambda p: (shutil.rmtree(p), p.write_text("x")), "cannot be read"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest not JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not JSON"),
    "manifest not UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff"), "UTF-8"),
    "manifest too deep": (lambda p: (p / "manifest.json").write_text("[" * 200000), "is not JSON"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[]"), "is of type list; dict is needed"),
    "manifest with a key twice": (lambda p: (p / "manifest.json").write_text('{"a": 1, "a": 2}'), "occurs twice"),
    "manifest a link": (lambda p: replace_by_link(p / "manifest.json", p.parent / "m"), "'manifest.json' is a link"),
    "unknown version": (edited(format_version=3), "format_version 3; this ldm_export reads 2"),
    "version of text": (edited(format_version="1"), "format_version is of type str"),
    "version true": (edited(format_version=True), "format_version is of type bool"),
    "missing version": (without("format_version"), "lacks 'format_version'"),
    "missing files": (without("files"), "lacks 'files'"),
    "missing graphs": (without("graphs"), "lacks 'graphs'"),
    "missing model": (without("model"), "lacks 'model'"),
    "missing source": (without("source"), "lacks 'source'"),
    "missing passes": (without("passes"), "lacks 'passes'"),
    "missing parity": (without("parity"), "lacks 'parity'"),
    "unknown key": (edited(colour="red"), "unknown key 'colour'"),
    "files a list": (edited(files=[]), "files is of type list"),
    "file entry of text": (edited(files={"a": "b"}), r"files\['a'\] is of type str"),
    "file without hash": (edited(files={"a": {"size_bytes": 1}}), "lacks 'sha256'"),
    "hash not hex": (edited(files={"a": FILE | {"sha256": "xyz"}}), "64 hex digits"),
    "size negative": (edited(files={"a": FILE | {"size_bytes": -1}}), "a size from 0"),
    "size true": (edited(files={"a": FILE | {"size_bytes": True}}), "size_bytes is of type bool"),
    "passes of text": (edited(passes=["fuse"]), r"passes\[0\] is of type str"),
    "graph of no file": (graph_with(path="vae/model.onnx"), "'vae/model.onnx', which is not among the files"),
    "graph without inputs": (graph_with(inputs=None), "inputs is of type NoneType"),
    "shape negative": (graph_with(inputs=[{"name": "x", "dtype": "float32", "shape": [-1]}]), r"shape \[-1\]"),
    "shape true": (graph_with(inputs=[{"name": "x", "dtype": "float32", "shape": [True]}]), r"shape \[True\]"),
    "input without dtype": (graph_with(inputs=[{"name": "x", "shape": []}]), r"inputs\[0\] lacks 'dtype'"),
    "absolute path": (rename_listed("/etc/passwd"), "'/etc/passwd' is not a plain one"),
    "path with ..": (rename_listed("../other/model_index.json"), "is not a plain one"),
    "path with .. inside": (rename_listed("unet/../model_index.json"), "is not a plain one"),
    "path with .": (rename_listed("./model_index.json"), "is not a plain one"),
    "path with //": (rename_listed("unet//model.onnx"), "is not a plain one"),
    "empty path": (rename_listed(""), "is not a plain one"),
    "path with backslash": (rename_listed("..\\model_index.json"), "has a character"),
    "path with a drive": (rename_listed("C:/model_index.json"), "has a character"),
    "path with NUL": (rename_listed("model\x00.json"), "has a character"),
    "manifest listed": (edited(files={"manifest.json": FILE}), "never are"),
    "target listed": (edited(files={"targets/x": FILE}), "never are"),
    "missing file": (lambda p: (p / "model_index.json").unlink(), "model_index.json is missing"),
    "folder for a file": (
        lambda p: ((p / "model_index.json").unlink(), (p / "model_index.json").mkdir()),
        "model_index.json is missing",
    ),
    "wrong size": (lambda p: (p / "model_index.json").write_text("{} \n"), "model_index.json has 4 bytes"),
    "linked file": (
        lambda p: replace_by_link(p / "unet" / "model.onnx_data", p.parent / "data"),
        "'unet/model.onnx_data' is a link",
    ),
    "file linked within": (
        lambda p: replace_by_link(p / "unet" / "model.onnx_data", p / "plans" / "data"),
        "'unet/model.onnx_data' is a link",
    ),
    "linked folder": (lambda p: replace_by_link(p / "unet", p.parent / "unet"), "'unet' is a link"),
    "link that is not listed": (lambda p: (p / "extra").symlink_to("/etc/passwd"), "'extra' is a link"),
    "dangling link": (lambda p: (p / "extra").symlink_to("nowhere"), "'extra' is a link"),
    "pipe": (lambda p: os.mkfifo(p / "pipe"), "'pipe' is neither a file nor a folder"),
    "external data absolute": (external_to("/etc/passwd"), "from '/etc/passwd', which"),
    "external data leaves": (external_to("../../secret"), r"from '\.\./\.\./secret', which"),
    "external data leaves and returns": (external_to("../../bundle/unet/model.onnx_data"), "does not list"),
    "external data with backslash": (external_to("..\\unet\\model.onnx_data"), "does not list"),
    "external data in memory": (external_to("*/_ORT_MEM_ADDR_/*"), "does not list"),
    "external data nowhere": (external_to(""), "does not list"),
    "external data not listed": (unlisted_external_data, "'model.onnx_data', which manifest.json does not list"),
    "external data under targets": (external_to("../targets/x"), "does not list"),
    "external data too short": (external_data_too_short, "beyond the 5 bytes"),
    "graph not ONNX": (not_onnx, "not a readable ONNX model"),
}  # fmt: skip
DEEP_LIES = {  # found by hashing
    "wrong hash": (wrong_hash, "unet/model.onnx_data has been altered"),
    "foreign manifest": (foreign_manifest, "model_index.json has been altered"),
    "stray file": (lambda p: (p / "unet" / "extra.bin").write_bytes(b"x"), "'unet/extra.bin' is not listed"),
    "file that is not listed": (rename_listed("model_index2.json"), "model_index2.json is missing"),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(bundle, lie, verify):
    spoil, message = LIES[lie]
    spoil(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle, verify=verify)
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize("lie", DEEP_LIES)
def test_a_lie_is_found_by_verify(bundle, lie):
    spoil, message = DEEP_LIES[lie]
    spoil(bundle)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle, verify=True)


class TestAddFile:
    def test_add(self, bundle):
        opened = Bundle.open(bundle)
        added = opened.add_file("plans/plms-50.json", b"[]\n")
        assert "plans/plms-50.json" not in opened.manifest.files
        assert added == Bundle.open(bundle, verify=True)
        assert added.file("plans/plms-50.json").read_bytes() == b"[]\n"
        assert added.manifest.graphs == opened.manifest.graphs

    def test_a_file_from_a_file(self, bundle, tmp_path):
        (tmp_path / "source").write_bytes(b"weights")
        added = Bundle.open(bundle).add_file("loops/weights", tmp_path / "source")
        assert added.file("loops/weights").read_bytes() == b"weights"
        Bundle.open(bundle, verify=True)
        with pytest.raises(ExportError, match="cannot be written"):
            added.add_file("loops/other", tmp_path / "absent")
        assert Bundle.open(bundle, verify=True) == added

    def test_a_graph_with_its_records(self, bundle):
        opened = Bundle.open(bundle)
        spec = GraphSpec("loops/a-1.onnx", (), (TensorSpec("y", "float32", ()),))
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
        for error in (1.0, 2.0):  # the second replaces the first
            node = helper.make_node("Constant", [], ["y"], value_float=error)
            model = helper.make_model(helper.make_graph([node], "g", [], [output]))
            record = {"graph": spec.name, "output": "y", "max_error": error, "tolerance": 1e-4, "passed": False}
            added = Bundle.open(bundle).add_file(spec.path, model.SerializeToString(), graph=spec, parity=[record])
            assert added.manifest.graphs == {**opened.manifest.graphs, "loops/a-1": spec}
            assert list(added.manifest.parity) == [*opened.manifest.parity, record]

    @pytest.mark.parametrize("error", [float("nan"), -1.0, "small"])
    def test_records_that_lie_are_not_added(self, bundle, error):
        spec = GraphSpec("loops/a-1.onnx", (), (TensorSpec("y", "float32", ()),))
        record = {"graph": spec.name, "output": "y", "max_error": error, "tolerance": 1e-4, "passed": True}
        with pytest.raises(LdmExportError):
            Bundle.open(bundle).add_file(spec.path, b"", graph=spec, parity=[record])
        assert spec.name not in Bundle.open(bundle).manifest.graphs

    def test_two_openers_both_add(self, bundle):
        first, second = Bundle.open(bundle), Bundle.open(bundle)
        first.add_file("plans/a.json", b"a")
        assert {"plans/a.json", "plans/b.json"} <= set(second.add_file("plans/b.json", b"b").manifest.files)

    def test_replace(self, bundle):
        Bundle.open(bundle).add_file("plans/ddim-20.json", b'{"new": 1}\n')
        assert Bundle.open(bundle, verify=True).file("plans/ddim-20.json").read_bytes() == b'{"new": 1}\n'

    def test_new_folder(self, bundle):
        Bundle.open(bundle).add_file("a/b/c.json", b"")
        Bundle.open(bundle, verify=True)

    @pytest.mark.parametrize(
        "relative", ["../x", "/x", "a\\b", "", "manifest.json", "targets/x", "a/../b", "C:x", "a ", "\ud800"]
    )
    def test_bad_path(self, bundle, relative):
        with pytest.raises(BundleError, match=r"manifest\.json: the path"):
            Bundle.open(bundle).add_file(relative, b"x")
        Bundle.open(bundle, verify=True)

    def test_a_model_that_reads_outside_is_not_added(self, bundle, tmp_path):
        save_model(tmp_path / "evil.onnx", "../../secret")
        with pytest.raises(BundleError, match="secret"):
            Bundle.open(bundle).add_file("loops/evil.onnx", (tmp_path / "evil.onnx").read_bytes())
        Bundle.open(bundle, verify=True)

    @pytest.mark.parametrize("fail_at", [0, 1, 2])
    @pytest.mark.parametrize("relative", ["plans/new.json", "plans/ddim-20.json"])
    def test_cut_off_anywhere_the_bundle_opens(self, bundle, monkeypatch, relative, fail_at):
        """Stand in for a kill: the n-th rename does not happen, nor anything after it."""
        opened = Bundle.open(bundle)
        calls = iter(range(10))
        real = os.replace

        def replace(source, target):
            if next(calls) >= fail_at:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            opened.add_file(relative, b"other\n")
        except KeyboardInterrupt:
            Bundle.open(bundle)
        monkeypatch.undo()
        Bundle.open(bundle).add_file(relative, b"other\n")
        assert Bundle.open(bundle, verify=True).file(relative).read_bytes() == b"other\n"

    def test_full_disk(self, bundle, monkeypatch):
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(ExportError, match="disk is full"):
            Bundle.open(bundle).add_file("plans/new.json", b"x")
        monkeypatch.undo()
        Bundle.open(bundle, verify=True)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, PermissionError])
    def test_an_error_leaves_nothing(self, tmp_path, error):
        with pytest.raises(error):
            make(tmp_path / "a" / "b", fill_and_raise(error))
        assert list(tmp_path.iterdir()) == []

    def test_leaving_without_seal_leaves_nothing(self, tmp_path):
        with create_bundle(tmp_path / "b") as writer:
            fill(writer.path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "error", [full_disk, lambda *_: (_ for _ in ()).throw(RuntimeError("x: No space left on device"))]
    )
    def test_full_disk_while_filling(self, tmp_path, monkeypatch, error):
        monkeypatch.setattr(onnx, "save", lambda *_, **__: error())
        with pytest.raises(
            ExportError, match=r"disk is full: .*b could not be written; .* GB are free, 0\.00 GB are needed"
        ):
            make(tmp_path / "b", needed_bytes=5000)
        assert list(tmp_path.iterdir()) == []

    def test_full_disk_while_sealing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(ExportError, match="disk is full"):
            make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_a_rename_that_the_system_refuses(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
        with pytest.raises(ExportError, match="cannot be written: not yours"):
            make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_too_little_room_is_refused_at_once(self, tmp_path):
        with pytest.raises(ExportError, match=r"1000000000\.00 GB are needed"):
            make(tmp_path / "b", needed_bytes=10**18)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ExportError, match="cannot be written"):
            make(tmp_path / "file" / "b")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_bundle_that_would_not_open_is_not_sealed(self, tmp_path):
        with pytest.raises(BundleError, match="does not list"):
            make(tmp_path / "b", lambda folder: fill(folder, "../../outside"))
        assert list(tmp_path.iterdir()) == []

    def test_values_that_json_cannot_hold(self, tmp_path):
        with pytest.raises(ExportError, match="JSON cannot hold"):
            make(tmp_path / "b", about=ABOUT | {"parity": [{"max_abs_error": float("nan")}]})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("where", ["filling", "sealed but not renamed"])
    def test_kill_leaves_nothing_that_opens(self, tmp_path, where):
        script = f"""
import os, pathlib, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import test_bundle, ldm_export.bundle.bundle as b
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if {where == "filling"}:
    os.fsync = die
else:
    b.move_into_place = die
test_bundle.make(pathlib.Path({str(tmp_path)!r}) / "b")
"""
        assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
        left = list(tmp_path.iterdir())
        assert len(left) == 1
        assert left[0].name.startswith(".b.partial-")
        assert (left[0] / "manifest.json").exists() == (where != "filling")
        for folder in [tmp_path / "b", *left]:
            with pytest.raises(BundleError):
                Bundle.open(folder)
        make(tmp_path / "b")
        Bundle.open(tmp_path / "b", verify=True)


class TestForce:
    def test_an_existing_bundle_is_kept(self, bundle):
        before = contents(bundle)
        with pytest.raises(BundleError, match="exists; use --force"):
            make(bundle)
        assert contents(bundle) == before

    def test_force_replaces(self, bundle):
        Bundle.open(bundle).add_file("plans/old.json", b"x")
        replaced = make(bundle, force=True)
        assert "plans/old.json" not in replaced.manifest.files
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]

    def test_force_replaces_a_damaged_bundle_and_an_empty_folder(self, bundle, tmp_path):
        wrong_hash(bundle)
        make(bundle, force=True)
        (tmp_path / "empty").mkdir()
        make(tmp_path / "empty", force=True)
        for path in (bundle, tmp_path / "empty"):
            Bundle.open(path, verify=True)

    @pytest.mark.parametrize("kind", ["folder", "web page", "file", "link"])
    def test_force_replaces_nothing_else(self, tmp_path, bundle, kind):
        target = tmp_path / "target"
        if kind == "file":
            target.write_text("x")
        elif kind == "link":
            target.symlink_to(bundle)
        else:
            target.mkdir()
            (target / "thesis.txt").write_text("x")
        if kind == "web page":
            (target / "manifest.json").write_text('{"name": "My page", "icons": []}')
        with pytest.raises(BundleError, match="is not a bundle; --force replaces"):
            make(target, force=True)
        assert target.exists()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_the_old_one_stays_when_filling_fails(self, bundle, error):
        before = contents(bundle)
        with pytest.raises(error):
            make(bundle, fill_and_raise(error), force=True)
        assert contents(bundle) == before
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]

    @pytest.mark.parametrize("failing", [0, 1])
    def test_the_old_one_is_back_when_renaming_fails(self, bundle, monkeypatch, failing):
        before = contents(bundle)
        calls = iter(range(10))
        real = os.rename

        def rename(source, target):
            if next(calls) == failing:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(bundle_module.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            make(bundle, force=True)
        assert contents(bundle) == before
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]

    def test_a_target_that_appears_meanwhile_is_kept(self, tmp_path):
        def meanwhile(folder: Path) -> None:
            fill(folder)
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / "mine.txt").write_text("x")

        with pytest.raises(BundleError, match="exists"):
            make(tmp_path / "b", meanwhile)
        assert contents(tmp_path / "b") == {"mine.txt": b"x"}


def test_every_error_is_of_the_package():
    assert issubclass(BundleError, LdmExportError)
    assert issubclass(ExportError, LdmExportError)
