"""Judges: a local model that reasons first, and a server that misbehaves in every way."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from tests.tiny_llama import tiny_llama
from trajkern.recipes import dro, reward_models
from trajkern.trainer.models import judges
from trajkern.trainer.models.judges import Judge, JudgeError, Judgements, LocalJudge, ServerJudge
from trajkern.trainer.models.verdicts import read_score

NAN = float("nan")


def test_judgements_feed_votes_and_gates() -> None:
    scores = torch.tensor([[0.2, 0.9, NAN], [0.4, NAN, NAN], [0.6, 0.7, NAN]])
    judged = Judgements(scores, [])
    torch.testing.assert_close(judged.mean(), torch.tensor([0.4, 0.8, NAN]), equal_nan=True)
    assert judged.complete().shape == (0, 3)
    pair = judged.complete(torch.tensor([0, 1]))
    torch.testing.assert_close(reward_models.vote(pair), torch.tensor([0.8, 1.6]))
    torch.testing.assert_close(
        reward_models.meta_vote(judged.complete(slice(0, 1)), torch.tensor([0.1, 0.3, 0.2]), keep=1),
        torch.tensor([0.4]),
    )
    assert dro.gate(judged.mean() >= 0.5, torch.tensor([0, 0, 0]), mode="drop_rollout").tolist() == [False, True, False]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama(max_position_embeddings=1024)


PROMPTS, RESPONSES = ["1+1", "2+2", "3+3"], ["2", "five", "6"]


def test_a_local_judges_draws_are_its_own(tiny: tuple[Any, Any]) -> None:
    """Not torch's, not its neighbours', not its order's; but the seed's and the text's."""
    judge: Judge = LocalJudge(*tiny, max_new_tokens=12, samples=2, seed=3)
    state = torch.get_rng_state()
    first = judge(PROMPTS, RESPONSES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert judge(PROMPTS[::-1], RESPONSES[::-1]).replies == first.replies[::-1]
    assert judge(PROMPTS[1:2], RESPONSES[1:2]).replies == first.replies[1:2]
    assert len(set(sum(first.replies, []))) == 6
    assert LocalJudge(*tiny, max_new_tokens=12, samples=2, seed=4)(PROMPTS, RESPONSES).replies != first.replies
    assert first.scores.shape == (2, 3) and first.scores.dtype == torch.float32
    assert first.scores.isnan().all(), "a random model says no number, and that is no 0"


def test_a_local_judge_in_batches(tiny: tuple[Any, Any]) -> None:
    greedy = {"max_new_tokens": 12, "temperature": 0.0}
    alone = LocalJudge(*tiny, **greedy)(PROMPTS, RESPONSES)
    assert LocalJudge(*tiny, **greedy, batch=2)(PROMPTS, RESPONSES).replies == alone.replies
    drawn = LocalJudge(*tiny, max_new_tokens=12, samples=3, batch=2)(PROMPTS, RESPONSES)
    assert drawn.scores.shape == (3, 3) and [len(texts) for texts in drawn.replies] == [3, 3, 3]


def test_nothing_to_judge(tiny: tuple[Any, Any]) -> None:
    assert LocalJudge(*tiny, samples=2)([], []).scores.shape == (2, 0)


def _script(monkeypatch: pytest.MonkeyPatch, tiny: tuple[Any, Any], *turns: list[str]) -> list[list[str]]:
    """Let the model write these texts, a list a call of ``generate``; "|" is the end of turn. What it was asked."""
    model, tokenizer = tiny
    asked: list[list[str]] = []
    left = iter(turns)

    def generate(*, input_ids: torch.Tensor, num_return_sequences: int, **_: Any) -> torch.Tensor:
        asked.append([tokenizer.decode(row, skip_special_tokens=True) for row in input_ids])
        written = [tokenizer(text.replace("|", "<eos>"), add_special_tokens=False).input_ids for text in next(left)]
        assert len(written) == len(input_ids) * num_return_sequences
        width = max(map(len, written))
        padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in written])
        return torch.cat((input_ids.repeat_interleave(num_return_sequences, 0), padded), 1)

    monkeypatch.setattr(model, "generate", generate)
    return asked


def test_a_local_judge_reasons_then_scores(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _script(
        monkeypatch,
        tiny,
        ["It is right.\nScore: 9|", "Wrong.|", "Unsure.\nI|", "There is no end to it.\nScore: 1"],
        [" 3\nbecause", " maybe|", "10|"],
    )
    judged = LocalJudge(*tiny, samples=2, batch=2, rubric="Be strict.")(PROMPTS[:2], RESPONSES[:2])
    torch.testing.assert_close(judged.scores, torch.tensor([[0.9, NAN], [0.3, 1.0]]), equal_nan=True)
    assert judged.replies == [
        ["It is right.\nScore: 9", "Wrong.\nScore: 3"],
        ["Unsure.\nI\nScore: maybe", "There is no end to it.\nScore: 1\nScore: 10"],
    ]
    assert asked[0][0].startswith("Be strict.") and "<response>\n2\n</response>" in asked[0][0]
    assert [text[len(asked[0][at]) :] for at, text in zip((0, 1, 1), asked[1], strict=True)] == [
        "Wrong.\nScore:",
        "Unsure.\nI\nScore:",
        "There is no end to it.\nScore: 1\nScore:",
    ]


def test_a_prompt_beyond_the_context_is_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"leave room in the judge's context of 1024 tokens for 16 new ones;.* has 1"):
        LocalJudge(*tiny, max_new_tokens=16)(["p" * 700], ["r"])


@pytest.mark.slow
def test_smollm2_judges(smollm2: str) -> None:
    judge = LocalJudge.load(smollm2, max_new_tokens=12, samples=4, temperature=0.7, batch=2)
    judged = judge(["What is the capital of France?", "What is 2+2?"], ["Paris.", "5"])
    votes = judged.scores[~judged.scores.isnan()]
    assert judged.scores.shape == (4, 2) and votes.numel() > 0
    assert ((votes >= 0) & (votes <= 1)).all()
    for texts, scores in zip(judged.replies, judged.scores.T.tolist(), strict=True):
        for text, score in zip(texts, scores, strict=True):
            assert len(text) > 30, "it reasons"
            assert math.isnan(score) or read_score(text, ended=True) == pytest.approx(score)


class Server:
    """A chat-completions server; ``script`` answers a request's number among those for its response, and its body."""

    def __init__(self) -> None:
        self.script: Callable[[int, str], tuple[int, bytes | float]] = lambda turn, text: _said("Good.\nScore: 8")
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.busy = self.most = 0
        self.pause = 0.0
        self._turns: dict[str, int] = {}
        self._lock = threading.Lock()
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        text = body["messages"][0]["content"].partition("<response>\n")[2].partition("\n</response>")[0]
        with self._lock:
            self.bodies.append(body)
            self.keys.add(request.headers["Authorization"])
            turn = self._turns[text] = self._turns.get(text, -1) + 1
            self.busy += 1
            self.most = max(self.most, self.busy)
        time.sleep(self.pause)
        status, content = self.script(turn, text)
        with self._lock:
            self.busy -= 1
        try:
            self._write(request, status, content)
        except OSError:
            pass  # the judge has hung up

    def _write(self, request: BaseHTTPRequestHandler, status: int, content: bytes | float) -> None:
        if status == 0 and content == 0.0:  # silence
            self.stop.wait(30)
            return
        request.send_response(status or 200)
        request.send_header("Content-Type", "application/json")
        if status == 0:  # blank lines for ever, or a text without end
            request.end_headers()
            while not self.stop.wait(0.05 if content == 1.0 else 0.0):
                request.wfile.write(b"\n" if content == 1.0 else b"a" * 4096)
            return
        assert isinstance(content, bytes)
        if content[:2] == b"\x1f\x8b":
            request.send_header("Content-Encoding", "gzip")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def close(self) -> None:
        self.stop.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


SILENCE, BLANKS, ENDLESS, PACKED = (0, 0.0), (0, 1.0), (0, 2.0), (200, gzip.compress(b" " * 10**7))
NO_TEXTS = (0, 5, [], ["Score: 5"], {}, {"text": "Score: 5"}, False)


def _said(text: Any, finish: Any = "stop") -> tuple[int, bytes]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, json.dumps(whole).encode()


SAID = json.loads(_said("Score: 5")[1])
OF_USER = {"choices": [{"finish_reason": "stop", "message": {"role": "user", "content": "Score: 5"}}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("openai", reason="the judge's extra is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    running = Server()
    yield running
    running.close()


def test_a_server_judges(server: Server) -> None:
    scores = {"2": 9, "five": 1, "6": 10}
    server.script = lambda turn, text: _said(f"So.\nScore: {scores[text]}")
    judge: Judge = ServerJudge(server.url, "m", samples=2, seed=7, options={"temperature": 0.5, "top_k": 4})
    judged = judge(PROMPTS, RESPONSES)
    torch.testing.assert_close(judged.scores, torch.tensor([[0.9, 0.1, 1.0]] * 2))
    assert judged.replies[1] == ["So.\nScore: 1"] * 2
    assert sorted(body["seed"] for body in server.bodies) == [7, 7, 7, 8, 8, 8]
    assert all((b["model"], b["temperature"], b["top_k"]) == ("m", 0.5, 4) for b in server.bodies)
    assert server.keys == {"Bearer none"}, "the environment's key is not for this server"
    ServerJudge(server.url, "m", api_key="mine")(["p"], ["2"])
    assert "Bearer mine" in server.keys and "seed" not in server.bodies[-1]


def test_a_server_judge_in_a_running_event_loop(server: Server) -> None:
    async def notebook() -> Judgements:
        return ServerJudge(server.url, "m")(["p"], ["r"])

    assert asyncio.run(notebook()).scores.tolist() == [[pytest.approx(0.8)]]


def test_concurrency_is_bounded_and_used(server: Server) -> None:
    server.pause = 0.1
    ServerJudge(server.url, "m", concurrency=3)(["p"] * 9, [str(i) for i in range(9)])
    assert server.most == 3 and len(server.bodies) == 9


@pytest.mark.parametrize("first", [(500, b"{}"), (429, b"{}"), SILENCE])
def test_a_failed_try_is_tried_again(server: Server, first: tuple[int, bytes | float]) -> None:
    server.script = lambda turn, text: first if turn == 0 else _said("Score: 6")
    judged = ServerJudge(server.url, "m", retries=1, timeout=0.5)(["p"], ["r"])
    assert judged.scores.tolist() == [[pytest.approx(0.6)]] and len(server.bodies) == 2


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ((500, b'{"error": {"message": "overloaded"}}'), "InternalServerError: .*overloaded"),
        ((401, b'{"error": {"message": "who are you"}}'), "AuthenticationError: .*who are you"),
        (SILENCE, "APITimeoutError: Request timed out"),
        (BLANKS, "TimeoutError: no whole reply within the deadline of 1.0 s"),
        ((200, b'{"choices": [{"mess'), "JSONDecodeError"),
        ((200, b'{"choices": []}'), "ValueError: the server's answer is no chat completion"),
        ((200, b'{"error": "busy"}'), "ValueError: the server's answer is no chat completion"),
        ((200, json.dumps(SAID | {"error": "half of it"}).encode()), "ValueError: .* completion: it has 'half of it'"),
        ((200, json.dumps(OF_USER).encode()), "ValueError: .* completion: it has \"a message of the role 'user'"),
        ((200, b"[]"), "ValueError: the server's answer is no chat completion"),
        ((200, b'"hello"'), "ValueError: the server's answer is no chat completion"),
        ((200, b'{"choices": [{"text": "Score: 5"}]}'), "ValueError: the server's answer is no chat completion"),
        *((_said(text), "ValueError: the server's answer is no chat completion: its text is") for text in NO_TEXTS),
        (_said("Score: 5", 3), "ValueError: the server's answer is no chat completion: its text is '3'"),
        (_said("a" * 30_000), "Refused: the server's answer must have at most 20000 bytes; more came"),
        ((206, _said("Score: 5")[1]), "Refused: the server's answer must be whole, of the status 200; it has 206"),
        ((200, b"[" * 15_000), "RecursionError|.*JSONDecodeError"),
        (ENDLESS, "Refused: the server's answer must have at most 20000 bytes; more came"),
        (PACKED, "Refused: the server's answer must not be compressed, as the request says; it is 'gzip'"),
    ],
)
def test_a_failed_call_is_no_score(
    server: Server, bad: tuple[int, bytes | float], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "MAX_BYTES", 20_000)
    server.script = lambda turn, text: bad if text == "five" else _said("Score: 6")
    judge = ServerJudge(server.url, "m", retries=0, timeout=0.5, deadline=1.0, samples=2, concurrency=1)
    with pytest.raises(JudgeError, match=f"(?s)^2 of 6 calls to the judge 'm' failed; the first: {cause}") as caught:
        judge(PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, Exception)
    assert len(server.bodies) == 6, "the others were waited for"


def test_no_redirection_is_followed(server: Server) -> None:
    """What is judged goes to the address that was given, and to no other."""
    with socket.create_server(("127.0.0.1", 0)) as moved:

        def away() -> None:
            connection, _ = moved.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(f"HTTP/1.1 307 Away\r\nLocation: {server.url}/chat/completions\r\n\r\n".encode())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # closed with bytes unread, a connection would be reset
                    pass

        threading.Thread(target=away, daemon=True).start()
        with pytest.raises(JudgeError, match="1 of 1 calls to the judge 'm' failed; the first: APIStatusError: .*307"):
            ServerJudge(f"http://127.0.0.1:{moved.getsockname()[1]}/v1", "m", retries=0)(["p"], ["2"])
    assert not server.bodies


def test_nobody_listens(server: Server) -> None:
    with pytest.raises(JudgeError, match="3 of 3 calls .* APIConnectionError"):
        ServerJudge("http://127.0.0.1:9/v1", "m", retries=0)(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    "reply", [_said("I cannot say."), _said(None, "length"), _said(""), _said("Fine.\nScore: 1", "length")]
)
def test_a_reply_without_a_score_is_a_missing_vote(server: Server, reply: tuple[int, bytes]) -> None:
    server.script = lambda turn, text: reply if text == "five" else _said("Score: 6")
    judged = ServerJudge(server.url, "m")(PROMPTS, RESPONSES)
    torch.testing.assert_close(judged.scores, torch.tensor([[0.6, NAN, 0.6]]), equal_nan=True)


def test_without_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"ServerJudge needs openai: pip install 'openai>=1.56'"):
        ServerJudge("http://localhost/v1", "m")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"base_url": "localhost:8000"}, "base_url must start with http:// or https://; got 'localhost:8000'"),
        ({"model": ""}, "model must be a string that is not empty"),
        ({"rubric": 3}, "rubric must be a string"),
        ({"timeout": 0}, "timeout must be finite and above 0, got 0"),
        ({"timeout": None}, "timeout must be a number, got None"),
        ({"deadline": float("inf")}, "deadline must be finite and at most"),
        ({"deadline": 10**400}, "deadline must be finite and at most.*got an integer of 1329 bits"),
        ({"base_url": "http://localhost:x/v1"}, "base_url must start with http"),
        ({"base_url": "http:///v1"}, "base_url must start with http"),
        ({"samples": 10**400}, "samples must be at most 2147483647, got an integer of 1329 bits"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"api_key": 3}, "api_key must be a string"),
        ({"api_key": "a\nb"}, "api_key must be of characters that a header holds"),
        ({"options": 3}, "options must be a mapping"),
        ({"options": {3: 1}}, "options must be named by strings"),
        ({"options": {"temperature": float("nan")}}, "options must be what JSON holds"),
        ({"model": "\ud800"}, "model must be texts that UTF-8 holds"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"samples": 1.0}, "samples must be an int, got 1.0"),
        ({"seed": "a"}, "seed must be an int"),
        ({"options": {"stream": True, "n": 2}}, "options must not hold n, stream"),
    ],
)
def test_bad_server_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        ServerJudge(**({"base_url": "http://localhost/v1", "model": "m"} | settings))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"temperature": 0, "samples": 2}, "samples must be 1 where temperature is 0.*got 2"),
        ({"batch": True}, "batch must be an int, got True"),
        ({"seed": None}, "seed must be an int, got None"),
    ],
)
def test_bad_local_settings(tiny: tuple[Any, Any], settings: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        LocalJudge(*tiny, **settings)


def test_bad_arguments(tiny: tuple[Any, Any]) -> None:
    judge = LocalJudge(*tiny)
    with pytest.raises(ValueError, match="responses must have one for each of the 2 prompts, got 1"):
        judge(["p", "q"], ["r"])
    with pytest.raises(TypeError, match="prompts must be a sequence of strings, got 'p'"):
        judge("p", ["r"])
    with pytest.raises(TypeError, match="responses must be a sequence of strings, got 3"):
        judge(["p"], [3])
