"""JSON over HTTP, bounded in bytes and in time."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from trajkern._checks import check_count, check_number, describe

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
            ``timeout`` seconds or ``max_bytes``, a connection that ended inside of it, or no JSON.
    """
    if not isinstance(url, str) or not url.startswith(("http://", "https://")) or not url.partition("//")[2]:
        raise ValueError(f"url must begin with http:// or https:// and have a host, got {describe(url)}")
    if not isinstance(body, Mapping):
        raise TypeError(f"body must be a mapping, got {describe(body)}")
    timeout = check_number("timeout", timeout, above=0, high=MOST_SECONDS)
    check_count("max_bytes", max_bytes, low=1, high=MOST_BYTES)
    try:
        encoded = json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"body must be what JSON holds: {error}") from None
    request = urllib.request.Request(url, encoded, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content = _read(answer, timeout, max_bytes)
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url} answered {error.code} {error.reason}: {error.read1(500)!r}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} gave no whole answer: {type(error).__name__}: {error}") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"{url} must answer in JSON; got {content[:300]!r} ({len(content)} bytes)") from error


def _read(answer: http.client.HTTPResponse, seconds: float, most: int) -> bytes:
    """All of an answer. Raises OSError where it is longer, or takes longer."""
    until, parts, size = time.monotonic() + seconds, list[bytes](), 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > most:
            raise OSError(f"more than max_bytes = {most} bytes came")
        if time.monotonic() > until:
            raise TimeoutError(f"after {seconds} s it was not at its end, {size} bytes")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)
