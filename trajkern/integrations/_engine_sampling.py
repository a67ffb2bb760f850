"""What a request's sampling options make of the model's distribution: what the ops compute, and what is refused.

The names and their meaning are those of vLLM 0.33.0 and SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trajkern._checks import (
    as_number,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_number,
    describe,
    shown,
)

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")
MOST_COMPLETIONS = 2**31 - 1  # of a prompt
LEAST_TEMPERATURE = 0.01  # vLLM raises what is lower to it

# option -> what it is where it does nothing; None always does nothing
_CUTS: dict[str, tuple[Any, ...]] = {  # leave some tokens: a softmax over the support is the whole of their effect
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
}
_MOVES: dict[str, tuple[Any, ...]] = {  # change logits by something that no op is given
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_REFUSED: dict[str, tuple[Any, ...]] = {  # may do anything
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "extra_args": ({},),
    "vllm_xargs": ({},),
    "use_beam_search": (False,),
    "beam_width": (1,),
    "thinking_token_budget": (),
    "trace_decode_token_ids": (),
    "watermark": (False,),
    "watermarking": (False,),
}
_INDIFFERENT = frozenset(  # to the distribution
    "model prompt messages text input_ids tools user rid n seed sampling_seed max_tokens max_new_tokens "
    "max_completion_tokens stop stop_token_ids stop_regex ignore_eos no_stop_trim include_stop_str_in_output "
    "logprobs top_logprobs prompt_logprobs flat_logprobs logprob_token_ids echo stream stream_options stream_interval "
    "return_token_ids return_tokens_as_token_ids return_prompt_token_ids detokenize skip_special_tokens "
    "spaces_between_special_tokens output_kind skip_clone skip_reading_prefix_cache cache_salt priority request_id "
    "truncate_prompt_tokens add_special_tokens repetition_detection".split()
)
# What vLLM, and SGLang with --sampling-defaults model, take from the model's generation_config.json.
_FROM_MODEL = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class Sampling(NamedTuple):
    """How an engine sampled, as far as the ops are concerned; made by :func:`sampling`."""

    temperature: float
    n: int  # completions of each prompt
    replay: bool  # whether the tokens that were left to sample from are given to the ops
    cuts: tuple[str, ...]  # the options that left out tokens


def check_sampling(name: str, how: Any) -> None:
    """That :func:`sampling` made it, or could have."""
    check_instance(name, how, Sampling)
    check_number(f"{name}.temperature", how.temperature, low=LEAST_TEMPERATURE)
    check_count(f"{name}.n", how.n, low=1, high=MOST_COMPLETIONS)
    check_flag(f"{name}.replay", how.replay)
    if not isinstance(how.cuts, tuple) or not all(isinstance(x, str) and x in _CUTS for x in how.cuts):
        raise ValueError(f"{name}.cuts must be a tuple of options that cut, got {describe(how.cuts)}")


def sampling(options: Any, *, logprobs_mode: str, replay: bool = True) -> Sampling:
    """What the ops need to know of a request's sampling options; refuses those that no op computes.

    The ops compute softmax(z / temperature) over each token's ``sampling_support``. That is what an engine sampled from
    under a temperature, ``top_p``, ``top_k``, ``min_p`` and forbidden tokens, so its processed log-probs are theirs to
    rounding. A penalty or a bias moves single logits by what stands before a token.

    Args:
        options: a ``vllm.SamplingParams``, or the mapping that is sent: an OpenAI-style request, or SGLang's
            ``sampling_params``. A mapping must state temperature, top_p, top_k, min_p and the three penalties: servers
            take what is left out from the model's ``generation_config.json``.
        logprobs_mode: what the engine's log-probs are. "raw_logprobs": of the model's own logits, vLLM's default and
            SGLang's under ``SGLANG_RETURN_ORIGINAL_LOGPROB``. "processed_logprobs": after every option, vLLM's with
            ``logprobs_mode="processed_logprobs"``; and SGLang's own, which are after every option but the cuts.
        replay: whether the responses bring each token's sampling mask where tokens were cut. False: none is read, and
            the ops' softmax runs over the whole vocabulary, so their ratio to the sampler's log-probs is off by the
            mass that was cut; penalties and biases are then allowed beside processed log-probs, which are those of the
            policy that acted, though not of the model's.

    Raises:
        TypeError, ValueError: naming the option, what it must be and what it was; an option that is not known.
    """
    logprobs_mode = check_choice("logprobs_mode", logprobs_mode, LOGPROBS_MODES)
    replay = check_flag("replay", replay)
    raw = logprobs_mode == "raw_logprobs"
    given = _stated(options)
    unknown = given.keys() - {"temperature"} - _CUTS.keys() - _MOVES.keys() - _REFUSED.keys() - _INDIFFERENT
    if unknown:
        names = shown(sorted(map(str, unknown)))
        raise ValueError(f"options must be known sampling options, to know what they sample from; got {names}")
    for name in (*_FROM_MODEL, "n"):
        if given.get(name) is not None:
            (check_count if name in ("top_k", "n") else check_number)(name, given[name])
    temperature = as_number("temperature", given["temperature"])
    if not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be at least {LEAST_TEMPERATURE}, a greedy token has no log-prob; got {temperature}"
        )
    for name in _active(given, _REFUSED):
        raise ValueError(
            f"{name} must be left out: what it does to the distribution is not known; got {shown(given[name])}"
        )
    for name in _active(given, _MOVES):
        if replay or raw:
            raise ValueError(
                f"{name} must be left at what does nothing: it moves logits by what stands before a token, which no op "
                "computes (replay=False and processed log-probs allow it, off the model's policy); got "
                f"{shown(given[name])}"
            )
    cuts = tuple(_active(given, _CUTS))
    if raw and temperature != 1:
        raise ValueError(
            f"logprobs_mode must be 'processed_logprobs' with a temperature of {temperature}: "
            "raw log-probs are those of temperature 1"
        )
    if raw and replay and cuts:
        raise ValueError(
            f"logprobs_mode must be 'processed_logprobs' with {', '.join(cuts)}: raw log-probs are those of the whole "
            "vocabulary, and the replayed ones are not"
        )
    return Sampling(
        temperature,
        1 if given.get("n") is None else check_count("n", given["n"], low=1, high=MOST_COMPLETIONS),
        replay,
        cuts,
    )


def _stated(options: Any) -> dict[str, Any]:
    if isinstance(options, Mapping):
        missing = [name for name in _FROM_MODEL if options.get(name) is None]
        if missing:
            raise ValueError(
                f"options must state {', '.join(_FROM_MODEL)}, which servers else take from the model's "
                f"generation_config.json; missing: {', '.join(missing)}"
            )
        return dict(options)
    fields = getattr(options, "__struct_fields__", None)
    if fields is None or not hasattr(options, "temperature"):
        raise TypeError(f"options must be a mapping or a vllm.SamplingParams, got {type(options).__name__}")
    defaults = type(options)()
    public = [name for name in fields if not name.startswith("_")]
    changed = {name: x for name in public if (x := getattr(options, name)) != getattr(defaults, name)}
    return {**{name: getattr(options, name) for name in _FROM_MODEL}, **changed}


def _active(given: Mapping[str, Any], options: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [name for name, idle in options.items() if (x := given.get(name)) is not None and not _is_one_of(x, idle)]


def _is_one_of(x: Any, idle: tuple[Any, ...]) -> bool:
    try:
        return x in idle
    except (TypeError, ValueError, RuntimeError):  # of what does not compare, as arrays and tensors
        return False
