"""One registry of op specs, which the tests, the validation and the benchmarks share."""

from trajkern._lazy import lazily
from trajkern.testing import advantage, divergence, head, logprob, policy_loss, reflection, span, topk, tree
from trajkern.testing.findings import Difference, Differences, Failure, Result, Results, differences
from trajkern.testing.numerics import budget_share, errors, oracle, run
from trajkern.testing.ptx import KernelFault, compiled
from trajkern.testing.registry import Case, OpSpec, Variant
from trajkern.testing.validation import check, spec_of

SPECS = (
    *logprob.SPECS,
    *advantage.SPECS,
    *policy_loss.SPECS,
    *head.SPECS,
    *divergence.SPECS,
    *reflection.SPECS,
    *span.SPECS,
    *topk.SPECS,
    *tree.SPECS,
)

__all__ = [
    "SPECS",
    "Case",
    "Difference",
    "Differences",
    "Failure",
    "KernelFault",
    "OpSpec",
    "Result",
    "Results",
    "Variant",
    "budget_share",
    "check",
    "compiled",
    "differences",
    "errors",
    "oracle",
    "run",
    "spec_of",
]
_, __dir__ = lazily(__name__, __all__)
