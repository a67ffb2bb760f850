"""Terms that read a tree of rollouts node by node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_flag, checked_field, suggesting
from trajkern.credit.part import Call, Learns, Part, check_name
from trajkern.credit.result import packed_any, to_tokens
from trajkern.credit.spec import GateSet
from trajkern.credit.terms import Outcome, Term, reward_of
from trajkern.layouts.tree import Tree
from trajkern.recipes import TREE_RECIPES, tree_grpo
from trajkern.recipes.trees import BEFORE_WHITENING

TOKENS_WITHIN = ("group", "tree")
TREE_TERMS = {**TREE_RECIPES, **BEFORE_WHITENING}


@suggesting
@dataclass(frozen=True, repr=False)
class OfTree(Term):
    """A recipe of ``trajkern.recipes.TREE_RECIPES``: of leaves, of nodes, or of the steps of each path."""

    made_by: ClassVar = ("tree_terms.OfTree", "")
    name: str = "treerl"
    reward: str = "reward"

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "name", TREE_TERMS)
        check_name("reward", self.reward)

    @property
    def own_needs(self) -> frozenset[str]:
        reads_logprobs = {"sampler_logprobs"} if TREE_TERMS[self.name].learns else set()
        return frozenset({self.reward, "tree"} | reads_logprobs)

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, recipe, passed = call.rollouts, TREE_TERMS[self.name], call.passed(gates)
        tree, reward = rollouts.tree, reward_of(call, self.reward, gates)
        assert tree is not None
        if recipe.within_prompt and rollouts.ranks.split_groups:
            raise ValueError(
                f"{self!r} compares the trees of a prompt, and the process_group has some on several ranks"
            )
        keep, only = passed, recipe.learns(self._sampled(call)) if recipe.learns else None
        abstains = None
        if self.reward in rollouts.unscored:
            keep, abstains = (call.among_passed(x, gates) for x in (~reward.isnan(), reward.isnan()))
        mask = packed_any(rollouts.batch.loss_mask, tree)
        if keep is None:
            of_kept = self._values(tree, reward, mask)
        else:  # the one read: how many are left
            tree, nodes = tree.pruned(keep)
            of_kept = self._values(tree, reward[keep], mask[nodes[rollouts.tree.token_node]])  # type: ignore[union-attr]
        placed = self._placed(call, of_kept, keep)
        learns = (Learns(keep, only),)
        part = Part(placed.get("rows"), tokens=placed.get("tokens"), learns=learns, abstains=abstains)
        if part.rows is None:
            tokens = call.tokens(part).mul_(call.learning(part))
            call.report_tokens(self.name, tokens, part)
            return replace(part, tokens=tokens)
        call.report(self.name, part.rows, call.counts if keep is None else torch.where(keep, call.counts, 0))
        return part

    def _sampled(self, call: Call) -> Tensor:
        """What each token was sampled with, ``[T]``."""
        base = call.rollouts.batch.sampler_logprobs
        base = call.rollouts.batch.old_logprobs if base is None else base
        assert base is not None
        return torch.where(call.rollouts.batch.loss_mask, base, torch.nan)

    def _values(self, tree: Tree, reward: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Of the rollouts of ``tree``, ``rows``, or of their tokens, ``tokens``."""
        recipe, length = TREE_TERMS[self.name], tree.flat_index.shape[0]
        if not tree.num_leaves:
            return {"rows": reward} if recipe.per == "leaf" else {"tokens": reward}
        values = recipe.advantages(tree, reward, mask)
        if recipe.per == "leaf":
            return {"rows": values}
        node = tree.path_nodes[1]
        steps = values if recipe.per == "step" else values[node]
        return {"tokens": torch.repeat_interleave(steps, tree.node_lengths.long()[node], output_size=length)}

    def _placed(self, call: Call, values: dict[str, Tensor], keep: Tensor | None) -> dict[str, Tensor]:
        """The values of the rollouts that are kept among those of all."""
        if keep is None:
            return values
        where = {"rows": keep, "tokens": to_tokens(keep.float(), call.rollouts) != 0}
        return {
            kind: torch.zeros(where[kind].shape, dtype=x.dtype, device=x.device).masked_scatter(where[kind], x)
            for kind, x in values.items()
        }


@suggesting
@dataclass(frozen=True, repr=False)
class OfTokens(Term):
    """The outcome at each rollout's last scored token, among all tokens of its group or tree; see
    :func:`trajkern.recipes.tree_grpo.token_advantages`.

    With ``observations`` every token from a rollout's first scored one on counts, else the scored ones alone.
    """

    made_by: ClassVar = ("tree_terms.OfTokens", "within")
    within: str = "group"
    reward: str = "reward"
    observations: bool = True

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "within", TOKENS_WITHIN)
        check_name("reward", self.reward)
        checked_field(self, check_flag, "observations")

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset({self.reward} | ({"tree"} if self.within == "tree" else set()))

    def formed(self, call: Call, gates: GateSet) -> Part:
        reward, ranks, batch = reward_of(call, self.reward, gates), call.rollouts.ranks, call.rollouts.batch
        missing, mask, bounds = reward.isnan(), batch.loss_mask, batch.cu_seqlens.long()
        keep = call.among_passed(~missing, gates)
        seen = torch.cat((bounds.new_zeros(1), mask.long().cumsum(0)))
        begin, end = seen[bounds[:-1]], seen[bounds[1:]]
        counts = end - begin
        if self.observations:
            counts = torch.cat((seen[:1], (seen[1:] > self._each(begin, call)).long().cumsum(0)))[bounds].diff()
        of_all = (ranks.gather(x) for x in (reward, Outcome(within=self.within).ids(call), counts))
        found = tree_grpo.pooled_outcomes(*of_all, gate=ranks.gather(keep))
        at_last, at_other = (self._each(ranks.own(x), call) for x in found)
        part = Part(learns=(Learns(keep),), abstains=call.among_passed(missing, gates))
        tokens = torch.where(mask & (seen[1:] == self._each(end, call)), at_last, at_other) * call.learning(part)
        call.report_tokens(f"tokens:{self.within}", tokens, part)
        return replace(part, tokens=tokens)

    def _each(self, rows: Tensor, call: Call) -> Tensor:
        """Each token's rollout's value, ``[T]``."""
        batch = call.rollouts.batch
        return torch.repeat_interleave(rows, batch.lengths.long(), output_size=batch.num_tokens)
