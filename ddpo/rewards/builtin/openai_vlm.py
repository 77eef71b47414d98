"""Alignment, or questions, by a vision-language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from PIL import Image
from pydantic import JsonValue, NonNegativeInt, PositiveFloat, PositiveInt

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
from ddpo.rewards.service.endpoints import Endpoints, Patience, Service

ENDPOINTS_VARIABLE = "DDPO_VLM_ENDPOINTS"
KEY_VARIABLE = "OPENAI_API_KEY"


class OpenaiVlm:
    """Reward = that of `vlm_alignment` or `vlm_vqa`, by a model behind an OpenAI-compatible API.

    Pictures go to ``POST <endpoint>/chat/completions`` as PNG, with temperature 0. A sample whose
    answer cannot be had has failed, with the reason in the column ``vlm_error`` or ``vqa_error``,
    and stops no other; where no endpoint can be reached, the whole call fails and may be tried
    again. Columns are those of the two rewards.

    Its identity is what it is asked and the model that is: building it asks ``GET
    <endpoint>/models`` for what stands behind the model's name. That is as much as the service
    tells; an exchange of weights under one name goes unnoticed. Endpoints, key and patience are no
    part of it.

    Args:
        model: Name of the model, as the service has it.
        task: ``alignment``, or ``vqa``: the questions of the prompts' metadata.
        endpoints: Base addresses, such as ``http://127.0.0.1:8000/v1``; asked in turn.
        endpoints_variable: Environment variable that, where it is set, holds the endpoints,
            separated by commas, and goes before `endpoints`.
        key_variable: Environment variable that holds the API key, if the service wants one. Never
            the key itself.
        question: What is asked about every picture; of ``alignment``, as the next four.
        template: What an answer is compared with; ``{prompt}`` stands for the prompt.
        bert_model: The model that compares: a hub id or a folder.
        bert_revision: Its commit; that of the default is pinned.
        bert_layer: The hidden layer that is compared.
        device: Where BERTScore runs.
        max_new_tokens: Tokens after which an answer is cut.
        at_once: Requests that are under way side by side.
        connect_timeout_s: Seconds to reach an endpoint.
        timeout_s: Seconds in which an endpoint must answer, its queue included.
        retries: How often all endpoints are asked again for an answer.
        give_up_after_s: Seconds after which an answer is given up.
        start_within_s: Seconds that building it waits for the service to be there.

    Raises:
        ConfigError: No endpoint, or one that is no plain http address; no usable key; a setting of
            ``alignment`` with the task ``vqa``.
        RewardError: The service is away, or serves no such model; torchmetrics is not installed.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = (
        "a server of a vision-language model with an OpenAI-compatible API (vLLM, SGLang); for "
        "alignment also torchmetrics (pip install -e '.[rewards]') and a model (3 GB, fetched)"
    )

    def __init__(
        self,
        model: str,
        task: Literal["alignment", "vqa"] = "alignment",
        endpoints: tuple[str, ...] = (),
        *,
        endpoints_variable: str = ENDPOINTS_VARIABLE,
        key_variable: str = KEY_VARIABLE,
        question: str = QUESTION,
        template: str = TEMPLATE,
        bert_model: str = BERT,
        bert_revision: str | None = None,
        bert_layer: NonNegativeInt = BERT_LAYER,
        device: Device = "auto",
        max_new_tokens: PositiveInt = 64,
        at_once: PositiveInt = 8,
        connect_timeout_s: PositiveFloat = 5.0,
        timeout_s: PositiveFloat = 120.0,
        retries: NonNegativeInt = 60,
        give_up_after_s: PositiveFloat = 600.0,
        start_within_s: PositiveFloat = 15.0,
    ) -> None:
        patience = Patience(connect_timeout_s, timeout_s, retries, give_up_after_s)
        service = Service(
            what="the served model",
            start="Start it",
            example="http://127.0.0.1:8000/v1",
            variable=endpoints_variable,
            token_variable=key_variable,
            token_parameter="key_variable",
        )
        served = Endpoints(endpoints, service, patience)
        self._chat = ChatModel(served, model, max_new_tokens, at_once, patience)
        self._bert: BertRecall | None = None
        self._question = question
        parameters: dict[str, JsonValue] = {
            "model": model,
            "task": task,
            "max_new_tokens": max_new_tokens,
        }
        compared: dict[str, tuple[JsonValue, JsonValue]] = {
            "question": (question, QUESTION),
            "template": (template, TEMPLATE),
            "bert_model": (bert_model, BERT),
            "bert_revision": (bert_revision, None),
            "bert_layer": (bert_layer, BERT_LAYER),
            "device": (device, "auto"),
        }
        revisions: dict[str, str] = {}
        if task == "alignment":
            self._template = check_template(template)
            self._bert = BertRecall(bert_model, bert_revision, bert_layer, device)
            revisions |= self._bert.revisions
            parameters |= {name: given for name, (given, _) in compared.items()}
        else:
            ignored = [name for name, (given, default) in compared.items() if given != default]
            if ignored:
                raise ConfigError(
                    f"{', '.join(ignored)}: the task 'vqa' asks the questions of the prompts and "
                    "compares no sentences; leave it out, or set the task to 'alignment'"
                )
        revisions[model] = self._chat.revision(start_within_s)
        self.identity = RewardIdentity("openai_vlm", parameters, revisions, self.version)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images."""
        if self._bert is None:
            return score_questions(images, prompts, self._chat.ask)
        return score_alignment(
            images, prompts, self._chat.ask, self._bert, self._question, self._template
        )
