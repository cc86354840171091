"""/openapi.json describes every route, and the bodies as they are decoded."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from services.router.app import generating_endpoints, make_api
from services.router.edge.deadlines import TIMEOUT_HEADER, TTFT_HEADER
from services.router.errors import ApiError
from services.router.openai.bodies import CompletionBody
from services.router.openai.decoding import decode


@pytest.fixture(scope="module")
def document(router):
    return httpx.get(f"{router.base_url}/openapi.json", timeout=60).json()


def schema_of(document, path):
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return document["components"]["schemas"][reference.rpartition("/")[2]]


def test_it_has_every_route_and_the_one_shape_of_errors(document, router):
    served = {route.path for route in make_api(router.running.parts).routes if isinstance(route, Route)}
    served |= set(generating_endpoints(router.running.parts))
    assert set(document["paths"]) == {path.replace(":path", "") for path in served} - {"/openapi.json"}
    for operations in document["paths"].values():
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "default"}
    assert document["openapi"].startswith("3.1")


def test_it_tells_the_fields_of_both_generating_endpoints_and_their_ranges(document):
    completion, chat = schema_of(document, "/v1/completions"), schema_of(document, "/v1/chat/completions")
    assert completion["required"] == ["prompt"]
    assert chat["required"] == ["messages"]
    assert completion["properties"]["n"] == {"type": "integer", "minimum": 1, "maximum": 128, "default": 1}
    assert chat["properties"]["temperature"]["anyOf"][0]["minimum"] == 0
    assert chat["properties"]["logprobs"] != completion["properties"]["logprobs"]
    assert "no constrained decoding" in completion["properties"]["guided_json"]["description"]
    assert set(schema_of(document, "/tokenize")["properties"]) > {"prompt", "messages", "return_token_strs"}


def test_it_tells_the_headers_that_the_generating_endpoints_read(document):
    for path in ("/v1/completions", "/v1/chat/completions"):
        told = {parameter["name"].lower() for parameter in document["paths"][path]["post"]["parameters"]}
        assert told == {"x-request-id", "x-tandem-receipt", TTFT_HEADER.decode(), TIMEOUT_HEADER.decode()}


def test_what_it_says_is_what_is_decoded(document):
    properties = schema_of(document, "/v1/completions")["properties"]
    for name, schema in properties.items():
        for kind in schema.get("anyOf", [schema]):
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if bound in kind and abs(kind[bound]) < 2**62:
                    with pytest.raises(ApiError) as caught:
                        decode(f'{{"prompt": "x", "{name}": {kind[bound] + step}}}'.encode(), CompletionBody)
                    assert caught.value.param == name
