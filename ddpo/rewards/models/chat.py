"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a vendor)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import httpx
from PIL import Image
from pydantic import BaseModel, ValidationError

from ddpo.basics.images import encode_image
from ddpo.errors import RewardError
from ddpo.rewards.models.vlm_tasks import EMPTY_ANSWER, Answer
from ddpo.rewards.service.endpoints import Endpoints, NoAnswer, Reply, ServerError
from ddpo.rewards.service.wire import describe_problems

UNREPORTED = "unreported"
"""Revision of a model about which no endpoint reports anything."""

_SETTINGS_STATUS = frozenset({401, 403, 404, 405})
"""Statuses that do not depend on the image: the key, the address or the model is wrong."""
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
    """Asks a served model about images, several questions at a time.

    Args:
        endpoints: Where it is served.
        model: Its name, as the endpoints serve it.
        max_tokens: Length of an answer at which it is cut.
        at_once: Number of concurrent requests.
    """

    def __init__(self, endpoints: Endpoints, model: str, max_tokens: int, at_once: int) -> None:
        self._endpoints = endpoints
        self._model = model
        self._max_tokens = max_tokens
        self._at_once = at_once

    def revision(self, within_s: float) -> str:
        """Return what the endpoints report about their model: ``root`` under /models, or its id.

        Args:
            within_s: Seconds to wait for an endpoint.

        Returns:
            The revision; `UNREPORTED` if an endpoint has no /models, or lists nothing there.

        Raises:
            RewardUnavailable: No endpoint responds.
            RewardError: An endpoint does not serve the model, or the endpoints serve different
                ones under its name.
        """
        try:
            first, revision = self._endpoints.first_answer(
                self._served_by, each_s=_LIST_TIMEOUT_S, within_s=within_s
            )
        except NoAnswer as error:
            raise RewardError(str(error)) from error
        others = self._endpoints.other_answers(first, self._served_by, each_s=_LIST_TIMEOUT_S)
        for endpoint, other in others:
            if other != revision:
                raise self._endpoints.error(
                    f"{endpoint} serves {other} as {self._model!r}, and {first} serves {revision}; "
                    "start the same model everywhere"
                )
        return revision

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Answer]:
        """Ask N questions, each about the image with the same index.

        Returns:
            N answers. One that failed says why, and does not affect the others.

        Raises:
            RewardUnavailable: No endpoint can be reached.
            RewardError: The key, the address or the model is wrong; or none of several questions
                was answered.
        """
        given_up = threading.Event()

        def answer(image: Image.Image, question: str) -> Answer:
            if given_up.is_set():
                return Answer("", "not asked")  # another question's error is about to be raised
            try:
                return self._answer(image, question)
            except BaseException:
                given_up.set()
                raise

        with ThreadPoolExecutor(self._at_once, "chat") as pool:
            # In this context, to which the log of a warning belongs.
            futures = [
                pool.submit(copy_context().run, answer, *pair)
                for pair in zip(images, questions, strict=True)
            ]
        answers = [future.result() for future in futures]
        if len(answers) > 1 and all(answer.error for answer in answers):
            raise RewardError(f"none of {len(answers)} questions was answered: {answers[0].error}")
        return answers

    def _answer(self, image: Image.Image, question: str) -> Answer:
        body = self._body(image, question)
        try:
            _, text = self._endpoints.first_answer(
                lambda endpoint, seconds: self._complete(endpoint, body, seconds)
            )
        except NoAnswer as error:
            return Answer("", self._endpoints.clean(str(error)))
        return Answer(text, "" if text else EMPTY_ANSWER)

    def _body(self, image: Image.Image, question: str) -> bytes:
        png = base64.b64encode(encode_image(image.convert("RGB"))).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
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
            raise NoAnswer(f"{endpoint} answered {reply.summary}")
        try:
            choices = _Completion.model_validate_json(reply.data).choices
        except ValidationError as error:
            problems = describe_problems(error)
            raise NoAnswer(f"{endpoint} did not return a chat completion: {problems}") from None
        if not choices:
            raise NoAnswer(f"{endpoint} returned a chat completion without choices")
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
                f"{endpoint}/models is not a list of models: {describe_problems(error)}"
            ) from None
        for model in served:
            if model.id == self._model:
                return model.root or model.id
        if not served:
            return UNREPORTED
        names = ", ".join(model.id for model in served[:_SHOWN])
        raise self._endpoints.error(f"{endpoint} does not serve {self._model!r}; it serves {names}")

    def _request(
        self, endpoint: str, path: str, seconds: float, body: bytes | None = None
    ) -> Reply:
        """Make one request to one endpoint; a server error may be transient."""
        reply = self._endpoints.request(endpoint, path, seconds, body)
        failed = reply.status >= httpx.codes.INTERNAL_SERVER_ERROR
        if failed and reply.status != httpx.codes.NOT_IMPLEMENTED:  # which is permanent
            raise ServerError(f"{endpoint} answered {reply.summary}")
        return reply

    def _wrong_settings(self, endpoint: str, reply: Reply) -> RewardError:
        if reply.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            way_out = f"Check the API key: {self._endpoints.token_state}"
        else:
            way_out = (
                "Check that the endpoint's path is the service's (often /v1), and that it serves "
                f"{self._model!r}"
            )
        return self._endpoints.error(f"{endpoint} answered {reply.summary}. {way_out}")
