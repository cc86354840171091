"""Looks, before torch is imported, whether a worker can start: the model, its settings, the registry's URL."""

from __future__ import annotations

import logging
from typing import Final

from kvstore.errors import RegistryError
from kvstore.registry import RegistryAway, redis_version
from services.engine.check import Machine, check_engine
from services.engine.model_config import ModelError
from services.logs import configure_logging
from services.settings import SettingsError
from services.worker.config import WorkerConfig

log = logging.getLogger(__name__)

CANNOT_START: Final = 2
"""The exit status of a process that its operator must help: what is wrong was said in one line."""


def can_start(config: WorkerConfig, role: str) -> bool:
    """Whether nothing is known that would keep the worker from serving; else say it, in one line.

    A registry that is away is not waited for: workers are tried again until it is there, as the registry does.
    """
    configure_logging(config.log_level, config.log_format, fields={"role": role, "worker_id": config.worker_id})
    try:
        check_engine(config, Machine.this())
        redis_version(config.redis)
    except RegistryAway as error:
        log.warning("%s; serving without it, and trying again", error)
    except (ModelError, SettingsError, RegistryError) as error:
        log.error("%s worker cannot start: %s", role, error)
        return False
    return True
