"""Trainers of TRL around a tiny model, and a batch as they hand it to their loss."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


SIZES = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 3,
    "learning_rate": 1e-2,
}


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def tiny(vocabulary: int = len(WORDS)) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(x))) for x in completions]


def words(completions: list[str]) -> list[list[str]]:
    return [x.split() for x in completions]


def won(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(x)) % 2) for x in words(completions)]


def action(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(w in "aeiou" for w in x)) for x in words(completions)]


def confidence(completions: list[str], **_: Any) -> list[float | None]:
    """None where the first word comes late in the alphabet."""
    return [None if not x or x[0] > "t" else sum(w < "m" for w in x) / 8 for x in words(completions)]


def similarity(completions: list[str], **_: Any) -> list[float | None]:
    return [None if not x or x[-1] > "t" else sum(w < "k" for w in x) / 8 for x in words(completions)]


REWARDS = {
    "rewards": [won, action, confidence, similarity],
    "reward_weights": [1.0, 0.0, 0.0, 0.0],
    "columns": {
        "fine": [True, False, True, True] * 2,
        "reference": ["a b", "c", "d e f", "g"] * 2,
        "belief_target": ["a", "b c", "d", "e"] * 2,
    },
}


def spoken(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that anyone can repeat: a turn, for most also what a tool said, and a second turn."""
    rank, size = trainer.accelerator.process_index, trainer.num_generations
    rows: list[tuple[list[int], list[int]]] = []
    for i, prompt in enumerate(prompts):
        number = (rank * len(prompts) + i) % size
        g = torch.Generator().manual_seed(sum(prompt.encode()) + 1000 * trainer.state.global_step + 17 * number)
        lengths = torch.randint(1, 4, (3,), generator=g).tolist()
        mask = [1] * lengths[0] + ([0] * lengths[1] + [1] * lengths[2] if number else [])
        rows.append((torch.randint(3, 29, (len(mask),), generator=g).tolist(), mask))
    ids = trainer.processing_class(text=prompts)["input_ids"]
    return {
        "prompt_ids": ids,
        "completion_ids": [x for x, _ in rows],
        "logprobs": None,
        "env_mask": [x for _, x in rows],
    }


def trainer_of(
    folder: Path,
    kind: str = "GRPO",
    model: Any = None,
    processing: Any = None,
    rewards: Any = length_reward,
    columns: dict[str, list[Any]] | None = None,
    rollout_func: Any = None,
    **options: Any,
) -> Any:
    """A trainer of a model that is as random as its seed, on eight prompts with further columns."""
    if model is None:  # a trainer with a reference loads it from where the model came from
        tiny().save_pretrained(folder / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    data = datasets.Dataset.from_dict(
        {"prompt": ["a b c", "d e", "f", "g h i j"] * 2, "n": list(range(8)), **(columns or {})}
    )
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        bf16=False,
        save_strategy="no",
        **SIZES | options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=data,
            processing_class=processing or tokenizer(),
            **({} if rollout_func is None else {"rollout_func": rollout_func}),
        )


def examples_of(trainer: Any) -> list[dict[str, Any]]:
    """Two prompts, each as often as it is rolled out."""
    return [dict(trainer.train_dataset[n]) for n in (0, 1) for _ in range(4)]


def generated(trainer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(examples_of(trainer))


def batch(sequence_weights: bool = False) -> dict[str, Tensor]:
    """Five ragged completions, one without a token; old log-probs near the model's."""
    g = torch.Generator().manual_seed(4)
    rows, prompt, length = 5, 3, 7
    mask = (torch.arange(length) < torch.tensor([7, 4, 0, 6, 1])[:, None]).long()
    tools = torch.ones_like(mask)
    tools[0, 2:4] = 0
    normal = partial(torch.randn, generator=g)
    weight = normal(rows, 1) if sequence_weights else normal(rows, length) * mask * tools
    old = -3.4 + 0.3 * normal(rows, length)
    return {
        "prompt_ids": torch.randint(3, 29, (rows, prompt), generator=g),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, 29, (rows, length), generator=g),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0]),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.2 * normal(rows, length),
        "sampling_per_token_logps": old + 0.3 * normal(rows, length),
        "importance_sampling_ratio": (0.4 * weight).exp(),
        "num_items_in_batch": torch.tensor(23.0),
        "old_logps": (old * mask).sum(1),
    }
