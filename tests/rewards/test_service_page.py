"""The reward service against its own OpenAPI page, and against bytes of any kind."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.rewards.served import CLIENT, GOOD, SMALL, TOLD, XYZ, expected, multipart, score

FEW = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_it_keeps_to_its_openapi_page(up, mode):
    """Forms of pictures and prompts as the page has them, and as it forbids them."""
    assert CLIENT.get(f"{up}/docs").status_code == 200
    schema = schemathesis.openapi.from_url(f"{up}/openapi.json")
    statuses: set[int] = set()

    @FEW
    @given(case=schema["/score"]["POST"].as_strategy(generation_mode=mode))
    def keeps_to_it(case):
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        statuses.add(answer.status_code)

    keeps_to_it()
    assert 422 in statuses
    assert statuses <= (
        {200, 413, 422} if mode == GenerationMode.POSITIVE else {400, 413, 415, 422}
    )
    assert score(up).json()["values"] == expected(2)


def test_its_other_pages_are_as_the_openapi_page_says(up):
    schema = schemathesis.openapi.from_url(f"{up}/openapi.json")
    for path in ("/health", "/ready", "/identity"):
        case = schema[path]["GET"].Case()
        answer = case.call()
        assert answer.status_code == 200
        case.validate_response(answer, checks=CHECKS)


WHOLE = multipart(TOLD, ("images", GOOD))


@pytest.mark.slow
@settings(FEW, max_examples=100)
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 40), st.binary(max_size=12)),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_requests_are_refused_or_scored_and_never_end_it(up, cuts):
    body = bytearray(WHOLE)
    for start, length, instead in cuts:
        body[start : start + length] = instead
    answer = CLIENT.post(f"{up}/score", headers={"Content-Type": XYZ}, content=bytes(body))
    assert answer.status_code in (200, 400, 413, 422), answer.text
    assert set(answer.json()) in ({"detail"}, {"values", "failed", "columns", "identity"})


def test_what_the_page_calls_a_request_is_one(up):
    page = CLIENT.get(f"{up}/openapi.json").json()
    told = page["paths"]["/score"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert set(told["schema"]["properties"]) == {"prompts", "images"}
    assert told["schema"]["properties"]["images"]["maxItems"] == SMALL.images
    assert set(page["paths"]["/score"]["post"]["responses"]) == {
        *("200", "400", "401", "408", "413", "415", "422", "500", "503")
    }
