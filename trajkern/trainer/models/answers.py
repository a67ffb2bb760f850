"""What a judge's server answers: read up to a limit, and checked before a word of it counts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from types import NoneType
from typing import Any

from trajkern.integrations._outside import decoded

ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # what servers call it that the model stopped


class Refused(ValueError):
    """An answer that is not read to its end."""


def counted(most: int) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """The client's hook that gives up an answer of more bytes."""

    async def limit(response: Any) -> None:
        if response.is_success and response.status_code != 200:
            raise Refused(f"the server's answer must be whole, of the status 200; it has {response.status_code}")
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


def reply(content: bytes) -> tuple[str, bool]:
    """The text of a chat completion, and whether the server says that it came to its own end."""
    answer = decoded(content)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ValueError(f"the server's answer is no chat completion: {str(answer)[:200]!r}")
    if answer.get("error") is not None or message.get("role", "assistant") != "assistant":
        said = answer.get("error") or f"a message of the role {message.get('role')!r}"
        raise ValueError(f"the server's answer is no chat completion: it has {str(said)[:200]!r}")
    text, finish = message.get("content"), choice.get("finish_reason")
    if not isinstance(text, (str, NoneType)) or not isinstance(finish, (str, NoneType)):
        wrong = finish if isinstance(text, (str, NoneType)) else text
        raise ValueError(f"the server's answer is no chat completion: its text is {str(wrong)[:200]!r}")
    return text or "", finish in ENDED  # None: all went into reasoning, or a refusal
