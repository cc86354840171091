"""Finds prefixes of prompts elsewhere: in the host tier, with peers and in store nodes; lends them the worker's own."""

from services.worker.prefixes.fetch_costs import FetchCosts
from services.worker.prefixes.host_prefixes import HostPrefixes
from services.worker.prefixes.lender import CacheLender
from services.worker.prefixes.prefix_fetcher import PrefixFetcher
from services.worker.prefixes.shunned import Shunned

__all__ = ["CacheLender", "FetchCosts", "HostPrefixes", "PrefixFetcher", "Shunned"]
