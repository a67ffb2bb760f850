"""GRPO's advantage (Shao et al., DeepSeekMath, arXiv:2402.03300)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trajkern._checks import suggesting
from trajkern.layouts.batch import PackedBatch, check_batch
from trajkern.ops.advantage import group_advantages


@suggesting
def grpo(batch: PackedBatch, *, process_group: Any = None) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6) over the rollouts of a prompt, std with ddof 1; ``[N]``.

    A group of equal rewards gets exactly 0. With ``process_group`` a group may be spread over its ranks. Raises
    ValueError where the batch has no rewards.
    """
    check_batch(batch)
    if batch.rewards is None:
        raise ValueError("batch must have rewards for the recipe grpo; got None")
    return group_advantages(batch.rewards, batch.group_ids, process_group=process_group)
