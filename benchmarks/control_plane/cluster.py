"""A Ray Jobs API that answers slowly, over real HTTP, in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    """Says after a while that everything works: what is submitted runs for ever."""

    delay_s: float
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"status": "RUNNING", "logs": "", "version": "4"})

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({"submission_id": json.loads(sent or b"{}").get("submission_id")})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: dict[str, object]) -> None:
        time.sleep(self.delay_s)
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def slow_jobs_api(delay_s: float) -> Iterator[str]:
    """Serve until the block ends; yields the address. Every answer takes delay_s."""
    handler = type("Handler", (_Handler,), {"delay_s": delay_s})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
