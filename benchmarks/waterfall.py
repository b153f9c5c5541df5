"""What each pass of a recipe bought and cost: every stage of its work folder, and PyTorch eager, timed in turn.

waterfall.py WORK [RESULT.json]        WORK as `ldm-export export CHECKPOINT --recipe ... --work WORK` left it

The last row is what was kept last, with its target ort-cpu. Quality is what the recipe measured on each stage's bundle;
times are measured here, one picture at a time, each variant drawn as its own defaults say, every round all variants.
The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from ldm_export.bench.machine import cpu
from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import ORT_CPU
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.recipe.stages import STAGE
from ldm_export.runtime import Pipeline
from ldm_export.runtime.pipeline import Timings
from ldm_export.verify.image_generators import SamplingSettings, TorchImageGenerator
from ldm_export.verify.latency import Draw, draw_with, runs_in_turn, times_as_fast
from ldm_export.verify.latency import stages as stages_of

ROUNDS = 11
PROMPTS = ("red apple", "black cat", "rocket", "pizza", "octopus", "snowman", "frog face", "crescent moon")


def main(work: Path, checkpoint: str) -> dict[str, Any]:
    records = [json.loads((folder / STAGE).read_text()) | {"folder": folder} for folder in stages(work)]
    built = [record for record in records if (record["folder"] / "bundle").is_dir()]  # undone ones are timed, too
    bundles = {record["name"]: Bundle.open(record["folder"] / "bundle") for record in built}
    plain = bundles["teacher"]
    drawing = plain.manifest.model
    variants: dict[str, Draw] = {"PyTorch eager": draw_with_torch(checkpoint, plain)}
    variants |= {name: draw_with(Pipeline(bundle, "cpu"), list(PROMPTS)) for name, bundle in bundles.items()}
    last = [record for record in built if record["kept"]][-1]
    with tempfile.TemporaryDirectory() as folder:
        final = Bundle.open(shutil.copytree(last["folder"] / "bundle", Path(folder) / "bundle"))
        build_ort_cpu(final)
        variants[ORT_CPU] = draw_with(Pipeline(final, "cpu"), list(PROMPTS))
        times = runs_in_turn(variants, ROUNDS)
    rows = [row("PyTorch eager", None, times["PyTorch eager"], times, records[0])]
    for record in records:
        rows.append(row(record["name"], record, times.get(record["name"]), times, records[0]))
    rows.append(row(ORT_CPU, None, times[ORT_CPU], times, records[0]))
    print_table(rows)
    return {
        "checkpoint": checkpoint,
        "steps_of_teacher": drawing["default_steps"],
        "guidance": plain.roles.guidance.scale,
        "machine": f"{platform.machine()}, {cpu()}, {torch.get_num_threads()} threads",
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "rounds": ROUNDS,
        "judged_on": records[0]["judged_on"],
        "rows": rows,
    }


def stages(work: Path) -> list[Path]:
    """The folders of the recipe's last run, in order: of passes that were run with several options, the newest."""
    newest: dict[str, Path] = {}
    for file in sorted(work.glob(f"*/{STAGE}"), key=lambda file: file.stat().st_mtime):
        newest[file.parent.name.partition("-")[0]] = file.parent
    return [newest[number] for number in sorted(newest)]


def draw_with_torch(checkpoint: str, plain: Bundle) -> Draw:
    """As the plain bundle is drawn by default."""
    image_generator, model = TorchImageGenerator(open_checkpoint(checkpoint)), plain.manifest.model
    settings = SamplingSettings(steps=model["default_steps"], guidance=plain.roles.guidance.scale)
    return lambda seed: image_generator.sample([f"{PROMPTS[seed % len(PROMPTS)]} {seed}"], [seed], settings).timings


def row(
    name: str,
    record: dict[str, Any] | None,
    spent: list[Timings] | None,
    times: dict[str, list[Timings]],
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """One line of the table: ratios are medians over the rounds, each against the same round."""
    found: dict[str, Any] = {"name": name, "kept": record is None or record["kept"]}
    if record is not None:
        found |= {key: record[key] for key in ("why", "seconds") if key in record}
        score = record.get("score", {}) if record["judged_on"] == teacher["judged_on"] else {}
        found |= {key: score.get(key) for key in ("bytes", "frechet_distance", "retrieval_at_1", "retrieval_at_5")}
        found["psnr_to_teacher_db"] = score.get("psnr_to_teacher_db")
        if score:
            found["frechet_ratio"] = score["frechet_distance"] / teacher["score"]["frechet_distance"]
    if spent:
        medians = stages_of(spent)
        found |= {
            f"{key}_ms": medians[stage]["median_ms"]
            for key, stage in (("total", "total"), ("unet", "denoiser_call"), ("decode", "decode"))
        }
        found["steps"] = len(spent[0].denoiser_ms)
        for variant, against in (("eager", "PyTorch eager"), ("plain", "teacher")):
            found[f"faster_than_{variant}"] = times_as_fast(times[against], spent)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown, as the README has it."""
    heads = ("pass", "calls", "UNet ms", "picture ms", "against eager", "against plain", "MB", "Fréchet", "R@5")
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|---:" * (len(heads) - 1) + "|")
    for entry in rows:
        timed = "total_ms" in entry
        cells = [
            entry["name"] + ("" if entry["kept"] else " (undone)"),
            str(entry["steps"]) if timed else "",
            f"{entry['unet_ms']:.2f}" if timed else "",
            f"{entry['total_ms']:.1f}" if timed else "",
            f"{entry['faster_than_eager']:.1f}x" if timed else "",
            f"{entry['faster_than_plain']:.1f}x" if timed else "",
            f"{entry['bytes'] / 1e6:.1f}" if entry.get("bytes") else "",
            f"{entry['frechet_distance']:.1f}" if entry.get("frechet_distance") else "",
            f"{entry['retrieval_at_5']:.3f}" if entry.get("retrieval_at_5") is not None else "",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    document = main(Path(sys.argv[1]), "emoji64")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(document, ensure_ascii=False))
