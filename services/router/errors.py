"""Defines the router's one exception, always rendered in OpenAI's error shape.

Whatever goes wrong on the way of a request is turned into an `ApiError` where it is understood, and into bytes once, at
the edge (`app.py`, or as an SSE event in a stream that has begun).
"""

from __future__ import annotations

import orjson
from tandem.v1 import worker_pb2 as pb

# Of what a client wrote a message quotes a part, so that no answer is as long as its question.
_MAX_MESSAGE_CHARS = 1000
_MAX_NAME_CHARS = 200


class ApiError(Exception):
    """An answer with an HTTP error status. `retry_after_s` becomes the Retry-After header, in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _bounded(message, _MAX_MESSAGE_CHARS)
        self.type = type
        self.param = None if param is None else _bounded(param, _MAX_NAME_CHARS)
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON object `{"error": {...}}`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns Retry-After, WWW-Authenticate and Connection where they help."""
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status == 408:
            headers.append((b"connection", b"close"))  # whose body does not come will send nothing else either
        return headers


def _bounded(text: str, max_chars: int) -> str:
    # JSON may hold lone surrogates, which no answer can.
    sound = text if text.isascii() else text.encode(errors="replace").decode()
    return sound if len(sound) <= max_chars else f"{sound[:max_chars]}…"


class ClientDisconnected(Exception):
    """The client has gone: there is nobody to answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def not_supported(name: str, why: str) -> ApiError:
    """400: a field that would change the answer and that this server cannot honour."""
    return ApiError(400, f"`{name}` is not supported: {why}", param=name, code="unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    """404 in OpenAI's words."""
    return ApiError(404, f"The model `{name:.200}` does not exist.", param="model", code="model_not_found")


def method_not_allowed(method: str, path: str) -> ApiError:
    """405."""
    return ApiError(405, f"Not allowed to {method} on {path:.200}.", code="method_not_allowed")


def overloaded(message: str) -> ApiError:
    """429: a bounded queue is full, here or at the workers."""
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=1)


def unavailable(message: str, code: str = "service_unavailable") -> ApiError:
    """503: nobody is there to serve it now."""
    return ApiError(503, message, type="server_error", code=code, retry_after_s=2)


def too_late(message: str, retry_after_s: int) -> ApiError:
    """503: its first token would come after its deadline, so nothing of it is begun."""
    return ApiError(503, message, type="server_error", code="ttft_deadline", retry_after_s=retry_after_s)


def timed_out(message: str) -> ApiError:
    """504: a deadline passed; the message names which."""
    return ApiError(504, message, type="server_error", code="timeout")


def aborted() -> ApiError:
    """499, as nginx counts a client that has gone, and Google's APIs say CANCELLED: no SDK tries that again."""
    return ApiError(499, "The request was aborted.", code="aborted")


def internal(message: str) -> ApiError:
    """500: our fault."""
    return ApiError(500, message, type="server_error", code="internal_error")


_OF_WORKERS = {
    pb.ERROR_CODE_INVALID: invalid,
    pb.ERROR_CODE_OVERLOADED: overloaded,
    pb.ERROR_CODE_UNAVAILABLE: unavailable,
    pb.ERROR_CODE_DEADLINE: timed_out,
}


def from_worker(error: pb.Error) -> ApiError:
    """A worker's error as the client sees it."""
    return _OF_WORKERS.get(error.code, internal)(error.message or "the worker gave no reason")


def is_retryable(error: pb.Error) -> bool:
    """Whether another worker may serve what this one could not."""
    return error.code in (pb.ERROR_CODE_OVERLOADED, pb.ERROR_CODE_UNAVAILABLE)
