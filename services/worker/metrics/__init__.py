"""What a worker's /metrics shows."""

from services.worker.metrics.worker_metrics import OrderOutcome, Refusal, WorkerMetrics

__all__ = ["OrderOutcome", "Refusal", "WorkerMetrics"]
