"""Structures from outside: what engines, servers and host trainers hand over, wrong at one place after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tests.attack import answers, host_calls, hosts
from tests.attack.case import Case
from tests.attack.mutated import GONE, Mutation
from tests.attack.target import Target, same, target_cases
from tests.integrations.engine_outputs import CHOICE, CUT, PLAIN, PROCESSED, PROMPT, sglang_response, vllm_output
from trajkern.integrations import engines


def cases() -> Iterator[Case]:
    for target in (*_of_engines(), *hosts.targets(), *host_calls.targets()):
        yield from target_cases(target)
    yield from answers.cases()


SECOND = {**CHOICE, "index": 1, "token_ids": [4, 8], "sampling_mask": [[4], [8, 1]], "finish_reason": "length"}
SECOND["logprobs"] = {"token_logprobs": [-1.0, -2.0]}


def _of_engines() -> Iterator[Target]:
    how = engines.sampling({**CUT, "n": 2}, **PROCESSED)
    without = engines.sampling({**CUT, "n": 2}, **PROCESSED, replay=False)
    pair, words = (
        [CHOICE, SECOND],
        ("completion", "request", "choice", "log-prob", "log-probs", "finish reason", "mask"),
    )
    more: dict[str, Any] = {"words": words, "another": _other_rollouts, "right": _right}
    for flat in (False, True):
        output = vllm_output(pair, flat=flat)
        for sampled, unread in ((how, ("request_id",)), (without, ("request_id", "sampling_mask"))):
            call = partial(_read, engines.from_vllm, sampled)
            for structure in (output, [output, output])[: 1 + sampled.replay]:
                optional = ("index", "offsets")
                yield Target("engines.from_vllm", call, structure, "outputs", unread=unread, optional=optional, **more)
    chat = [{**x, "logprobs": {"content": [{"logprob": p} for p in x["logprobs"]["token_logprobs"]]}} for x in pair]
    for choices in (pair, chat):
        for sampled, unread in ((how, ()), (without, ("sampling_mask",))):
            call, structure = partial(_read, engines.from_openai, sampled), {"choices": choices}
            yield Target("engines.from_openai", call, structure, "response", unread=unread, optional=("index",), **more)
    one = engines.sampling(CUT, **PROCESSED)
    prompted = {"choices": [{k: v for k, v in CHOICE.items() if k != "prompt_token_ids"}]}
    more["words"] = (*words, "prompt_token_ids")
    yield Target("engines.from_openai", lambda x: engines.from_openai(prompted, one, x), PROMPT, "prompt", **more)
    for whole in (False, True):
        structure = [sglang_response(x, whole) for x in pair]
        call = partial(_read, engines.from_sglang, how)
        more |= {"alike": _behind_masks, "optional": ("output_ids",), "unread": ("matched",)}
        yield Target("engines.from_sglang", call, structure, "response", **more)
    first, second = engines.from_openai({"choices": pair}, how)
    after = first._replace(tokens=[*first.tokens, 1, 2], sampled=[*first.sampled, False, True])
    after = after._replace(tokens=after.tokens, logprobs=[-0.5], sampled=[False] * 6 + [True], support=[[2, 9]])
    more = {"words": ("turn",), "another": _other_rollouts, "optional": ("support",)}
    yield Target("engines.continued", engines.continued, [first, after], "turns", **more, right=_right_turns)
    ids, kept = torch.tensor([3, 3]), [first, second]
    more["words"] = ("group_ids",)
    call = partial(engines.pack, how=how, group_ids=ids)
    yield Target("engines.pack", call, kept, "rollouts", **more, right=_right_pack)
    more = {"another": _other_sampling, "right": _right_pack}
    yield Target("engines.pack", partial(engines.pack, kept, group_ids=ids), how, "how", **more)
    options = PLAIN | {"n": 2, "seed": 3, "min_tokens": 0, "bad_words": [], "logit_bias": {}, "watermark": False}
    options |= {"response_format": {"type": "text"}, "extra_args": {}, "tool_choice": "auto", "stop": ["x"]}
    call = partial(engines.sampling, logprobs_mode="processed_logprobs")
    idle = ("n", "min_tokens", "bad_words", "logit_bias", "watermark", "response_format", "extra_args", "tool_choice")
    more = {"unread": ("seed", "stop"), "optional": idle, "another": _other_options, "right": _right_options}
    yield Target("engines.sampling", call, options, "options", **more)


def _other_sampling(change: Mutation) -> bool:
    cuts = change.names == ("cuts",) and isinstance(change.after, tuple)
    return cuts or change.is_number_for_number or (change.names == ("temperature",) and change.after == 2**64)


def _other_options(change: Mutation) -> bool:
    return True


def _right_options(change: Mutation, result: Any, base: Any) -> bool:
    """An option of another value cuts, or is what it was; a temperature or a number of completions is what was said."""
    name, cuts = change.path[0], result.cuts
    if name in ("temperature", "n") and change.after not in (None, GONE):
        return getattr(result, name) == change.after and type(getattr(result, name)) in (int, float)
    return set(cuts) <= {name} and type(result.n) is int and result._replace(cuts=(), n=2) == base


def _read(function: Callable[..., Any], how: engines.Sampling, structure: Any) -> Any:
    return function(structure, how)


def _behind_masks(change: Mutation) -> bool:
    """SGLang's log-probs before the cut and its texts, where masks have their own; an id of a mask of probability 0."""
    if "output_token_sampling_logprobs" in change.names:
        return change.after == -math.inf and change.path[-1] == 1
    if "output_token_logprobs" not in change.names:
        return False
    at = change.path[change.path.index("output_token_logprobs") + 1 :]
    entry = isinstance(change.after, tuple) and len(change.after) > 1 and change.after[1] == change.before[1]
    return at[1:] in ((0,), (2,)) or (len(at) == 1 and entry)


def _other_rollouts(change: Mutation) -> bool:
    """Whether what stands there may be meant: also other prompts, texts and masks, and more or fewer requests."""
    name = change.names[-1] if change.names else ""
    if name in ("finish_reason", "type", "finish") and isinstance(change.after, str):
        return change.after not in ("", "abort", "error")
    if not isinstance(change.after, (list, tuple)) or not isinstance(change.before, (list, tuple)):
        return change.is_number_for_number
    ids = name == "prompt_token_ids" or (change.path and isinstance(change.path[-1], int))
    return bool(change.after) and (not change.path or ids or name in ("prompt_token_ids",))


def _right(change: Mutation, result: Any, base: Any) -> bool:
    """Whether all rollouts are legal, and those of which nothing was changed as they were."""
    if not all(map(_is_legal, result)):
        return False
    if len(result) != len(base):  # more or fewer requests
        return not change.path and all(any(same(x, y) for y in base) for x in result)
    changed = sum(not same(x, y) for x, y in zip(result, base, strict=True))
    return changed <= (2 if "outputs" not in change.names and "prompt_token_ids" in change.names else 1)


def _right_turns(change: Mutation, result: Any, base: Any) -> bool:
    return _is_legal(result)


def _right_pack(change: Mutation, result: Any, base: Any) -> bool:
    batch, was = result.batch, base.batch
    legal = bool(batch.sampler_logprobs.isfinite().all()) and int(batch.loss_mask.sum()) == int(was.loss_mask.sum())
    return legal and math.isfinite(result.head["temperature"])


def _is_legal(x: Any) -> bool:
    kinds = type(x) is engines.Rollout and all(type(t) is int and 0 <= t < 2**63 for t in x.tokens)
    flags = len(x.sampled) == len(x.tokens) and {*map(type, x.sampled)} <= {bool}
    numbers = all(type(p) in (int, float) and -9999 < p <= 1e-3 for p in x.logprobs)
    drawn = [t for t, sampled in zip(x.tokens, x.sampled, strict=True) if sampled]
    support = x.support is None or (
        len(x.support) == len(drawn)
        and all(type(i) is int and 0 <= i < 2**63 for ids in x.support for i in ids)
        and all(t in ids for t, ids in zip(drawn, x.support, strict=True))
    )
    return kinds and flags and numbers and len(drawn) == len(x.logprobs) and support and type(x.finish) is str
