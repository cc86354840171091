"""Sends one request over HTTP, in its own greenlet, and stamps each chunk of the stream as it is read.

Each request has a connection of its own, as another user's would be: none waits for a slow one before it, and none
meets a kept-alive connection that the server has just given up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from loadtest.plan import LoadOptions, Outcome, PlannedRequest, PromptMaker, RequestRecord, Scale
from loadtest.send.sse import BadStream, parse_line

API_KEY_VARIABLE = "OPENAI_API_KEY"
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_REFUSALS = (429, 503)
_MAX_ERROR_CHARS = 300
_CONNECT_TIMEOUT_S = 30.0


class TargetError(Exception):
    """The target does not answer as an OpenAI server does; the message says what it did."""


@dataclass(frozen=True)
class ServedModel:
    """The target's word on its model; `max_model_len` is None where it said nothing."""

    name: str
    max_model_len: int | None


def look_up_model(url: str, name: str, api_key: str) -> ServedModel:
    """Asks /v1/models: the model called `name`, or the first one. Raises TargetError, also where nobody answers."""
    where = f"{url}/v1/models"
    try:
        http = HTTPClient.from_url(url, connection_timeout=_CONNECT_TIMEOUT_S, network_timeout=_CONNECT_TIMEOUT_S)
        headers = _headers(api_key) | {"Connection": "close"}
        response = http.request("GET", _path(url, "/v1/models"), headers=headers)
        status, text = response.status_code, response.read()
    except (OSError, HTTPParseError, ValueError) as error:
        raise TargetError(f"no answer from {where}: {error}") from error
    if status != 200:
        raise TargetError(f"{where} answers {status}: {text[:_MAX_ERROR_CHARS].decode(errors='replace')}")
    try:
        models = {str(each["id"]): each for each in json.loads(text)["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{where} lists no models as OpenAI does: {text[:_MAX_ERROR_CHARS]!r}") from error
    chosen = name or next(iter(models), "")
    if chosen not in models:
        raise TargetError(f"{where} has no model {name!r}; it has {', '.join(models) or 'none'}")
    context = models[chosen].get("max_model_len")
    return ServedModel(chosen, context if isinstance(context, int) and context > 0 else None)


class Client:
    """Sends planned requests to one target."""

    def __init__(self, url: str, model: str, options: LoadOptions, scale: Scale, api_key: str = "") -> None:
        self._url = url
        self._model = model
        self._options = options
        self._scale = scale
        self._maker = PromptMaker(scale, options.token_range, options.seed)
        self._path = _path(url, _PATHS[options.endpoint])
        self._headers = _headers(api_key) | {"Content-Type": "application/json", "Connection": "close"}

    def body(self, planned: PlannedRequest) -> bytes:
        """The request's body. It takes a while to make: make it before the request is due."""
        options = self._options
        max_tokens = self._scale.output_tokens(planned.request)
        fields: dict[str, object] = {"model": self._model, "stream": True, "max_tokens": max_tokens, "temperature": 0}
        fields["stream_options"] = {"include_usage": True}
        if options.ignore_eos:
            fields["ignore_eos"] = True
        text_or_tokens = self._maker.text if options.sends_text else self._maker.tokens
        if options.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": text_or_tokens(planned.request)}]
        else:
            fields["prompt"] = text_or_tokens(planned.request)
        return json.dumps(fields | options.extra_fields).encode()

    def send(self, planned: PlannedRequest, body: bytes, start: float) -> RequestRecord:
        """Sends it now and reads the answer to its end. Never raises for what the network or the server do.

        `start` is the run's start on the clock of time.perf_counter.
        """
        reading = _Reading(start)
        sent_s = time.perf_counter() - start
        timeout = gevent.Timeout(self._options.timeout_s)
        timeout.start()
        try:
            outcome, error = self._exchange(body, reading)
        except gevent.Timeout as raised:
            if raised is not timeout:
                raise
            outcome, error = Outcome.ERROR, f"no end of the answer within {self._options.timeout_s:g} s"
        except (OSError, HTTPParseError, BadStream) as raised:
            outcome, error = Outcome.ERROR, f"{type(raised).__name__}: {raised}"
        finally:
            timeout.close()
        ended_s = reading.last_token_s if outcome is Outcome.OK else None
        return RequestRecord(
            index=planned.index,
            kind=planned.kind,
            turn=planned.request.turn,
            is_warmup=planned.is_warmup,
            scheduled_s=planned.at_s,
            sent_s=sent_s,
            finished_s=ended_s if ended_s is not None else time.perf_counter() - start,
            outcome=outcome,
            error=error[:_MAX_ERROR_CHARS],
            first_token_s=reading.first_token_s,
            gaps_s=tuple(reading.gaps_s),
            num_prompt_tokens=reading.usage("prompt_tokens") or self._scale.prompt_tokens(planned.request),
            num_cached_tokens=reading.num_cached_tokens,
            num_output_tokens=reading.usage("completion_tokens") or reading.num_chunks,
        )

    def _exchange(self, body: bytes, reading: _Reading) -> tuple[Outcome, str]:
        timeout_s = self._options.timeout_s
        http = HTTPClient.from_url(self._url, connection_timeout=_CONNECT_TIMEOUT_S, network_timeout=timeout_s)
        try:
            response = http.request("POST", self._path, body=body, headers=self._headers)
            if response.status_code != 200:
                text = response.read().decode(errors="replace")
                refused = response.status_code in _REFUSALS
                return (Outcome.REFUSED if refused else Outcome.ERROR), f"HTTP {response.status_code}: {text}"
            # An empty answer is the end of the body: the lines of a stream end in a line feed.
            while line := response.readline(b"\n"):
                if error := reading.take(line):
                    response.release()
                    return Outcome.ERROR, error
        finally:
            http.close()
        if not reading.is_done:
            return Outcome.ERROR, "the stream ended before [DONE]"
        if reading.first_token_s is None:
            return Outcome.ERROR, "the stream had no token"
        return Outcome.OK, ""


@dataclass
class _Reading:
    """One answer as far as it has been read. Times are seconds since `start`."""

    start: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_chunks: int = 0
    is_done: bool = False
    _usage: Mapping[str, object] = field(default_factory=dict)

    def take(self, line: bytes) -> str:
        """One line of the stream, just read. Returns the error it reports, or nothing. Raises BadStream."""
        now_s = time.perf_counter() - self.start
        chunk = parse_line(line)
        if chunk is None:
            return ""
        if chunk.has_tokens:
            if self.last_token_s is None:
                self.first_token_s = now_s
            else:
                self.gaps_s.append(now_s - self.last_token_s)
            self.last_token_s = now_s
            self.num_chunks += 1
        self._usage = chunk.usage or self._usage
        self.is_done = self.is_done or chunk.is_done
        return chunk.error

    def usage(self, name: str) -> int:
        value = self._usage.get(name)
        return value if isinstance(value, int) else 0

    @property
    def num_cached_tokens(self) -> int:
        details = self._usage.get("prompt_tokens_details")
        value = details.get("cached_tokens") if isinstance(details, dict) else None
        return value if isinstance(value, int) else 0


def _path(url: str, path: str) -> str:
    """The path below the target's URL, which may have one itself."""
    return "/" + "/".join([*url.split("/")[3:], path.lstrip("/")]).lstrip("/")


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
