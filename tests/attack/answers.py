"""What a judge's server answers: a chat completion with one node of it wrong, and bytes that are none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.attack.case import Case
from tests.attack.mutated import Mutation, mutations
from trajkern.trainer.models.judges import JudgeError, Judgements, ServerJudge
from trajkern.trainer.models.pair_judges import ServerPairJudge

SCORED, VERDICT = "Good.\nScore: 8", "Good.\n<answer>[[A]]</answer>"
TEXTS = {  # of answers that are whole -> their votes, None where that is missing
    "Score: 10": 1.0,
    "Score: 0": 0.0,
    "**Score:** 7/10": 0.7,
    "Score: 11": None,
    "Score: -1": None,
    "Score: nan": None,
    "Score: inf": None,
    "Score: 1e1": None,
    "Score: 5/100": None,
    "Score: 9" + "9" * 5000: None,
    "Score: ٣": None,
    "Score: ": None,
    "Score: 3 or 4": None,
    "\ud800": None,
    "Score: 3\nScore: eight": 0.3,
    "Score:" * 5000: None,
}


def _completion(text: Any, finish: Any = "stop") -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return whole | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


GOOD = json.dumps(_completion(SCORED)).encode()
NO_COMPLETIONS = {
    "nothing": b"",
    "a null": b"null",
    "cut in half": GOOD[: len(GOOD) // 2],
    "followed by more": GOOD + GOOD,
    "a key twice": GOOD.replace(b'"content": ', b'"content": "Score: 1", "content": '),
    "choices twice": GOOD.replace(b'"choices"', b'"choices": [], "choices"'),
    "finish_reason twice": GOOD.replace(b'"finish_reason"', b'"finish_reason": "length", "finish_reason"'),
    "no UTF-8": GOOD.replace(b"Good", b"G\xff\xfed"),
    "UTF-16 without a mark and a byte": json.dumps(_completion(SCORED)).encode("utf-16-le")[:-1],
    "deep": b"[" * 100_000,
    "a number without an end": b'{"created": ' + b"9" * 100_000 + b"}",
    "an event stream": b"data: " + GOOD + b"\n\ndata: [DONE]\n\n",
    "HTML": b"<html>Score: 8</html>",
    "two choices": json.dumps(_completion(SCORED) | {"choices": _completion(SCORED)["choices"] * 2}).encode(),
}


class _Server:
    """Answers each response that is judged with the bytes that were put down for it."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = outer.answers[body["messages"][0]["content"].partition("answer ")[2].partition(" ")[0]]
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

        http = Http(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{http.server_port}/v1"

    def put(self, content: bytes) -> str:
        """The response that is answered so."""
        name = str(len(self.answers))
        self.answers[name] = content
        return f"answer {name} "


def cases() -> Iterator[Case]:
    server = _Server()
    single = partial(_judged, ServerJudge(server.url, "m", retries=0, timeout=20.0, deadline=30.0))
    pair = partial(_judged, ServerPairJudge(server.url, "m", retries=0, timeout=20.0, deadline=30.0))
    for name, call, text, right in (
        ("judges.ServerJudge", single, SCORED, 0.8),
        ("judges.ServerPairJudge", pair, VERDICT, 1.0),
    ):
        whole = _completion(text)
        yield Case(name, "as it should be", partial(call, server.put(json.dumps(whole).encode())), (), may_pass=True)
        for change in mutations(whole):
            try:
                content = json.dumps(change.value).encode()
            except (TypeError, ValueError):
                continue
            yield Case(name, change.label, partial(call, server.put(content)), ("judge",), wrong=_vote(change, right))
        for label, content in NO_COMPLETIONS.items():
            yield Case(name, label, partial(call, server.put(content)), ("judge",))
    for text, score in TEXTS.items():
        call = partial(single, server.put(json.dumps(_completion(text)).encode()))
        yield Case("judges.ServerJudge", f"{text[:20]!r}", call, ("judge",), wrong=_is_score(score))
    yield Case("judges.ServerJudge", "64 at once, each its own", partial(_many, server), (), may_pass=True)


def _judged(judge: Any, response: str) -> Judgements:
    try:
        return judge(["p"], [response]) if isinstance(judge, ServerJudge) else judge(["p"], [response], ["another"])
    except JudgeError as error:  # the documented end of a call that is no score
        raise ValueError(str(error)) from error


def _vote(change: Mutation, right: float) -> Callable[[Judgements], str]:
    """A vote stands only where the text and its end are as they were."""

    def wrong(judged: Judgements) -> str:
        score, touched = judged.scores.item(), ("choices", 0, "message", "content")
        path = change.path[: len(touched)]
        of_text = path == touched[: len(path)] or change.names[-1:] == ("finish_reason",)
        if score != score:
            return "" if of_text else "lost a vote by what says nothing"
        verdict_stands = right == 1.0 and change.names[-1:] == ("finish_reason",)  # it is whole or none
        if of_text and not verdict_stands:
            return f"votes {score}"
        return "" if abs(score - right) < 1e-6 else f"votes {score} for {right}"

    return wrong


def _is_score(expected: float | None) -> Callable[[Judgements], str]:
    def wrong(judged: Judgements) -> str:
        score = judged.scores.item()
        right = score != score if expected is None else abs(score - expected) < 1e-6
        return "" if right else f"votes {score} for {expected}"

    return wrong


def _many(server: _Server) -> None:
    scores = [n % 11 for n in range(64)]
    responses = [server.put(json.dumps(_completion(f"Score: {x}")).encode()) for x in scores]
    judge = ServerJudge(server.url, "m", retries=0, timeout=60.0)
    with ThreadPoolExecutor(8) as pool:
        parts = [responses[at : at + 8] for at in range(0, 64, 8)]
        found = [
            x for judged in pool.map(lambda part: judge(["p"] * 8, part), parts) for x in judged.scores[0].tolist()
        ]
    if [round(10 * x) for x in found] != scores:
        raise AssertionError(f"votes {found} for {scores}")
