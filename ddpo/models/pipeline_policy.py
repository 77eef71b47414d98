"""What all families share that are a diffusers pipeline: loading, decoding, and exports.

Shapes: B images, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM, T5EncoderModel

from ddpo.basics.tensors import detach_from_files
from ddpo.errors import ModelError
from ddpo.models import exports, hub, lora_files
from ddpo.models.base import Policy
from ddpo.models.conditioning import Conditioning
from ddpo.models.files import ModelFiles
from ddpo.models.lora import LoraWeights, by_part, text_state

if TYPE_CHECKING:
    from ddpo.models.weights import Network

LARGE_TEXT_ENCODERS = (T5EncoderModel, Qwen3ForCausalLM)
"""Those whose weights are kept in the dtype of the arithmetic."""


class PipelinePolicy(Policy):
    """A diffusers pipeline as a policy; one of its parts holds the trained weights."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The pipeline's class in diffusers."""
    autoencoder_class: ClassVar[type[AutoencoderKL | AutoencoderKLFlux2]] = AutoencoderKL
    """The autoencoder's class in diffusers."""
    network_part: ClassVar[str]
    """The part that is trained."""
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]]
    """The class of each text encoder by its part; those that are not there are left out."""
    trainable_text: ClassVar[Sequence[str]] = ()
    """The text encoders that can have an adapter."""
    tokenizers: ClassVar[Sequence[str]]
    """The parts that cut prompts into tokens, the one that reads most of a prompt last."""

    text_tokens: ClassVar[int | None] = None
    """Tokens of a prompt that the family's large text encoder reads by default, padding included:
    as many as in the pipeline. None without such an encoder."""
    expected: ClassVar[str]
    """What the family's models are called, for messages."""

    pipeline: Any

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class in diffusers."""
        return self.pipeline_class.__name__

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """How many tokens a large text encoder reads, if there is one."""
        return {} if self.text_tokens is None else {"max_sequence_length": self._text_tokens}

    @property
    def _text_tokens(self) -> int:
        own = self.model.text_tokens
        return (self.text_tokens or 0) if own is None else own

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt the text encoder reads."""
        return self._tokenizer.model_max_length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has, those included that mark its start and end."""
        tokens = self._tokenizer(list(prompts), verbose=False).input_ids
        return [len(ids) for ids in tokens]

    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Predict what the model predicts; with guidance, both predictions share one forward."""
        if guidance_scale == 1.0:
            return self._forward(latents, times, conditioning)
        empty = self._unconditional().expand(len(conditioning))
        output = self._forward(
            torch.cat([latents, latents]),
            torch.cat([times, times]),
            Conditioning.cat([empty, conditioning]),
        )
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents into images.

        In float32 whatever the network computes in: 16-bit rounding in the autoencoder would be
        noise that a reward sees, and Stable Diffusion XL's overflows in float16 (`force_upcast`).
        On CUDA, with ``numerics.tf32``, its convolutions round to TF32: the switch is the
        process's, and rewards that compute beside it must not see it change.
        """
        vae = self.pipeline.vae
        decoded = vae.decode(self._unscaled(latents), return_dict=False)[0]
        images = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return cast(list[Image.Image], images)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Turn images into the means of what the autoencoder encodes them to, in float32."""
        vae = self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(list(images)).to(self.device)
        return self._scaled(vae.encode(pixels, return_dict=False)[0].mode())

    def export(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, or a whole pipeline (full fine-tuning)."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.weights, LoraWeights):
            self._export_adapter(folder, self.weights.folded())
        else:
            self._export_pipeline(folder)

    def _export_adapter(self, folder: Path, adapter: dict[str, Any]) -> None:
        # Under peft's names, all of them: diffusers' own conversion renames attention layers alone,
        # and its loader then drops those. Without settings in the header: some readers do not look
        # there, and older ones refuse settings that are newer than they are.
        layers: dict[str, Any] = {
            f"{part}_lora_layers": tensors for part, tensors in self._by_part(adapter).items()
        }
        self.pipeline.save_lora_weights(folder, save_function=exports.save_tensors, **layers)
        self._check_adapter(folder / LORA_WEIGHT_NAME_SAFE, adapter)

    def export_lora(
        self, diffusers_file: Path, kohya_file: Path, notes: Mapping[str, str]
    ) -> str | None:
        """Write the adapter in use for diffusers, and a UNet's for other programs too.

        Returns:
            The base model as kohya's trainer calls it; None for one that readers of its layout do
            not know.
        """
        weights = cast(LoraWeights, self.weights)
        adapter, config = weights.folded(), weights.config
        lora_files.write_diffusers(diffusers_file, self._by_part(adapter), config, notes)
        self._check_adapter(diffusers_file, adapter)
        base = self._kohya_base()
        if self.network_part == "unet":
            lora_files.write_kohya(kohya_file, self._by_part(adapter), config, base, notes)
        return base

    def _by_part(self, adapter: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Split an adapter by the parts of the pipeline that it is for, the network's first."""
        parts = by_part(adapter, cast(LoraWeights, self.weights).text_encoders)
        return {self.network_part: parts.pop(""), **parts}

    def _kohya_base(self) -> str | None:
        """Return the base model's name in kohya's layout; None if readers do not know it."""
        return None

    def _check_adapter(self, file: Path, adapter: Mapping[str, Tensor]) -> None:
        parts = self._by_part(adapter)
        with torch.device("meta"):
            empty: dict[str, Any] = {
                self.network_part: type(self.network).from_config(self.network.config)
            }
            for part in parts.keys() - empty.keys():
                own = getattr(self.pipeline, part)
                empty[part] = type(own)(own.config)
        for module in empty.values():
            module.to_empty(device="cpu")  # without values, which loading an adapter does not need
        reader = self._reader(empty)
        reader.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name="default",
            local_files_only=True,
        )
        for part, written in parts.items():
            read = get_peft_model_state_dict if part == self.network_part else text_state
            exports.check_read_back(f"{part}'s adapter", read(empty[part]), written)

    def _reader(self, parts: Mapping[str, Any]) -> Any:
        """Return a pipeline that holds some parts and nothing else."""
        kind: Any = self.pipeline_class
        return kind(**{**dict.fromkeys(self.pipeline.components, None), **parts})

    def _export_pipeline(self, folder: Path) -> None:
        self.check_files()
        exports.write_pipeline(
            folder, self.folder, self.parts, self.network_part, self.weights.state()
        )
        if self.vae_folder is not None:
            shutil.rmtree(folder / "vae")
            (folder / "vae").mkdir()
            for name in hub.VAE_FILES:  # a repository may hold others, as large
                shutil.copyfile(self.vae_folder / name, folder / "vae" / name)
        reader = self._loaded(hub.local_files(folder, self.parts), torch.float32)
        for part in (self.network_part, "vae", *self._present_text_encoders()):
            written, found = (getattr(each, part).state_dict() for each in (self.pipeline, reader))
            exports.check_read_back(f"pipeline's {part}", found, written)

    @property
    def network(self) -> Network:
        """The denoising network."""
        return getattr(self.pipeline, self.network_part)

    @property
    def _tokenizer(self) -> Any:
        present = [getattr(self.pipeline, name, None) for name in self.tokenizers]
        return next(each for each in reversed(present) if each is not None)

    def _load(self, files: ModelFiles, dtype: torch.dtype) -> Network:
        self.pipeline = self._loaded(files, dtype, self.vae_folder)
        return self.network

    def _move(self, device: torch.device) -> None:
        modules = self._modules()
        for part, module in modules.items():
            if part not in self.text_encoders or self.weights.train_text:
                module.to(device)  # frozen text encoders are there while they encode
        for module in modules.values():
            detach_from_files(module)

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Keep the text encoders on the device inside the block."""
        encoders = self._present_text_encoders()
        try:
            for module in encoders.values():
                module.to(self.device)
            yield
        finally:
            for module in encoders.values():
                module.to("cpu")

    def _modules(self) -> dict[str, nn.Module]:
        """Return the parts that have weights."""
        components: Mapping[str, Any] = self.pipeline.components
        return {name: each for name, each in components.items() if isinstance(each, nn.Module)}

    def _text_encoders_to_train(self) -> Mapping[str, PreTrainedModel]:
        if not self.trainable_text:
            return super()._text_encoders_to_train()
        return {part: getattr(self.pipeline, part) for part in self.trainable_text}

    def _present_text_encoders(self) -> dict[str, nn.Module]:
        return {name: each for name, each in self._modules().items() if name in self.text_encoders}

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder decodes."""
        config = self.pipeline.vae.config
        latents = latents / config.scaling_factor
        shift = getattr(config, "shift_factor", None)
        return latents + shift if shift else latents

    def _scaled(self, encoded: Tensor) -> Tensor:
        """Return the latents of what the autoencoder encodes: the inverse of `_unscaled`."""
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None)
        return (encoded - shift if shift else encoded) * config.scaling_factor

    def _unconditional(self) -> Conditioning:
        """Return the one row that guidance leads away from: the empty prompt's."""
        return self.encode([""])

    @abstractmethod
    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Run ``self.weights.network``, which is not the pipeline's while it is split.

        Returns:
            [B, C, h, w], at least float32.
        """

    def _loaded(self, files: ModelFiles, dtype: torch.dtype, vae: Path | None = None) -> Any:
        """Load a pipeline.

        Safetensors only, no remote code. Safety checkers and watermarks are left out: a black or a
        marked image in place of a sample would be scored as the model's own.

        Args:
            files: The pipeline's, all of them here.
            dtype: What the network's weights are kept in; those of large text encoders are kept in
                the dtype of the arithmetic, and all others in float32.
            vae: Folder of another autoencoder.

        Returns:
            The pipeline, on the CPU, in eval mode and without gradients.

        Raises:
            ModelError: The folder does not hold such a pipeline, or its weights are not finite.
        """
        logging.disable_progress_bar()  # of loading, which no environment variable controls
        given: dict[str, Any] = {
            part: self._text_encoder(files, part, kind)
            for part, kind in self.text_encoders.items()
            if part in files.parts
        }
        given |= {
            part: None
            for part in (*self.text_encoders, *self.tokenizers)
            if part not in files.parts
        }
        try:
            if vae is not None:
                given["vae"] = self.autoencoder_class.from_pretrained(
                    vae, use_safetensors=True, local_files_only=True
                )
            pipeline: Any = self.pipeline_class.from_pretrained(
                files.folder,
                dtype={"default": torch.float32, self.network_part: dtype},
                variant=files.variant,
                use_safetensors=True,
                local_files_only=True,
                **given,
                **self._without(),
            )
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ModelError(
                f"{files.folder} cannot be loaded as a {self.pipeline_class.__name__}: {error}. "
                f"Expected {self.expected} in safetensors."
            ) from error
        self._finish(pipeline)
        for part, module in pipeline.components.items():
            if isinstance(module, nn.Module):
                _check_finite(module, files.folder / part)
        return pipeline

    def _without(self) -> dict[str, Any]:
        """Return arguments of loading that leave parts out."""
        return {}

    def _finish(self, pipeline: Any) -> None:
        """Freeze what was just loaded, and change what the family has to."""
        pipeline.set_progress_bar_config(disable=True)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    def _text_encoder(self, files: ModelFiles, part: str, kind: Any) -> PreTrainedModel:
        """Load a text encoder; raise ModelError if its files lack, or name otherwise, weights."""
        # Where diffusers fails, transformers initialises missing weights at random, with a warning.
        folder = files.folder / part
        dtype = self.numerics.torch_dtype if kind in LARGE_TEXT_ENCODERS else torch.float32
        try:
            loaded: Any = kind.from_pretrained(
                folder,
                variant=files.variant_of(part),
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ModelError(
                f"{folder} cannot be loaded as a {kind.__name__}: {error}. Expected "
                f"{self.expected} in safetensors."
            ) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"in the text encoder in {folder}, this release of transformers finds no weights "
                f"for {missing[0]} and {len(missing) - 1} others; expected a {kind.__name__} as "
                "save_pretrained writes it. Download or convert the model again"
            )
        return model


def _check_finite(module: nn.Module, folder: Path) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"{name} in {folder} holds NaN or infinity: the base model itself (checkpoint 0) "
                "is damaged, before any training. Download or convert it again"
            )
