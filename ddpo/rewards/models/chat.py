"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a vendor's own)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from PIL import Image
from pydantic import BaseModel, ValidationError

from ddpo.basics.images import encode_image
from ddpo.errors import RewardError
from ddpo.rewards.models.vlm_tasks import NOTHING_SAID, Answer
from ddpo.rewards.service.endpoints import Broken, Endpoints, NoAnswer, Patience, Reply
from ddpo.rewards.service.wire import what_is_wrong

UNREPORTED = "unreported"
"""Revision of a model that no endpoint tells anything about."""

_SETTINGS_STATUS = frozenset({401, 403, 404, 405})
"""Answers that no other picture would change: the key, the address or the model is wrong."""
_NO_LIST_STATUS = frozenset({404, 405, 501})
_LIST_TIMEOUT_S = 10.0
_SHOWN = 5  # names in a message


class _Message(BaseModel):
    content: str | None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice]


class _ServedModel(BaseModel):
    id: str
    root: str | None = None  # vLLM: what is behind the name that it serves


class _ServedModels(BaseModel):
    data: list[_ServedModel]


class ChatModel:
    """Asks a served model about pictures, several questions at once.

    Args:
        endpoints: Where it is served.
        model: Its name, as the endpoints serve it.
        max_tokens: Tokens after which an answer is cut.
        at_once: Questions that are under way side by side.
        patience: How long an answer is waited for.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        model: str,
        max_tokens: int,
        at_once: int,
        patience: Patience,
    ) -> None:
        self._endpoints = endpoints
        self._model = model
        self._max_tokens = max_tokens
        self._at_once = at_once
        self._patience = patience

    def revision(self, within_s: float) -> str:
        """Return what the endpoints say their model is: the ``root`` under /models, or its id.

        Args:
            within_s: Seconds that an endpoint is waited for.

        Returns:
            The revision; `UNREPORTED` where an endpoint has no /models, or an empty one.

        Raises:
            RewardUnavailable: No endpoint answers.
            RewardError: An endpoint does not serve this model, or another one than the others do.
        """
        try:
            first, found = self._endpoints.in_turn(
                self._served_by, each_s=_LIST_TIMEOUT_S, within_s=within_s
            )
        except NoAnswer as error:
            raise RewardError(str(error)) from error
        others = self._endpoints.others(first, self._served_by, each_s=_LIST_TIMEOUT_S)
        for endpoint, other in others:
            if other != found:
                raise self._endpoints.error(
                    f"{endpoint} serves {other} as {self._model!r}, and {first} serves {found}; "
                    "start the same model everywhere"
                )
        return found

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Answer]:
        """Ask N questions, each about the picture of its own index.

        Returns:
            N answers. One that cannot be had says why, and stops no other.

        Raises:
            RewardUnavailable: No endpoint can be reached.
            RewardError: The key, the address or the model is wrong; or of several questions none
                was answered.
        """
        given_up = threading.Event()

        def answer(image: Image.Image, question: str) -> Answer:
            if given_up.is_set():
                return Answer("", "not asked")  # the error of another question is on its way
            try:
                return self._answer(image, question)
            except BaseException:
                given_up.set()
                raise

        with ThreadPoolExecutor(self._at_once, "chat") as pool:
            asked = [pool.submit(answer, *pair) for pair in zip(images, questions, strict=True)]
        answers = [each.result() for each in asked]
        if len(answers) > 1 and all(each.error for each in answers):
            raise RewardError(f"none of {len(answers)} questions was answered: {answers[0].error}")
        return answers

    def _answer(self, image: Image.Image, question: str) -> Answer:
        body = self._body(image, question)
        try:
            _, text = self._endpoints.in_turn(
                lambda endpoint, seconds: self._complete(endpoint, body, seconds),
                each_s=self._patience.timeout_s,
                within_s=self._patience.give_up_after_s,
            )
        except NoAnswer as error:
            return Answer("", self._endpoints.clean(str(error)))
        return Answer(text, "" if text else NOTHING_SAID)

    def _body(self, image: Image.Image, question: str) -> bytes:
        picture = base64.b64encode(encode_image(image.convert("RGB"))).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": question},
        ]
        return json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self._max_tokens,
            }
        ).encode()

    def _complete(self, endpoint: str, body: bytes, seconds: float) -> str:
        reply = self._request(endpoint, "/chat/completions", seconds, body)
        if reply.status != httpx.codes.OK:
            if reply.status in _SETTINGS_STATUS or reply.status < httpx.codes.BAD_REQUEST:
                raise self._wrong_settings(endpoint, reply)
            raise NoAnswer(f"{endpoint} answered {reply.said}")
        try:
            choices = _Completion.model_validate_json(reply.data).choices
        except ValidationError as error:
            wrong = what_is_wrong(error)
            raise NoAnswer(f"{endpoint} answered no chat completion: {wrong}") from None
        if not choices:
            raise NoAnswer(f"{endpoint} answered a chat completion without choices")
        return (choices[0].message.content or "").strip()

    def _served_by(self, endpoint: str, seconds: float) -> str:
        reply = self._request(endpoint, "/models", seconds)
        if reply.status in _NO_LIST_STATUS:
            return UNREPORTED
        if reply.status != httpx.codes.OK:
            raise self._wrong_settings(endpoint, reply)
        try:
            served = _ServedModels.model_validate_json(reply.data).data
        except ValidationError as error:
            raise self._endpoints.error(
                f"{endpoint}/models is no list of models: {what_is_wrong(error)}"
            ) from None
        for each in served:
            if each.id == self._model:
                return each.root or each.id
        if not served:
            return UNREPORTED
        names = ", ".join(each.id for each in served[:_SHOWN])
        raise self._endpoints.error(f"{endpoint} does not serve {self._model!r}; it serves {names}")

    def _request(
        self, endpoint: str, path: str, seconds: float, body: bytes | None = None
    ) -> Reply:
        """Ask one endpoint once; an error of its own may not come again."""
        reply = self._endpoints.request(endpoint, path, seconds, body)
        own = reply.status >= httpx.codes.INTERNAL_SERVER_ERROR
        if own and reply.status != httpx.codes.NOT_IMPLEMENTED:  # it will not be there later
            raise Broken(f"{endpoint} answered {reply.said}")
        return reply

    def _wrong_settings(self, endpoint: str, reply: Reply) -> RewardError:
        if reply.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            way_out = f"The API key in {self._endpoints.token_state}"
        else:
            way_out = (
                "Check that the endpoint ends as the service's does (often /v1), and that it "
                f"serves {self._model!r}"
            )
        return self._endpoints.error(f"{endpoint} answered {reply.said}. {way_out}")
