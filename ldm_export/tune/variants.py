"""The bundles that configurations are drawn with, each made once, in a folder that keeps them.

A folder's name has a hash of all that it depends on, and a bundle is written whole or not at all, so what is there is
what would be made. The bundle that is tuned is never changed: what is untouched is a copy without targets.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.bundle.targets.base import ORT_CPU, Target, needs_of, read_target
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.export.graphs import change_graphs, copy_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.graph.base import GraphPass, Inputs
from ldm_export.plan import Plan
from ldm_export.reading.hashes import hash_of
from ldm_export.tune.candidates import Configuration, merged_passes
from ldm_export.verify.calibration import calibration_calls, calibration_conditions

UNTOUCHED = "untouched"


class Variants:
    """Makes them.

    Parameters
    ----------
    bundle : the one that is tuned
    checkpoint : the networks that it was exported from, which changed graphs are compared with; None if unknown
    conditions : prompts or classes that passes are calibrated on; none that the result is judged by
    work : where they are kept
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: LatentDiffusion | None,
        conditions: Sequence[str | int],
        work: Path,
        progress: Callable[[str], None],
    ):
        self._bundle, self._checkpoint = bundle, checkpoint
        self._conditions = calibration_conditions(conditions) if conditions else []
        self._work, self._progress = work, progress
        self._plans: dict[tuple[str, int], Plan] = {}
        self._recorded: tuple[str, dict[str, list[Inputs]]] = ("", {})

    @cached_property
    def key(self) -> str:
        """Hash of the bundle that is tuned, of what it holds and not of where it is."""
        files = {path: entry.sha256 for path, entry in self._bundle.manifest.files.items()}
        return hash_of(files, self._bundle.manifest.model)

    def keep_plan(self, plan: Plan) -> None:
        """Have a plan that cannot be compiled in every bundle that is made from now on, and drawn with it."""
        self._plans[plan.sampler, plan.num_inference_steps] = plan

    def kept_plan(self, configuration: Configuration) -> Plan | None:
        """The plan of a configuration, if it is one that was kept."""
        return self._plans.get((configuration.sampler, configuration.steps))

    def plan_of(self, configuration: Configuration) -> Plan:
        """The plan that a configuration is drawn with."""
        return self.kept_plan(configuration) or read_plan(
            self.bundle_of(configuration), configuration.sampler, configuration.steps
        )

    def bundle_of(self, configuration: Configuration) -> Bundle:
        """The bundle that a configuration is drawn with, made if it is not there.

        Raises
        ------
        LdmExportError
            If it cannot be: a pass has no such graph, or makes one that is too far from PyTorch's, or a target differs.
        """
        if configuration.bundle:
            return Bundle.open(configuration.bundle)
        made = self._changed(merged_passes(configuration.passes))
        if configuration.target:
            made = self._with_target(made)
        plan = self.kept_plan(configuration)
        if plan is not None and f"plans/{plan.file_name}" not in made.manifest.files:
            made = made.add_file(f"plans/{plan.file_name}", plan.to_json().encode())
        return made

    def records(self, passes: Sequence[str]) -> list[dict[str, Any]]:
        """The passes as manifests and recipes have them: name and options."""
        return [{"name": step.name, "options": _options(step), "kept": True} for step in merged_passes(passes)]

    def _changed(self, steps: Sequence[GraphPass]) -> Bundle:
        """The plain graphs after these passes."""
        done = [(step.name, _options(step)) for step in steps]
        name = re.sub(r"[^a-z0-9]+", "-", "-".join(step.name for step in steps)) or UNTOUCHED
        key = hash_of(self.key, done, self._conditions if steps else [])
        folder = self._work / f"{name}-{key[:8]}.bundle"
        if folder.is_dir():
            return Bundle.open(folder)
        if not steps:
            return copy_bundle(self._bundle, folder, passes=self._bundle.manifest.passes, force=False)
        if self._checkpoint is None:
            raise InputError(f"{steps[-1].name} is compared with PyTorch, and no checkpoint was given. Name one.")
        before = self._changed(steps[:-1])
        calls = self._calls(before)
        changed, reports = change_graphs(
            before, folder, steps[-1], calls, self._conditions, self._checkpoint, self._progress
        )
        if all(report.get("quantized") == 0 for report in reports.values()):
            shutil.rmtree(folder)
            raise InputError(
                f"{steps[-1].name} left {' and '.join(reports)} as they were: no operator of theirs is large enough, "
                "accurate enough and faster with integers."
            )
        return changed

    def _with_target(self, plain: Bundle) -> Bundle:
        folder = plain.path.with_name(f"{plain.path.stem}.{ORT_CPU}.bundle")
        made = (
            Bundle.open(folder)
            if folder.is_dir()
            else copy_bundle(plain, folder, passes=plain.manifest.passes, force=False)
        )
        if not isinstance(read_target(made, ORT_CPU, needs_of(onnxruntime.__version__)), Target):
            build_ort_cpu(made, self._progress)
        return made

    def _calls(self, bundle: Bundle) -> dict[str, list[Inputs]]:
        if self._recorded[0] != str(bundle.path):
            self._progress("calibration pictures")
            self._recorded = ("", {})  # one of the two is in memory at a time
            self._recorded = str(bundle.path), calibration_calls(bundle, self._conditions)
        return self._recorded[1]


def _options(step: GraphPass) -> dict[str, Any]:
    options: Any = step
    return asdict(options)
