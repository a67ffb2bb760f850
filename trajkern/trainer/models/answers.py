"""What a judge's server answers: read up to a limit, and checked before a word of it counts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from types import NoneType
from typing import Any


class Refused(ValueError):
    """An answer that is not read to its end."""


def counted(most: int) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """The client's hook that gives up an answer of more bytes."""

    async def limit(response: Any) -> None:
        packed = response.headers.get("content-encoding", "identity")
        if packed != "identity":
            raise Refused(f"the server's answer must not be compressed, as the request says; it is {packed!r}")
        raw = response.aiter_raw

        async def parts(*args: Any, **named: Any) -> AsyncIterator[bytes]:
            size = 0
            async with contextlib.aclosing(raw(*args, **named)) as stream:
                async for part in stream:
                    size += len(part)
                    if size > most:
                        raise Refused(f"the server's answer must have at most {most} bytes; more came")
                    yield part

        response.aiter_raw = parts

    return limit


def reply(completion: Any) -> tuple[str, bool]:
    """The text of a chat completion, and whether it came to its own end."""
    try:
        choice = completion.choices[0]
        content, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"the server's answer is no chat completion: {str(completion)[:200]!r}") from error
    if not isinstance(content, (str, NoneType)) or not isinstance(finish, (str, NoneType)):
        wrong = finish if isinstance(content, (str, NoneType)) else content
        raise ValueError(f"the server's answer is no chat completion: its text is {str(wrong)[:200]!r}")
    return content or "", finish != "length"  # None: all went into reasoning, or a refusal
