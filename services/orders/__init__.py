"""Carries work orders: sessions from routers to decode workers, orders from there to prefill workers.

Who gives and takes orders knows streams of messages. `grpc_orders.py` carries them, between peers that have proved
themselves.
"""

import os

# gRPC reads it when it is imported; else it writes a line of its own to our log for each connection that idles.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from services.orders.budgets import budgets_to_proto
from services.orders.grpc_orders import GrpcOrders, GrpcServer
from services.orders.streams import (
    BUDGETS,
    LISTS,
    MOVES,
    REDIRECTS,
    RESUMES,
    Orders,
    OrderServer,
    ServePrefill,
    ServeSession,
    StreamBroken,
    StreamRefused,
    WorkerSilent,
    is_cancelled,
)

__all__ = [
    "BUDGETS",
    "LISTS",
    "MOVES",
    "REDIRECTS",
    "RESUMES",
    "GrpcOrders",
    "GrpcServer",
    "OrderServer",
    "Orders",
    "ServePrefill",
    "ServeSession",
    "StreamBroken",
    "StreamRefused",
    "WorkerSilent",
    "budgets_to_proto",
    "is_cancelled",
]
