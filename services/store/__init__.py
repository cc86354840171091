"""Runs a store node's process: kvstore's `StoreNode` with settings, registry, index, metrics and signals."""
