"""Exports a worker's /metrics."""

from services.worker.metrics.worker_metrics import OrderOutcome, Refusal, WorkerMetrics

__all__ = ["OrderOutcome", "Refusal", "WorkerMetrics"]
