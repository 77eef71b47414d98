"""The files of a pipeline: which of them are loaded, and what their headers say.

Weights are safetensors: whole, in shards, or in a variant such as ``fp16`` where that is all there
is. Nothing here loads a tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ddpo.errors import ModelError

INDEX = "model_index.json"

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"(?:\.index(?:\.(?P<index_variant>[^.]+))?\.json)?"
)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_OTHER_WEIGHTS = (*_PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline's files as ``save_pretrained`` writes them; those of the Hub may not be here yet.

    Names are relative to the folder, with slashes. A *part* is a subfolder.
    """

    path: str
    """The model's path or Hub id, for messages."""
    folder: Path
    """Where files are, or will be once downloaded."""
    names: frozenset[str]
    """Every file of the model's folder and its parts."""
    parts: Sequence[str]
    """The parts that the model's family loads."""

    @cached_property
    def variant(self) -> str | None:
        """The variant that is loaded; None where every part has weights without one."""
        offers = [variants for part in self.parts if (variants := self._variants(part))]
        needed = [variants for variants in offers if None not in variants]
        if not needed:
            return None
        common = set(needed[0]).intersection(*needed)
        known = [name for name in ("fp16", "bf16") if name in common]
        return next(iter([*known, *sorted(name for name in common if name)]), None)

    def on_trust(self) -> ModelFiles:
        """Return the files as if weights that are not here were still on the Hub.

        What is then known of a model is what its small JSON files say.
        """
        absent = [part for part in self.parts if not self._variants(part)]
        config = [part for part in absent if f"{part}/config.json" in self.names]
        return replace(self, names=self.names | {f"{part}/model.safetensors" for part in config})

    def weights(self, part: str) -> list[str]:
        """Return the names of a part's weights that are loaded, with the index of their shards.

        Raises:
            ModelError: The part has none in safetensors.
        """
        variants, variant = self._variants(part), self.variant_of(part)
        if variant not in variants:
            raise self._without_weights(part)
        return sorted(variants[variant])

    def variant_of(self, part: str) -> str | None:
        """Return the variant that a part is loaded in; None without one."""
        return self.variant if self.variant in self._variants(part) else None

    def loaded(self) -> list[str]:
        """Return the names of all files that are loaded: index, configs, tokenizer, weights."""
        names = [INDEX]
        for part in self.parts:
            kept = [
                name
                for name in self._in(part)
                if not name.endswith(_OTHER_WEIGHTS) and not _WEIGHTS.fullmatch(_base(name))
            ]
            weights = self.weights(part) if self._has_weights(part) else []
            names += sorted([*kept, *weights])
        return names

    def without_variant(self, text: str) -> str:
        """Return names of files, or an index that holds some, as they are without the variant."""
        if self.variant is None:
            return text
        return re.sub(
            rf"\.{re.escape(self.variant)}(?=-\d{{5}}-of-|\.safetensors|\.json)", "", text
        )

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the model.

        Raises:
            ModelError: It is missing, or holds no object.
        """
        try:
            document = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise self.problem(f"{name} cannot be read ({error})") from error
        if not isinstance(document, dict):
            raise self.problem(f"{name} holds no JSON object")
        return document

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a part by name, from the headers of its files.

        Empty where they are not downloaded yet.

        Raises:
            ModelError: A file is truncated or damaged, or a shard is missing.
        """
        names = self.weights(part)
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            if name.endswith(".json"):
                self._check_shards(part, name)
            elif (self.folder / name).is_file():
                shapes |= self._header(name)
        return shapes

    def present(self, parts: Sequence[str]) -> list[str]:
        """Return those of some parts that the index says the model has."""
        index = self.json(INDEX)
        return [part for part in parts if index.get(part) not in (None, [None, None])]

    def problem(self, what: str) -> ModelError:
        """Return the error of files that do not make a pipeline of their class."""
        return ModelError(
            f"model.path {self.path!r} cannot be loaded as a {self.pipeline_class}: {what}"
        )

    @cached_property
    def pipeline_class(self) -> str:
        """The pipeline's class, as the index names it.

        Raises:
            ModelError: It names none.
        """
        index = self.folder / INDEX
        try:
            return str(json.loads(index.read_bytes())["_class_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{index} does not name a pipeline class (_class_name); expected a diffusers "
                "pipeline as save_pretrained writes it"
            ) from error

    def _in(self, part: str) -> list[str]:
        return [name for name in self.names if name.rpartition("/")[0] == part]

    def _has_weights(self, part: str) -> bool:
        return bool(self._variants(part)) or any(n.endswith(_PICKLES) for n in self._in(part))

    def _variants(self, part: str) -> dict[str | None, list[str]]:
        """Return the weights of a part in safetensors, by variant."""
        variants: dict[str | None, list[str]] = {}
        for name in self._in(part):
            if found := _WEIGHTS.fullmatch(_base(name)):
                variant = found["variant"] or found["index_variant"]
                variants.setdefault(variant, []).append(name)
        return {
            variant: names
            for variant, names in variants.items()
            if any(name.endswith(".safetensors") for name in names)
        }

    def _without_weights(self, part: str) -> ModelError:
        pickles = sorted(name for name in self._in(part) if name.endswith(_PICKLES))
        if not pickles:
            return self.problem(
                f"{part} has no weights in safetensors; expected "
                f"{part}/diffusion_pytorch_model.safetensors or {part}/model.safetensors"
            )
        return self.problem(
            f"{part} has its weights as a pickle only ({pickles[0]}), which can run code when it "
            "is loaded. If you trust it, convert it once and set model.path to the new folder: "
            'python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_pretrained('{self.path}').save_pretrained('NEW_FOLDER')\""
        )

    def _check_shards(self, part: str, index: str) -> None:
        if not (self.folder / index).is_file():
            return
        shards = {str(name) for name in dict(self.json(index).get("weight_map", {})).values()}
        missing = sorted(shards - {_base(name) for name in self._in(part)})
        if missing:
            raise self.problem(f"{index} lists {missing[0]}, which is missing from {part}")

    def _header(self, name: str) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(self.folder / name, "np") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self.problem(
                f"{name} is truncated or damaged ({error}); copy or download it again"
            ) from error


def _base(name: str) -> str:
    return name.rpartition("/")[2]
