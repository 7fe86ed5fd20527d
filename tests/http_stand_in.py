"""Real HTTP servers on loopback for tests, each in a thread: stand-ins for served models, judges and the hub."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

HANG_S = 20  # an upper bound that only a hang can reach


class StandIn(ThreadingHTTPServer):
    """Serves by `handler` on a free port. `released` is set when the test is over, for handlers that stall."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.lock, self.released = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        """Of an OpenAI-compatible endpoint."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a client that gave up, or was killed
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """What handlers of chat requests share."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, status: int, body: str | dict[str, Any], length: int | None = None, **headers: str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, text: str | None, finish: str = "stop") -> None:
        """A chat completion."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        self.send(200, {"object": "chat.completion", "choices": [choice]})


@contextmanager
def serving(server: StandIn) -> Iterator[StandIn]:
    """The server at work, and ended."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(HANG_S)


def no_key_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what would send requests elsewhere, or a key with them, out of the environment."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
