"""The loss of TRL's AsyncGRPOTrainer on trajkern's, with what this trainer logs.

Its batch is a row of tokens that samples share, and a list of loss terms over it. What the host must know of a batch is
read from the device once, before the forward; TRL reads it in some twenty places. What is logged stays there until
:func:`trajkern.integrations._trl_loss.read_logged`.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations._adapter import clipped
from trajkern.integrations._trl_loss import clip_of, largest, mark_unread

_MARKED = {  # what is padded behind its last entry, with less than 0
    "terms": "token_index",
    "keys": "tree_kv_index",
    "bounds_q": "tree_cu_seqlens_q",
    "bounds_k": "tree_cu_seqlens_k",
}


class Sizes(NamedTuple):
    """What the host must know of one rank's batch."""

    tokens: int
    terms: int
    keys: int
    bounds_q: int
    bounds_k: int
    longest_q: int
    longest_k: int
    samples: int  # up to the last that has a term
    forwarded: float  # tokens of all ranks
    trained: float
    mean_length: float

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Sizes:
        """Waits for the device once."""
        counts = [(inputs["attention_mask"] != 0).sum(), *((inputs[name] >= 0).sum() for name in _MARKED.values())]
        each = (inputs["global_n_forward_tokens"], inputs["global_n_tokens"], inputs["mean_seq_len"])
        sample = inputs["segment_id"]
        last = sample.max() if sample.numel() else sample.new_full((), -1)
        found = (*counts, *inputs["tree_max_seqlens"][0], last + 1, *(x[0] for x in each))
        numbers = torch.stack([x.double() for x in found]).tolist()
        return cls(*map(int, numbers[:8]), *numbers[8:])


def async_grpo_loss(
    self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Tensor:
    """AsyncGRPOTrainer.compute_loss: the clipped objective's mean over the tokens that all ranks train."""
    sizes = Sizes.of(inputs)
    index = inputs["token_index"][0, : sizes.terms]
    old, a = (inputs[name][0, : sizes.terms] for name in ("old_log_probs", "advantages"))
    start = time.time()
    outputs = _forward(self, model, inputs, sizes)
    new, entropy = outputs.log_probs.flatten()[index], outputs.entropy.flatten()[index]
    self._last_forward_time_s = time.time() - start
    config = clip_of(self, aggregate="token_mean")
    accumulation = self.current_gradient_accumulation_steps
    counted = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0) * accumulation
    whole = torch.arange(2, device=new.device) * sizes.terms  # which sample a term is of says nothing to the mean
    loss, _ = tk.policy_loss(new, old, a, whole, config=config, per_token=True, normalizer=counted)
    metrics = self._metrics["train"]
    if self.aux_loss_enabled:
        auxiliary = outputs.aux_loss
        loss = loss + self.router_aux_loss_coef * auxiliary / accumulation
    with torch.no_grad():
        sample = inputs["segment_id"][0, : sizes.terms]
        low, high = _log_means(self, new.detach(), old, a, entropy.detach(), config)
        _log_extremes(self, low, high, sample, sizes.samples)
        if self.aux_loss_enabled:
            every = self.accelerator.reduce(auxiliary.detach().float(), reduction="sum")
            metrics["aux_loss"].append(every / self.accelerator.num_processes)
    mark_unread(self)
    self._step_forward_tokens += sizes.forwarded
    self._step_trained_tokens += sizes.trained
    self._step_seq_len_weighted += sizes.mean_length * sizes.forwarded
    self._step_samples += sizes.forwarded / sizes.mean_length
    self._step_forward_s += self._last_forward_time_s
    return loss


def _forward(self: Any, model: Any, inputs: dict[str, Any], sizes: Sizes) -> Any:
    row = {name: inputs[name][:, : sizes.tokens] for name in ("input_ids", "position_ids", "shift_labels")}
    lengths = {"tree_kv_index": sizes.keys, "tree_cu_seqlens_q": sizes.bounds_q, "tree_cu_seqlens_k": sizes.bounds_k}
    row |= {name: inputs[name][0, :length] for name, length in lengths.items()}
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    longest = {"tree_max_seqlen_q": sizes.longest_q, "tree_max_seqlen_k": sizes.longest_k}
    return model(**row, fused_lm_head=True, **router, **longest)


def _log_means(
    self: Any, new: Tensor, old: Tensor, a: Tensor, entropy: Tensor, config: tk.PolicyLoss
) -> tuple[Tensor, Tensor]:
    """Over all terms of all ranks; returns which are clipped from below and from above, float ``[M]``."""
    difference = new - old
    ratio = difference.exp()
    low, high = (x.float() for x in clipped(ratio, a, config))
    sums = [x.sum() for x in (ratio, ratio - 1 - difference, entropy, low, high, torch.maximum(low, high))]
    total = self.accelerator.reduce(torch.stack([*sums, torch.full_like(sums[0], new.numel())]), reduction="sum")
    names = ("ratio", "kl", "entropy", *(f"clip_ratio/{x}_mean" for x in ("low", "high", "region")))
    for name, x in zip(names, (total[:-1] / total[-1]).unbind(), strict=True):
        self._metrics["train"][name].append(x)
    return low, high


def _log_extremes(self: Any, low: Tensor, high: Tensor, sample: Tensor, samples: int) -> None:
    """The least and the largest share of clipped terms that a sample has, of all ranks."""
    sums = torch.zeros(3, samples, dtype=low.dtype, device=low.device).index_add(
        1, sample, torch.stack((torch.ones_like(low), low, high))
    )
    least, most = sums[1:] / sums[0]  # NaN for a sample without terms
    for name, x, sign in (("low_min", least, -1), ("high_max", most, 1)):
        every = self.accelerator.gather(largest(sign * x)).reshape(-1)
        self._metrics["train"][f"clip_ratio/{name}"].append(sign * largest(every))
