"""Many requests at a time, of which none that is answered is lost."""

from __future__ import annotations

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
        super().__init__(f"{len(failures)} of {count} requests failed, {len(finished)} are in .finished; {shown}{more}")


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
