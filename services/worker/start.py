"""Looks, before torch is imported, whether a worker can start: the model, its settings, the registry's URL."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TypeVar

from kvstore.errors import RegistryError
from services.engine.check import Machine
from services.engine.choice import check_model, vllm_version, with_engine
from services.engine.model_config import ModelError
from services.logs import configure_logging
from services.secrets import read_secret
from services.settings import SettingsError
from services.startup import CannotListen, check_registry, claim_port
from services.worker.config import WorkerConfig

log = logging.getLogger(__name__)

C = TypeVar("C", bound=WorkerConfig)


def ready_to_start(config: C, role: str) -> C | None:
    """The settings, their engine chosen, if nothing is known that would keep the worker from serving; else say it, in
    one line.
    """
    configure_logging(config.log_level, config.log_format, fields={"role": role, "worker_id": config.worker_id})
    try:
        config.read_proof_key()
        read_secret("peer_secret", config.peer_secret, config.peer_secret_file)
        machine = Machine.this()
        config = with_engine(config, machine, vllm_version())
        if role == "prefill":  # nobody guesses there, and a draft model would take memory for nothing
            config = replace(config, speculative_method="off", speculative_model="")
        check_model(config, machine)
        for port, flag in ((config.port, "--port"), (config.kv_port, "--kv-port"), (config.http_port, "--http-port")):
            if port:
                claim_port(config.host, port, flag)
        check_registry(config.redis)
    except (CannotListen, ModelError, SettingsError, RegistryError) as error:
        log.error("%s worker cannot start: %s", role, error)
        return None
    return config
