"""Answers of an engine's server that have no end, no JSON or more bytes than are wanted."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trajkern.integrations import engines
from trajkern.integrations._engine_http import _Timed

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
        (trickling, "gave no whole answer: TimeoutError: 0.4 s after its beginning it was not at its end"),
        (lambda write: time.sleep(0.8), "gave no whole answer: TimeoutError: 0.4 s after its beginning it was not"),
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


def raw(answer: Callable[[Write], Any]) -> str:
    """The address of a server that writes what it wants, once."""
    server = socket.create_server(("127.0.0.1", 0))

    def once() -> None:
        connection, _ = server.accept()
        with server, connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            answer(connection.sendall)

    threading.Thread(target=once, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/generate"


OK, LINE = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
LATE = "gave no whole answer: TimeoutError: 0.4 s after its beginning it was not at its end"


def repeated(first: bytes, part: bytes, pause: float = 0) -> Callable[[Write], Any]:
    def answer(write: Write) -> None:
        write(first)
        for _ in itertools.count():
            write(part)
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda write: time.sleep(2), "gave no whole answer: TimeoutError: timed out"),
        (repeated(OK[:8], b" ", 0.1), LATE),  # its status
        (repeated(OK + b"X: ", b"x", 0.1), LATE),
        (repeated(b"", LINE, 0.1), LATE),
        (repeated(b"", LINE), LATE),
        (repeated(CHUNKED, b"X: x\r\n", 0.1), LATE),
        (repeated(CHUNKED, b"X: x\r\n"), LATE),
        (repeated(OK, b"X: x\r\n"), "gave no whole answer: HTTPException: got more than 100 headers"),
        (
            repeated(b"HTTP/1.1 500 No\r\nContent-Length: 99\r\n\r\n", b"", 0.1),
            "answered 500 No: no more could be read: ",
        ),
        (
            lambda write: write(b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
            "answered 400 No: no more",
        ),
        (lambda write: write(b"HTTP/1.1 302 No\r\nLocation: http://[::bad\r\n\r\n"), "answered 302 No: b''"),
    ],
)
def test_what_is_given_up_before_a_body(answer: Callable[[Write], Any], message: str) -> None:
    url, began = raw(answer), time.monotonic()
    with pytest.raises(ConnectionError, match=f"^{url} {message}"):
        engines.post(url, {}, timeout=0.4)
    assert time.monotonic() - began < 10


def test_what_is_there_already_is_not_read_behind_the_deadline() -> None:
    """A server that never pauses never lets a read wait."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        timed = _Timed(ours)
        theirs.sendall(b"xy")
        assert timed.readinto(bytearray(1)) == 1
        time.sleep(0.1)
        with pytest.raises(TimeoutError, match="0.05 s after its beginning it was not at its end"):
            timed.readinto(bytearray(1))


def _nested(depth: int) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for _ in range(depth):
        body = {"a": body}
    return body


@pytest.mark.parametrize(
    "body", [{"a": float("nan")}, {"a": [float("inf")]}, _nested(100_000)], ids=["nan", "inf", "deep"]
)
def test_what_json_does_not_hold(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^body must be what JSON holds"):
        engines.post("http://127.0.0.1:9/", body)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed(status: int) -> None:
    asked: list[bytes] = []
    other = raw(lambda write: asked.append(b"") or write(OK + b"\r\n{}"))
    url = raw(lambda write: write(f"HTTP/1.1 {status} Away\r\nLocation: {other}\r\n\r\n".encode()))
    with pytest.raises(ConnectionError, match=f"^{url} answered {status} Away"):
        engines.post(url, {}, timeout=5)
    assert not asked


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "http://[::x", "http://h:x/", "http://h:99999/", "http://h/ x", "http://a..b/"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="^url must begin with http"):
        engines.post(url, {})


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_has_no_word_for_is_no_answer(serve: Callable[..., str], word: str) -> None:
    url = serve(lambda write: write(b'{"id": %s}' % word.encode()))
    with pytest.raises(ConnectionError, match=f"must answer in JSON; got .*{word} is no number of JSON's"):
        engines.post(url, {}, timeout=10)


def test_a_key_twice_is_no_answer(serve: Callable[..., str]) -> None:
    """Which of the two is meant nobody can say."""
    url = serve(lambda write: write(b'{"choices": [{"token_ids": [1], "token_ids": [2]}]}'))
    with pytest.raises(ConnectionError, match="must answer in JSON; got .*'token_ids' stands twice in an object"):
        engines.post(url, {}, timeout=10)
