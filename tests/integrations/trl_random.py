"""Random options and batches for the losses of TRL's trainers, with and without trajkern: ``python -m`` runs thousands.

A case is the trainer's options, some changed only after ``enable``, and a batch. trajkern must give TRL's loss,
gradients, state and everything that TRL logs, or refuse: with a ValueError or TypeError that names an option.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.integrations.trl_trainers import trainer_of
from trajkern.integrations import trl as adapter
from trajkern.integrations._trl_loss import read_logged

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
NONSENSE: dict[str, list[tuple[str, Any]]] = {
    "GRPO": [
        *(("loss_type", x) for x in ("gspo", "GRPO", None)),
        *(("importance_sampling_level", x) for x in ("word", None)),
        *((name, x) for name in ("epsilon_low", "epsilon_high") for x in (-0.1, math.nan, "0.2", None)),
        *(("args.delta", x) for x in (0.9, math.nan, "2")),
        *(("beta", x) for x in (-0.1, math.nan)),
    ],
    "RLOO": [(name, x) for name in ("epsilon_low", "epsilon_high") for x in (-0.1, math.nan, "0.2", None)],
}
WORDS = ("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "delta", "beta")


@dataclass
class Case:
    kind: str
    options: dict[str, Any]
    inputs: dict[str, Any]
    training: bool
    later: bool  # whether the options are set behind enable

    def __str__(self) -> str:
        shape = list(self.inputs["completion_ids"].shape)
        lengths = self.inputs["completion_mask"].sum(1).tolist()
        return f"{self.kind} {self.options}, {shape} of {lengths}, training={self.training}, later={self.later}"


def drawn(kind: str, seed: int) -> Case:
    r, g = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    options = (
        _grpo_options(r) if kind == "GRPO" else {"epsilon_low": r.uniform(0, 0.9), "epsilon_high": r.uniform(0, 2)}
    )
    if r.random() < 0.1:
        name, value = r.choice(NONSENSE[kind])
        options[name] = value
    return Case(kind, options, _inputs(r, g, options), r.random() < 0.8, r.random() < 0.5)


def _grpo_options(r: random.Random) -> dict[str, Any]:
    loss_type = r.choice(LOSSES)
    high = r.choice([1.0, 1.2, 3.0, 5.0] if loss_type == "cispo" else [0.0, 0.1, 0.2, 0.28, 1.0])
    bonus = r.choice(["none", "none", "static", "adaptive"])
    return {
        "loss_type": loss_type,
        "importance_sampling_level": r.choice(["token", "sequence"]),
        "epsilon_low": r.choice([0.0, 0.1, 0.2, 0.9]),
        "epsilon_high": high,
        "args.delta": r.choice([None, None, max(1 + high, 1.05), 1.5 + high, 4.0 + high]),
        "beta": r.choice([0.0, 0.1, 1.0]),
        "args.use_bias_correction_kl": r.random() < 0.5,
        "top_entropy_quantile": r.choice([1.0, 1.0, 0.6, 0.2]),
        "off_policy_mask_threshold": r.choice([None, None, 0.05, 0.5]),
        "_entropy_bonus_enabled": bonus != "none",
        "use_adaptive_entropy": bonus == "adaptive",
        "entropy_coef": 0.03,
        "_last_world_entropy": r.choice([0.1, 5.0]),
        "_entropy_window_stats": None,
        "args.entropy_target": r.choice([0.5, 2.0, 9.0]),
        "args.entropy_coef_delta": 0.01,
        "args.entropy_coef_min": 0.025,
        "args.entropy_coef_max": 0.035,
        "current_gradient_accumulation_steps": r.randint(1, 3),
        "args.steps_per_generation": r.randint(1, 4),
        "max_completion_length": r.randint(1, 9),
        "args.sapo_temperature_pos": r.choice([0.5, 1.0]),
        "args.sapo_temperature_neg": r.choice([0.5, 1.05]),
        "args.vespo_k_pos": r.choice([0.5, 2.0]),
        "args.vespo_lambda_neg": r.choice([0.5, 2.0]),
        "use_vllm": r.random() < 0.3,
        "vllm_importance_sampling_correction": r.random() < 0.8,
    }


def _inputs(r: random.Random, g: torch.Generator, options: dict[str, Any]) -> dict[str, Any]:
    rows, prompt, length = r.randint(1, 6), r.randint(1, 4), r.choice([1, 1, 2, 3, 8])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def below(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=g)

    longest = below(length + 1, rows, 1) if r.random() < 0.8 else torch.full((rows, 1), r.choice([0, length]))
    mask = (torch.arange(length) < longest).long()
    tools = (below(4, rows, length) > 0).long()
    old = -3.4 + r.choice([0.1, 0.3, 2.0]) * normal(rows, length)
    weight = normal(rows, 1) if r.random() < 0.3 else normal(rows, length) * mask * tools
    per_token = r.random() < 0.2
    advantages = normal(rows, length) if per_token and "loss_type" in options else normal(rows)
    made = {
        "prompt_ids": 3 + below(26, rows, prompt),
        "prompt_mask": (torch.arange(prompt) >= below(prompt, rows, 1)).long(),
        "completion_ids": 3 + below(26, rows, length),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": advantages * below(4, *advantages.shape).clamp(max=1),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.5 * normal(rows, length),
        "sampling_per_token_logps": old + 0.3 * normal(rows, length),
        "importance_sampling_ratio": (0.4 * weight).exp() * (below(8, *weight.shape) > 0),
        "num_items_in_batch": torch.tensor(float(r.choice([0, 1, 17, 23]))),
        "old_logps": (old * mask).sum(1),
    }
    absent = [x for x in ("tool_mask", "old_per_token_logps", "sampling_per_token_logps") if r.random() < 0.4]
    return {name: x for name, x in made.items() if name not in absent}


def outcome(trainer: Any, case: Case) -> dict[str, Any]:
    """All that one call of the loss leaves."""
    vars(trainer).update({name: value for name, value in case.options.items() if name in STATE})
    for mode in ("train", "eval"):
        trainer._metrics[mode].clear()
    loss = trainer._compute_loss(trainer.model, dict(case.inputs))
    parameters = [x for x in trainer.model.parameters() if x.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    read_logged(trainer)
    logged = {f"{mode} {name}": x for mode in ("train", "eval") for name, x in trainer._metrics[mode].items()}
    state = {name: vars(trainer).get(name) for name in STATE if name in case.options}
    flat = torch.cat(
        [torch.zeros(p.numel()) if x is None else x.flatten() for p, x in zip(parameters, grads, strict=True)]
    )
    return {"loss": loss.detach(), "gradients": flat, **state, **logged}


def _put(trainer: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        owner, _, last = name.rpartition(".")
        setattr(trainer.args if owner else trainer, last, value)


def fault(trainer: Any, case: Case) -> str | None:
    """What trajkern did otherwise than TRL; None for nothing, and "" where it refused, as it may."""
    kept = {x: getattr(trainer.args if "." in x else trainer, x.rpartition(".")[2], None) for x in case.options}
    trainer.model.train(case.training)
    try:
        return _fault(trainer, case, kept)
    finally:
        adapter.disable(trainer)
        _put(trainer, kept)


def _fault(trainer: Any, case: Case, kept: dict[str, Any]) -> str | None:
    theirs: dict[str, Any] | None = None
    _put(trainer, case.options)
    with contextlib.suppress(Exception):  # what TRL cannot do either must be refused
        theirs = outcome(trainer, case)
    if case.later:
        _put(trainer, kept)
    try:
        adapter.enable(trainer)
        _put(trainer, case.options)
        ours = outcome(trainer, case)
    except (ValueError, TypeError) as error:
        odd = theirs is None or any((name, repr(x)) in _ODD for name, x in case.options.items())
        named = any(word in str(error) for word in WORDS)
        return "" if odd and named else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "TRL refuses" if theirs is None else _difference(ours, theirs)


_ODD = {(name, repr(x)) for of_kind in NONSENSE.values() for name, x in of_kind}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    if ours.keys() != theirs.keys():
        return f"logged: {sorted(ours.keys() ^ theirs.keys())}"
    for name, x in theirs.items():
        a, b = (torch.as_tensor(0.0 if y is None else y, dtype=torch.float64) for y in (ours[name], x))
        room = 1e-5 + 2e-5 * float(b.abs().nan_to_num(0).max()) if b.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=2e-5, atol=room, equal_nan=True):
            return f"{name}: {a.flatten()[:4].tolist()}, TRL has {b.flatten()[:4].tolist()}"
    return None


def trainers() -> Iterator[tuple[str, Any]]:
    for kind in ("GRPO", "RLOO"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(Path(folder), kind, beta=0.1)
            trainer.current_gradient_accumulation_steps = 1
            yield kind, trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    chosen, _ = parser.parse_known_args()  # of tests.fuzz, which has more
    tally: Counter[str] = Counter()
    for kind, trainer in trainers():
        for n in range(chosen.cases if kind == "GRPO" else chosen.cases // 4):
            found = fault(trainer, case := drawn(kind, chosen.seed * 1_000_000 + n))
            tally["refused" if found == "" else "as TRL" if found is None else "otherwise"] += 1
            if found:
                print(f"{kind}, {chosen.seed * 1_000_000 + n}: {found}\n  {case}", flush=True)
    print(dict(tally))
    return tally["otherwise"] > 0


if __name__ == "__main__":
    sys.exit(main())
