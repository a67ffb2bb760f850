"""A small random Llama and its tokenizer of bytes, of which two letters never are one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def tiny_llama(**changes: Any) -> tuple[Any, Any]:
    """Of transformers, in its training mode; ``changes`` are of its config."""
    transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(vocabulary), **config | changes))
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
