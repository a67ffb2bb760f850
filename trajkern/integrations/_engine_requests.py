"""Many requests at a time, of which none that is answered is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from trajkern._checks import check_callable, check_count, describe

MOST_WORKERS = 4096  # threads
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class EngineFailure(RuntimeError):
    """Some requests failed; nothing that came is lost.

    Attributes:
        finished: the answers that came, by the number of their request.
        failures: the exception of each other request, by its number.
    """

    def __init__(self, finished: dict[int, Any], failures: dict[int, BaseException]) -> None:
        self.finished, self.failures = finished, failures
        shown = "; ".join(f"request {i}: {type(e).__name__}: {e}" for i, e in list(failures.items())[:3])
        more = f"; and {len(failures) - 3} more in .failures" if len(failures) > 3 else ""
        count = len(finished) + len(failures)
        self._words = f"{len(failures)} of {count} requests failed, {len(finished)} are in .finished; {shown}{more}"
        super().__init__(finished, failures)

    def __str__(self) -> str:
        return self._words

    def __copy__(self) -> EngineFailure:
        again = type(self)(*self.args)
        vars(again).update(vars(self))
        return again

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {name: x for name, x in vars(self).items() if name not in ("finished", "failures")}
        return type(self), (self.finished, {i: _portable(e) for i, e in self.failures.items()}), rest


def _portable(error: BaseException) -> BaseException:
    """What another process can make it of, or else its type and its words: one that it cannot takes all with it."""
    try:
        copy.deepcopy(error)  # by the same steps
        found = "<locals>" not in type(error).__qualname__
    except Exception:
        found = False
    return error if found else RuntimeError(f"{type(error).__name__}: {error}")


def collect(ask: Callable[[Request], Answer], requests: Iterable[Request], *, workers: int = 8) -> list[Answer]:
    """``ask`` of each request, ``workers`` at a time in threads, in the order of the requests.

    Raises:
        EngineFailure: after all have been asked, where one raised an exception; it holds the answers that came.
    """
    check_callable("ask", ask, "a function of a request")
    if not isinstance(requests, Iterable) or isinstance(requests, (str, Mapping, Tensor)):
        raise TypeError(f"requests must be a sequence, got {describe(requests)}")
    with ThreadPoolExecutor(check_count("workers", workers, low=1, high=MOST_WORKERS)) as pool:
        futures = [pool.submit(ask, request) for request in requests]
    failures = {i: e for i, x in enumerate(futures) if (e := x.exception()) is not None}
    if failures:
        raise EngineFailure({i: x.result() for i, x in enumerate(futures) if i not in failures}, failures)
    return [x.result() for x in futures]
