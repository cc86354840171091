"""Feeds counters from receipts and from nothing else, so that both always add up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from services.metric_families import ROUTER
from services.rates import TIERS
from services.router.receipt import Receipt


class ReceiptMetrics:
    """Sums over all receipts of this router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._receipts = ROUTER.counter("tandem:router_receipts", registry)
        prompt_tokens = ROUTER.counter("tandem:router_receipt_prompt_tokens", registry)
        self._computed = prompt_tokens.labels("computed")
        self._reused = prompt_tokens.labels("reused")
        self._fetched = prompt_tokens.labels("fetched")
        self._cached = ROUTER.counter("tandem:router_cached_tokens", registry)
        self._fetched_blocks = ROUTER.counter("tandem:router_fetched_blocks", registry)
        self._fetched_bytes = ROUTER.counter("tandem:router_fetched_bytes", registry)
        self._handoff_blocks = ROUTER.counter("tandem:router_handoff_blocks", registry)
        self._handoff_bytes = ROUTER.counter("tandem:router_handoff_bytes", registry)
        self._digests = ROUTER.counter("tandem:router_digests_checked", registry)
        self._recomputes = ROUTER.counter("tandem:router_recomputes", registry)

    def add(self, receipt: Receipt) -> None:
        self._receipts.inc()
        self._computed.inc(receipt.num_computed_tokens)
        self._reused.inc(receipt.num_reused_tokens)
        self._fetched.inc(receipt.num_fetched_tokens)
        self._cached.inc(receipt.num_cached_tokens)
        for part in receipt.fetched:
            # The word is the worker's; an unknown one must not become a series.
            tier = part.tier if part.tier in TIERS else "other"
            self._fetched_blocks.labels(tier).inc(part.num_blocks)
            self._fetched_bytes.labels(tier).inc(part.num_bytes)
        self._handoff_blocks.inc(receipt.num_handoff_blocks)
        self._handoff_bytes.inc(receipt.num_handoff_bytes)
        self._digests.inc(receipt.num_digests_checked)
        self._recomputes.inc(receipt.num_recomputes)
