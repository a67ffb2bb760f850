"""The oracle: every public op in plain torch, any float dtype, differentiable. Arguments are taken as valid."""

from trajkern.reference.advantage import discounted_returns, gae, group_advantages, whiten
from trajkern.reference.divergence import linear_divergence, topk_divergence
from trajkern.reference.head import linear_logprobs, linear_policy_loss, linear_token_stats
from trajkern.reference.logprob import token_logprobs, token_stats
from trajkern.reference.policy_loss import policy_loss
from trajkern.reference.reflection import reflection_rewards, variance_weights
from trajkern.reference.span import span_reduce, spread
from trajkern.reference.topk import linear_topk
from trajkern.reference.tree import branch_coefficients, sibling_advantages, subtree_reduce

__all__ = [
    "branch_coefficients",
    "discounted_returns",
    "gae",
    "group_advantages",
    "linear_divergence",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_token_stats",
    "linear_topk",
    "policy_loss",
    "reflection_rewards",
    "sibling_advantages",
    "span_reduce",
    "spread",
    "subtree_reduce",
    "token_logprobs",
    "token_stats",
    "topk_divergence",
    "variance_weights",
    "whiten",
]
