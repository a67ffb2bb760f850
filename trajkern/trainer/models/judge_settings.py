"""What judges are made with and asked: every message names the argument, what it must be and what it was."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

MOST_COUNT, MOST_SEED, MOST_SECONDS = 2**31 - 1, 2**63 - 1, 1e9


def _got(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"got an integer of {value.bit_length()} bits"
    return f"got {reprlib.repr(value)} ({type(value).__name__})"


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{name} must be a string that is not empty, {_got(value)}")
    _check_encodable(name, value)


def check_count(name: str, value: Any, low: int, high: int = MOST_COUNT) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, {_got(value)}")
    if not low <= value <= high:
        bound = f"at least {low}" if value < low else f"at most {high}"
        raise ValueError(f"{name} must be {bound}, {_got(value).partition(' (')[0]}")


def check_seed(value: Any) -> None:
    check_count("seed", value, -MOST_SEED, MOST_SEED)


def check_positive(name: str, value: Any, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, {_got(value)}")
    if not (0 < value <= MOST_SECONDS or zero and value == 0):
        bound = f"at most {MOST_SECONDS:g}" if value > MOST_SECONDS else f"{'at least' if zero else 'above'} 0"
        raise ValueError(f"{name} must be finite and {bound}, {_got(value)}")


def check_server(base_url: str, api_key: Any, options: Any, reserved: set[str]) -> None:
    """What a request is sent with."""
    try:
        parts = urlsplit(base_url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # of a port that is no number, or an address that is none
        legal = False
    if not legal or not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        raise ValueError(f"base_url must start with http:// or https://; got {base_url!r} (and a host must be in it)")
    if api_key is not None:
        check_text("api_key", api_key)
        if not api_key.isascii() or not api_key.isprintable():
            raise ValueError("api_key must be of characters that a header holds")
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping, {_got(options)}")
    if held := sorted(reserved & set(options)):
        raise ValueError(f"options must not hold {', '.join(held)}: the judge sets these itself")
    if wrong := [x for x in options if not isinstance(x, str)]:
        raise TypeError(f"options must be named by strings, {_got(wrong[0])}")
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"options must be what JSON holds: {error}") from None


def side_by_side(**named: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts side by side."""
    first, *others = named
    for name, texts in named.items():
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise TypeError(f"{name} must be a sequence of strings, {_got(texts)}")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a sequence of strings, {_got(text)}")
            _check_encodable(name, text)
    for name in others:
        if len(named[name]) != len(named[first]):
            count = len(named[first])
            raise ValueError(f"{name} must have one for each of the {count} {first}, got {len(named[name])}")
    return list(zip(*named.values(), strict=True))


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be texts that UTF-8 holds: {error}") from None
