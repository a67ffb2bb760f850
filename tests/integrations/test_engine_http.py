"""Answers of an engine's server that have no end, no JSON or more bytes than are wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trajkern.integrations import engines

Write = Callable[[bytes], Any]


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """The address of a server that answers with a status, and a body that a function writes."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer["status"])
            self.end_headers()
            try:
                answer["body"](self.wfile.write)
            except OSError:
                pass  # the client has hung up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def start(body: Callable[[Write], Any], status: int = 200) -> str:
        answer.update(status=status, body=body)
        return f"http://127.0.0.1:{server.server_port}/generate"

    yield start
    server.shutdown()
    server.server_close()
    thread.join()


def endless(write: Write) -> None:
    while True:
        write(b"[" * 4096)


def trickling(write: Write) -> None:
    for _ in range(100):
        write(b" ")
        time.sleep(0.05)


def test_a_whole_answer(serve: Callable[..., str]) -> None:
    assert engines.post(serve(lambda write: write(b'{"text": "\xc3\xa9"}')), {}, max_bytes=14) == {"text": "é"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (endless, "gave no whole answer: OSError: more than max_bytes = 100000 bytes came"),
        (trickling, r"gave no whole answer: TimeoutError: after 0.4 s it was not at its end, \d+ bytes"),
        (lambda write: time.sleep(0.8), "gave no whole answer: TimeoutError: timed out"),
        (lambda write: write(b"[" * 90_000), r"must answer in JSON; got b'\[\[\[.* \(90000 bytes\)"),
        (lambda write: None, r"must answer in JSON; got b'' \(0 bytes\)"),
    ],
)
def test_what_is_given_up(serve: Callable[..., str], body: Callable[[Write], Any], message: str) -> None:
    url, began = serve(body), time.monotonic()
    with pytest.raises(ConnectionError, match=f"^{url} {message}"):
        engines.post(url, {}, timeout=0.4, max_bytes=100_000)
    assert time.monotonic() - began < 10


def test_an_errors_words_are_shortened(serve: Callable[..., str]) -> None:
    with pytest.raises(ConnectionError, match="answered 500 Internal Server Error: b'overloaded") as caught:
        engines.post(serve(lambda write: (write(b"overloaded"), endless(write)), 500), {}, timeout=5)
    assert len(str(caught.value)) < 700
