"""What vLLM 0.33.0 and SGLang 0.5.23 return, written down from their sources, and stand-ins for the two."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PROMPT = [5, 6]
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
PLAIN |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
CUT = {**PLAIN, "top_k": 3}
PROCESSED = {"logprobs_mode": "processed_logprobs"}
CHOICE: dict[str, Any] = {
    "index": 0,
    "prompt_token_ids": PROMPT,
    "token_ids": [7, 8, 9],
    "logprobs": {"token_logprobs": [-0.5, -0.25, 0.0]},
    "sampling_mask": [[7, 3], [1, 8, 2], [9]],
    "finish_reason": "stop",
}


def vllm_output(choices: list[dict[str, Any]], flat: bool = False) -> SimpleNamespace:
    """A ``RequestOutput`` of these choices; ``flat``: masks with offsets into one list."""
    outputs = []
    for x in choices:
        pairs = zip(x["token_ids"], x["logprobs"]["token_logprobs"], strict=True)
        steps = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in pairs]
        masks = SimpleNamespace(token_ids=x["sampling_mask"])
        if flat:
            offsets = [0]
            for ids in x["sampling_mask"]:
                offsets.append(offsets[-1] + len(ids))
            masks = SimpleNamespace(token_ids=sum(x["sampling_mask"], []), offsets=offsets)
        fields = {"index": x["index"], "token_ids": x["token_ids"], "logprobs": steps}
        outputs.append(SimpleNamespace(**fields, sampling_mask=masks, finish_reason=x["finish_reason"]))
    return SimpleNamespace(request_id="r7", prompt_token_ids=choices[0]["prompt_token_ids"], outputs=outputs)


def sglang_response(choice: dict[str, Any], whole: bool) -> dict[str, Any]:
    """``/generate``'s; ``whole``: log-probs of all of each mask."""
    tokens, found, masks = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["sampling_mask"]
    over = found
    if whole:
        over = [[p if i == t else -3.0 for i in ids] for t, p, ids in zip(tokens, found, masks, strict=True)]
    meta = {
        "output_token_logprobs": [(p - 0.1, t, None) for t, p in zip(tokens, found, strict=True)],
        "output_token_sampling_mask": masks,
        "output_token_sampling_logprobs": over,
        "finish_reason": {"type": "stop", "matched": 0},
    }
    return {"output_ids": tokens, "meta_info": meta, "prompt_token_ids": choice["prompt_token_ids"]}


class SamplingParams:
    """What is read of vLLM's."""

    __struct_fields__ = (*PLAIN, "n", "seed", "logprobs", "bad_words", "skip_clone", "novelty", "_bad_words_token_ids")
    __match_args__ = ()

    def __init__(self, **given: Any) -> None:
        defaults = {**PLAIN, "top_k": 0, "n": 1, "seed": None, "logprobs": None, "bad_words": None, "skip_clone": False}
        for name, x in {**defaults, "novelty": 0.0, "_bad_words_token_ids": None, **given}.items():
            setattr(self, name, x)


class StandIns:
    """``vllm.LLM`` and ``sglang.Engine`` around the example's model, with the arguments that the pages give them."""

    def __init__(self, local: ModuleType) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.model = local.CharacterModel(local.ModelConfig())
        self.local, self.calls = local, []

    def choices(self, prompt: list[int], params: dict[str, Any]) -> list[dict[str, Any]]:
        engine = SimpleNamespace(model=self.model)
        engine.choice = lambda *given: self.local.Engine.choice(engine, *given)
        return self.local.Engine.complete(engine, {**params, "prompt": prompt})

    def vllm(self) -> ModuleType:
        found, stand_ins = ModuleType("vllm"), self

        class LLM:
            def __init__(self, model: str, **options: Any) -> None:
                assert options["return_sampling_mask"] and options["logprobs_mode"] == "processed_logprobs"

            def generate(self, prompts: list[dict[str, Any]], params: SamplingParams) -> list[SimpleNamespace]:
                return [vllm_output(stand_ins.choices(x["prompt_token_ids"], vars(params))) for x in prompts]

            def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
                stand_ins.calls.append((method, kwargs))

            def reset_prefix_cache(self) -> bool:
                stand_ins.calls.append(("reset_prefix_cache", {}))
                return True

        found.LLM, found.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
        return found

    def sglang(self) -> ModuleType:
        found, stand_ins = ModuleType("sglang"), self

        class Engine:
            def __init__(self, model_path: str, **options: Any) -> None:
                pass

            def generate(self, *, input_ids: list[int], sampling_params: dict[str, Any], **asked: Any) -> list[Any]:
                assert asked == {"return_logprob": True, "return_sampling_mask": True}
                given = {**sampling_params, "max_tokens": sampling_params["max_new_tokens"]}
                choices = stand_ins.choices(input_ids, given)
                return [
                    {k: v for k, v in sglang_response(x, whole=False).items() if k != "prompt_token_ids"}
                    for x in choices
                ]

            def update_weights_from_tensor(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
                stand_ins.calls.append(("update_weights_from_tensor", dict(named_tensors)))

        found.Engine = Engine  # type: ignore[attr-defined]
        return found
