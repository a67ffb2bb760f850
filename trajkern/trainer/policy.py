"""What the trainer asks of a language model, and the models it knows by name."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trajkern.trainer import tokenizer
from trajkern.trainer.model import ModelConfig, Transformer
from trajkern.trainer.tasks import Question


class Policy(nn.Module, abc.ABC):
    """A causal language model with its tokenizer.

    Calling it runs packed trajectories; ``start`` and ``extend`` sample through a key-value cache (an object with
    ``repeat(copies)``, which returns it with every sequence that many times, copies adjacent).
    """

    eos: int

    @abc.abstractmethod
    def forward(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, V]
        """Logits of ``rows`` only; attention stays inside each trajectory."""

    @abc.abstractmethod
    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, H]
        """What the head makes these logits of."""

    @abc.abstractmethod
    def head_arguments(self) -> dict[str, Any]:
        """The head as :func:`trajkern.linear_logprobs` takes it: weight, and what else there is."""

    @abc.abstractmethod
    def start(self, count: int, room: int) -> Any:
        """An empty cache for ``count`` sequences of at most ``room`` padded positions."""

    @abc.abstractmethod
    def extend(self, tokens: Tensor, keep: Tensor, cache: Any) -> Tensor:  # [N, S], [N, S] bool -> [N, V]
        """Append S positions, padded where ``keep`` is False, and return the logits after the last."""

    @abc.abstractmethod
    def prompt(self, question: Question) -> list[int]:
        """The tokens that pose ``question``."""

    @abc.abstractmethod
    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, its end included."""

    @abc.abstractmethod
    def text(self, tokens: list[int]) -> str:
        """The answer that ``tokens`` spell."""


class CharacterModel(Transformer, Policy):
    """The built-in transformer over characters; it reads a question's short prompt."""

    eos = tokenizer.EOS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, tokenizer.VOCABULARY)

    def head_arguments(self) -> dict[str, Any]:
        return {"weight": self.head.weight}

    def prompt(self, question: Question) -> list[int]:
        return tokenizer.encode(question.prompt)

    def answer(self, text: str) -> list[int]:
        return [*tokenizer.encode(text), self.eos]

    def text(self, tokens: list[int]) -> str:
        return tokenizer.decode(tokens)


def load_policy(name: str, tiny: ModelConfig, shots: Sequence[Question]) -> Policy:
    """The policy that ``--model name`` asks for; ``shots`` are what a pretrained one is shown before each question.

    Raises ValueError where ``name`` is neither "tiny", "smollm2" nor an existing path.
    """
    if name == "tiny":
        return CharacterModel(tiny)
    from trajkern.trainer.huggingface import HuggingFacePolicy

    return HuggingFacePolicy.load(name, shots)
