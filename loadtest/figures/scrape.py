"""Reads the server's gauges from its /metrics once a second during a run, by vLLM's names, and what it says it is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
}
_LINE = re.compile(rf"^({'|'.join(_GAUGES)})(?:\{{.*\}})? (\S+)", re.MULTILINE)
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Sample:
    """One process's gauges at one moment of the run; None where it has no such gauge."""

    at_s: float
    process: str
    running: float | None
    waiting: float | None
    kv_usage: float | None


def parse_gauges(text: str) -> dict[str, float]:
    """The gauges in a page of Prometheus text; several series of one name (models, engines) are added up.

    KV usage is a share, so of several the largest counts. Raises ValueError for a gauge that is no number.
    """
    found: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        gauge = _GAUGES[name]
        number = float(value)
        before = found.get(gauge, 0.0)
        found[gauge] = max(before, number) if gauge == "kv_usage" else before + number
    return found


_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Labels that say what a server is: by series, and what we call them.
_FACTS = {
    "tandem:compute_info": {"device": "device", "kernels": "kernels", "quantization": "quantization"},
    "vllm:cache_config_info": {"cache_dtype": "dtype of keys and values"},
    "tandem:transfer_bytes_total": {"lane": "lane"},
    "tandem:build_info": {"version": "version"},
}
_FACT_LINE = re.compile(rf"^({'|'.join(_FACTS)})\{{(.*)\}} (\S+)", re.MULTILINE)


def parse_facts(pages: Iterable[str]) -> dict[str, str]:
    """What a server's processes say of themselves; different values are joined by commas. Lanes are those that blocks
    have travelled on."""
    found: dict[str, set[str]] = {}
    for page in pages:
        for series, labels, value in _FACT_LINE.findall(page):
            for label, text in _LABEL.findall(labels):
                if (name := _FACTS[series].get(label)) and float(value) > 0:
                    found.setdefault(name, set()).add(text)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def server_facts(urls: Mapping[str, str], api_key: str = "") -> dict[str, str]:
    """Asks all processes of a server what they are. Pages that do not come say nothing."""
    reads = [gevent.spawn(_read, url, api_key) for url in urls.values()]
    gevent.joinall(reads)
    return parse_facts(each.value or "" for each in reads)


def _read(url: str, api_key: str) -> str:
    """A page of metrics; "" where it does not come."""
    try:
        with gevent.Timeout(_TIMEOUT_S, TimeoutError(f"no metrics within {_TIMEOUT_S:g} s")):
            http = HTTPClient.from_url(url, connection_timeout=_TIMEOUT_S, network_timeout=_TIMEOUT_S)
            path = "/" + "/".join(url.split("/")[3:])
            headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
            response = http.request("GET", path, headers=headers)
            return response.read().decode(errors="replace") if response.status_code == 200 else ""
    except (OSError, HTTPParseError):
        return ""


_INTERVAL_S = 1.0


class Scraper:
    """Reads all processes' pages until stopped. A page that does not come leaves a gap, and is counted."""

    def __init__(self, urls: Mapping[str, str], api_key: str = "") -> None:
        self._urls = dict(urls)
        self._api_key = api_key
        self._greenlet: gevent.Greenlet | None = None
        self.samples: list[Sample] = []
        self.num_missed = 0

    def start(self, start: float) -> None:
        """`start` is the run's start on the clock of time.perf_counter."""
        if self._urls:
            self._greenlet = gevent.spawn(self._run, start)

    def stop(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()
            self._greenlet = None

    def _run(self, start: float) -> None:
        due = start
        while True:
            gevent.sleep(max(0.0, due - time.perf_counter()))
            gevent.joinall([gevent.spawn(self._scrape, process, url, start) for process, url in self._urls.items()])
            due = max(due + _INTERVAL_S, time.perf_counter())

    def _scrape(self, process: str, url: str, start: float) -> None:
        at_s = time.perf_counter() - start
        try:
            found = parse_gauges(_read(url, self._api_key))
        except ValueError:
            found = {}
        if not found:
            self.num_missed += 1
            return
        gauges = (found.get("running"), found.get("waiting"), found.get("kv_usage"))
        self.samples.append(Sample(at_s, process, *gauges))
