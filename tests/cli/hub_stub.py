"""A hub on this machine that gives nothing, and says why as the real one does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_REFUSALS = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound"), "revision": (404, "RevisionNotFound")}


class _Refuser(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = next((name for name in _REFUSALS if name in self.path), "absent")
        status, code = _REFUSALS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@contextmanager
def hub_stub() -> Iterator[str]:
    """Yield the hub's URL, for HF_ENDPOINT. Its repositories are me/gated, me/absent and me/revision."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuser) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
