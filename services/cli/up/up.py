"""`tandem up`: runs the whole stack on this machine, from a private Redis to the URL to ask."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from kvstore.errors import KVStoreError
from services.cli.config import DEMO_MODEL, UpConfig
from services.cli.up.console import Display, WhileRead, make_display
from services.cli.up.example import curl_line, example_request
from services.cli.up.own_secrets import check_secrets, make_secrets, own_secrets
from services.cli.up.placement import available_cores, available_gpus, place_workers
from services.cli.up.plan import (
    SAFE_PATH,
    check_forwarded,
    check_offloading,
    check_stores,
    num_workers,
    plan_stack,
    process_names,
    store_config,
    up_config,
    up_settings,
)
from services.cli.up.preflight import check_stack
from services.cli.up.spec import Stack
from services.decode.config import DecodeConfig
from services.engine.model_config import ModelError
from services.machine import available_memory_bytes
from services.router.config import RouterConfig
from services.settings import (
    Given,
    SettingsError,
    collect_settings,
    make_parser,
    refuse,
    tensor_parallel_size,
)
from services.startup import CANNOT_START, CannotListen, claim_port

_DESCRIPTION = (
    "Serves a model on this machine: a private Redis, prefill and decode workers or elastic ones, and a router, each a "
    "process of its own. Ends by printing a request to try; Ctrl-C stops everything in order, a second one at once."
)


def main(argv: Sequence[str], prog: str = "tandem up") -> int:
    """Runs until SIGINT, SIGTERM or SIGHUP; returns the exit status. `prog`: what our user calls it."""
    with ExitStack() as cleanup:
        return _main(argv, prog, cleanup)


def serve(argv: Sequence[str]) -> int:
    """As `main`."""
    return main(argv, "tandem serve")


def _main(argv: Sequence[str], prog: str, cleanup: ExitStack) -> int:
    parser = make_parser(up_settings(), prog=prog, description=_DESCRIPTION, positional="model")
    try:
        given = collect_settings(up_settings(), argv, os.environ, parser)
        config = up_config(given)
        model, name = choose_model(config.model)
        own = own_secrets(config, store_config(given), given, cleanup)
        given |= own
        router, _, decode, store = check_forwarded(given, model, config.elastic)
        check_offloading(config, decode, available_memory_bytes())
        check_stores(config, given)
    except SettingsError as error:
        refuse(parser.prog, error)
    display = WhileRead(make_display(process_names(config), config.log_format == "json", sys.stderr))
    try:
        display.line("tandem", f"starting {name}: {described(config)}")
        engine = check_stack(config, given, router, decode, store)
        if engine != decode.engine:
            display.line("tandem", f"--engine {decode.engine} takes {engine}")
            given |= {"engine": Given(engine, "tandem up")}
        make_secrets(own)
        check_secrets(router, decode)
        return _start(config, given, model, name, router, replace(decode, engine=engine), display)
    except (CannotListen, KVStoreError, ModelError, SettingsError) as error:
        display.line("tandem", f"cannot start: {error}")
        return CANNOT_START
    except KeyboardInterrupt:  # before or after the time when signals are events
        display.settled()
        display.line("tandem", "stopped")
        return 0


def _start(
    config: UpConfig,
    given: Mapping[str, Given],
    model: str,
    name: str,
    router: RouterConfig,
    decode: DecodeConfig,
    display: Display,
) -> int:
    """Runs the stack. Raises CannotListen, `KVStoreError`."""
    # Here and not above: neither --help nor the first line must wait for them.
    import asyncio

    from services.cli.embedded_redis import EmbeddedRedis
    from services.cli.up.forks import WORKER_MODULES, Forks
    from services.cli.up.stack import run_stack
    from services.engine.choice import modules_of

    with ExitStack() as cleanup:
        port = claim_port(router.host, router.port)
        if config.redis:
            from kvstore.registry import redis_version  # which loads a client that nobody else here needs

            redis_version(config.redis)
        forks = None
        modules = (*WORKER_MODULES, *modules_of(decode.engine))
        if sys.platform == "linux":  # elsewhere a process that has torch loaded must not fork
            forks = cleanup.enter_context(closing(Forks(modules, {**os.environ, **SAFE_PATH})))
        redis = None if config.redis else cleanup.enter_context(EmbeddedRedis.start())
        placements = place_workers(
            num_workers(config),
            available_cores() if config.pin else [],
            [] if decode.device == "cpu" else available_gpus(),
            tensor_parallel_size(decode.engine_args),
        )
        stack = plan_stack(
            config,
            given,
            model=model,
            served_model_name=name,
            redis=redis.url if redis else config.redis,
            port=port,
            placements=placements,
            environ=os.environ,
            worker_prefix="" if redis else f"{socket.gethostname()}-",
        )
        announce = partial(announce_stack, stack, config, model, display)
        return asyncio.run(run_stack(stack, display, config.startup_timeout_s, announce, redis, forks))


def choose_model(model: str) -> tuple[str, str]:
    """The model to load and the name to serve it under. Raises SettingsError where there is nothing to load."""
    if not model:
        return str(DEMO_MODEL), DEMO_MODEL.name
    return os.path.expanduser(model), model


def described(config: UpConfig) -> str:
    """What there will be, in a few words."""
    num_prefill = num_workers(config) - config.decode
    parts = [f"{num_prefill} prefill", f"{config.decode} decode"]
    if config.elastic:
        parts = [f"{num_workers(config)} elastic: at first {parts[0]}", parts[1]]
    if config.stores:
        parts.append("1 store node" if config.stores == 1 else f"{config.stores} store nodes")
    return ", ".join(parts)


def announce_stack(stack: Stack, config: UpConfig, model: str, display: Display) -> None:
    """The URL, and a request to try, on standard output, which may be closed or full: who serves goes on."""
    path, body = example_request(stack.served_model_name, model)
    serves = f"Tandem serves {stack.served_model_name} at {stack.url}/v1"
    try:
        print(f"\n{serves} ({described(config)}; Ctrl-C stops it). Try:\n")
        print(curl_line(stack.url, path, body, bool(stack.api_key)) + "\n", flush=True)
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else the interpreter tries again at its end
        display.line("tandem", f"{serves}; standard output takes nothing: {error.strerror}")
