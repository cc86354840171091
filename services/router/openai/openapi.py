"""Makes /openapi.json from the types of bodies (`bodies`) and from FastAPI's routes."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.router.openai.bodies import AbortBody, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/abort_requests": AbortBody,
}


_GENERATING = ("/v1/completions", "/v1/chat/completions")
_MILLISECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e10}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("The request's id; one of ours where it is no id.", {"type": "string"}),
    "X-Tandem-Receipt": ("1: as `receipt` in the body.", {"type": "string", "enum": ["0", "1"]}),
    "X-Slo-Ttft-Ms": ("When the first token is too late; what cannot meet that gets a 503 at once.", _MILLISECONDS),
    "X-Envoy-Expected-Rq-Timeout-Ms": ("When the whole answer is too late.", _MILLISECONDS),
}
"""Of the generating endpoints, all optional."""
_TOKEN_ID = {"type": "integer", "minimum": 0}
_PROMPTS = [
    {"type": "string"},
    *(
        {"type": "array", "items": items, "minItems": 1}
        for items in ({"type": "string"}, _TOKEN_ID, {"type": "array", "items": _TOKEN_ID, "minItems": 1})
    ),
]
"""Not several of these in one list, which the type of the field cannot say."""


class ErrorDetail(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is wrong."""
    code: str | None


class Error(msgspec.Struct):
    """The one shape of all errors."""

    error: ErrorDetail


def openapi_document(app: FastAPI, root_path: str) -> dict[str, Any]:
    """The document of the whole API; `app` has all routes but the generating ones."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas, components = msgspec.json.schema_components(
        (*_BODIES.values(), Error), ref_template="#/components/schemas/{name}"
    )
    components["CompletionBody"]["properties"]["prompt"]["anyOf"] = _PROMPTS
    components["TokenizeBody"]["anyOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    for path, schema in zip(_BODIES, schemas, strict=False):
        post = document["paths"].setdefault(path, {}).setdefault("post", {"responses": {"200": {"description": "OK"}}})
        post["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if path in _GENERATING:
            post["parameters"] = [
                {"name": name, "in": "header", "required": False, "description": words, "schema": kind}
                for name, (words, kind) in _HEADERS.items()
            ]
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours are all of one shape
            failure = {"description": "An error", "content": {"application/json": {"schema": schemas[-1]}}}
            operation["responses"]["default"] = failure
    document["components"] = {"schemas": components}
    if root_path.rstrip("/"):
        document["servers"] = [{"url": root_path.rstrip("/")}]
    return document
