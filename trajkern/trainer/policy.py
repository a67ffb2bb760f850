"""What the trainer asks of a language model, and the models it knows by name."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from trajkern.trainer import tokenizer
from trajkern.trainer.model import ModelConfig, Transformer
from trajkern.trainer.tasks import Question


class Policy(Protocol):
    """A causal language model with its tokenizer.

    Calling it runs packed trajectories; ``start`` and ``extend`` sample through a key-value cache (an object with
    ``repeat(copies)``, which repeats every sequence in place of itself).
    """

    eos: int

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor: ...  # [T], [N+1], [P] -> [P, V]
    def start(self, count: int, room: int) -> Any: ...
    def extend(self, tokens: Tensor, keep: Tensor, cache: Any) -> Tensor: ...  # [N, S], [N, S] -> [N, V]
    def prompt(self, question: Question) -> list[int]: ...
    def answer(self, text: str) -> list[int]: ...
    def text(self, tokens: list[int]) -> str: ...


class CharacterModel(Transformer):
    """The built-in transformer over characters; it reads a question's short prompt."""

    eos = tokenizer.EOS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, tokenizer.VOCABULARY)

    def prompt(self, question: Question) -> list[int]:
        return tokenizer.encode(question.prompt)

    def answer(self, text: str) -> list[int]:
        return [*tokenizer.encode(text), self.eos]

    def text(self, tokens: list[int]) -> str:
        return tokenizer.decode(tokens)


def load_policy(name: str, tiny: ModelConfig) -> nn.Module:
    """The policy that ``--model name`` asks for.

    Raises ValueError where ``name`` is neither "tiny", "smollm2" nor an existing path.
    """
    if name == "tiny":
        return CharacterModel(tiny)
    from trajkern.trainer.huggingface import HuggingFacePolicy

    return HuggingFacePolicy.load(name)
