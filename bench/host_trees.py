"""Cases of trees that hosts make: a whole model's forward and backward on a tree, and on each rollout by itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._bench.case import Target, TimedCase
from trajkern._bench.recipes import Exact
from trajkern.integrations._host_tree import TreeRollouts
from trajkern.integrations._trl_tree import tree_rollouts
from trajkern.integrations.transformers import log_probs
from trajkern.testing.numerics import Outcome

SIZES = {"vocab_size": 4_096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
PROMPTS, PROMPT, TURNS, TURN = 2, 256, 4, 32
CONFIG = tk.PolicyLoss("grpo", aggregate="token_mean")


def _samples() -> list[dict[str, Any]]:
    """Of an AsyncGRPOTrainer of TRL: of each prompt two rollouts of a turn, and behind the second two of another."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        return torch.randint(SIZES["vocab_size"], (count,), generator=generator).tolist()

    samples = []
    for prompt in range(PROMPTS):
        context = drawn(PROMPT)
        for turn in range(TURNS):
            written = drawn(TURN)
            tokens = context + written
            samples.append(
                {
                    "input_ids": tokens,
                    "completion_mask": [0] * len(context) + [1] * TURN,
                    "old_log_probs": [-8.0] * len(tokens),
                    "advantage": 1.0 - turn,
                    "group_id": prompt,
                }
            )
            context = tokens if turn % 2 else context
    return samples


def _model(device: str, attention: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, max_position_embeddings=1_024)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device, torch.float32 if attention == "sdpa" else torch.bfloat16)


def _outcome(model: Any, logprobs: Tensor, rollouts: TreeRollouts) -> Outcome:
    """The loss and the gradient of the embedding, behind a backward through the whole model."""
    batch = rollouts.batch
    loss, _ = tk.policy_loss(
        logprobs,
        batch.old_logprobs,
        rollouts.advantages,
        batch.cu_seqlens,
        mask=batch.loss_mask,
        per_token=True,
        config=CONFIG,
    )
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {"loss": loss.detach(), "grad": model.get_input_embeddings().weight.grad}


def _of_trl(attention: str) -> Callable[[str], Exact]:
    def make(device: str) -> Exact:
        model, row = _model(device, attention), SimpleNamespace(samples=_samples())
        whole = tree_rollouts(row, device)

        def ours() -> Outcome:
            rollouts = tree_rollouts(row, device)
            logprobs = log_probs(model, rollouts.tree, rollouts.tokens, rollouts.loss_mask)
            return _outcome(model, logprobs[rollouts.tree.flat_index], rollouts)

        return Exact(
            op="trl.tree_rollouts",
            inputs={},
            ours=ours,
            eager=lambda: _outcome(model, log_probs(model, whole.batch), whole),
            bare=lambda: model(whole.tokens[None]).logits.sum().backward(),
            bytes=2 * sum(x.nbytes for x in model.parameters()),
            tolerance=1e-5 if attention == "sdpa" else 1e-2,
        )

    return make


def _case(attention: str, device: str, targets: tuple[Target, ...]) -> TimedCase:
    work = "forward + backward of a model; eager is each rollout by itself, the bare pass as many tokens in one row"
    return TimedCase(
        "trl.tree_rollouts",
        f"{work}; {attention}",
        f"{PROMPTS * TURNS} rollouts of {PROMPTS} prompts of {PROMPT} tokens",
        _of_trl(attention),
        targets,
        devices=(device,),
        outside="hosts",
    )


CASES = (
    (
        _case("sdpa", "cpu", (Target("fast", 1.5, "eager"),)),
        _case("sdpa", "cuda", ()),
        *((_case("flash_attention_2", "cuda", ()),) if importlib.util.find_spec("flash_attn") else ()),
    )
    if importlib.util.find_spec("transformers")
    else ()
)
