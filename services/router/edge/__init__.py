"""The HTTP edge: checks keys, bounds what is in flight, logs each request once."""

from services.router.edge.access import CLIENT_GONE
from services.router.edge.admission import Admission, Room
from services.router.edge.http import FAILED, App, Edge, Guard, read_body
from services.router.edge.serving import GenerateEndpoint, RouterParts

__all__ = [
    "CLIENT_GONE",
    "FAILED",
    "Admission",
    "App",
    "Edge",
    "GenerateEndpoint",
    "Guard",
    "Room",
    "RouterParts",
    "read_body",
]
