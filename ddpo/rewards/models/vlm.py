"""A vision-language model of transformers that answers questions about images."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ddpo.errors import RewardError
from ddpo.rewards.models.pinned import find_model, load_part
from ddpo.rewards.models.pretrained import SCORED_AT_ONCE, Device, LoadedOnce, pick_device, place
from ddpo.rewards.models.vlm_tasks import EMPTY_ANSWER, Answer

if TYPE_CHECKING:
    import torch
    from transformers.processing_utils import ProcessorMixin

LLAVA = "llava-hf/llava-1.5-7b-hf"

_PINNED = {
    LLAVA: "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
    "llava-hf/llava-1.5-13b-hf": "5dda2880bda009266dda7c4baff660b95ca64540",
}

Dtype = Literal["float16", "bfloat16", "float32"]
"""The precision in which a model computes."""


@dataclass(frozen=True)
class _Vlm:
    model: Any  # a PreTrainedModel with generate(), which the auto class does not declare
    processor: ProcessorMixin
    lock: threading.Lock = field(default_factory=threading.Lock)


class VisionLanguageModel:
    """Answers questions by greedy decoding; loaded by the first question.

    Args:
        model: A Hub id or a folder: any model of transformers that `AutoModelForImageTextToText`
            and `AutoProcessor` load, with a chat template.
        revision: Commit of a Hub id; those of LLaVA 1.5 (7b, 13b) are pinned.
        dtype: The precision in which it computes.
        max_new_tokens: Length of an answer at which it is cut.
        device: Where it runs.

    Raises:
        ConfigError: The model is not pinned.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        dtype: Dtype,
        max_new_tokens: int,
        device: Device,
    ) -> None:
        self._folder = find_model(model, revision or _PINNED.get(model))
        self._dtype_name: Dtype = dtype
        self._max_new_tokens = max_new_tokens
        self._device: Device = device
        self._loaded = LoadedOnce(self._load, self._folder)

    @property
    def revisions(self) -> dict[str, str]:
        """Revision of the model."""
        return {self._folder.name: self._folder.revision}

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self._dtype_name)

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Answer]:
        """Ask N questions, each about the image with the same index."""
        answers: list[Answer] = []
        for start in range(0, len(images), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            rgb = [image.convert("RGB") for image in images[part]]
            texts = self._answer(self._loaded.get(), rgb, questions[part])
            answers += [Answer(text, "" if text else EMPTY_ANSWER) for text in texts]
        return answers

    def _answer(
        self, vlm: _Vlm, images: Sequence[Image.Image], questions: Sequence[str]
    ) -> list[str]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for image, question in zip(images, questions, strict=True)
        ]
        import torch

        # One thread at a time: a fast tokenizer keeps its padding settings as state, and two
        # generations may not fit into memory.
        with vlm.lock, torch.no_grad():
            inputs: Any = vlm.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            inputs = inputs.to(vlm.model.device, dtype=self._dtype)
            tokens = vlm.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self._max_new_tokens
            )
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip()
            for text in vlm.processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        ]

    def _load(self) -> _Vlm:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = pick_device(self._device)
        try:
            # Always resize with Pillow, whether or not torchvision is installed.
            processor: ProcessorMixin = load_part(
                "the processor", AutoProcessor.from_pretrained, self._folder, backend="pil"
            )
        except ImportError as error:
            raise RewardError(
                f"the processor of {self._folder.name!r} needs a package that is missing: {error}"
            ) from error
        if processor.chat_template is None:
            raise RewardError(
                f"{self._folder.name!r} ({self._folder.revision}) has no chat template, without "
                "which it cannot be asked; choose a model that was trained on conversations"
            )
        processor.tokenizer.padding_side = (
            "left"  # so that generation starts right after the question
        )
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        model = load_part(
            "the vision-language model",
            AutoModelForImageTextToText.from_pretrained,
            self._folder,
            weights=True,
            dtype=self._dtype,
        )
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return _Vlm(place(model, device), processor)
