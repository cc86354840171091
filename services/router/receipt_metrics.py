"""Counters that are fed from receipts and from nothing else, so that both always add up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from services.rates import TIERS
from services.router.receipt import Receipt


class ReceiptMetrics:
    """Sums over all receipts of this router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tandem:router_{name}", text, labels, registry=registry)

        self._receipts = counter("receipts", "Sequences that ended regularly and whose worker said what they cost.")
        prompt_tokens = counter("receipt_prompt_tokens", "Prompt tokens, by where their KV came from.", "source")
        self._computed = prompt_tokens.labels("computed")
        self._reused = prompt_tokens.labels("reused")
        self._fetched = prompt_tokens.labels("fetched")
        self._cached = counter("cached_tokens", "Prompt tokens that were not computed: reused or fetched.")
        self._fetched_blocks = counter("fetched_blocks", "Prefix blocks pulled from other holders.", "tier")
        self._fetched_bytes = counter("fetched_bytes", "The same in bytes.", "tier")
        self._handoff_blocks = counter("handoff_blocks", "Blocks read from prefill workers.")
        self._handoff_bytes = counter("handoff_bytes", "The same in bytes.")
        self._digests = counter("digests_checked", "Blocks whose payload was checked before use.")
        self._recomputes = counter("recomputes", "Prompts computed again after a fault or a preemption.")

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
