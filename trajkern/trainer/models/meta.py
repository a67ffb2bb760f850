"""A meta reward model: how likely is a judgement right?"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trajkern.recipes.reward_models import meta_loss
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import pack_pieces
from trajkern.trainer.tasks.base import Question


class MetaModel(nn.Module):
    """A copy of a policy that reads a question and a judgement of it, and rates the judgement.

        rating = w h + b        h: the hidden state after the judgement's end; sigmoid(rating) is the chance of right

    Args:
        policy: on one device, not sharded; it is copied and stays as it is. ``w`` and ``b`` begin at 0.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy)
        weight = policy.head_arguments()["weight"]
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, questions: Sequence[Question], texts: Sequence[str]) -> Tensor:
        """The rating of each judgement of its question, ``[N]`` float32."""
        pairs = zip(questions, texts, strict=True)
        batch = pack_pieces([[(self.body.prompt(q), False), (self.body.answer(text), True)] for q, text in pairs])
        hidden = self.body.hidden(batch.tokens, batch.cu_seqlens, batch.cu_seqlens[1:] - 1)
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(1).float()

    @torch.no_grad()
    def rate(self, questions: Sequence[Question], texts: Sequence[str], batch: int = 512) -> Tensor:
        """:meth:`forward` without a gradient, ``batch`` judgements at a time."""
        starts = range(0, len(texts), batch)
        return torch.cat([self(questions[at : at + batch], texts[at : at + batch]) for at in starts])

    def fit(
        self,
        questions: Sequence[Question],
        texts: Sequence[str],
        right: Tensor,  # [N] bool
        *,
        steps: int,
        batch: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> float:
        """Train body and head by :func:`trajkern.recipes.reward_models.meta_loss`, the right and the wrong judgements
        weighing alike; returns the last loss.

        Args:
            questions, texts: N judgements, in any order.
            right: whether each is; some are and some are not.
            steps: of AdamW, at least 1, on ``batch`` judgements drawn with replacement by ``seed``.
            lr: learning rate.

        Raises:
            ValueError: judgements that are all right or all wrong.
        """
        count = int(right.sum())
        if not 0 < count < len(right):
            raise ValueError(f"right must hold True and False; {count} of {len(right)} are True")
        share = count / len(right)
        weights = torch.where(right, 0.5 / share, 0.5 / (1 - share)).float()
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)
        generator = torch.Generator(right.device).manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(texts), (batch,), generator=generator, device=right.device)
            some = chosen.tolist()
            logits = self([questions[n] for n in some], [texts[n] for n in some])
            loss = meta_loss(logits, right[chosen], weights=weights[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
        return loss.item()
