"""Declares the router's settings. Flags are spelled as in `vllm serve` where they mean the same."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.peer_settings import PeerSettings
from services.router.objectives import ObjectiveTable
from services.router.tenants import ApiKey
from services.secrets import Secret, read_private_file, read_secret
from services.settings import SettingsError, setting

PUBLIC_ROUTES: Final = ("metrics", "load", "version", "openapi", "debug")
_MAX_KEYS_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class RouterConfig(PeerSettings):
    """One router process: where it listens, whom it lets in, how much it takes on, and where it finds workers."""

    host: str = setting(
        "127.0.0.1", help="address to listen on; another than loopback needs a peer secret", group="HTTP"
    )
    port: int = setting(8000, min=0, max=65535, help="port of the HTTP API; 0 chooses a free one", group="HTTP")
    api_key: tuple[str, ...] = setting(
        (),
        help="accepted bearer tokens, each as KEY or TENANT:KEY (keys of one tenant share a cache), KEY plain or as"
        " sha256:HASH; none: all may ask",
        secret=True,
        group="HTTP",
    )
    api_key_file: str = setting(
        "", help="file with more of them, one a line, # before a comment; mode 0600; read at the start", group="HTTP"
    )
    public_routes: tuple[str, ...] = setting(
        (),
        help="what needs no API key, where there are keys, beside /health and /ready: metrics, load, version, openapi,"
        " debug",
        group="HTTP",
    )
    allowed_origins: tuple[str, ...] = setting((), help="origins that browsers may ask from (CORS)", group="HTTP")
    root_path: str = setting(
        "", help="path prefix behind a proxy, such as /llm; the proxy may strip it or not", group="HTTP"
    )
    forwarded_allow_ips: str = setting(
        "127.0.0.1",
        help="proxies whose X-Forwarded-For says who a client is: addresses and networks, by commas, * for all; empty:"
        " none, so that no process on this machine can pass for many clients",
        group="HTTP",
    )
    tenant_secret_file: str = setting(
        "",
        help="file with the secret that tenants' cached blocks are kept apart by, the same for all routers; mode 0600",
        group="secrets",
    )
    tenant_secret: str = setting("", help="the same, not in a file", secret=True, group="secrets")
    ssl_keyfile: str = setting("", help="TLS key; with --ssl-certfile the API is served over HTTPS", group="HTTP")
    ssl_certfile: str = setting("", help="TLS certificate chain", group="HTTP")
    ssl_ca_certs: str = setting(
        "",
        help="certificates of authorities: clients whose certificate one of them has signed are let in",
        group="HTTP",
    )
    ssl_cert_reqs: int = setting(
        0,
        help="whether a client needs a certificate of --ssl-ca-certs (mutual TLS): 0 no, 1 if it has one, 2 yes",
        choices=(0, 1, 2),
        group="HTTP",
    )
    max_body_bytes: int = setting(8 << 20, min=1, help="largest request body; larger ones get a 413", group="HTTP")
    unread_timeout_s: float = setting(
        10.0,
        above=0,
        help="a client that reads nothing of its answer for so long is cut, and its sequences end",
        group="HTTP",
    )
    sse_keepalive_s: float = setting(15.0, above=0, help="a stream idle for so long gets a comment line", group="HTTP")

    router_workers: int = setting(
        1,
        min=1,
        max=64,
        flags=("--router-workers", "--workers", "--api-server-count"),
        help="processes of this router, on one port: a core each; --max-concurrent-requests, --max-queue,"
        " --request-memory-bytes and --worker-backlog-s are divided among them",
        group="HTTP",
    )

    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the registry", group="workers", secret=True)
    router_id: str = setting(
        "", help="this router in the workers' logs; the default has host and port", group="workers"
    )
    reconnect_max_s: float = setting(
        2.0, above=0, help="longest pause between two tries to reach a worker", group="workers"
    )
    silence_timeout_s: float = setting(
        2.0,
        min=0.2,
        help="a decode worker that says nothing for so long is left, and its requests go elsewhere; it speaks four"
        " times as often",
        group="workers",
    )
    max_attempts: int = setting(3, min=1, help="decode workers that a request is tried on", group="workers")
    max_worker_deaths: int = setting(
        2, min=1, help="a request that so many decode workers die with is given up, with a 500", group="workers"
    )
    resume_wait_s: float = setting(
        30.0,
        min=0,
        help="seconds that a request whose decode worker was lost waits for another one, where none takes it",
        group="workers",
    )

    routing_policy: str = setting(
        "kv",
        help="how workers are chosen: kv is the least cost of queues, missing prefix and decode load",
        choices=("kv", "least-loaded", "round-robin", "prefix-hash"),
        group="routing",
    )
    routing_history: int = setting(
        4096, min=0, help="decisions kept for /debug/routing/{request_id}; 0: none", group="routing"
    )
    index_timeout_s: float = setting(
        0.05,
        above=0,
        flags=("--index-timeout",),
        help="seconds that a request waits for the prefix index; then it is routed without it",
        group="routing",
    )
    cache_sharing: str = setting(
        "tenant",
        help="who may hit whose cached prefixes where API keys are set: tenant is each its own, all is everybody",
        choices=("tenant", "all"),
        group="routing",
    )

    served_model_name: tuple[str, ...] = setting(
        (), help="serve these of the registered models only; the default is all", group="models"
    )
    model_grace_s: float = setting(
        30.0,
        min=0,
        help="so long after the first model has come, one that nobody serves is a 503, no 404 yet: it may be starting",
        group="models",
    )
    tokenizer: str = setting("", help="directory or hub name of the tokenizer; default: the model's", group="models")
    chat_template: str = setting(
        "", help="file with a Jinja chat template, or its text; default: the model's", group="models"
    )
    generation_config: str = setting(
        "auto",
        help="where sampling defaults come from: auto is the model's generation_config.json, vllm is neutral values",
        choices=("auto", "vllm"),
        group="models",
    )
    max_logprobs: int = setting(
        20, min=0, max=20, help="most alternatives per token that a client may ask for; workers give 20", group="models"
    )

    max_concurrent_requests: int = setting(1024, min=1, help="sequences in flight; further ones queue", group="limits")
    max_sequences_per_request: int = setting(
        1024, min=1, help="prompts times n of one request; more get a 400", group="limits"
    )
    scheduling_policy: str = setting(
        "fcfs",
        help="fcfs: first come, first served, and a `priority` in a request is a 400; priority: smaller is sooner",
        choices=("fcfs", "priority"),
        group="limits",
    )
    max_queue: int = setting(1024, min=0, help="sequences that may queue for that; more get a 429", group="limits")
    request_memory_bytes: int = setting(
        64 << 20,
        min=1,
        help="of bodies while they are decoded, and of answers in one piece until they are read, beyond the first"
        " 64 KiB of each; then large requests get a 429",
        group="limits",
    )
    client_share: float = setting(
        0.75,
        above=0,
        max=1,
        help="most of the queue, of the tokenizer's, of the request memory and, while others ask, of the workers'"
        " batches that one client may take: a tenant, or where there are no keys an address",
        group="limits",
    )
    request_timeout_s: float = setting(
        600.0,
        min=0,
        flags=("--request-timeout",),
        help="seconds from arrival to the last byte; 0: no limit",
        group="limits",
    )
    tokenizer_pool_size: int = setting(2, min=1, help="threads that render and tokenize longer texts", group="limits")
    tokenizer_queue: int = setting(256, min=1, help="prompts that may wait for these; more get a 429", group="limits")
    ttft_deadline_s: float = setting(
        0.0,
        min=0,
        help="a request whose first token is expected later, counted from its arrival, gets a 503 at once; the header"
        " x-slo-ttft-ms may say less; 0: as --request-timeout",
        group="limits",
    )
    worker_backlog_s: float = setting(
        0.5,
        min=0,
        help="prompt work that may wait at a worker, in seconds of its time; more waits in the router, where priority"
        " and fairness order it; 0: no limit",
        group="limits",
    )
    ttft_objective: float = setting(
        0.0,
        min=0,
        help="milliseconds from a request's arrival to its first token that clients are to get at most: elastic workers"
        " bend their roles for it; 0: none",
        group="objectives",
    )
    tpot_objective: float = setting(
        0.0,
        min=0,
        help="milliseconds per output token that clients are to get at most; 0: none",
        group="objectives",
    )
    objectives: tuple[str, ...] = setting(
        (),
        help="other ones for a priority or a tenant, which goes before: priority=0:ttft=500,tpot=40 or"
        " tenant=acme:ttft=800; what it does not name is as for all, 0 is none",
        group="objectives",
    )
    controller: str = setting(
        "auto",
        help="whether this router may lead elastic workers, one router at a time: auto is where there are objectives",
        choices=("auto", "off"),
        group="objectives",
    )
    controller_window_s: float = setting(
        30.0,
        min=1,
        max=600,
        help="seconds over which the controller measures what comes in and what clients get; whoever is short for a"
        " third of it is helped",
        group="objectives",
    )
    controller_dwell_s: float = setting(
        60.0, min=1, help="seconds from one change of a worker's role to the next, at least", group="objectives"
    )
    tenants_file: str = setting(
        "", help="YAML or JSON file of tenants' weights, priorities and limits; none: all are equal", group="limits"
    )
    shutdown_timeout_s: float = setting(
        30.0, min=0, flags=("--shutdown-timeout",), help="how long SIGTERM waits for running requests", group="limits"
    )

    log_level: str = setting(
        "info",
        flags=("--log-level", "--uvicorn-log-level"),
        help="how much is logged",
        choices=("debug", "info", "warning", "error"),
        group="logs",
    )
    log_format: str = setting(
        "auto", help="text, json, or auto: text on a terminal", choices=("auto", "text", "json"), group="logs"
    )
    disable_log_stats: bool = setting(
        False, help="no line every 10 s on how busy this process is, while it is", group="logs"
    )
    disable_uvicorn_access_log: bool = setting(
        False, help="no line per request; those that failed by our fault are logged all the same", group="logs"
    )

    def read_api_keys(self) -> tuple[str, ...]:
        """Return the entries of setting and file. Raises SettingsError."""
        if not self.api_key_file:
            return self.api_key
        lines = read_private_file("api_key", self.api_key_file, _MAX_KEYS_BYTES).splitlines()
        entries = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        given = (*self.api_key, *filter(None, entries))
        if not given:
            raise SettingsError(f"{self.api_key_file} has no key; all would be let in", "api_key_file")
        _check_keys(given, "api_key_file")
        return given

    def read_objectives(self) -> ObjectiveTable:
        """Return everybody's objectives. Raises SettingsError."""
        return ObjectiveTable.of(self.ttft_objective, self.tpot_objective, self.objectives)

    def read_tenant_secret(self) -> Secret | None:
        """Return it, None where there is none. Raises SettingsError."""
        return read_secret("tenant_secret", self.tenant_secret, self.tenant_secret_file)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root_path and not self.root_path.startswith("/"):
            raise SettingsError(f"must start with a slash, got {self.root_path!r}", "root_path")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise SettingsError("give both --ssl-keyfile and --ssl-certfile, or neither", "ssl_keyfile")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise SettingsError("needs --ssl-ca-certs: whose certificates are clients to have?", "ssl_cert_reqs")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise SettingsError("needs --ssl-certfile and --ssl-keyfile", "ssl_ca_certs")
        if unknown := set(self.public_routes).difference(PUBLIC_ROUTES):
            raise SettingsError(f"must be of {', '.join(PUBLIC_ROUTES)}, not {min(unknown)!r:.80}", "public_routes")
        for proxy in self.forwarded_allow_ips.split(",") if self.forwarded_allow_ips else ():
            _check_proxy(proxy.strip())
        _check_keys(self.api_key, "api_key")
        self.read_objectives()
        largest_bytes = self.request_memory_bytes / self.router_workers * self.client_share
        if self.router_workers > 1 and largest_bytes < self.max_body_bytes:
            raise SettingsError(
                f"leaves one client {largest_bytes:.0f} bytes of a process's --request-memory-bytes, and a body may"
                f" have {self.max_body_bytes} (--max-body-bytes): give more of the first, or less of the other",
                "router_workers",
            )


def _check_proxy(proxy: str) -> None:
    try:
        if proxy != "*":
            ipaddress.ip_network(proxy)
    except ValueError as error:
        text = f"must be addresses and networks by commas, or *, and {proxy!r:.80} is none: {error}"
        raise SettingsError(text, "forwarded_allow_ips") from error


def _check_keys(entries: Sequence[str], setting: str) -> None:
    if any(not key for key in entries):
        raise SettingsError("must not be empty", setting)
    if any(key != key.strip() or "," in key for key in entries):
        # A variable separates keys by commas, and a header has no spaces around its value.
        raise SettingsError("must have no comma, and no space at its ends", setting)
    digests = [ApiKey.parse(entry).digest for entry in entries]
    if len(set(digests)) < len(digests):
        raise SettingsError("has the same key twice", setting)
