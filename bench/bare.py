"""The bare pass: what is timed beside trajkern to show where its time goes, and why trajkern may take less.

It is torch's own passes over the same data, which compute nothing of the op, or what is there without it. It is no
bound: torch's passes do not move data as fast as the machine can, and write what a fused kernel never stores.
"""

from __future__ import annotations

from typing import Any

from trajkern._bench.case import BARE, OURS

HEADS = ("linear_logprobs", "linear_policy_loss", "linear_topk")
LOGITS = ("token_logprobs", "token_stats")
LESS = ("% scored", "half the advantages")  # of the work of a case in which trajkern has less to do than the bare pass
TREES = "trl.tree_rollouts"  # whose head has the learnt tokens alone
PASSES = {
    "group_advantages": "torch's copy of the rewards",
    "discounted_returns": "torch's copy of the rewards",
    "gae": "torch's copy of the rewards and values",
    "whiten": "torch's copy of the values",
    "policy_loss": "torch's copy of two arrays of a number a token",
    "reflection_rewards": "torch's copy of two arrays of a number a token",
    "subtree_reduce": "torch's copy of a number a node",
    "sibling_advantages": "torch's copy of a number a node",
    "branch_coefficients": "torch's copy of a number a node",
    "span_reduce": "torch's copy of the spans' tokens",
    "spread": "torch's copy of a number a token",
    "Spans.turns": "torch's copy of the mask",
    "dro.gate": "torch's copy of a number a token",
    "toolpo.token_advantages": "torch's copy of a number a token",
    "credit": "torch's copies of all that is read and written",
    "srl.similarity": "torch's copy of the characters",
    "sequence_group": "a share alone, and as many bare exchanges",
    TREES: "the model on as many tokens in one row, with whole logits",
    "prime_rl.compute_loss": "torch's copy of two arrays of a number a token",
}
MOVES = "torch's passes move the data below the machine's speed"
STORES = "torch's product writes all logits to memory, and tiles stay in the cache"
NOISE = "the two are no further apart than their spreads"
SKIPS = "trajkern leaves out rows that need no work, and the bare pass is the whole batch"


def what(case: dict[str, Any]) -> str:
    """The bare pass of a case."""
    op, work = case["op"], case["work"]
    if op in LOGITS:
        backward = {"in-place": ", then a product in place", "backward": ", then a product into fresh memory"}
        return "torch's sum of the logits" + next((text for word, text in backward.items() if word in work), "")
    if op in HEADS:
        if any(part in work for part in LESS):
            return "trajkern's own whole batch"
        return "the three matrix products alone" if "backward" in work else "the matrix product alone"
    return PASSES.get(op, "torch's copy of as many bytes")


def why_less(case: dict[str, Any]) -> str:
    """Why trajkern takes less time than the bare pass, or "" where it does not."""
    times = case["seconds"]
    if OURS not in times or BARE not in times or times[OURS]["median"] >= times[BARE]["median"]:
        return ""
    if any(part in case["work"] for part in LESS) or case["op"] == TREES:
        return SKIPS
    spreads = times[OURS]["spread"] + times[BARE]["spread"]
    if times[BARE]["median"] / times[OURS]["median"] - 1 <= spreads:
        return NOISE
    return STORES if case["op"] in HEADS else MOVES
