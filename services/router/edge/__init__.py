"""The HTTP edge: checks keys, reads bodies, logs each request once, serves the generating endpoints."""

from services.router.edge.access import CLIENT_GONE
from services.router.edge.http import FAILED, App, Edge, Guard, read_body
from services.router.edge.limits import Limits
from services.router.edge.memory import RequestMemory
from services.router.edge.serving import GenerateEndpoint, RouterParts

__all__ = [
    "CLIENT_GONE",
    "FAILED",
    "App",
    "Edge",
    "GenerateEndpoint",
    "Guard",
    "Limits",
    "RequestMemory",
    "RouterParts",
    "read_body",
]
