"""What a model family has to provide: a text-to-image pipeline as policy p_theta(x_{t-1} | x_t, c).

Shapes: B images, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ddpo.basics.digests import json_digest, tensors_digest
from ddpo.basics.randomness import derive_seed
from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ConfigError, ModelError
from ddpo.models import hub
from ddpo.models.compiled import compile_blocks
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts, resized
from ddpo.models.files import ModelFiles
from ddpo.models.full import FullWeights
from ddpo.models.numerics import Numerics
from ddpo.models.offloading import offload_activations
from ddpo.models.schedule import Schedule
from ddpo.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ddpo.models.weights import Network

_logger = logging.getLogger(__name__)


class Policy(ABC):
    """A loaded pipeline with trainable weights. Loaded once per process; weights are swapped.

    Args:
        model: Path or Hub id, and the size of its images.
        trainable: Weights to train.
        numerics: Device, dtype, batch sizes; applied to the whole process.
        seed: The run's seed; initial weights of an adapter, or of a network from scratch, are
            derived from it.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model cannot be downloaded, loaded or trained.
    """

    parts: Sequence[str]
    """Subfolders of the pipeline that are loaded: of the family, and then of the model."""
    optional_parts: ClassVar[Sequence[str]] = ()
    """Those that a model may lack, or that a config may leave out (``model.t5``)."""

    own_settings: ClassVar[Sequence[str]] = ()
    """Settings of ``model`` that not all families have."""

    model: ModelConfig
    """Path or Hub id, and the size of its images."""
    numerics: Numerics
    """Device, dtype, batch sizes."""
    folder: Path
    """Where the base model was loaded from."""
    vae_folder: Path | None
    """Where another autoencoder than the base model's was loaded from."""
    base_digest: str
    """sha256 of the base model's files."""
    weights: Weights
    """The trained weights, in and out."""
    schedule: Schedule
    """How its training mixed images with noise; all that a denoising process knows of it."""
    size: tuple[int, int]
    """Width and height of an image in pixels."""
    latent_shape: tuple[int, ...]
    """Shape of one image's latents, [C, h, w]."""

    def __init__(
        self,
        model: ModelConfig,
        trainable: LoraConfig | FullConfig,
        numerics: Numerics,
        *,
        seed: int,
    ) -> None:
        numerics.apply()
        self.parts = self.parts_of(model)
        files = hub.fetch_model(model, self.parts)
        self._describe(files, model, trainable, numerics)
        self.vae_folder = hub.fetch_vae(model)
        self._files = hub.file_states(self.folder, self.parts, self.vae_folder)
        self.base_digest = hub.base_digest(self.folder, self.parts, self.vae_folder)
        self._build(files, trainable, seed)
        if numerics.compile:
            compile_blocks(self.weights.network, numerics)
        self.check_files()

    def _describe(
        self,
        files: ModelFiles,
        model: ModelConfig,
        trainable: LoraConfig | FullConfig,
        numerics: Numerics,
    ) -> None:
        """Take what is known before anything is loaded."""
        self.numerics, self.model, self.folder = numerics, model, files.folder
        facts = self.inspect(files, model, trainable)
        self.schedule, self.size = facts.schedule, facts.size
        self.latent_shape = facts.latent_shape
        self._encoded: dict[str, Conditioning] = {}

    def _build(self, files: ModelFiles, trainable: LoraConfig | FullConfig, seed: int) -> None:
        """Load the pipeline, make weights trainable, and move it to the device."""
        numerics = self.numerics
        whole = isinstance(trainable, FullConfig)
        # Adapters leave the network's own weights alone: they pass through no wider dtype.
        network = self._load(files, torch.float32 if whole else numerics.torch_dtype)
        if isinstance(trainable, FullConfig):
            scratch_seed = derive_seed(seed, "network") if trainable.from_scratch else None
            self.weights = FullWeights(network, scratch_seed=scratch_seed)
        else:
            from ddpo.models.lora import LoraWeights  # imports peft, diffusers and transformers

            adapter_seed = derive_seed(seed, "adapter")
            self.weights = LoraWeights(
                network,
                trainable,
                seed=adapter_seed,
                dtype=numerics.torch_dtype,
                text_encoders=self._text_encoders_to_train() if trainable.text_encoders else {},
            )
        if numerics.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if numerics.offload_activations:
            offload_activations(network)
        self._move(numerics.torch_device)

    def check_files(self) -> None:
        """Check that the base model's files are still those that were digested and loaded.

        Raises:
            ModelError: One has changed.
        """
        now = hub.file_states(self.folder, self.parts, self.vae_folder)
        changed = sorted(
            str(file.relative_to(self.folder) if file.is_relative_to(self.folder) else file)
            for file in {*now, *self._files}
            if now.get(file) != self._files.get(file)
        )
        if changed:
            raise ModelError(
                f"the model in {self.folder} was changed while it was in use ({', '.join(changed)}"
                "); expected the files that it was loaded from. Restore them, and repeat the "
                "command"
            )

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.numerics.torch_device

    @property
    def digest(self) -> str:
        """``policy_digest`` of the base model and the trained weights as they are now."""
        return policy_digest(self.base_digest, self.weights.state())

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each distinct one by itself and once until :meth:`prepare_prompts`.

        Where text encoders are trained, once in every call, and with their gradients.

        Args:
            prompts: B prompts.

        Returns:
            B rows, float32 on the device.
        """
        if self.weights.train_text:
            encoded = {text: self._encode(text) for text in dict.fromkeys(prompts)}
            return Conditioning.cat([encoded[prompt] for prompt in prompts])
        self._encode_new(prompts)
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts])

    def prepare_prompts(self, prompts: Iterable[str]) -> None:
        """Encode these prompts and the empty one, and forget all others.

        One of Stable Diffusion 1.x takes 236 kB on the device. Sampling and an epoch's updates call
        it with their own prompts, so that a large prompt set does not fill the device, and text
        encoders are on it only once. Where text encoders are trained, nothing is kept.
        """
        if self.weights.train_text:
            return
        kept = dict.fromkeys(["", *prompts])
        self._encoded = {text: row for text, row in self._encoded.items() if text in kept}
        self._encode_new(kept)

    def _encode_new(self, prompts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(prompts) if text not in self._encoded]
        if new:
            with torch.no_grad(), self._encoding():
                for text in new:
                    self._encoded[text] = self._encode(text)

    @contextmanager
    def sized(self, size: tuple[int, int] | None) -> Iterator[None]:
        """Sample images of another size inside the block.

        Args:
            size: Width and height in pixels; None changes nothing.

        Raises:
            ConfigError: The network does not take such images.
        """
        before = self.size, self.latent_shape
        schedule = self.schedule
        self.size, self.latent_shape = resized(*before, size or self.size, self.schedule.patch)
        self.schedule = schedule.at(self.latent_shape)
        try:
            yield
        finally:
            (self.size, self.latent_shape), self.schedule = before, schedule

    @classmethod
    def parts_of(cls, model: ModelConfig) -> tuple[str, ...]:
        """Return the parts of a model that are loaded.

        Args:
            model: Path or Hub id, and what to leave out.

        Raises:
            ConfigError: It has a setting that means nothing for the family.
            ModelError: The model is neither on disk nor reachable.
        """
        for name in ("t5", "text_tokens"):
            changed = getattr(model, name) != ModelConfig.model_fields[name].default
            if changed and name not in cls.own_settings:
                raise ConfigError(
                    f"model.{name} means nothing for {model.path!r}, a {cls.__name__}; remove it"
                )
        present = hub.find_model(model).present(cls.optional_parts)
        wanted = present if model.t5 else ()
        return tuple(p for p in cls.parts if p not in cls.optional_parts or p in wanted)

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """What the diffusers pipeline takes to encode prompts likewise, beside a sampler's."""
        return {}

    def warn_of_cut(self, prompts: Iterable[str]) -> None:
        """Log how many of the prompts are longer than what the model reads, if any are."""
        texts = list(dict.fromkeys(prompts))
        counts = self.count_tokens(texts)
        cut = [text for text, n in zip(texts, counts, strict=True) if n > self.most_tokens]
        if cut:
            _logger.warning(
                "%d of %d prompts are longer than the %d tokens that the model reads, and are "
                "truncated; the first: %s",
                *(len(cut), len(texts), self.most_tokens, cut[0]),
            )

    @property
    @abstractmethod
    def pipeline_name(self) -> str:
        """The pipeline's class in diffusers."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """How many tokens of a prompt the model reads."""

    @abstractmethod
    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has, those included that mark its start and end."""

    @abstractmethod
    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Predict what the schedule says the model predicts, with classifier-free guidance.

        Args:
            latents: [B, C, h, w] float32.
            times: [B] float32, on the schedule's axis.
            conditioning: B rows.
            guidance_scale: 1 is none, at half the cost.

        Returns:
            [B, C, h, w], at least float32.
        """

    def forwards(self, guidance_scale: float) -> int:
        """Return how many forwards of the network one prediction takes: two with guidance."""
        return 1 if guidance_scale == 1.0 else 2

    @abstractmethod
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents into images.

        Args:
            latents: [B, C, h, w] float32.

        Returns:
            B RGB images.
        """

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Turn images into clean latents: the most likely ones, without a draw.

        Args:
            images: B RGB images of the policy's size.

        Returns:
            [B, C, h, w] float32 on the device.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the weights in use as plain diffusers loads them: an adapter or a whole pipeline.

        Args:
            folder: Created if missing.
        """

    @abstractmethod
    def export_lora(
        self, diffusers_file: Path, kohya_file: Path, notes: Mapping[str, str]
    ) -> str | None:
        """Write the adapter in use for diffusers, and for ComfyUI and AUTOMATIC1111.

        Args:
            diffusers_file: Created or replaced.
            kohya_file: Created or replaced, unless those programs read diffusers' file.
            notes: Entries of the headers of both.

        Returns:
            The base model as kohya's trainer calls it; None for one that readers of its layout do
            not know.

        Raises:
            ModelError: diffusers read something else than was written.
        """

    @classmethod
    @abstractmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check without loading it that a model of the family can be trained.

        Args:
            files: The pipeline's; those of the Hub may not be here yet.
            model: Path or Hub id, and the size of its images.
            trainable: Weights to train.

        Raises:
            ConfigError: Size or trainable weights do not fit the model.
            ModelError: It is a model of another kind, or its files are incomplete or damaged.
        """

    @abstractmethod
    def _load(self, files: ModelFiles, dtype: torch.dtype) -> Network:
        """Load the pipeline on the CPU.

        Args:
            files: The pipeline's, all of them here.
            dtype: What the denoising network's weights are kept in.

        Returns:
            The denoising network, frozen.
        """

    def _text_encoders_to_train(self) -> Mapping[str, PreTrainedModel]:
        """Return the text encoders that can have an adapter, by part.

        Raises:
            ConfigError: There are none.
        """
        raise ConfigError(
            f"trainable.text_encoders: those of a {type(self).__name__} cannot be trained here; "
            "remove it"
        )

    @abstractmethod
    def _move(self, device: torch.device) -> None:
        """Move the pipeline to a device."""

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Keep what encodes prompts on the device inside the block."""
        yield

    @abstractmethod
    def _encode(self, prompt: str) -> Conditioning:
        """Encode one prompt: one row, float32 on the device."""


def policy_digest(base: str, weights: Mapping[str, Tensor]) -> str:
    """Return ``policy_digest``, the identity of a base model and trained weights together.

    Args:
        base: ``base_digest`` of the model.
        weights: The trained weights by name.

    Returns:
        sha256, hexadecimal.
    """
    return json_digest({"base": base, "weights": tensors_digest(weights)})
