"""Credit: from the signals that rollouts carry to an advantage for each token, as one expression for every trainer::

    from trajkern import credit

    spec = credit.outcome() + 0.5 * credit.spans("call", reward="call_score")
    spec = spec.gate("well_formed", mode="pass_rate").asymmetric(positive=0.1) + 0.1 * credit.directive(where="failed")
    found = spec(credit.Rollouts(batch, rewards=..., spans=..., flags=...))
    loss, metrics = trajkern.policy_loss(logprobs, old, cu_seqlens=cu_seqlens, config=config, **found.loss_inputs())

Gates say who is compared and who learns, weights how much: the two never mix. Terms stay values of rollouts and of
spans until they are spread to tokens, once, at the end.
"""

from __future__ import annotations

from typing import Any

from trajkern._checks import check_choice, refuse_unknown, suggesting
from trajkern._lazy import lazily
from trajkern.credit import presets, scored, terms, tree_terms
from trajkern.credit.part import Function, check_name, load
from trajkern.credit.presets import PRESETS
from trajkern.credit.result import Credit
from trajkern.credit.rollouts import Rollouts
from trajkern.credit.spec import Spec
from trajkern.credit.terms import Directive, Divergence, OfSpans, Outcome


@suggesting
def outcome(
    reward: str | Function | Spec = "reward",
    within: str = "group",
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
) -> Spec:
    """A rollout's reward against those it is compared with: A = (r - mean) / (std + eps); a value a rollout.

    Args:
        reward: a name of ``Rollouts.rewards``; or a function of the rollouts, or its "package.module:name", that
            returns ``[N]``; or an expression of whole rollouts, which is then compared once more. What a function reads
            it may say in an attribute ``needs``. NaN takes a rollout out of this term; one that no term of a credit
            scores, where one was to, does not learn.
        within: compared with the rollouts of the same "group" (prompt), of the same "tree" (root) or of the "batch".
        baseline, scale, ddof, eps, singleton: as in :func:`trajkern.group_advantages`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    return Outcome(baseline, scale, ddof, eps, singleton, reward, within)


@suggesting
def spans(
    name: str,
    reward: str | Function | None = None,
    within: str = "group",
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
) -> Spec:
    """The reward of each span of this name against the others'; a value a span, 0 outside.

    Args:
        name: of ``Rollouts.spans``. "turn" is always there.
        reward: a name of ``Rollouts.span_rewards``, by default the spans' own; or a function of the rollouts, or its
            "package.module:name", that returns ``[S]``. NaN takes a span out.
        within: compared with all spans of this name in the "group", each counted once; or with those of the same
            "index" in their rollouts. A rollout without such spans is in no statistic, and learns from other terms.
        baseline, scale, ddof, eps, singleton: as for :func:`outcome`.
    """
    check_name("name", name)
    return OfSpans(baseline, scale, ddof, eps, singleton, name, reward, within)


@suggesting
def directive(where: str = "all") -> Spec:
    """log p(teacher) - log p(policy) of each token: what a teacher who knows more would have done differently.

    The policy's are ``batch.old_logprobs``, else its ``sampler_logprobs``. It blames and praises the tokens that were
    sampled; :func:`divergence` also says what to do instead.

    Args:
        where: in "all" rollouts, or in the "failed" ones, whose ``rewards["reward"]`` is 0 or less.
    """
    return Directive(where=where)


@suggesting
def divergence(where: str = "all", *, k: int | None = 100, beta: float = 0.5, max_ratio: float | None = None) -> Spec:
    """A divergence from the teacher's distribution, added to the loss; its weight is the expression's.

    Its gradient reaches tokens that were not sampled, so it is no advantage: ``Credit.divergences`` has its weight for
    each token, and a host without the policy's logits refuses it.

    Args:
        where: as for :func:`directive`.
        k: over the teacher's k likeliest tokens and one for all others; None: over the whole vocabulary.
        beta: 0 is the forward KL, 1 the reverse, between them the generalised Jensen-Shannon divergence.
        max_ratio: a token is weighed by its ratio of policy to sampler, at most this; None: it is not weighed.
    """
    return Divergence(where=where, k=k, beta=beta, max_ratio=max_ratio)


def recipe(name: str, **settings: Any) -> Spec:
    """A published system as an expression.

    Args:
        name: one of ``credit.PRESETS``.
        **settings: of the system; what they mean stands in :mod:`trajkern.recipes`.

    Raises:
        ValueError: with the list of names, where there is none of that name.
        TypeError: a setting that the system does not have.
    """
    made = PRESETS[check_choice("recipe", name, PRESETS)]
    try:
        return made(**settings)
    except TypeError:
        refuse_unknown(f"credit.recipe({name!r})", made, settings)
        raise


__all__ = [
    "PRESETS",
    "Credit",
    "Function",
    "Rollouts",
    "Spec",
    "directive",
    "divergence",
    "load",
    "outcome",
    "presets",
    "recipe",
    "scored",
    "spans",
    "terms",
    "tree_terms",
]
_, __dir__ = lazily(__name__, __all__)
