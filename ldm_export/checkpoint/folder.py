"""Opens a checkpoint, in diffusers layout or as CompVis' single file.

Components are loaded one at a time, when they are asked for, and their weights are memory-mapped: a model larger than
half of the memory can be exported. What a file leaves out has the value that diffusers gives it
(:mod:`ldm_export.checkpoint.kind`, :mod:`ldm_export.plan.samplers`); keys that diffusers and transformers read
past are read past here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm_reference.layout import save_component, write_json

from ldm_export.adapters.embeddings import Embedding
from ldm_export.checkpoint.added import AddedNetwork
from ldm_export.checkpoint.building import built, checked_tensors, read_json, stored_tensors
from ldm_export.checkpoint.image_adapter import ImageAdapter
from ldm_export.checkpoint.inversions import config_with, read_embeddings, sha256_with, with_vectors
from ldm_export.checkpoint.kind import CheckpointKind, kind_of, names_part
from ldm_export.checkpoint.merging import Merge, layers_of, merged_sha256, merged_weights, read_merges
from ldm_export.checkpoint.networks import CLIP_TEXT_ENCODER, Network
from ldm_export.checkpoint.sampling_defaults import FEW, SamplingDefaults
from ldm_export.checkpoint.shipped import shipped_checkpoints
from ldm_export.checkpoint.single_file import SingleFile
from ldm_export.checkpoint.single_file_sd3 import BLOCKS, SingleFileSD3
from ldm_export.checkpoint.weights import (
    WeightFiles,
    find_weights,
    opened,
)
from ldm_export.errors import CheckpointError, InputError
from ldm_export.plan import compile_plan, picture_tokens, sampler_of, shifts_dynamically
from ldm_export.plan.scheduler_classes import FLOW_MATCHING
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.weight_files import HOW_TO_CONVERT, PICKLES


def open_single_file(path: Path, prediction_type: str | None = None) -> SingleFile:
    """Open one file with all networks, in CompVis' layout or in that of Stable Diffusion 3."""
    with opened(path) as file:
        kind = SingleFileSD3 if any(f".{BLOCKS}." in f".{key}" for key in file.keys()) else SingleFile  # noqa: SIM118
    return kind(path, prediction_type)


PASSES = "passes.json"
"""Beside ``model_index.json``: how a model that passes have changed is drawn with, and what each of them did."""


@dataclass(frozen=True)
class LatentDiffusion:
    """A checkpoint on disk.

    Attributes
    ----------
    name : the folder's name
    path : the folder, or the single file
    kind : what checkpoints of its family consist of
    index : the content of ``model_index.json``
    file : the single file in CompVis' layout, where it is one
    drawn_with : how to draw it, where that is not what its files say
    sampler : the sampler to use by default in place of the scheduler's own, or None
    prediction_type : what the UNet predicts, where its files do not say or say it wrongly, or None
    merges : adapters that are merged into its networks when they are loaded
    controls : ControlNets beside its own networks, by the names that they are asked for by
    image_adapter : an IP-Adapter of its UNet, or None
    embeddings : textual inversions that are put into its text encoders and tokenizers
    """

    name: str
    path: Path
    kind: CheckpointKind
    index: dict[str, Any]
    file: SingleFile | None = None
    drawn_with: SamplingDefaults | None = None
    sampler: str | None = None
    prediction_type: str | None = None
    merges: tuple[Merge, ...] = ()
    controls: Mapping[str, AddedNetwork] = field(default_factory=dict)
    image_adapter: ImageAdapter | None = None
    embeddings: tuple[Embedding, ...] = ()

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        kinds: Sequence[CheckpointKind],
        *,
        sampler: str | None = None,
        prediction_type: str | None = None,
    ) -> LatentDiffusion:
        """Open a folder, a single safetensors file in CompVis' layout, or a shipped checkpoint by its name.

        Parameters
        ----------
        kinds : those that it may be of; see `ldm_export.families.open_checkpoint`
        sampler, prediction_type : in place of what its files say, as :class:`LatentDiffusion` has them

        Raises
        ------
        CheckpointError
            If there is no such checkpoint, it is a pickle, or a component is missing.
        """
        path = Path(checkpoint)
        if not path.exists() and str(checkpoint) in shipped_checkpoints():
            path = shipped_checkpoints()[str(checkpoint)]
        if not path.exists():
            raise CheckpointError(
                f"There is no checkpoint {str(checkpoint)!r}; give a folder in diffusers layout or one of the shipped: "
                f"{', '.join(shipped_checkpoints()) or 'none'}."
            )
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, which can run code when it is opened. {HOW_TO_CONVERT}")
        if path.is_file():
            file = open_single_file(path, prediction_type)
            kind = kind_of(path, file.index, kinds)
            return cls(path.stem, path, kind, file.index, file, sampler=sampler, prediction_type=prediction_type)
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"{path} has no model_index.json; a checkpoint is a folder in diffusers layout. "
                "Save it with diffusers' save_pretrained, or train one with `ldm-export train`."
            )
        index = read_json(path / "model_index.json")
        kind = kind_of(path / "model_index.json", index, kinds)
        kind.check_parts(path / "model_index.json", index)
        return cls(path.resolve().name, path, kind, index, sampler=sampler, prediction_type=prediction_type)

    def with_adapters(self, given: Sequence[tuple[Path, float]]) -> LatentDiffusion:
        """This checkpoint with adapters merged, each a file and its strength; raises as `read_merges` does."""
        changed = (name for name in self.components if name != "vae")
        layers = {name: layers_of(name, self.skeleton(name), self.configs[name]) for name in changed}
        return replace(self, merges=read_merges(given, layers))

    def with_embeddings(self, given: Sequence[tuple[Path, str | None]]) -> LatentDiffusion:
        """This checkpoint with textual inversions, each a file and a token or None; raises as `read_embeddings`."""
        kinds = self.kind.components
        encoders = (name for name in self.text_encoders if kinds[name] is CLIP_TEXT_ENCODER)
        widths = {name: int(self.configs[name]["hidden_size"]) for name in encoders}
        return replace(self, embeddings=read_embeddings(given, widths))

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The networks that it has, in the order in which they run."""
        return tuple(name for name in self.kind.components if names_part(self.index, name))

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of its text encoders, in the order in which the denoiser reads them."""
        return tuple(name for name in self.components if name.startswith("text_encoder"))

    @property
    def reads_text(self) -> bool:
        return bool(self.text_encoders)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Each network's config, defaults filled in."""
        own = {name: self.kind.components[name].config(self.skeleton(name)) for name in self.components}
        return {name: config_with(name, config, self.embeddings) for name, config in own.items()}

    @cached_property
    def pixels_per_latent(self) -> int:
        """Pixels of a picture's side for one of its latents'."""
        return self.kind.pixels_per_latent(self.configs)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of its pictures, in pixels."""
        height, width = self.latent_size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    @property
    def tokens(self) -> int:
        """Tokens of a picture of its own size; 0 where its scheduler does not go by them."""
        if not shifts_dynamically(self.scheduler):
            return 0
        facts = {"pixels_per_latent": self.pixels_per_latent, "patch_size": self.kind.patch_size(self.configs)}
        return picture_tokens(facts, *self.picture_size)

    @cached_property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of its latents."""
        release = None
        if self.file is None:
            release = read_json(self.path / self.kind.denoiser / "config.json").get("_diffusers_version")
        return self.kind.latent_size(self.index, self.configs, release)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The content of ``scheduler_config.json``, as the pipeline of the checkpoint's class uses it."""
        if self.file is not None:
            config = self.file.scheduler
        else:
            config = read_json(self.path / "scheduler" / "scheduler_config.json")
            config = self.kind.scheduler_as_used(self.index, config)
        if self.prediction_type is not None:
            if config.get("_class_name") in FLOW_MATCHING:
                raise CheckpointError(
                    f"{self.path}: prediction_type {self.prediction_type} was asked for, and its scheduler, "
                    f"{config['_class_name']}, is for flow matching alone. Leave it out."
                )
            config = {**config, "prediction_type": self.prediction_type}
        return config

    @cached_property
    def drawing(self) -> SamplingDefaults:
        """How it is drawn with: what passes left, or what its scheduler says."""
        if self.drawn_with is not None:
            return self.drawn_with
        if self.file is None and (self.path / PASSES).is_file():
            try:
                left = SamplingDefaults.from_dict(read_json(self.path / PASSES)["drawing"])
                return replace(left, sampler=self.sampler or left.sampler)
            except (KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path / PASSES} does not say how to draw ({error}). Run the recipe again."
                ) from error
        try:
            sampler = self.sampler or sampler_of(self.scheduler)
            pipeline = self.kind.pipeline(self.index)
            steps = next(filter(self._fits(sampler), range(FEW if sampler == "lcm" else pipeline.steps, 1, -1)), 1)
            compile_plan(self.scheduler, sampler, steps, tokens=self.tokens)
        except InputError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return SamplingDefaults(sampler, steps, pipeline.guidance)

    def _fits(self, sampler: str) -> Callable[[int], bool]:
        """Whether so many steps of a sampler fit into the training timesteps."""

        def fits(steps: int) -> bool:
            try:
                compile_plan(self.scheduler, sampler, steps, tokens=self.tokens)
            except InputError:
                return False
            return True

        return fits

    @cached_property
    def passes(self) -> list[dict[str, Any]]:
        """What passes did to it, in order."""
        if self.file is not None or not (self.path / PASSES).is_file():
            return []
        records = read_json(self.path / PASSES).get("passes", [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise CheckpointError(f"{self.path / PASSES} does not say what passes did. Fetch it again.")
        return records

    @cached_property
    def weights_bytes(self) -> int:
        """What all weights take in float32."""
        networks = map(self.skeleton, self.components)
        return sum(4 * parameter.numel() for network in networks for parameter in network.parameters())

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The component's safetensors files, in name order: those that diffusers and transformers read."""
        if self.file is not None:
            return (self.path,)
        return self._weights(component).files

    def _weights(self, component: str) -> WeightFiles:
        return find_weights(self.path / component, self.kind.components[component].weights)

    def sha256(self, component: str) -> str:
        """SHA-256 of the component's weight files, in name order, hex; with adapters in it, of their hashes too."""
        files = self.file.sha256 if self.file is not None else sha256_of(*self.weight_files(component))
        return sha256_with(merged_sha256(files, component, self.merges), component, self.embeddings)

    def load(self, component: str) -> Network:
        """The network with its weights, float32, in evaluation mode, without gradients.

        Raises
        ------
        CheckpointError
            If weights are missing, truncated, quantized, not finite, of another shape, or of a network that the
            config does not describe.
        """
        network = self.skeleton(component)
        place = self.path / component
        if self.file is not None:
            shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
            tensors = self.file.tensors(component, shapes)
        else:
            tensors = stored_tensors(self.kind.components[component], place, network)
        tensors = checked_tensors(place, tensors, network)
        tensors |= merged_weights(component, tensors, self.merges)
        network.load_state_dict(tensors, assign=True)
        return with_vectors(component, network, self.embeddings).requires_grad_(False).eval()  # type: ignore[no-any-return]

    def save_changed(
        self,
        folder: Path,
        networks: Mapping[str, Network],
        scheduler: Mapping[str, Any] | None,
        drawing: SamplingDefaults,
        passes: Sequence[Mapping[str, Any]],
    ) -> LatentDiffusion:
        """Write this checkpoint with other networks in place of its own, weights of those in fp16, and open that."""
        if self.file is not None:
            raise CheckpointError(f"{self.path} is one file; passes need a folder in diffusers layout. Save it as one.")
        for file in self._files_read(left_out=networks):
            copy = folder / file.relative_to(self.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_regular(file), copy)
        index = dict(self.index)
        for component, network in networks.items():
            save: Callable[[Path], None] | None = getattr(network.half(), "save_pretrained", None)
            if save is not None:  # another library's
                save(folder / component)
            else:
                save_component(network.half(), folder / component)
            index[component] = [self.index[component][0], type(network).__name__]
        if scheduler is None and self.prediction_type is not None:
            scheduler = self.scheduler
        if scheduler is not None:
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        write_json(folder / "model_index.json", index)
        write_json(folder / PASSES, {"drawing": asdict(drawing), "passes": list(passes)})
        return LatentDiffusion.open(folder, [self.kind])

    def _files_read(self, left_out: Collection[str]) -> list[Path]:
        """The files that opening and exporting read, without those of some networks, ``model_index.json`` and
        `PASSES`."""
        alignment = self.path / "alignment"  # that pictures are judged by, of models that were trained here
        files = [self.path / "scheduler" / "scheduler_config.json"]
        files += sorted(file for pattern in ("*.json", "*.safetensors") for file in alignment.glob(pattern))
        for component in self.components:
            if component not in left_out:
                weights = self.weight_files(component)
                files += [self.path / component / "config.json", *weights]
                for index in sorted((self.path / component).glob("*.safetensors.index*.json")):
                    named = read_json(index).get("weight_map", {})
                    files += [index] if {*named.values()} <= {file.name for file in weights} else []
            if component.startswith("text_encoder"):
                folder = self.tokenizer_folder(component)
                files += sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".model"))
        return files

    def record_passes(self, passes: Sequence[Mapping[str, Any]]) -> None:
        """Write down what passes did to it."""
        write_json(self.path / PASSES, {"drawing": asdict(self.drawing), "passes": list(passes)})

    def tokenizer_folder(self, component: str) -> Path:
        """Where the tokenizer of a text encoder is: in the checkpoint, or beside a single file."""
        folder = self.path if self.file is None else self.path.parent
        return folder / component.replace("text_encoder", "tokenizer")

    def skeleton(self, component: str) -> Network:
        """The network without its weights, which take no memory."""
        file = self.path / component / "config.json"
        if component not in self.components:
            raise CheckpointError(
                f"{self.path / 'model_index.json'} names no {component}; it has {', '.join(self.components)}."
            )
        values = dict(read_json(file) if self.file is None else self.file.config(component))
        network: Network = built(self.kind.components[component], self.index[component][1], values, file)
        return network


def _regular(file: Path) -> Path:
    """Raise CheckpointError unless a file, or what it links to, is one that can be read to its end."""
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file; the checkpoint is incomplete. Fetch it again.")
    return file
