"""Our KV connector, inside vLLM: it tells what a step does, copies blocks that came from elsewhere, and moves nothing.

    vLLM calls                            here
    get_num_new_matched_tokens            a joining request's context is there, beyond what vLLM's cache has of it
    update_state_after_alloc              notes which of its blocks go to which that vLLM has just given the request
    build_connector_meta                  tells the engine what the step computes, before it does
    start_load_kv (each rank)             copies those blocks, and seeds the generators of requests with a seed
    request_finished                      keeps nothing: what others need, they hold references to

There are two of them, made by vLLM: one beside its scheduler, one on each rank. Nothing is loaded asynchronously and
nothing is sent, so the calls that report such loads have nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from services.engine.foreign import PlacedGenerator


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """What each rank does with a step, beside computing it."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    """Whole blocks, from and to."""
    draws: dict[str, int] = field(default_factory=dict)
    """By request id: where its newest token will stand, for those that draw by a seed."""


@dataclass(frozen=True)
class Held:
    """The blocks that a joining request came with, in the order of its context, one reference on each."""

    block_ids: list[int]
    num_tokens: int  # whose KV they hold


class TandemConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        # Beside the scheduler.
        self.joining: dict[str, Held] = {}
        """By request id; the engine puts them in, and takes out those of requests that end before."""
        self.joined: list[Held] = []
        """Those that vLLM has its own blocks for: the engine gives them back after the step."""
        self.plan: Callable[[SchedulerOutput], dict[str, int]] = lambda output: {}
        """Hears of each step; returns `Orders.draws`."""
        self.may_begin = True
        """Whether a prompt may in this step; one that may not is passed over."""
        self._copies: list[tuple[int, int]] = []
        # On a rank.
        self.caches: dict[str, torch.Tensor] = {}
        self.runner: Any = None
        self._generators: dict[str, PlacedGenerator] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what is lent has references of its own

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Heads before tokens, so that ranks' parts of a block can be put together; its CPU kernels have one alone."""
        return None if current_platform.is_cpu() else "BLHNC"

    # ---- beside the scheduler -------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        held = self.joining.get(request.request_id)
        if held is None and not self.may_begin:
            return None, False
        return (max(0, held.num_tokens - num_computed_tokens) if held is not None else 0), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        held = self.joining.pop(request.request_id, None)
        if held is None:
            return
        first = (held.num_tokens - num_external_tokens) // self._block_size
        given = blocks.get_block_ids()[0]
        self._copies += zip(held.block_ids[first:], given[first : len(held.block_ids)], strict=True)
        self.joined.append(held)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Orders:
        copies, self._copies = self._copies, []
        return Orders(copies, self.plan(scheduler_output))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    # ---- on each rank -----------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        for source, target in orders.copies:
            for cache in self.caches.values():
                cache[target].copy_(cache[source])
        if orders.draws or self._generators:
            self._seed(orders.draws)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The copies precede the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing leaves by layers."""

    def wait_for_save(self) -> None:
        """Nothing is being saved."""

    def _seed(self, draws: dict[str, int]) -> None:
        """Seed generators by seed and place, where vLLM's go on from draw to draw.

        So the same token follows however the prompt was cut, and wherever the output before it was made. The second
        model runner of vLLM does so by itself, and has no generators.
        """
        batch = self.runner.input_batch
        self._generators = {name: each for name, each in self._generators.items() if name in batch.req_id_to_index}
        for request_id, place in draws.items():
            index, sampling = batch.req_id_to_index[request_id], self.runner.requests[request_id].sampling_params
            if request_id not in self._generators:
                self._generators[request_id] = PlacedGenerator(device=self.runner.device)
            generator = self._generators[request_id].place(sampling.seed, place)
            self.runner.requests[request_id].generator = batch.generators[index] = generator
