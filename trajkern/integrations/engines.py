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
from trajkern._checks import describe, shown
from trajkern.integrations._engine_http import post
from trajkern.integrations._engine_requests import EngineFailure, collect
from trajkern.integrations._engine_rollouts import Rollout, check_logprobs, check_rollouts, rollout_of
from trajkern.integrations._engine_sampling import Sampling, check_sampling, sampling
from trajkern.integrations._outside import Outside, is_list

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
        TypeError, ValueError: naming the request and the completion: what is of another kind, a completion that the
            policy did not end (still running, aborted, an error), other completions than asked for, fewer log-probs or
            masks than tokens, a log-prob that is missing, not finite or positive, a sampled token outside its mask, no
            mask where tokens were cut.
    """
    check_sampling("how", how)
    given = Outside("outputs", outputs)
    if not is_list(outputs) and given.get("outputs") is None:
        raise given.refuse("a RequestOutput of vLLM, which has outputs, or a list of them")
    rollouts = []
    for i, output in enumerate(given.sequence() if is_list(outputs) else [outputs]):
        name = getattr(output, "request_id", i)
        request = Outside(f"request {name if isinstance(name, str) else shown(name)}", output)
        prompt = request.at("prompt_token_ids")
        completions = _by_index(request.whose, request.at("outputs").each())
        if len(completions) != how.n:
            raise ValueError(f"{request.name} must have {how.n} completions, as n asks; {len(completions)} came")
        for index, found in completions:
            x = Outside(f"{request.whose}, completion {index}", found.value)
            tokens = x.at("token_ids")
            logprobs = _of_steps(x.at("logprobs", "which SamplingParams(logprobs=0) asks for"), tokens.ids())
            mask = x.get("sampling_mask") if how.replay else None
            rollouts.append(
                rollout_of(x.whose, prompt, tokens, logprobs, mask and _lists(mask), x.get("finish_reason"), how)
            )
    if not rollouts:
        raise ValueError("outputs must hold at least one request, got none")
    return rollouts


def from_openai(response: Mapping[str, Any], how: Sampling, prompt: Sequence[int] | None = None) -> list[Rollout]:
    """The rollouts of an OpenAI-style response: of completions, chat completions, or vLLM's ``/inference/v1/generate``.

    Token ids must be in it, so ask vLLM's server for ``return_token_ids``, with ``logprobs: 0`` (completions) or
    ``logprobs: true`` (chat): text that is tokenised again may be other tokens. Its sampling masks come from
    ``/inference/v1/generate`` alone.

    Args:
        response: the decoded JSON.
        how: of :func:`sampling`.
        prompt: the prompt's token ids where the response has no ``prompt_token_ids``; a response to several prompts
            must have each one's.

    Raises:
        TypeError, ValueError: as :func:`from_vllm`, naming the choice; and a response that has an error, or no token
            ids.
    """
    check_sampling("how", how)
    if not isinstance(response, Mapping):
        raise TypeError(f"response must be the decoded JSON of a response, got {describe(response)}")
    choices = response.get("choices")
    if not is_list(choices) or not all(isinstance(x, Mapping) for x in choices) or not choices:
        raise ValueError(f"response must have choices; got {shown(response)}")
    _check_count("response", len(choices), how)
    given, rollouts = _given_prompt(prompt), []
    whole = Outside("response", response)
    for index, found in _by_index(whole.whose, whole.at("choices").each()):
        x = Outside(f"choice {index}", found.value)
        why = "which return_token_ids asks for"
        asked = x.get("prompt_token_ids")
        if asked is None:
            shared = whole.get("prompt_token_ids") or given
            asked = x.at("prompt_token_ids", why) if shared is None else _of_all(shared, len(choices), how)
        tokens, logprobs = x.at("token_ids", why), _openai_logprobs(x)
        masks, finish = x.get("sampling_mask"), x.get("finish_reason")
        rollouts.append(rollout_of(x.whose, asked, tokens, logprobs, masks, finish, how))
    return rollouts


def from_sglang(response: Any, how: Sampling, prompt: Sequence[int] | None = None) -> list[Rollout]:
    """The rollouts of SGLang's ``Engine.generate`` or ``/generate``: one response, or the list that ``n`` gives.

    ``return_logprob=True`` asks for the log-probs; ``return_sampling_mask=True`` for the sampling masks, with which the
    log-probs are those over them (``output_token_sampling_logprobs``, in either ``sampling_logprobs_mode``).

    Args:
        response: as returned, or its decoded JSON.
        how: of :func:`sampling`.
        prompt: the prompt's token ids where ``return_prompt_token_ids`` was not set; responses to several prompts must
            have each one's.

    Raises:
        TypeError, ValueError: as :func:`from_vllm`, naming the response's number.
    """
    check_sampling("how", how)
    if not isinstance(response, Mapping) and not is_list(response):
        raise TypeError(f"response must be a response of SGLang, or a list of them; got {describe(response)}")
    responses = [response] if isinstance(response, Mapping) else response
    _check_count("response", len(responses), how)
    given, rollouts = _given_prompt(prompt), []
    for i, value in enumerate(responses):
        x = Outside(f"response {i}", value)
        x.mapping()
        meta = x.get("meta_info")
        entries = None if meta is None else meta.get("output_token_logprobs")
        if meta is None or entries is None:
            raise ValueError(
                f"{x.whose} must have output_token_logprobs, which return_logprob asks for; got {shown(value)}"
            )
        tokens, found = _drawn(x, entries)
        asked = x.get("prompt_token_ids")
        if asked is None:
            if given is None:
                raise ValueError(
                    f"{x.whose} must have prompt_token_ids, or the call its prompt; it has {shown(set(value))}"
                )
            asked = _of_all(given, len(responses), how)
        masks = meta.get("output_token_sampling_mask") if how.replay else None
        if masks is not None:
            found = _over_masks(meta.get("output_token_sampling_logprobs"), masks.each(), tokens.ids())
        reason = meta.get("finish_reason")
        finish = None if reason is None else reason.at("type")
        rollouts.append(rollout_of(x.whose, asked, tokens, found, masks, finish, how))
    return rollouts


def continued(turns: Sequence[Rollout]) -> Rollout:
    """The turns of one trajectory as one rollout; what an environment wrote between them is not scored.

    Args:
        turns: in order; the prompt of each must begin with all tokens of the one before.

    Raises:
        ValueError: a prompt that begins otherwise, as one does that was tokenised again, with the first place where it
            differs; turns of which only some have a support.
    """
    check_rollouts("turns", turns)
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
        TypeError, ValueError: rollouts of which only some have a support, what is of another kind in one or
            disagrees with the rest of it; else as the batch does.
    """
    check_rollouts("rollouts", rollouts)
    check_sampling("how", how)
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


def _check_count(name: str, count: int, how: Sampling) -> None:
    if count == 0 or count % how.n:
        raise ValueError(f"{name} must have {how.n} completions a prompt, as n asks; {count} came")


def _given_prompt(prompt: Sequence[int] | None) -> Outside | None:
    if prompt is None:
        return None
    given = Outside("prompt", prompt)
    given.ids()
    return given


def _of_all(prompt: Outside, count: int, how: Sampling) -> Outside:
    """The prompt of a completion that names none: the one that is known, where there is no other."""
    if count > how.n:
        raise ValueError(
            f"{prompt.name} must be the one prompt of all completions; {count} came, of {count // how.n} prompts where "
            f"n is {how.n}, and not each has its prompt_token_ids"
        )
    return prompt


def _by_index(whose: str, completions: Sequence[Outside]) -> list[tuple[int, Outside]]:
    """Each with its index, or its place where none has one, in their order."""
    found = dict[int, Outside]()
    for i, x in enumerate(completions):
        index = x.get("index")
        number = i if index is None else index.count()
        if number in found or number >= len(completions):
            raise ValueError(
                f"{x.name} must have an index of its own below {len(completions)} in {whose}; got {number}"
            )
        found[number] = x
    return sorted(found.items())


def _of_steps(steps: Outside, tokens: Sequence[int]) -> list[Any]:
    """vLLM's log-probs of the sampled tokens, None where a step has none of its own."""
    found: list[Any] = []
    for i, step in enumerate(steps.each()):
        entry = step.mapping().get(tokens[i]) if i < len(tokens) and step.value is not None else None
        found.append(None if entry is None else step._replace(value=entry).at("logprob").value)
    return found


def _lists(mask: Outside) -> Outside:
    """vLLM's masks, a list of ids a token; of ``offsets`` into one list, its parts."""
    ids, offsets = mask.at("token_ids"), mask.get("offsets")
    if offsets is None:
        return ids
    bounds, flat = offsets.ids(), ids.ids()
    if bounds[:1] != [0] or bounds[-1] != len(flat) or bounds != sorted(bounds):
        raise ValueError(f"{offsets.name} must rise from 0 to the {len(flat)} token_ids; got {shown(bounds)}")
    return ids._replace(value=[flat[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)])


def _openai_logprobs(choice: Outside) -> list[Any]:
    """Of completions' lists, or of chat's entries."""
    found = choice.get("logprobs")
    if found is None or not isinstance(found.value, Mapping):
        raise ValueError(
            f"{choice.whose} must have log-probs, which logprobs asks for; its logprobs are "
            f"{shown(found and found.value)}"
        )
    if (numbers := found.get("token_logprobs")) is not None:
        return list(numbers.sequence())
    return [x.at("logprob").value for x in found.at("content").each()]


def _drawn(response: Outside, entries: Outside) -> tuple[Outside, list[Any]]:
    """SGLang's tokens, and their log-probs: entries of a log-prob, an id and a text."""
    drawn, found = [], []
    for x in entries.each():
        if len(x.sequence()) < 2:
            raise ValueError(f"{x.name} must have a log-prob and a token id, got {shown(x.value)}")
        found.append(x.value[0])
        drawn.append(x.value[1])
    ids = entries._replace(value=drawn)
    tokens = response.get("output_ids") or ids
    if ids.ids() != tokens.ids():
        raise ValueError(
            f"{response.whose} must have log-probs of its output_ids {shown(tokens.value[:8])}; output_token_logprobs "
            f"are of {shown(drawn[:8])}"
        )
    return tokens, found


def _over_masks(logprobs: Outside | None, masks: Sequence[Outside], tokens: Sequence[int]) -> list[Any]:
    """SGLang's log-probs over the masks, of the sampled token or of the whole of each."""
    values = [] if logprobs is None else logprobs.each()
    whole = any(is_list(x.value) for x in values)
    if not whole or not len(values) == len(masks) == len(tokens):
        return [x.value for x in values]  # their number is checked with the others'
    found = []
    for x, mask, token in zip(values, masks, tokens, strict=True):
        check_logprobs(x.name, x.sequence(), len(mask.ids()), low=-math.inf)
        found.append(dict(zip(mask.value, x.value, strict=True)).get(token))
    return found


def _flat(support: list[list[int]]) -> tuple[Tensor, Tensor]:  # -> [E], [P+1]
    offsets = torch.tensor([0, *accumulate(len(ids) for ids in support)], device="cpu")
    ids = torch.tensor(list(chain.from_iterable(support)), dtype=torch.int64, device="cpu")
    return ids, offsets
