"""A credit's ``score`` in a trainer of TRL: log-probs of texts in contexts, by the policy that it trains."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajkern.integrations._adapter import held

_ROWS = 1024  # of logits at once, where the places of tokens are asked for


@dataclass
class Asked:
    """What a score wants of the trainer's head besides its log-probs, or otherwise."""

    temperature: float
    places: list[Tensor] | None  # of the targets in the vocabulary, those of a forward behind those of another

    def see(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
        """Notes the places of a head's targets: neither its temperature nor its cap moves them."""
        if self.places is None:
            return
        found = [targets.new_zeros(0)]
        for rows, chosen in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
            logits = torch.nn.functional.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows))
            found.append(1 + (logits > logits.gather(1, chosen[:, None])).sum(1))
        self.places.append(torch.cat(found))


_asked: list[Asked] = []


def asked() -> Asked | None:
    """What the score that runs wants; None where none runs."""
    return _asked[-1] if _asked else None


@contextlib.contextmanager
def _asking(what: Asked) -> Iterator[None]:
    _asked.append(what)
    try:
        yield
    finally:
        _asked.pop()


@contextlib.contextmanager
def unrecorded(trainer: Any) -> Iterator[None]:
    """Forwards without a gradient, as TRL makes them."""
    module = importlib.import_module("trl.models.utils")
    checkpointing = held(module, "disable_gradient_checkpointing")
    with torch.no_grad(), checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        yield


def batch_size(trainer: Any) -> int:
    """Rows of a forward that needs no gradient, as TRL has it."""
    args = trainer.args
    return args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size


@dataclass(frozen=True, eq=False)
class Score:
    """:attr:`trajkern.credit.Rollouts.score`; every rank runs as many forwards as the one with the most."""

    trainer: Any
    images: bool = False  # whether the batch has some, which a context of tokens does not show

    def __call__(
        self, contexts: Sequence[Any], targets: Sequence[Any], *, temperature: float = 1.0, ranks: bool = False
    ) -> tuple[Tensor, ...]:
        """log p of each target behind its context.

        Args:
            contexts: of each target: a text or a conversation, which become tokens as a prompt does; token ids; or a
                tuple of such pieces, of which texts after the first get no special tokens. At least one token.
            targets: texts, which get no special tokens, or token ids; at least one token.
            temperature: the logits are divided by it.
            ranks: also give each token's place in the vocabulary.

        Returns:
            (log-probs ``[P]``, int64 ``cu_seqlens`` ``[len(targets) + 1]``) and with ``ranks`` the places, int64
            ``[P]``, 1 for the likeliest.
        """
        if self.images:
            raise ValueError("score must be asked of batches of text alone in TRL; this one has images")
        rows = [(self._context(x), self._ids(y)) for x, y in zip(contexts, targets, strict=True)]
        for n, row in enumerate(rows):
            for name, ids in zip(("contexts", "targets"), row, strict=True):
                if not ids:
                    raise ValueError(f"{name} must have at least one token each; {name}[{n}] has none")
        trainer, size = self.trainer, batch_size(self.trainer)
        device = trainer.accelerator.device
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        most = int(trainer.accelerator.gather(torch.tensor([len(chunks)], device=device)).max())
        filler = [([self._tokenizer.pad_token_id], [self._tokenizer.pad_token_id])]
        logprobs = [torch.zeros(0, dtype=torch.float32, device=device)]
        places = [torch.zeros(0, dtype=torch.int64, device=device)]
        with unrecorded(trainer):
            for chunk in chunks + [filler] * (most - len(chunks)):
                of_chunk = self._forward(chunk, temperature, ranks)
                if chunk is not filler:
                    logprobs.append(of_chunk[0])
                    places.extend(of_chunk[1:])
        lengths = torch.tensor([0, *(len(target) for _, target in rows)], device=device)
        scored = torch.cat(logprobs), lengths.cumsum(0)
        return (*scored, torch.cat(places)) if ranks else scored

    def _forward(self, rows: list[tuple[list[int], list[int]]], temperature: float, ranks: bool) -> tuple[Tensor, ...]:
        """Contexts end where targets begin, as TRL lays out prompts and completions."""
        pad, device = self._tokenizer.pad_token_id, self.trainer.accelerator.device
        before, behind = (max(map(len, column)) for column in zip(*rows, strict=True))
        ids = torch.full((len(rows), before + behind), pad, device=device)
        mask = torch.zeros_like(ids)
        for n, (context, target) in enumerate(rows):
            taken = slice(before - len(context), before + len(target))
            ids[n, taken], mask[n, taken] = torch.tensor(context + target, device=device), 1
        wanted = Asked(temperature, [] if ranks else None)
        with _asking(wanted):
            found = self.trainer._get_per_token_logps_and_entropies(self.trainer.model, ids, mask, behind)[0]
        scored = mask[:, before:].bool()
        if wanted.places is None:
            return (found[scored],)
        places = torch.cat(wanted.places)
        if places.numel() != int(scored.sum()):  # a head that computes the positions without a label as well
            places = places.view(len(rows), -1)[:, -behind:][scored]
        return found[scored], places

    def _context(self, context: Any) -> list[int]:
        if isinstance(context, tuple):
            first, *others = context
            return self._context(first) + [token for piece in others for token in self._ids(piece)]
        spoken = not isinstance(context, str) and len(context) > 0 and isinstance(context[0], Mapping)
        if spoken and getattr(self.trainer, "environment_factories", None) is not None:
            raise ValueError(
                "contexts must be texts or token ids where environments choose the tools; got a conversation"
            )
        if spoken or isinstance(context, str):
            return list(held(type(self.trainer), "_tokenize_prompts")(self.trainer, [context])[0][0])
        return list(context)

    def _ids(self, piece: Any) -> list[int]:
        if isinstance(piece, str):
            return list(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
        return list(piece)

    @property
    def _tokenizer(self) -> Any:
        processing = self.trainer.processing_class
        return getattr(processing, "tokenizer", processing)
