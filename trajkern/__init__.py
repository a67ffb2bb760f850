"""Kernels for reinforcement learning of language-model agents, on packed batches of rollouts.

Beside the ops there are, imported when first asked for:

    trajkern.recipes        published systems as functions on tensors
    trajkern.credit         signals to token advantages, as expressions that any trainer computes
    trajkern.integrations   adapters for TRL, verl and other trainers, one by one
    trajkern.testing        the ops' cases and the check of a kernel of one's own
    trajkern.bench          the times of functions of one's own beside the ops
"""

from typing import TYPE_CHECKING

from trajkern import _start as _start  # the first of all: what follows takes a second
from trajkern._backends import backends, use_backend
from trajkern._lazy import lazily
from trajkern._results import GAE, Branch, Reflection, TokenStats, TopK
from trajkern.layouts.batch import HeadInputs, PackedBatch
from trajkern.layouts.spans import Spans
from trajkern.layouts.tree import Tree
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import KINDS
from trajkern.ops.advantage import discounted_returns, gae, group_advantages, whiten
from trajkern.ops.divergence import linear_divergence, topk_divergence
from trajkern.ops.head import linear_logprobs, linear_token_stats
from trajkern.ops.head_loss import linear_policy_loss
from trajkern.ops.logprob import token_logprobs, token_stats
from trajkern.ops.policy_loss import policy_loss
from trajkern.ops.reflection import reflection_rewards, variance_weights
from trajkern.ops.span import span_reduce, spread
from trajkern.ops.topk import linear_topk
from trajkern.ops.tree import branch_coefficients, sibling_advantages, subtree_reduce
from trajkern.ops.tree_loss import Paths

if TYPE_CHECKING:
    from trajkern import bench as bench
    from trajkern import credit as credit
    from trajkern import integrations as integrations
    from trajkern import recipes as recipes
    from trajkern import testing as testing

__version__ = "0.2.0"
policy_loss_kinds = tuple(KINDS)

__all__ = [
    "Branch",
    "GAE",
    "HeadInputs",
    "PackedBatch",
    "Paths",
    "PolicyLoss",
    "Reflection",
    "Spans",
    "TokenStats",
    "TopK",
    "Tree",
    "backends",
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
    "policy_loss_kinds",
    "reflection_rewards",
    "sibling_advantages",
    "span_reduce",
    "spread",
    "subtree_reduce",
    "token_logprobs",
    "token_stats",
    "topk_divergence",
    "use_backend",
    "variance_weights",
    "whiten",
]
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, __all__, ("bench", "credit", "integrations", "recipes", "testing"))
