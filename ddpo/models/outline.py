"""A policy without weights, on `meta`: what a model's JSON files say of classes and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models import family_of, hub
from ddpo.models.files import INDEX, ModelFiles
from ddpo.models.numerics import Numerics
from ddpo.models.pipeline_policy import LARGE_TEXT_ENCODERS, PipelinePolicy

if TYPE_CHECKING:
    from ddpo.models.weights import Network

    _Base = PipelinePolicy
else:
    _Base = object


class NumericsOnMeta(Numerics):
    """A run's numerics, on `meta` in place of its device."""

    @property
    def torch_device(self) -> torch.device:
        """`meta`."""
        return torch.device("meta")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Let `GpuKernels` cast inside the block, if a 16-bit dtype is set."""
        with torch.autocast("cpu", dtype=self.torch_dtype, enabled=self.low_precision):
            yield


class Outline(_Base):
    """What a family's class does, on weights that have shapes alone.

    Args:
        model: Path or Hub id; only its small JSON files are read.
        trainable: Weights to train.
        numerics: Device, dtype, batch sizes, which are not applied to the process.
    """

    in_phase: Callable[[Literal["encode", "decode"]], AbstractContextManager[None]]
    """Called around encoding and decoding."""

    def __init__(
        self, model: ModelConfig, trainable: LoraConfig | FullConfig, numerics: Numerics
    ) -> None:
        self.parts = self.parts_of(model)
        files = hub.find_model(model, self.parts).on_trust()
        self._describe(files, model, trainable, NumericsOnMeta.model_validate(dict(numerics)))
        self.vae_folder = hub.fetch_vae(model, ("config.json",))
        self.base_digest = ""
        self.in_phase = lambda phase: nullcontext()
        with torch.device("meta"):
            self._build(files, trainable, 0)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents into images, in a phase of its own."""
        with self.in_phase("decode"):
            return super().decode(latents)

    @property
    def passing(self) -> list[Tensor]:
        """What is on the device while prompts are encoded: weights of frozen text encoders."""
        if self.weights.train_text:
            return []
        modules = self._present_text_encoders().values()
        return [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]

    @property
    def resident(self) -> list[Tensor]:
        """What is on the device all the time: network, autoencoder, text encoders in training."""
        trained = self.weights.train_text
        modules = [
            m for part, m in self._modules().items() if trained or part not in self.text_encoders
        ]
        return [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        with self.in_phase("encode"):
            yield

    def _load(self, files: ModelFiles, dtype: torch.dtype) -> Network:
        index = files.json(INDEX)
        parts: dict[str, Any] = {
            self.network_part: nn.Module.to(_network(files, index, self.network_part), dtype),
            "vae": self.autoencoder_class.from_config(self._vae_config(files)),
        }
        with torch.device("cpu"):
            scheduler = getattr(diffusers, index["scheduler"][1])
            settings = files.json("scheduler/scheduler_config.json")
            parts["scheduler"] = scheduler.from_config(settings)
        for part, kind in self.text_encoders.items():
            narrow = kind in LARGE_TEXT_ENCODERS
            parts[part] = None
            if part in files.parts:
                config = kind.config_class.from_dict(files.json(f"{part}/config.json"))
                encoder = kind._from_config(config)
                parts[part] = encoder.to(self.numerics.torch_dtype if narrow else torch.float32)
        for part in self.tokenizers:
            parts[part] = _Tokens(files, part) if part in files.parts else None
        taken = inspect.signature(self.pipeline_class.__init__).parameters
        settings = {k: v for k, v in index.items() if k in taken and not isinstance(v, list)}
        kind: Any = self.pipeline_class
        self.pipeline = kind(**{**settings, **self._without(), **parts})
        self._finish(self.pipeline)
        return self.network

    def _vae_config(self, files: ModelFiles) -> Any:
        if self.vae_folder is None:
            return files.json("vae/config.json")
        return self.autoencoder_class.load_config(self.vae_folder)


def outline(model: ModelConfig, trainable: LoraConfig | FullConfig, numerics: Numerics) -> Outline:
    """Build a policy of a model's family from its JSON files alone.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is neither on disk nor reachable, or cannot be trained.
    """
    family = family_of(model)
    kind: Any = type(f"{family.__name__}Outline", (Outline, family), {})
    return kind(model, trainable, numerics)


class _Tokens:
    """Stands for a tokenizer, whose files may not be here: a prompt is padded to a fixed number."""

    def __init__(self, files: ModelFiles, part: str) -> None:
        config = f"{part}/tokenizer_config.json"
        known = files.json(config) if config in files.names else {}
        self.model_max_length = int(known.get("model_max_length", 77))
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(
        self, text: str | Sequence[str], *, max_length: int = 1, **_: Any
    ) -> BatchEncoding:
        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(rows, max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        """Return what is said, without what a template puts around it."""
        return messages[0]["content"]

    def tokenize(self, text: str) -> list[str]:
        """Return no tokens: none is a textual inversion's."""
        return []


def _network(files: ModelFiles, index: dict[str, Any], part: str) -> Any:
    return getattr(diffusers, index[part][1]).from_config(files.json(f"{part}/config.json"))
