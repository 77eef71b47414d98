"""VQA: the prompt's own questions, answered by a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image
from pydantic import PositiveInt

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.pretrained import Device
from ddpo.rewards.models.vlm import LLAVA, Dtype, VisionLanguageModel
from ddpo.rewards.models.vlm_tasks import score_questions


class VlmVqa:
    """Reward = share of the prompt's questions that a vision-language model answers as expected.

    Questions and answers are the prompt's metadata ``questions`` and ``answers``, as in the prompt
    set ``counting``. An answer is right if it contains the expected one as whole words; case is
    ignored, '3' and 'three' are the same, and so are 'cat' and 'cats'. Columns: ``vqa_answers``,
    JSON text of each question, answer, expected answer and whether it is right; and ``vqa_error``,
    which says why a sample failed: it has no questions, or an answer is empty.

    Args:
        model: The vision-language model: a Hub id or a folder.
        revision: Commit of a Hub id; those of LLaVA 1.5 (7b, 13b) are pinned.
        max_new_tokens: Length of an answer, in tokens, at which it is cut.
        dtype: The precision in which it computes.
        device: Where it runs.

    Raises:
        ConfigError: The model is not pinned.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = (
        "a vision-language model (LLaVA 1.5 7b: 14 GB), fetched from the hub; prompts with "
        "questions and answers in their metadata"
    )

    def __init__(
        self,
        model: str = LLAVA,
        revision: str | None = None,
        max_new_tokens: PositiveInt = 32,
        dtype: Dtype = "float16",
        device: Device = "auto",
    ) -> None:
        self._vlm = VisionLanguageModel(model, revision, dtype, max_new_tokens, device)
        self.revisions = self._vlm.revisions

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images by the questions of their prompts."""
        return score_questions(images, prompts, self._vlm.ask)
