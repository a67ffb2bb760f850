"""Judges: language models that reason about a response and then score it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trajkern._extras import pip_install
from trajkern.trainer.models.answers import Refused, counted, reply
from trajkern.trainer.models.huggingface import HuggingFacePolicy
from trajkern.trainer.models.judge_settings import (
    check_count,
    check_positive,
    check_seed,
    check_server,
    check_text,
    side_by_side,
)
from trajkern.trainer.models.verdicts import RUBRIC, question, read_score
from trajkern.trainer.sampling import left_padded
from trajkern.trainer.tasks.base import Question

if TYPE_CHECKING:
    from typing_extensions import Self

_OPENING = "\nScore:"
MAX_BYTES = 2**22  # of a server's answer
_RESERVED = {"messages", "model", "n", "seed", "stream"}
T = TypeVar("T")


class Judgements(NamedTuple):
    """K judgements of each of N responses.

    ``recipes.reward_models.vote`` and ``meta_vote`` take :meth:`complete` of the responses to compare. A rubric's gate,
    ``recipes.dro.gate``, takes ``mean() >= 0.5``: where no vote is left the mean is NaN, and the rollout is out.

    Attributes:
        scores: float32 ``[K, N]`` in [0, 1]; NaN is a missing vote: a reply without a readable score.
        replies: the K texts for each of the N responses, reasoning and score, ``replies[n][k]``.
    """

    scores: Tensor
    replies: list[list[str]]

    def mean(self) -> Tensor:
        """The mean of each response's votes, missing ones left out; float32 ``[N]``, NaN where none is left."""
        return self.scores.nanmean(0)

    def complete(self, responses: slice | Tensor = slice(None)) -> Tensor:
        """The samples in which every one of ``responses`` has its vote; float32 ``[K', N']``, K' at most K."""
        scores = self.scores[:, responses]
        return scores[~scores.isnan().any(1)]


class Judge(Protocol):
    """Scores responses to prompts, one of each."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Judgements:
        """A missing vote is NaN; a judge that could not be asked raises :class:`JudgeError`."""


class JudgeError(RuntimeError):
    """Judgements that could not be had. They are no scores."""


class _Local:
    """A model on this machine that judges items: tuples of texts."""

    opening = _OPENING
    glue = " "  # between the opening and what the model goes on with
    whole = False  # whether a verdict is read in all of a reply that went on, or after the opening

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        rubric: str = RUBRIC,
        max_new_tokens: int = 256,
        samples: int = 1,
        temperature: float = 1.0,
        batch: int = 1,
        seed: int = 0,
    ) -> None:
        check_text("rubric", rubric)
        for name, value in {"max_new_tokens": max_new_tokens, "samples": samples, "batch": batch}.items():
            check_count(name, value, 1)
        check_positive("temperature", temperature, zero=True)
        check_seed(seed)
        if temperature == 0 and samples > 1:
            raise ValueError(f"samples must be 1 where temperature is 0: all would be the same; got {samples}")
        self._model: Any = model.eval()
        self._tokenizer, self._rubric = tokenizer, rubric
        self._new, self._samples, self._temperature = max_new_tokens, samples, temperature
        self._batch, self._seed = batch, seed
        self._policy = HuggingFacePolicy(model, tokenizer)

    @classmethod
    def load(cls, name: str, **settings: Any) -> Self:
        """Load "smollm2", a HuggingFace folder or a .gguf file, in float32; ``settings`` are the constructor's."""
        policy = HuggingFacePolicy.load(name)
        return cls(policy.model, policy._tokenizer, **settings)

    def question(self, *item: str) -> str:
        return question(*item, rubric=self._rubric)

    def read(self, text: str, ended: bool) -> float:
        return read_score(text, ended)

    def judged(self, items: Sequence[tuple[str, ...]]) -> Judgements:
        replies: list[list[str]] = []
        scores: list[list[float]] = []
        for begin in range(0, len(items), self._batch):
            some = items[begin : begin + self._batch]
            with torch.random.fork_rng([self._model.device] if self._model.device.type == "cuda" else []):
                drawn = hashlib.sha256(json.dumps([self._seed, some]).encode()).digest()
                torch.manual_seed(int.from_bytes(drawn[:8], "big", signed=True))
                judged = self._judge(some)
            for at in range(0, len(judged), self._samples):
                texts, votes = zip(*judged[at : at + self._samples], strict=True)
                replies.append(list(texts))
                scores.append(list(votes))
        return _judgements(scores, replies, self._samples)

    def _judge(self, items: Sequence[tuple[str, ...]]) -> list[tuple[str, float]]:
        """The texts and scores of ``samples`` judgements an item, adjacent."""
        asked = [self._policy.prompt(Question("", self.question(*item), "", {})) for item in items]
        written = self._continue(asked, self._new, self._samples)
        asked = [prompt for prompt in asked for _ in range(self._samples)]
        opening = self._tokenizer(self.opening, add_special_tokens=False).input_ids
        out = []
        for tokens in written:
            text = self._text(tokens)
            out.append((text, self.read(text, tokens[-1:] == [self._policy.eos])))
        silent = [at for at, (_, score) in enumerate(out) if score != score]
        if not silent:
            return out
        thoughts = [[token for token in written[at] if token != self._policy.eos] for at in silent]
        ends = self._continue([asked[at] + t + opening for at, t in zip(silent, thoughts, strict=True)], 8, 1)
        for at, thought, tokens in zip(silent, thoughts, ends, strict=True):
            line, newline, _ = self._text(tokens).partition("\n")
            ended = newline == "\n" or tokens[-1] == self._policy.eos
            end = f"{self.opening}{self.glue}{line}"
            whole = f"{self._text(thought)}{end}"
            out[at] = (whole, self.read(whole if self.whole else end, ended))
        return out

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _continue(self, prompts: list[list[int]], most: int, copies: int) -> list[list[int]]:
        """What the model writes after each prompt, ``copies`` times, adjacent; up to its end of turn, that included."""
        eos, longest = self._policy.eos, max(map(len, prompts))
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and longest + most > context:
            raise ValueError(
                f"prompts and responses must leave room in the judge's context of {context} tokens for {most} new ones;"
                f" with rubric and reasoning the longest has {longest}"
            )
        tokens, keep = (x.to(self._model.device) for x in left_padded(prompts, eos))
        sampling: dict[str, Any] = {"do_sample": True, "temperature": self._temperature}
        out = self._model.generate(
            input_ids=tokens,
            attention_mask=keep.long(),
            max_new_tokens=most,
            num_return_sequences=copies,
            pad_token_id=eos,
            eos_token_id=eos,
            **(sampling if self._temperature else {"do_sample": False}),
        )
        rows = out[:, longest:].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


class LocalJudge(_Local):
    """A HuggingFace causal language model that reasons before it scores.

    It is asked for a last line "Score:" with a number from 0 to 10. Where its reply has none, it goes on once after
    "Score:"; where that brings no number either, the vote is missing.

    The same arguments give the same judgements, whatever torch's own generator has drawn. A response's do not depend on
    what else is judged unless ``batch`` is above 1.

    Args:
        model: on any device; set to evaluation mode.
        tokenizer: the model's own. Its chat template is used where it has one.
        rubric: what makes a good response, in words.
        max_new_tokens: for the reasoning and its score, at least 1.
        samples: judgements of each response (K), at least 1; they share one reading of the prompt.
        temperature: above 0; or 0, for the likeliest token each time (then samples must be 1). Other settings of
            sampling are the model's ``generation_config``.
        batch: responses judged together, at least 1: faster, but a draw then depends on all of them.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Judgements:
        return self.judged(side_by_side(prompts=prompts, responses=responses))


class _Server:
    """A model behind a server that judges items: tuples of texts."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        deadline: float = 600.0,
        concurrency: int = 16,
        rubric: str = RUBRIC,
        samples: int = 1,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        for name, text in {"base_url": base_url, "model": model, "rubric": rubric}.items():
            check_text(name, text)
        check_positive("timeout", timeout)
        check_positive("deadline", deadline)
        check_count("retries", retries, 0)
        check_count("concurrency", concurrency, 1)
        check_count("samples", samples, 1)
        if seed is not None:
            check_seed(seed)
        check_server(base_url, api_key, options, _RESERVED)
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs openai: {pip_install('judge', 'openai')} ({error})"
            ) from error
        self._connect: Any = openai.AsyncOpenAI
        self._http: Any = openai.DefaultAsyncHttpxClient
        self._kept = {"event_hooks": {"response": [counted(MAX_BYTES)]}, "follow_redirects": False}
        # a key must be given, or the client would send the environment's to this server
        self._client = {"base_url": base_url, "api_key": api_key or "none", "timeout": timeout, "max_retries": retries}
        self._client["default_headers"] = {"Accept-Encoding": "identity"}  # few bytes may unpack to many
        self._model, self._rubric, self._samples, self._seed = model, rubric, samples, seed
        self._deadline, self._concurrency, self._options = deadline, concurrency, dict(options or {})

    def question(self, *item: str) -> str:
        return question(*item, rubric=self._rubric)

    def read(self, text: str, ended: bool) -> float:
        return read_score(text, ended)

    def judged(self, items: Sequence[tuple[str, ...]]) -> Judgements:
        asked = [self.question(*item) for item in items]
        results = _run(self._ask_all(asked))
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            first = failures[0]
            raise JudgeError(
                f"{len(failures)} of {len(results)} calls to the judge {self._model!r} failed; the first:"
                f" {type(first).__name__}: {first}"
            ) from first
        judged = [result for result in results if not isinstance(result, BaseException)]
        groups = [judged[at : at + self._samples] for at in range(0, len(judged), self._samples)]
        scores = [[self.read(text, ended) for text, ended in group] for group in groups]
        return _judgements(scores, [[text for text, _ in group] for group in groups], self._samples)

    async def _ask_all(self, asked: Sequence[str]) -> list[tuple[str, bool] | BaseException]:
        gate = asyncio.Semaphore(self._concurrency)
        async with self._connect(**self._client, http_client=self._http(**self._kept)) as client:
            calls = [self._ask(client, gate, text, sample) for text in asked for sample in range(self._samples)]
            return await asyncio.gather(*calls, return_exceptions=True)

    async def _ask(self, client: Any, gate: asyncio.Semaphore, text: str, sample: int) -> tuple[str, bool]:
        """The reply, and whether it came to its own end."""
        seed = {} if self._seed is None else {"seed": self._seed + sample}
        async with gate:
            call = client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": text}],
                extra_body={**self._options, **seed},
            )
            try:
                answer = await asyncio.wait_for(call, self._deadline)
            except asyncio.TimeoutError:
                raise TimeoutError(f"no whole reply within the deadline of {self._deadline} s") from None
            except Exception as error:
                if isinstance(error.__cause__, Refused):  # as the client's error of a connection
                    raise error.__cause__ from None
                raise
        return reply(answer.content)


class ServerJudge(_Server):
    """A model behind any server that speaks OpenAI's chat completions: OpenAI's own, vLLM, llama.cpp, Ollama.

    A call that fails (a refusal to connect, an error status, silence, an answer of more than 4 MiB, a compressed one or
    one that is no completion, such as one whose content is no text, of two choices or of a key twice) is no score: the
    others are waited for, then :class:`JudgeError` says how many failed and why the first did. A reply that has no
    score in it, or in its last line where the server does not say that the model stopped, is a missing vote.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: the name that the server knows it by.
        api_key: None for a server that asks for none; the environment is not consulted.
        timeout: seconds that a try may be silent before it counts as failed, above 0.
        retries: tries after the first, at least 0, with growing pauses or those that the server asks for: after a
            timeout, a lost connection, and the statuses 408, 409, 429 and 500 or more.
        deadline: seconds for a call with its retries and pauses, above 0: some servers keep a hopeless call alive with
            blank lines, and are never silent.
        concurrency: calls under way at once, at least 1.
        rubric: what makes a good response, in words.
        samples: judgements of each response (K), a call each, at least 1.
        seed: sample k is asked with ``seed + k``, for servers that can repeat themselves; None sends none.
        options: what else each request says, such as ``{"temperature": 0.5, "max_tokens": 512}``.

    Raises:
        ImportError: without the package openai, which is in trajkern's extra "judge".
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Judgements:
        return self.judged(side_by_side(prompts=prompts, responses=responses))


def _judgements(scores: list[list[float]], replies: list[list[str]], samples: int) -> Judgements:
    return Judgements(torch.tensor(scores, dtype=torch.float32).reshape(-1, samples).T.contiguous(), replies)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to its end, in a notebook too, where this thread has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
