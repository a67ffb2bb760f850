"""Cases with the head of a published model: its width and its vocabulary."""

from __future__ import annotations

from functools import partial

import torch

from trajkern._bench import head, logprob
from trajkern._bench.case import TimedCase

# name -> (hidden size, vocabulary), from each model's published configuration
MODELS = {
    "smollm2-135m": (576, 49_152),
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-4b": (2560, 151_936),
    "qwen3-8b": (4096, 151_936),
    "qwen3-32b": (5120, 151_936),
    "llama3-8b": (4096, 128_256),
    "llama3-70b": (8192, 128_256),
    "gemma3-4b": (2560, 262_208),
    "gpt-oss-20b": (2880, 201_088),
    "deepseek-v3": (7168, 129_280),
}
ROWS = {"cpu": 128, "cuda": 8192}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def cases(model: str, device: str, rows: int | None = None) -> tuple[TimedCase, ...]:
    """:func:`sized` for the head of a model."""
    return sized(f"{model}: ", rows or ROWS[device], *MODELS[model], device, DTYPE[device])


def sized(label: str, rows: int, width: int, vocabulary: int, device: str, dtype: torch.dtype) -> tuple[TimedCase, ...]:
    """Log-probs and their gradient from the logits, log-probs and the whole loss from the hidden states."""
    make = partial(logprob.problem, rows=rows, vocabulary=vocabulary, dtype=dtype)
    logits = f"{label}{rows:,} × {vocabulary:,} {str(dtype)[6:]}"
    hidden = f"{label}{rows:,} × {width:,} × {vocabulary:,} {str(dtype)[6:]}"
    size = (rows, width, vocabulary, dtype)
    case = partial(TimedCase, devices=(device,))
    return (
        case("token_logprobs", "forward", logits, make("token_logprobs")),
        case(
            "token_logprobs", "forward + in-place backward", logits, make("token_logprobs", backward=True, inplace=True)
        ),
        case("token_stats", "forward + backward, entropy", logits, make("token_stats", backward=True)),
        case("linear_logprobs", "forward", hidden, head.forward_problem(*size)),
        case("linear_policy_loss", "forward + backward", hidden, head.loss_problem(*size)),
    )
