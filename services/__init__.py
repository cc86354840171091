"""Tandem's services: router, prefill worker, decode worker, and the engine that both workers run."""

__version__ = "0.1.0"
