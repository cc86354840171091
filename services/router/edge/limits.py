"""Holds a key, or a tenant, to its limits: takes a request's part before it begins, settles it when it has ended."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.router.errors import ApiError
from services.router.metrics import RouterMetrics
from services.router.openai import GenerationPlan
from services.router.sharing import Quotas, Share, Taken, headers, wait_s
from services.router.sse import Message
from services.router.tenants import Tenant, name_of

_MAX_LEASE_S = 3600.0
_WORDS = {"concurrent": "requests at a time", "requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


@dataclass
class Spent:
    """What a request has used so far."""

    num_tokens: int = 0


class Limits:
    """Everybody's limits. One per router."""

    def __init__(self, quotas: Quotas, metrics: RouterMetrics) -> None:
        self._quotas = quotas
        self._metrics = metrics

    @asynccontextmanager
    async def within(
        self, share: Share, tenant: Tenant | None, plan: GenerationPlan, scope: Message, left_s: float | None
    ) -> AsyncIterator[Spent]:
        """Let a request run within the limits of its key; the body says in `Spent` what it used.

        Its answer, of whatever kind, gets OpenAI's headers. Raises ApiError 429, in OpenAI's words.
        """
        spent = Spent()
        if not share.is_limited:
            yield spent
            return
        num_tokens = tokens_wanted(plan)
        if share.tokens_per_minute and num_tokens > share.tokens_per_minute:
            self._metrics.count_refusal("quota")
            raise _too_large(share, num_tokens)
        lease_s = min(left_s or math.inf, _MAX_LEASE_S)
        taken = await self._quotas.take(_holder(tenant, share), share, secrets.token_hex(8), num_tokens, lease_s)
        scope["state"]["headers"] = headers(taken.share, taken.verdict)
        if taken.verdict.refused:
            self._metrics.count_refusal("quota")
            raise _refusal(taken)
        try:
            yield spent
        finally:
            await self._quotas.settle(taken, spent.num_tokens)


def _holder(tenant: Tenant | None, share: Share) -> str:
    """Whose buckets they are; where there are no keys, everybody's."""
    if tenant is None or share.limits_for == "tenant":
        return name_of(tenant)
    return f"{tenant.name}/{tenant.key_id}"


def tokens_wanted(plan: GenerationPlan) -> int:
    """What is taken of the tokens a minute: the prompts, and what the client allows the answers, where it says so."""
    answers = sum(plan.max_tokens) * plan.request.body.n if plan.request.max_tokens is not None else 0
    return sum(map(len, plan.prompts)) + answers


def _too_large(share: Share, num_tokens: int) -> ApiError:
    message = f"Request too large on tokens per min (TPM): Limit {share.tokens_per_minute}, Requested {num_tokens}."
    return ApiError(429, message, type="tokens", code="rate_limit_exceeded")


def _refusal(taken: Taken) -> ApiError:
    share, kind = taken.share, taken.verdict.refused
    limit = {
        "concurrent": share.max_concurrent,
        "requests": share.requests_per_minute,
        "tokens": share.tokens_per_minute,
    }[kind]
    retry_after_s = max(math.ceil(wait_s(share, taken.verdict, taken.num_tokens)), 1)
    message = f"Rate limit reached on {_WORDS[kind]}: Limit {limit}. Please try again in {retry_after_s}s."
    kind = "tokens" if kind == "tokens" else "requests"
    return ApiError(429, message, type=kind, code="rate_limit_exceeded", retry_after_s=retry_after_s)
