"""What the recipes share: ids of pairs, sums of groups; and that no recipe waits for its device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern import Tree, _backends
from trajkern.recipes import (
    delta_belief,
    dro,
    feedback,
    gigpo,
    nsr,
    reward_models,
    rlcr,
    sdpo,
    spo,
    srl,
    toolpo,
    tree_grpo,
    treepo,
    treerl,
    treerpo,
    vineppo,
)
from trajkern.recipes._groups import group_sum, pair_ids

KEY = st.sampled_from([-(2**62), -1, 0, 1, 2**62])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(KEY, KEY, KEY)))
def test_pair_ids_ascend_with_their_tuples(rows: list[tuple[int, int, int]]) -> None:
    keys = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 3)
    ranked = sorted(set(rows))
    assert pair_ids(*keys.unbind(1)).tolist() == [ranked.index(row) for row in rows]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3))))
def test_group_sum(rows: list[tuple[int, int]]) -> None:
    x, ids = torch.tensor([v for v, _ in rows], dtype=torch.int64), torch.tensor([g for _, g in rows]).long()
    ids = pair_ids(ids)
    expected = [sum(v for v, h in rows if h == g) for _, g in rows]
    assert group_sum(x, ids).tolist() == expected and group_sum(x, ids).dtype == torch.int64
    assert group_sum(x.float(), ids).tolist() == expected and group_sum(x.float(), ids).dtype == torch.float64
    assert group_sum(x > 0, ids).tolist() == [sum(v > 0 for v, h in rows if h == g) for _, g in rows]


N, S, T = 6, 9, 20
F, IDS, SF, SI, TF = (
    torch.empty(n, dtype=dtype, device="meta")
    for n, dtype in ((N, None), (N, torch.int64), (S, None), (S, torch.int64), (T, None))
)
FLAG, TFLAG, CU = F > 0, TF > 0, torch.empty(N + 1, dtype=torch.int64, device="meta")
KF, BELIEFS = torch.empty(3, N, device="meta"), torch.empty(S + N, device="meta")
CALLS: dict[str, Callable[[Tree], object]] = {
    "tree_grpo": lambda tree: [
        [tree_grpo.leaf_advantages(F, IDS, IDS, estimator=e) for e in tree_grpo.ESTIMATORS],
        tree_grpo.node_rewards(F[: tree.num_leaves], tree),
        tree_grpo.token_advantages(TF, TF.long(), TF.long(), TFLAG),
        tree_grpo.pooled_outcomes(F, IDS, IDS, gate=FLAG),
    ],
    "treerl": lambda tree: [treerl.node_rewards(F[: tree.num_leaves], tree, form=form) for form in treerl.FORMS],
    "treepo": lambda tree: treepo.advantages(F, IDS[:, None].expand(N, 3)),
    "treerpo": lambda tree: treerpo.node_advantages(F[: tree.num_leaves], tree),
    "spo": lambda tree: [spo.node_advantages(F[: tree.num_leaves], tree, scale="std"), spo.low_probability(TF)],
    "vineppo": lambda tree: vineppo.step_advantages(F, F[1:]),
    "gigpo": lambda tree: gigpo.step_advantages(SF, SI, SI, SI, episode_rewards=F),
    "nsr": lambda tree: [nsr.advantages(F, kind=kind) for kind in nsr.KINDS],
    "toolpo": lambda tree: [
        toolpo.token_advantages(F, IDS, IDS, TFLAG, CU),
        toolpo.fold_preference(F, F),
        toolpo.group_preference(F, FLAG, IDS),
    ],
    "rlcr": lambda tree: [rlcr.rewards(FLAG, F, well_formed=FLAG), rlcr.calibration(FLAG, F)],
    "delta_belief": lambda tree: [
        delta_belief.turn_rewards(BELIEFS, CU, won=FLAG, penalty=SF),
        [delta_belief.turn_advantages(SF, SI, SI, IDS, finished=finished) for finished in delta_belief.FINISHED],
    ],
    "dro": lambda tree: [
        dro.rank_filter(TF.long(), CU, IDS, worst_fraction=0.1, top_k=3),
        dro.keep_groups(F, drop_fraction=0.2),
        dro.length_reward(F, F, beta=1),
        [dro.gate(FLAG, IDS, mode=mode) for mode in dro.GATES],
        dro.right_minus_wrong(F, FLAG, IDS),
        dro.propagated(TF, CU, TF.abs(), gamma=0.5, fraction=0.5),
    ],
    "srl": lambda tree: [srl.rewards(F, FLAG), srl.keep_groups(F, IDS, min_std=0)],
    "feedback": lambda tree: [
        feedback.majority_vote(KF),
        feedback.token_advantages(F, TF, TF, TFLAG, CU),
        feedback.step_advantages(SF, SI, SI),
    ],
    "sdpo": lambda tree: [
        sdpo.divergence_loss(SF[:, None].expand(S, 5), sdpo.topk(SF[:, None].expand(S, 5), 2), SI, SF, mask=SF > 0),
        sdpo.peers(F, IDS),
    ],
    "reward_models": lambda tree: [
        reward_models.rule_rewards(KF, IDS[:3], rule="deepseek_grm"),
        reward_models.meta_vote(KF, F[:3], keep=2),
    ],
}


def on_meta(tree: Tree) -> Tree:
    """The tree without its values: what needs one raises."""
    return tree.to("meta")


@pytest.mark.parametrize("name", CALLS)
def test_no_device_value_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "wants_reference", lambda *_: False)
    result = CALLS[name](on_meta(Tree(torch.tensor([-1, 0, 0, 1, 1, 2]), torch.ones(6, dtype=torch.int64))))
    left = [result]
    while left:
        x = left.pop()
        if isinstance(x, torch.Tensor):
            assert x.device.type == "meta"
        else:
            left.extend(x)
