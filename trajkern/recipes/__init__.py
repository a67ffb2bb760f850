"""Recipes: a published system's way from rewards to advantages, a module each, and by name.

    delta_belief    Delta-Belief-RL: a turn is worth what it taught the policy
    dro             DRO: which rollouts and prompts are worth training on; gates, filters, a reward for length
    feedback        OpenClaw-RL and on-policy distillation: votes on a turn, and what a hint would change
    gigpo           GiGPO: rollouts compared whole, and step by step at equal states
    grpo            GRPO: a function, of a batch
    nsr             PSR, NSR and W-REINFORCE: successes and failures apart
    reward_models   reasoning reward models: their rewards, and how verdicts are put together
    rlcr            RLCR: right, and sure of it
    sdpo            SDPO: the policy learns from itself, shown what it did not know
    skillrl         SkillRL: what earlier attempts taught, shown in the prompt
    spo             SPO-tree: a segment against the value of where it started
    srl             supervised RL: a step's likeness to the expert's
    toolpo          ToolPO: the tool's reward to the tokens that acted
    tree_grpo       Tree-GRPO: a rollout against its prompt's and its tree's
    treepo          TreePO: a rollout against its peers at every depth
    treerl          TreeRL: a step's reward from the leaves that it leads to
    treerpo         TreeRPO: GRPO among the continuations of one step
    vineppo         VinePPO: a step's advantage from Monte Carlo values

Modules are imported when first asked for: ``trajkern.recipes.dro``. ``RECIPES`` map a packed batch to the rollouts'
advantages ``[N]``, or to these and which rollouts are trained, bool ``[N]``, and take the ``process_group`` over whose
ranks groups are spread; ``TREE_RECIPES`` read a tree of rollouts; ``recipe(name)`` finds either. As expressions that
compose they are ``trajkern.credit.recipe(name)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trajkern._checks import check_choice
from trajkern._lazy import lazily
from trajkern.layouts.batch import PackedBatch, check_batch
from trajkern.recipes import nsr
from trajkern.recipes.grpo import grpo
from trajkern.recipes.trees import TREE_RECIPES, TreeRecipe, path_nodes

Recipe = Callable[..., Tensor | tuple[Tensor, Tensor]]


def _by_sign(kind: str) -> Recipe:
    def advantages(batch: PackedBatch, *, process_group: Any = None) -> tuple[Tensor, Tensor]:
        """A rollout's own reward decides: no rank needs to hear of another's."""
        check_batch(batch)
        if batch.rewards is None:
            raise ValueError(f"batch must have rewards for the recipe {kind}; got None")
        return nsr.advantages(batch.rewards, kind=kind)

    return advantages


RECIPES: dict[str, Recipe] = {"grpo": grpo, **{kind: _by_sign(kind) for kind in nsr.KINDS}}


def recipe(name: str) -> Recipe | TreeRecipe:
    """The recipe called ``name``. Raises ValueError with the list of names where there is none."""
    name = check_choice("recipe", name, {**RECIPES, **TREE_RECIPES})
    return TREE_RECIPES[name] if name in TREE_RECIPES else RECIPES[name]


_MODULES = (
    "delta_belief",
    "dro",
    "feedback",
    "gigpo",
    "nsr",
    "reward_models",
    "rlcr",
    "sdpo",
    "skillrl",
    "spo",
    "srl",
    "toolpo",
    "tree_grpo",
    "treepo",
    "treerl",
    "treerpo",
    "vineppo",
)
__all__ = ["RECIPES", "TREE_RECIPES", "Recipe", "TreeRecipe", "grpo", "path_nodes", "recipe"]

if TYPE_CHECKING:
    from trajkern.recipes import delta_belief as delta_belief
    from trajkern.recipes import dro as dro
    from trajkern.recipes import feedback as feedback
    from trajkern.recipes import gigpo as gigpo
    from trajkern.recipes import reward_models as reward_models
    from trajkern.recipes import rlcr as rlcr
    from trajkern.recipes import sdpo as sdpo
    from trajkern.recipes import skillrl as skillrl
    from trajkern.recipes import spo as spo
    from trajkern.recipes import srl as srl
    from trajkern.recipes import toolpo as toolpo
    from trajkern.recipes import tree_grpo as tree_grpo
    from trajkern.recipes import treepo as treepo
    from trajkern.recipes import treerl as treerl
    from trajkern.recipes import treerpo as treerpo
    from trajkern.recipes import vineppo as vineppo
else:
    __getattr__, __dir__ = lazily(__name__, __all__, _MODULES)
