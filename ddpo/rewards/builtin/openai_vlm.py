"""Alignment or VQA by a vision-language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from PIL import Image
from pydantic import JsonValue, NonNegativeInt, PositiveInt

from ddpo.errors import ConfigError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.models.bert_recall import BERT, BERT_LAYER, BertRecall
from ddpo.rewards.models.chat import ChatModel
from ddpo.rewards.models.pretrained import Device
from ddpo.rewards.models.vlm_tasks import (
    QUESTION,
    TEMPLATE,
    check_template,
    score_alignment,
    score_questions,
)
from ddpo.rewards.service.client import ServedReward

ENDPOINTS_VARIABLE = "DDPO_VLM_ENDPOINTS"
KEY_VARIABLE = "OPENAI_API_KEY"

_OF_ALIGNMENT = ("question", "template", "bert_model", "bert_revision", "bert_layer", "device")
"""Parameters that the task ``vqa`` has no use for."""


@dataclass(kw_only=True, eq=False)
class OpenaiVlm(ServedReward):
    """Reward = that of `vlm_alignment` or `vlm_vqa`, by a model behind an OpenAI-compatible API.

    Images are sent to ``POST <endpoint>/chat/completions`` as PNG, with temperature 0. A sample
    that gets no answer is marked as failed, with the reason in the column ``vlm_error`` or
    ``vqa_error``, and does not affect the others; if no endpoint can be reached, the whole call
    fails and can be retried. The columns are those of the two rewards.

    The identity is the question and the model: building the reward asks ``GET <endpoint>/models``
    what is behind the model's name. Services report no more than that; new weights under the same
    name go unnoticed. Endpoints, key and patience are not part of it.

    Raises:
        ConfigError: There is no endpoint, an address is not plain http, the key is malformed, or a
            parameter of ``alignment`` is set for the task ``vqa``.
        RewardError: The service is unavailable, or does not serve the model; torchmetrics is not
            installed.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = (
        "a server of a vision-language model with an OpenAI-compatible API (vLLM, SGLang); for "
        "alignment also torchmetrics (pip install -e '.[rewards]') and a model (3 GB, fetched)"
    )

    endpoints_variable: str = ENDPOINTS_VARIABLE
    key_variable: str = KEY_VARIABLE
    """Environment variable with the API key, if the service requires one. Never the key itself."""
    model: str
    """The model's name, as the service knows it."""
    task: Literal["alignment", "vqa"] = "alignment"
    """``alignment``, or ``vqa``: the questions in the prompts' metadata."""
    question: str = QUESTION
    """What is asked about every image; only for ``alignment``, like the next five."""
    template: str = TEMPLATE
    """What an answer is compared with; ``{prompt}`` stands for the prompt."""
    bert_model: str = BERT
    """The model that compares sentences: a Hub id or a folder."""
    bert_revision: str | None = None
    """Its commit; that of the default is pinned."""
    bert_layer: NonNegativeInt = BERT_LAYER
    """The hidden layer that is compared."""
    device: Device = "auto"
    """Where BERTScore runs."""
    max_new_tokens: PositiveInt = 64
    """Length of an answer, in tokens, at which it is cut."""
    at_once: PositiveInt = 8
    """Number of concurrent requests."""

    def __post_init__(self) -> None:
        endpoints = self._connect(
            what="the served model",
            start="Start it",
            example="http://127.0.0.1:8000/v1",
            token_parameter="key_variable",
        )
        self._chat = ChatModel(endpoints, self.model, self.max_new_tokens, self.at_once)
        self._bert: BertRecall | None = None
        parameters: dict[str, JsonValue] = {
            "model": self.model,
            "task": self.task,
            "max_new_tokens": self.max_new_tokens,
        }
        revisions: dict[str, str] = {}
        if self.task == "alignment":
            check_template(self.template)
            self._bert = BertRecall(
                self.bert_model, self.bert_revision, self.bert_layer, self.device
            )
            revisions |= self._bert.revisions
            parameters |= {name: getattr(self, name) for name in _OF_ALIGNMENT}
        else:
            defaults = {field.name: field.default for field in fields(self)}
            ignored = [name for name in _OF_ALIGNMENT if getattr(self, name) != defaults[name]]
            if ignored:
                raise ConfigError(
                    f"{', '.join(ignored)}: the task 'vqa' asks the questions of the prompts and "
                    "compares no sentences; remove it, or set the task to 'alignment'"
                )
        revisions[self.model] = self._chat.revision(self.start_within_s)
        self.identity = RewardIdentity("openai_vlm", parameters, revisions, self.version)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images."""
        if self._bert is None:
            return score_questions(images, prompts, self._chat.ask)
        return score_alignment(
            images, prompts, self._chat.ask, self._bert, self.question, self.template
        )
