"""trajkern in the trainers and model libraries that people already use: an adapter each, imported when first asked for.

    areal                   AReaL: its actor's loss, and its advantages by a credit
    art                     ART: its packed rows of shared prompts as trees
    engines                 what vLLM and SGLang return, as the packed batch and the head's arguments
    kernels                 the Triton families as a kernel of HuggingFace's ``kernels``
    liger                   Liger-Kernel's fused GRPO loss
    nemo_rl                 NeMo-RL: its clipped policy loss, and its advantages by a credit
    openrlhf                OpenRLHF: log-probs and policy loss of its actor
    prime_rl                prime-rl: its packed loss, and its advantages by a credit
    sentence_transformers   vectors of texts, for ``trajkern.recipes.skillrl``
    skyrl                   SkyRL: estimators, policy losses and credits of its registries
    slime                   slime and miles: loss, advantages and corrections by their path flags
    transformers            a HuggingFace causal language model on a packed batch or tree
    trl                     TRL: the fused head, the loss and a credit in its GRPO and RLOO trainers
    verl                    verl: estimators, policy losses, credits and the fused head

``trajkern.integrations.trl.enable(trainer)`` leaves the name ``trl`` to TRL itself. Importing an adapter does not
import its host; what it puts in the place of the host's own is taken back where the handle that it returns is left::

    with trajkern.integrations.trl.enable(trainer):
        trainer.train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trajkern._lazy import lazily

_ADAPTERS = (
    "areal",
    "art",
    "engines",
    "kernels",
    "liger",
    "nemo_rl",
    "openrlhf",
    "prime_rl",
    "sentence_transformers",
    "skyrl",
    "slime",
    "transformers",
    "trl",
    "verl",
)

if TYPE_CHECKING:
    from trajkern.integrations import areal as areal
    from trajkern.integrations import art as art
    from trajkern.integrations import engines as engines
    from trajkern.integrations import kernels as kernels
    from trajkern.integrations import liger as liger
    from trajkern.integrations import nemo_rl as nemo_rl
    from trajkern.integrations import openrlhf as openrlhf
    from trajkern.integrations import prime_rl as prime_rl
    from trajkern.integrations import sentence_transformers as sentence_transformers
    from trajkern.integrations import skyrl as skyrl
    from trajkern.integrations import slime as slime
    from trajkern.integrations import transformers as transformers
    from trajkern.integrations import trl as trl
    from trajkern.integrations import verl as verl
else:
    __getattr__, __dir__ = lazily(__name__, (), _ADAPTERS)
