"""JSON over HTTP, bounded in bytes and in time."""

from __future__ import annotations

import http.client
import io
import json
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from trajkern._checks import check_count, check_number, describe
from trajkern.integrations._outside import decoded

MOST_SECONDS, MOST_BYTES = 1e6, 2**40  # that a socket waits, and that one machine holds


def post(url: str, body: Mapping[str, Any], *, timeout: float = 600.0, max_bytes: int = 2**28) -> Any:
    """The decoded JSON that a server answers to ``body``.

    Args:
        url: of the server's endpoint.
        body: what is sent, as JSON.
        timeout: seconds of silence, and for the whole answer from its first byte on.
        max_bytes: of the answer, which is given up as soon as it has more; by default 256 MiB.

    Raises:
        TypeError, ValueError: naming the argument: no url, or what JSON does not hold.
        ConnectionError: naming the url: a status that is an error with what was said, no whole answer within
            ``timeout`` seconds or ``max_bytes``, a connection that ended inside of it, or no JSON. A redirection is
            such a status: nothing is sent to another address.
    """
    _check_url(url)
    if not isinstance(body, Mapping):
        raise TypeError(f"body must be a mapping, got {describe(body)}")
    timeout = check_number("timeout", timeout, above=0, high=MOST_SECONDS)
    max_bytes = check_count("max_bytes", max_bytes, low=1, high=MOST_BYTES)
    try:
        encoded = json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"body must be what JSON holds: {error}") from None
    request = urllib.request.Request(url, encoded, {"Content-Type": "application/json"})
    try:
        with _opener().open(request, timeout=timeout) as answer:
            if answer.status != 200:  # as of a part of it
                raise OSError(f"its status must be 200, got {answer.status} {answer.reason}")
            content = _read(answer, max_bytes)
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url} answered {error.code} {error.reason}: {_said(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} gave no whole answer: {type(error).__name__}: {error}") from error
    try:
        return decoded(content)
    except (ValueError, RecursionError) as error:
        got = f"{content[:300]!r} ({len(content)} bytes)"
        raise ConnectionError(f"{url} must answer in JSON; got {got}: {type(error).__name__}: {error}") from error


def _check_url(url: Any) -> None:
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        legal = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        if parts is not None and parts.hostname:
            parts.hostname.encode("idna")  # as the socket will
    except ValueError:  # of a port that is no number, or an address that is none
        legal = False
    if not legal or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"url must begin with http:// or https:// and have a host, got {describe(url)}")


class _Timed(io.RawIOBase):
    """A socket's bytes: the first within its timeout, and all of them within as many seconds more."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._stream = connection, connection.makefile("rb", buffering=0)
        self._seconds: float | None = connection.gettimeout()
        self._until = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._until:
            count = self._stream.readinto(buffer)
            self._until = time.monotonic() + (self._seconds or math.inf)
            return count
        if time.monotonic() > self._until:  # a server that sends without an end never lets a read wait
            raise TimeoutError(f"{self._seconds} s after its beginning it was not at its end")
        try:
            self._connection.settimeout(max(self._until - time.monotonic(), 1e-6))
            return self._stream.readinto(buffer)
        except TimeoutError:
            raise TimeoutError(f"{self._seconds} s after its beginning it was not at its end") from None

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """Status, headers and trailers are timed too: http.client reads any number of lines of some."""

    def __init__(self, connection: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(connection))


class _Connection(http.client.HTTPConnection):
    response_class = _Answer


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Answer


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)


def _opener() -> urllib.request.OpenerDirector:
    """What asks one address, or the environment's proxy for it, and follows no redirection."""
    opener = urllib.request.OpenerDirector()
    errors = urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()
    for handler in (urllib.request.ProxyHandler(), _Http(), _Https(), *errors):
        opener.add_handler(handler)
    return opener


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    """All of an answer. Raises OSError where it is longer."""
    parts, size = list[bytes](), 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > most:
            raise OSError(f"more than max_bytes = {most} bytes came")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says of its error, or why that could not be read."""
    try:
        return repr(error.read1(500))
    except (OSError, http.client.HTTPException) as why:
        return f"no more could be read: {type(why).__name__}: {why}"
