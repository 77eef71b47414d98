"""The DDPO paper's alignment: does a vision-language model see what the prompt says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.bert_recall import BERT, BERT_LAYER, BertRecall
from ddpo.rewards.models.pretrained import Device
from ddpo.rewards.models.vlm import LLAVA, Dtype, VisionLanguageModel
from ddpo.rewards.models.vlm_tasks import QUESTION, TEMPLATE, check_template, score_alignment


class VlmAlignment:
    """Reward = BERTScore recall of a vision-language model's caption against the prompt, in 0..1.

    The model is asked what is going on in the image; its answer, decoded greedily, is compared with
    'The image contains <prompt>' (arXiv 2305.13301, section 5.2). Columns: ``caption``,
    ``bert_precision``, ``bert_f1``, and ``vlm_error``, which says why a sample failed: the answer
    is empty.

    Args:
        model: The vision-language model: a Hub id or a folder. The paper's is LLaVA 13b.
        revision: Commit of a Hub id; those of LLaVA 1.5 (7b, 13b) are pinned.
        question: What it is asked.
        template: What its answer is compared with; ``{prompt}`` stands for the prompt.
        max_new_tokens: Length of an answer, in tokens, at which it is cut.
        dtype: The precision in which it computes; BERTScore is always in float32.
        bert_model: The model that compares sentences: a Hub id or a folder.
        bert_revision: Its commit; that of the default is pinned.
        bert_layer: The hidden layer that is compared.
        device: Where both run.

    Raises:
        ConfigError: A model is not pinned, or the template has no placeholder for the prompt.
        RewardError: torchmetrics is not installed.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = (
        "a vision-language model (LLaVA 1.5 7b: 14 GB) and a model for BERTScore (3 GB), fetched "
        "from the hub; torchmetrics (pip install -e '.[rewards]')"
    )

    def __init__(
        self,
        model: str = LLAVA,
        revision: str | None = None,
        question: str = QUESTION,
        template: str = TEMPLATE,
        max_new_tokens: PositiveInt = 64,
        dtype: Dtype = "float16",
        bert_model: str = BERT,
        bert_revision: str | None = None,
        bert_layer: NonNegativeInt = BERT_LAYER,
        device: Device = "auto",
    ) -> None:
        self._question = question
        self._template = check_template(template)
        self._vlm = VisionLanguageModel(model, revision, dtype, max_new_tokens, device)
        self._bert = BertRecall(bert_model, bert_revision, bert_layer, device)
        self.revisions = self._vlm.revisions | self._bert.revisions

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images against their prompts."""
        return score_alignment(
            images, prompts, self._vlm.ask, self._bert, self._question, self._template
        )
