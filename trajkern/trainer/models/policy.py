"""What the trainer asks of a language model, and the models it knows by name."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trajkern.trainer.models import tokenizer
from trajkern.trainer.models.blocks import Layout
from trajkern.trainer.models.transformer import ModelConfig, Transformer
from trajkern.trainer.tasks.base import Question

TOOL_CALL_END = "</tool>"


class KeyValues(Protocol):
    """The keys and values of sequences, a column a padded position."""

    @property
    def length(self) -> int:
        """Columns filled."""

    def repeat(self, copies: Tensor) -> Any:  # [N]
        """Sequence n ``copies[n]`` times, copies adjacent; this one must not be used after it."""

    def select(self, rows: Tensor) -> Any:  # [R]
        """Sequences ``rows`` alone; this one must not be used after it."""

    def branch(self, rows: Tensor, ends: Tensor, room: int) -> Any:  # [R], [R]
        """Copies: row ``rows[i]`` up to its column ``ends[i]``, with ``room`` more columns."""

    def join(self, other: Any) -> Any:
        """The rows of both."""


class Policy(nn.Module, abc.ABC):
    """A causal language model with its tokenizer.

    Calling it runs a pack: trajectories, given by their cu_seqlens, or a tree, each shared prefix once. ``start`` and
    ``extend`` sample through a :class:`KeyValues`.
    """

    eos: int
    alphabet: Collection[str] | None = None  # what it can spell, where that is not everything

    @abc.abstractmethod
    def forward(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, V]
        """Logits of ``rows`` only; a token sees those before it in its trajectory, or on its path of the tree."""

    @abc.abstractmethod
    def hidden(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, H]
        """What the head makes these logits of."""

    @abc.abstractmethod
    def head_arguments(self) -> dict[str, Any]:
        """The head as :func:`trajkern.linear_logprobs` takes it: weight, and what else there is."""

    @abc.abstractmethod
    def layers(self) -> list[nn.Module]:
        """The blocks whose weights are sharded over ranks one by one."""

    @abc.abstractmethod
    def head_modules(self) -> tuple[Any, Any]:
        """The linear head and the embedding, whose weights may be one."""

    @abc.abstractmethod
    def start(self, count: int, room: int) -> KeyValues:
        """An empty cache for ``count`` sequences of at most ``room`` padded positions."""

    @abc.abstractmethod
    def extend(self, tokens: Tensor, keep: Tensor, cache: Any) -> Tensor:  # [N, S], [N, S] bool -> [N, V]
        """Append S positions, padded where ``keep`` is False, and return the logits after the last."""

    @abc.abstractmethod
    def prompt(self, question: Question) -> list[int]:
        """The tokens that pose ``question``."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a part of a rollout."""

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, its end included."""
        return [*self.encode(text), self.eos]

    @abc.abstractmethod
    def spelling(self, tokens: list[int]) -> str:
        """The characters that ``tokens`` stand for."""

    def answer_in(self, spelling: str) -> slice:
        """Which of these characters are the answer."""
        return slice(0, len(spelling))

    def text(self, tokens: list[int]) -> str:
        """The answer that ``tokens`` spell."""
        spelling = self.spelling(tokens)
        return spelling[self.answer_in(spelling)]

    def steps(self, tokens: list[int]) -> list[int]:
        """How many tokens each step of a completion has: a step ends with a newline or a tool call."""
        lengths, begin = [], 0
        for end in range(1, len(tokens) + 1):
            # no token is empty, so as many as the mark has characters hold it
            written = self.spelling(tokens[max(begin, end - len(TOOL_CALL_END)) : end])
            if end == len(tokens) or written.endswith(("\n", TOOL_CALL_END)):
                lengths.append(end - begin)
                begin = end
        return lengths


class CharacterModel(Transformer, Policy):
    """The built-in transformer over characters; it reads a question's short prompt."""

    eos = tokenizer.EOS
    alphabet = frozenset(tokenizer.ALPHABET)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, tokenizer.VOCABULARY)

    def head_arguments(self) -> dict[str, Any]:
        return vocabulary_rows(weight=self.head.weight)

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def head_modules(self) -> tuple[Any, Any]:
        return self.head, self.embed

    def prompt(self, question: Question) -> list[int]:
        return tokenizer.encode(question.prompt)

    def encode(self, text: str) -> list[int]:
        return tokenizer.encode(text)

    def spelling(self, tokens: list[int]) -> str:
        return tokenizer.decode(tokens)

    def steps(self, tokens: list[int]) -> list[int]:
        spelling, begin, lengths = self.spelling(tokens), 0, []  # a character a token, up to the end
        for end, character in enumerate(spelling, start=1):
            if character == "\n" or (character == ">" and spelling.endswith(TOOL_CALL_END, begin, end)):
                lengths.append(end - begin)
                begin = end
        return [*lengths, len(tokens) - begin] if begin < len(tokens) else lengths


def vocabulary_rows(**head: Any) -> dict[str, Any]:
    """This rank's rows of the head, and the group that holds the others where it is spread over ranks."""
    shards = {name: x for name, x in head.items() if hasattr(x, "device_mesh")}
    if not shards:
        return dict(head)
    ranks = shards["weight"].device_mesh
    if ranks.mesh_dim_names != ("vocabulary",):
        raise RuntimeError("the head can be read only after a forward pass, which gathers it")
    return head | {name: x.to_local() for name, x in shards.items()} | {"process_group": ranks.get_group()}


def load_policy(name: str, tiny: ModelConfig, shots: Sequence[Question]) -> Policy:
    """The policy that ``--model name`` asks for; ``shots`` are what a pretrained one is shown before each question.

    Raises ValueError where ``name`` is neither "tiny", "smollm2" nor an existing path.
    """
    if name == "tiny":
        return CharacterModel(tiny)
    from trajkern.trainer.models.huggingface import HuggingFacePolicy

    return HuggingFacePolicy.load(name, shots)
