"""VinePPO (arXiv 2410.01679; github McGill-NLP/VinePPO): a step's advantage from Monte Carlo values."""

from __future__ import annotations

from torch import Tensor

from trajkern.recipes._groups import check_vector, widened


def step_advantages(
    values: Tensor,  # [K+1]
    step_rewards: Tensor,  # [K]
) -> Tensor:
    """The advantage of each of a rollout's K steps: A_i = r_i + V_{i+1} - V_i, without discount.

    Args:
        values: float ``[K+1]``, finite (checked on the CPU); V_i is the mean return of fresh continuations from the
            state before step i, and ``values[K]`` that of the state behind the last step: 0 where the rollout ended and
            ``step_rewards`` holds its outcome, the outcome itself where ``step_rewards`` leaves it out.
        step_rewards: float ``[K]``, finite (checked on the CPU); 0 but for the last step where only an outcome exists.

    Returns:
        ``[K]`` float32 (float64 if either is float64), not normalised; it sums to the rewards plus the last value less
        the first. K = 0 is legal.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("values", values, None, "", None)
    check_vector("step_rewards", step_rewards, None, "", values.device)
    if values.shape[0] != step_rewards.shape[0] + 1:
        raise ValueError(
            f"values must have shape [{step_rewards.shape[0] + 1}] (one a step and one behind the last); "
            f"got {list(values.shape)}"
        )
    v = widened(values)
    return widened(step_rewards) + (v[1:] - v[:-1])
