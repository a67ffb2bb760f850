"""An engine's rollouts to the loss, and what top-p and top-k do to the ratios, with and without their sampling masks.

A server on this machine speaks the OpenAI protocol around the built-in tiny model, weights rounded to bfloat16; each
choice has its tokens' sampling masks, as vLLM's ``/inference/v1/generate`` gives them. ``python examples/engine.py``
asks it for rollouts, packs them, compares its log-probs with the trained model's, and takes their loss. It prints:

    without replay  81.0 % of the ratios are outside [0.9, 1.1]
    with replay      0.0 % of the ratios are outside [0.9, 1.1]
"""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations import engines
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig

SHARPNESS = 2  # of the logits, towards a trained model's
PROMPTS, ANSWERS = ("2+3=", "9-4=", "7*6=", "8+8="), 8
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0, **PENALTIES, "n": ANSWERS, "max_tokens": 24}


class Engine(ThreadingHTTPServer):
    """A copy of the model behind a url."""

    def __init__(self, model: CharacterModel) -> None:
        super().__init__(("127.0.0.1", 0), Completions)
        self.model = copy.deepcopy(model)
        for weight in self.model.parameters():
            weight.data = weight.data.bfloat16().float()
        self.url = f"http://127.0.0.1:{self.server_port}/v1/completions"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        prompt, generator = request["prompt"], torch.Generator().manual_seed(sum(request["prompt"]))
        cache = self.model.start(request["n"], len(prompt) + request["max_tokens"])
        step, steps = torch.tensor([prompt] * request["n"]), []
        for _ in range(request["max_tokens"]):
            logits = self.model.extend(step, torch.ones_like(step, dtype=torch.bool), cache) / request["temperature"]
            kept = cut(logits, request["top_p"], request["top_k"])
            step = kept.softmax(-1).multinomial(1, generator=generator)
            masks = [row.isfinite().nonzero()[:, 0].tolist() for row in kept]
            steps.append((step[:, 0].tolist(), kept.log_softmax(-1).gather(1, step)[:, 0].tolist(), masks))
        return [self.choice(i, prompt, [[part[i] for part in x] for x in steps]) for i in range(request["n"])]

    def choice(self, index: int, prompt: list[int], drawn: list[list[Any]]) -> dict[str, Any]:
        ended = next((k for k, (token, *_) in enumerate(drawn, 1) if token == self.model.eos), None)
        tokens, logprobs, masks = (list(x) for x in zip(*drawn[:ended], strict=True))
        ids = {"prompt_token_ids": prompt, "token_ids": tokens, "sampling_mask": masks}
        found = {"logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop" if ended else "length"}
        return {"index": index, "text": self.model.spelling(tokens), **ids, **found}


class Completions(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps({"choices": self.server.complete(request)}).encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def cut(logits: Tensor, top_p: float, top_k: int) -> Tensor:  # [N, V]
    """-inf outside the fewest of the top-k tokens that hold top_p of their mass."""
    values, ids = logits.topk(top_k)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values.masked_fill(before >= top_p, -torch.inf))


def main(seed: int = 0) -> list[Tensor]:
    """The ratios that are printed, the trainer's to the engine's probabilities, one a sampled token."""
    torch.manual_seed(seed)
    model = CharacterModel(ModelConfig())
    model.head.weight.data *= SHARPNESS
    engine, how = Engine(model), engines.sampling(SAMPLING, logprobs_mode="processed_logprobs")
    requests = [{**SAMPLING, "logprobs": 0, "return_token_ids": True, "prompt": model.encode(x)} for x in PROMPTS]
    groups = engines.collect(lambda request: engines.from_openai(engines.post(engine.url, request), how), requests)
    engine.shutdown()

    rollouts = [rollout for group in groups for rollout in group]
    rewards = torch.tensor([float("1" in model.spelling(x.tokens)) for x in rollouts])
    batch, head = engines.pack(rollouts, how, torch.arange(len(groups)).repeat_interleave(ANSWERS), rewards)
    rows, targets, tokens, cu_seqlens = batch.head_inputs()
    arguments = {**model.head_arguments(), "hidden": model.hidden(batch.tokens, batch.cu_seqlens, rows), **head}
    sampler, ratios = batch.sampler_logprobs[tokens], []
    for name, left_out in (("without replay", {"sampling_support": None}), ("with replay", {})):
        new = tk.linear_logprobs(targets=targets, **{**arguments, **left_out})
        ratios.append((new - sampler).exp().detach())
        outside = 100 * ((ratios[-1] < 0.9) | (ratios[-1] > 1.1)).float().mean()
        print(f"{name:<14} {outside:5.1f} % of the ratios are outside [0.9, 1.1]")

    advantages = tk.group_advantages(batch.rewards, batch.group_ids)
    given = {"targets": targets, "old_logprobs": sampler, "advantages": advantages, "cu_seqlens": cu_seqlens}
    loss, _ = tk.linear_policy_loss(**given, **arguments, config=tk.PolicyLoss("grpo"))
    loss.backward()
    return ratios


if __name__ == "__main__":
    main()
