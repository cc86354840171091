"""The router's choice among candidates that a test lists."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from services.router.routing import (
    Decision,
    DecodeCandidate,
    DecodeTable,
    PrefillCandidate,
    PrefillTable,
    Refusal,
    RoutedRequest,
)
from services.router.routing import choose as choose_from_tables


def choose(
    request: RoutedRequest,
    decode: Sequence[DecodeCandidate],
    prefill: Sequence[PrefillCandidate],
    exclude: Collection[str] = (),
    **options: Any,
) -> Decision | Refusal:
    """As the router's, of lists."""
    return choose_from_tables(request, DecodeTable(decode), PrefillTable(prefill), exclude, **options)
