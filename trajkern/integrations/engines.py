"""What vLLM 0.33.0 and SGLang 0.5.23 return, as the packed batch and the head's arguments that the ops take::

    how = engines.sampling(request, logprobs_mode="processed_logprobs")
    rollouts = engines.from_vllm(llm.generate(prompts, params), how)
    batch, head = engines.pack(rollouts, how, group_ids, rewards)
    rows, targets, tokens, cu_seqlens = batch.head_inputs()
    logprobs = tk.linear_logprobs(hidden, weight, targets, rows=rows, **head)   # the sampler's, to rounding

Neither engine is imported: what is read are the attributes of their outputs, or the JSON of their servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern import PackedBatch
from trajkern._checks import check_count, check_instance, describe
from trajkern.integrations._arguments import check_kind
from trajkern.integrations._engine_http import post
from trajkern.integrations._engine_requests import EngineFailure, collect
from trajkern.integrations._engine_sampling import Sampling, sampling

__all__ = [
    "EngineFailure",
    "Packed",
    "Rollout",
    "Sampling",
    "collect",
    "continued",
    "from_openai",
    "from_sglang",
    "from_vllm",
    "pack",
    "post",
    "sampling",
]

MINUS_INFINITY = -9999.0  # what vLLM's server writes for it
ROUNDING = 1e-3  # by which a log-prob in bfloat16 may exceed 0
CUT_SHORT = (None, "abort", "error")  # a finish reason of what the policy did not end


class Rollout(NamedTuple):
    """One completion after its prompt; or several turns of them, see :func:`continued`."""

    tokens: list[int]  # the prompt and all that follows
    sampled: list[bool]  # of each token, whether the engine drew it
    logprobs: list[float]  # of the sampled tokens, in their order
    support: list[list[int]] | None  # of each sampled token, the ids that it was drawn from
    finish: str  # why it ended: "stop", "length", ...


class Packed(NamedTuple):
    batch: PackedBatch
    head: dict[str, Any]  # arguments of linear_logprobs, linear_policy_loss and the like

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        support = self.head.get("sampling_support")
        moved = {} if support is None else {"sampling_support": tuple(x.to(device) for x in support)}
        return Packed(self.batch.to(device), {**self.head, **moved})


def from_vllm(outputs: Any, how: Sampling) -> list[Rollout]:
    """The rollouts of vLLM's ``RequestOutput``, or of several in their order, each one's completions by their index.

    ``SamplingParams(logprobs=0)`` asks for the sampled tokens' log-probs alone; ``LLM(return_sampling_mask=True,
    logprobs_mode="processed_logprobs")`` for the sampling masks. A ``SamplingMask`` is read with a list of ids a token,
    as released, or with ``offsets`` into one list, as first proposed.

    Raises:
        ValueError: naming the request and the completion: one that the policy did not end (still running, aborted, an
            error), fewer completions than asked for, fewer log-probs or masks than tokens, a log-prob that is missing,
            not finite or positive, a sampled token outside its mask, no mask where tokens were cut.
    """
    check_instance("how", how, Sampling)
    rollouts = []
    for output in [outputs] if hasattr(outputs, "outputs") else outputs:
        name = f"request {output.request_id}"
        completions = sorted(output.outputs, key=lambda x: x.index)
        _check_count(name, len(completions), how)
        for x in completions:
            where = f"{name}, completion {x.index}"
            tokens = list(x.token_ids)
            if x.logprobs is None:
                raise ValueError(f"{where} must have log-probs, which SamplingParams(logprobs=0) asks for; it has none")
            found = [_of_token(step, token) for step, token in zip(x.logprobs, tokens, strict=False)]
            found += [None] * (len(x.logprobs) - len(tokens))  # their number is checked with the others'
            mask = getattr(x, "sampling_mask", None)
            lists = None if mask is None else _lists(mask.token_ids, getattr(mask, "offsets", None))
            rollouts.append(_rollout(where, output.prompt_token_ids, tokens, found, lists, x.finish_reason, how))
    return rollouts


def from_openai(response: Mapping[str, Any], how: Sampling, prompt: Sequence[int] | None = None) -> list[Rollout]:
    """The rollouts of an OpenAI-style response: of completions, chat completions, or vLLM's ``/inference/v1/generate``.

    Token ids must be in it, so ask vLLM's server for ``return_token_ids``, with ``logprobs: 0`` (completions) or
    ``logprobs: true`` (chat): text that is tokenised again may be other tokens. Its sampling masks come from
    ``/inference/v1/generate`` alone.

    Args:
        response: the decoded JSON.
        how: of :func:`sampling`.
        prompt: the prompt's token ids where the response has no ``prompt_token_ids``.

    Raises:
        ValueError: as :func:`from_vllm`, naming the choice; and a response that has an error, or no token ids.
    """
    check_instance("how", how, Sampling)
    if not isinstance(response, Mapping):
        raise TypeError(f"response must be the decoded JSON of a response, got {describe(response)}")
    choices = response.get("choices")
    if not isinstance(choices, Sequence) or not all(isinstance(x, Mapping) for x in choices) or not choices:
        raise ValueError(f"response must have choices; got {_shortened(response)}")
    _check_count("response", len(choices), how)
    rollouts = []
    if prompt is not None:
        check_kind("prompt", prompt, ("Sequence",), None)
    for i, x in enumerate(choices):
        check_count(f"index of choice {i}", x.get("index", i))
    for i, x in enumerate(sorted(choices, key=lambda x: x.get("index", 0))):
        where = f"choice {x.get('index', i)}"
        asked: Any = x.get("prompt_token_ids") or response.get("prompt_token_ids") or prompt
        for name, ids in (("token_ids", x.get("token_ids")), ("prompt_token_ids", asked)):
            if ids is None:
                raise ValueError(f"{where} must have {name}, which return_token_ids asks for; it has {sorted(x)}")
        found = _openai_logprobs(where, x.get("logprobs"))
        rollouts.append(
            _rollout(where, asked, x["token_ids"], found, x.get("sampling_mask"), x.get("finish_reason"), how)
        )
    return rollouts


def from_sglang(response: Any, how: Sampling, prompt: Sequence[int] | None = None) -> list[Rollout]:
    """The rollouts of SGLang's ``Engine.generate`` or ``/generate``: one response, or the list that ``n`` gives.

    ``return_logprob=True`` asks for the log-probs; ``return_sampling_mask=True`` for the sampling masks, with which the
    log-probs are those over them (``output_token_sampling_logprobs``, in either ``sampling_logprobs_mode``).

    Args:
        response: as returned, or its decoded JSON.
        how: of :func:`sampling`.
        prompt: the prompt's token ids where ``return_prompt_token_ids`` was not set.

    Raises:
        ValueError: as :func:`from_vllm`, naming the response's number.
    """
    check_instance("how", how, Sampling)
    responses = [response] if isinstance(response, Mapping) else list(response)
    _check_count("response", len(responses), how)
    rollouts = []
    for i, x in enumerate(responses):
        where, meta = f"response {i}", x.get("meta_info")
        if meta is None or "output_token_logprobs" not in meta:
            raise ValueError(
                f"{where} must have output_token_logprobs, which return_logprob asks for; got {_shortened(x)}"
            )
        drawn = [entry[1] for entry in meta["output_token_logprobs"]]
        tokens = list(x.get("output_ids", drawn))
        if any(a != b for a, b in zip(drawn, tokens, strict=False)):
            raise ValueError(
                f"{where} must have log-probs of its output_ids {tokens[:8]}...; they are of {drawn[:8]}..."
            )
        asked = x.get("prompt_token_ids", prompt)
        if asked is None:
            raise ValueError(f"{where} must have prompt_token_ids, or the call its prompt; it has {sorted(x)}")
        masks = meta.get("output_token_sampling_mask") if how.replay else None
        found = [entry[0] for entry in meta["output_token_logprobs"]]
        if masks is not None:
            found = _over_masks(meta.get("output_token_sampling_logprobs") or [], masks, tokens)
        finish = (meta.get("finish_reason") or {}).get("type")
        rollouts.append(_rollout(where, asked, tokens, found, masks, finish, how))
    return rollouts


def continued(turns: Sequence[Rollout]) -> Rollout:
    """The turns of one trajectory as one rollout; what an environment wrote between them is not scored.

    Args:
        turns: in order; the prompt of each must begin with all tokens of the one before.

    Raises:
        ValueError: a prompt that begins otherwise, as one does that was tokenised again, with the first place where it
            differs; turns of which only some have a support.
    """
    _check_rollouts("turns", turns)
    if not turns:
        raise ValueError("turns must hold at least one rollout, got none")
    whole = turns[0]
    for i, turn in enumerate(turns[1:], start=1):
        count, asked = len(whole.tokens), turn.tokens[: turn.sampled.index(True)] if any(turn.sampled) else turn.tokens
        if asked[:count] != whole.tokens:
            pairs = enumerate(zip(asked, whole.tokens, strict=False))
            at = next((k for k, (a, b) in pairs if a != b), len(asked))
            raise ValueError(
                f"the prompt of turn {i} must begin with the {count} tokens of the turns before; it differs at {at}: "
                f"{asked[at : at + 4]} for {whole.tokens[at : at + 4]} (was it tokenised again?)"
            )
        if (turn.support is None) != (whole.support is None):
            raise ValueError(f"turns must all have a support or none; turn {i} is not as those before")
        support = None if whole.support is None or turn.support is None else whole.support + turn.support
        sampled = whole.sampled + turn.sampled[count:]
        whole = Rollout(turn.tokens, sampled, whole.logprobs + turn.logprobs, support, turn.finish)
    return whole


def pack(
    rollouts: Sequence[Rollout],
    how: Sampling,
    group_ids: Tensor,  # [N]
    rewards: Tensor | None = None,  # [N]
) -> Packed:
    """The rollouts as a :class:`trajkern.PackedBatch` and the head's arguments.

    Args:
        rollouts: N of them, of one sampling.
        how: of :func:`sampling`.
        group_ids: int64 or int32 ``[N]``, equal for the completions of a prompt.
        rewards: float ``[N]``.

    Returns:
        ``batch``, with ``sampler_logprobs`` (float32 ``[T]``) and a loss mask of the sampled tokens; and ``head``:
        ``temperature`` and, where the rollouts have it, ``sampling_support`` (ids ``[E]``, offsets ``[P+1]``, int64) of
        the batch's pairs. Both on the CPU; ``.to(device)`` moves them.

    Raises:
        TypeError, ValueError: rollouts of which only some have a support, an id twice in one; else as the batch does.
    """
    _check_rollouts("rollouts", rollouts)
    check_instance("how", how, Sampling)
    lengths = [len(x.tokens) for x in rollouts]
    mask = torch.tensor(list(chain.from_iterable(x.sampled for x in rollouts)), dtype=torch.bool, device="cpu")
    logprobs = torch.zeros(sum(lengths), dtype=torch.float32, device="cpu")
    logprobs[mask] = torch.tensor(
        list(chain.from_iterable(x.logprobs for x in rollouts)), dtype=torch.float32, device="cpu"
    )
    batch = PackedBatch(
        torch.tensor(list(chain.from_iterable(x.tokens for x in rollouts)), dtype=torch.int64, device="cpu"),
        torch.tensor([0, *accumulate(lengths)], device="cpu"),
        mask,
        group_ids,
        rewards,
        sampler_logprobs=logprobs,
    )
    with_support = [i for i, x in enumerate(rollouts) if x.support is not None]
    if with_support and len(with_support) < len(rollouts):
        without = min(set(range(len(rollouts))) - set(with_support))
        raise ValueError(f"rollouts must all have a support or none; {with_support[0]} has one and {without} has none")
    head: dict[str, Any] = {"temperature": how.temperature}
    if with_support:
        head["sampling_support"] = _flat([ids for x in rollouts for ids in x.support or ()])
    return Packed(batch, head)


def _rollout(
    where: str,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[Any],
    masks: Sequence[Sequence[int]] | None,
    finish: str | None,
    how: Sampling,
) -> Rollout:
    """What came, checked against itself."""
    for name, ids in (("token_ids", tokens), ("prompt_token_ids", prompt)):
        if not isinstance(ids, Sequence) or not all(type(x) is int and x >= 0 for x in ids):
            raise ValueError(f"{where} must have {name} that are integers of at least 0; got {_shortened(ids)}")
    if finish in CUT_SHORT:
        raise ValueError(f"{where} must have been ended by the policy or its length; its finish reason is {finish!r}")
    if not prompt:
        raise ValueError(f"{where} must have a prompt of at least one token, which predicts the first; it has none")
    if len(logprobs) != len(tokens):
        raise ValueError(f"{where} must have a log-prob a token; it has {len(logprobs)} for {len(tokens)} tokens")
    for i, x in enumerate(logprobs):
        if not isinstance(x, (int, float)) or not math.isfinite(x) or not MINUS_INFINITY < x <= ROUNDING:
            hint = ": are they logits?" if isinstance(x, (int, float)) and x > 0 else ""
            raise ValueError(f"{where} must have finite log-probs; that of token {i} of {len(tokens)} is {x}{hint}")
    if how.replay and how.cuts and masks is None:
        raise ValueError(
            f"{where} must have a sampling mask, as {', '.join(how.cuts)} cut the distribution; it has none "
            "(return_sampling_mask asks the engine for it, and replay=False does without)"
        )
    support = [list(x) for x in masks] if how.replay and masks is not None else None
    if support is not None:
        if len(support) != len(tokens):
            raise ValueError(f"{where} must have a sampling mask a token; it has {len(support)} for {len(tokens)}")
        for i, (token, ids) in enumerate(zip(tokens, support, strict=True)):
            if token not in ids:
                raise ValueError(
                    f"{where} must have drawn each token from its mask; token {i} is {token}, not in {ids[:8]}"
                )
    sampled = [False] * len(prompt) + [True] * len(tokens)
    return Rollout([*prompt, *tokens], sampled, list(logprobs), support, str(finish))


def _check_rollouts(name: str, rollouts: Any) -> None:
    if not isinstance(rollouts, Sequence):
        raise TypeError(f"{name} must be a sequence of rollouts, got {describe(rollouts)}")
    for i, x in enumerate(rollouts):
        check_instance(f"{name}[{i}]", x, Rollout)
        for field in ("tokens", "sampled", "logprobs"):
            if not isinstance(getattr(x, field), (list, tuple)):
                raise TypeError(f"{name}[{i}].{field} must be a list, got {describe(getattr(x, field))}")
        written = sum(map(bool, x.sampled))
        if len(x.sampled) != len(x.tokens) or len(x.logprobs) != written:
            raise ValueError(
                f"{name}[{i}] must have a flag a token and a log-prob each sampled one; got {len(x.tokens)} tokens, "
                f"{len(x.sampled)} flags, {written} of them True, and {len(x.logprobs)} log-probs"
            )


def _check_count(name: str, count: int, how: Sampling) -> None:
    if count == 0 or count % how.n:
        raise ValueError(f"{name} must have {how.n} completions a prompt, as n asks; {count} came")


def _of_token(step: Mapping[int, Any] | None, token: int) -> Any:
    entry = (step or {}).get(token)
    return None if entry is None else entry.logprob


def _lists(ids: Sequence[Any], offsets: Sequence[int] | None) -> Sequence[Sequence[int]]:
    if offsets is None:
        return ids
    return [ids[begin:end] for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]


def _openai_logprobs(where: str, logprobs: Mapping[str, Any] | None) -> list[Any]:
    """Of completions' lists, or of chat's entries."""
    found = logprobs.get("token_logprobs", logprobs.get("content")) if isinstance(logprobs, Mapping) else None
    if not isinstance(found, Sequence):
        raise ValueError(f"{where} must have log-probs, which logprobs asks for; it has {logprobs}")
    return [x["logprob"] if isinstance(x, Mapping) else x for x in found]


def _over_masks(logprobs: Sequence[Any], masks: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[Any]:
    """SGLang's log-probs over the masks, of the sampled token or of the whole of each."""
    if not logprobs or not isinstance(logprobs[0], Sequence):
        return list(logprobs)
    entries = zip(logprobs, masks, tokens, strict=False)
    return [dict(zip(ids, values, strict=False)).get(token) for values, ids, token in entries]


def _flat(support: list[list[int]]) -> tuple[Tensor, Tensor]:  # -> [E], [P+1]
    offsets = torch.tensor([0, *accumulate(len(ids) for ids in support)], device="cpu")
    ids = torch.tensor(list(chain.from_iterable(support)), dtype=torch.int64, device="cpu")
    pair = torch.repeat_interleave(torch.arange(len(support), device="cpu"), offsets.diff())
    together = torch.stack((pair, ids), 1).unique(dim=0, return_counts=True)
    if bool((together[1] > 1).any()):
        at, token = together[0][together[1] > 1][0].tolist()
        raise ValueError(f"a support must hold each id once; that of sampled token {at} holds {token} more often")
    return ids, offsets


def _shortened(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"
