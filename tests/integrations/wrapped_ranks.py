"""Two ranks of gloo with a causal model in every wrapper: what each case gives is written for the test to compare."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

import trajkern as tk
from trajkern.integrations.transformers import head_arguments, hidden_states, log_probs

V, RANKS = 61, 2


def tiny(*, tied: bool = False, family: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for x in model.parameters():
        x.data.mul_(3).add_(0.01 * torch.randn(x.shape))  # no softmax is nearly flat, and no bias is 0
    return model.eval()


def adapted(model: Any) -> Any:
    import peft

    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def packed(rank: int, lengths: tuple[int, ...] = (9, 1, 0, 14, 5)) -> tk.PackedBatch:
    g = torch.Generator().manual_seed(1 + rank)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(V, (int(bounds[-1]),), generator=g)
    mask = torch.rand(tokens.shape, generator=g) < 0.7
    mask[bounds[:-1][bounds.diff() > 0]] = False
    return tk.PackedBatch(tokens, bounds, mask, torch.zeros(len(lengths), dtype=torch.long))


def factors(batch: tk.PackedBatch) -> Tensor:
    return torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3))


# model, batch -> its log-probs, and a loss whose gradients are compared


def own(model: Any, batch: tk.PackedBatch, *, detached: bool = False) -> tuple[Tensor, Tensor]:
    """By the forward of the model itself, which is not wrapped."""
    head, bounds, parts = model.get_output_embeddings(), batch.cu_seqlens.tolist(), []
    freeze = head.register_forward_pre_hook(lambda _, x: (x[0].detach(),)) if detached else None
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if end > begin:
            tokens = batch.tokens[begin:end]
            logits = model(input_ids=tokens[None]).logits[0, :-1].float()
            parts += [torch.zeros(1), logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]]
    if freeze is not None:
        freeze.remove()
    logprobs = torch.where(batch.loss_mask, torch.cat(parts or [torch.zeros(0)]), 0)
    return logprobs.detach(), (logprobs * factors(batch)).sum()


def scored(model: Any, batch: tk.PackedBatch) -> tuple[Tensor, Tensor]:
    logprobs = log_probs(model, batch)
    return logprobs.detach(), (logprobs * factors(batch)).sum()


def halves(model: Any, batch: tk.PackedBatch, *, detached: bool = False) -> tuple[Tensor, Tensor]:
    rows, targets, tokens, _ = batch.head_inputs()
    hidden = hidden_states(model, batch)
    hidden = hidden.detach() if detached else hidden
    of_pairs = tk.linear_logprobs(hidden, targets=targets, rows=rows, **head_arguments(model))
    logprobs = of_pairs.detach().new_zeros(batch.num_tokens).index_copy(0, tokens, of_pairs)
    return logprobs.detach(), (logprobs * factors(batch)).sum()


def detached(model: Any, batch: tk.PackedBatch) -> tuple[Tensor, Tensor]:
    return halves(model, batch, detached=True)


def gathered(model: Any, batch: tk.PackedBatch) -> tuple[Tensor, Tensor]:
    """The head's weight by hand, as the error for a DTensor says."""
    rows, targets, tokens, _ = batch.head_inputs()
    hidden = hidden_states(model, batch)
    weight = model.lm_head.weight.full_tensor(grad_placements=[Partial("avg")])
    of_pairs = tk.linear_logprobs(hidden, weight, targets, rows=rows)
    logprobs = of_pairs.detach().new_zeros(batch.num_tokens).index_copy(0, tokens, of_pairs)
    return logprobs.detach(), (logprobs * factors(batch)).sum()


# wrappers


def sharded(model: Any, *, body: bool = True, **root: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers if body else ():
        fully_shard(layer, **{k: v for k, v in root.items() if k != "reshard_after_forward"})
    return fully_shard(model, **root)


def with_own_head(model: Any, *, root: bool) -> Any:
    fully_shard(model.lm_head)
    fully_shard(model.model)
    return fully_shard(model) if root else model


def grouped(model: Any) -> Any:
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=True)
    return sharded(model)


def divided(model: Any) -> Any:
    sharded(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # all that gloo has
            module.set_gradient_divide_factor(1.0)
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return sharded(model)


def fsdp1(model: Any, *, orig: bool = True, strategy: str = "FULL_SHARD", own_head: bool = False) -> Any:
    cpu = {"use_orig_params": orig, "device_id": torch.device("cpu"), "sharding_strategy": ShardingStrategy[strategy]}
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = FullyShardedDataParallel(layer, **cpu)
    if own_head:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **cpu)
    return FullyShardedDataParallel(model, **cpu)


class Case(NamedTuple):
    wrap: Callable[[Any], Any]
    make: Callable[[], Any] = tiny
    loss: Callable[..., tuple[Tensor, Tensor]] = scored
    summed: bool = False  # over the ranks, where the others take the mean
    tolerance: float = 1e-5
    quick: bool = False  # runs wherever the tests run
    lengths: tuple[tuple[int, ...], ...] = ((9, 1, 0, 14, 5),) * RANKS


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MESH = lambda: init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))  # noqa: E731
CASES = {
    "ddp": Case(DistributedDataParallel),
    "ddp halves": Case(DistributedDataParallel, loss=halves),
    "ddp unused": Case(lambda m: DistributedDataParallel(m, find_unused_parameters=True), loss=halves, quick=True),
    "ddp static": Case(lambda m: DistributedDataParallel(m, static_graph=True)),
    "ddp lora": Case(lambda m: DistributedDataParallel(adapted(m), find_unused_parameters=True)),
    "ddp compiled": Case(lambda m: torch.compile(DistributedDataParallel(m))),
    "compiled ddp": Case(lambda m: DistributedDataParallel(torch.compile(m))),
    "ddp tied": Case(DistributedDataParallel, lambda: tiny(tied=True)),
    "fsdp2": Case(sharded),
    "fsdp2 halves": Case(sharded, loss=halves, quick=True),
    "fsdp2 one group": Case(lambda m: sharded(m, body=False)),
    "fsdp2 resharded": Case(lambda m: sharded(m, reshard_after_forward=True), quick=True),
    "fsdp2 resharded halves": Case(lambda m: sharded(m, reshard_after_forward=True), loss=halves),
    "fsdp2 own head": Case(lambda m: with_own_head(m, root=True), quick=True),
    "fsdp2 own head, no root": Case(lambda m: with_own_head(m, root=False), loss=halves),
    "fsdp2 grouped": Case(grouped, quick=True),
    "fsdp2 grouped halves": Case(grouped, loss=halves),
    "fsdp2 detached": Case(sharded, loss=detached),
    "fsdp2 own head detached": Case(lambda m: with_own_head(m, root=True), loss=detached),
    "fsdp2 gathered by hand": Case(lambda m: sharded(m, reshard_after_forward=True), loss=gathered),
    "fsdp2 tied": Case(sharded, lambda: tiny(tied=True), quick=True),
    "fsdp2 bias": Case(sharded, lambda: tiny(family="Phi")),
    "fsdp2 lora": Case(lambda m: sharded(adapted(m))),
    "fsdp2 bf16": Case(lambda m: sharded(m, mp_policy=BF16), tolerance=0.05),
    "fsdp2 divided": Case(divided, summed=True),
    "fsdp2 compiled": Case(lambda m: torch.compile(sharded(m))),
    "fsdp2 compiled in place": Case(compiled_in_place),
    "fsdp2 replicated": Case(lambda m: sharded(m, mesh=MESH())),
    "fsdp2 empty rank": Case(sharded, lengths=((9, 5), (0,)), quick=True),
    "ddp empty rank": Case(DistributedDataParallel, lengths=((9, 5), (0,))),
    "fsdp1": Case(fsdp1, quick=True),
    "fsdp1 halves": Case(fsdp1, loss=halves),
    "fsdp1 flat": Case(lambda m: fsdp1(m, orig=False)),
    "fsdp1 grad_op": Case(lambda m: fsdp1(m, strategy="SHARD_GRAD_OP")),
    "fsdp1 own head": Case(lambda m: fsdp1(m, own_head=True)),
    "fsdp1 own head halves": Case(lambda m: fsdp1(m, own_head=True), loss=halves),
}


def clean(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(part, "")
    return name


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient, whole; of FSDP1, which has flat ones, what a step of SGD takes away."""
    if not isinstance(model, FullyShardedDataParallel):
        found = {clean(name): x.grad for name, x in model.named_parameters() if x.grad is not None}
        return {k: x.full_tensor() if isinstance(x, DTensor) else x.detach().clone() for k, x in found.items()}
    weights, before = [], [x.detach().clone() for x in model.parameters()]
    for stepped in (False, True):
        if stepped:
            torch.optim.SGD(model.parameters(), 1.0).step()
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            weights.append({clean(name): x.detach().clone() for name, x in model.named_parameters()})
    for x, old in zip(model.parameters(), before, strict=True):
        x.data.copy_(old)
    return {name: x - weights[1][name] for name, x in weights[0].items()}


def outcome(case: Case, rank: int) -> dict[str, Any]:
    """Log-probs without and with gradients, twice, so that a second step starts from what the first one left."""
    model, batch = case.wrap(case.make()), packed(rank, case.lengths[rank])
    before = None
    with torch.no_grad():
        unscored = log_probs(model, batch)
    for _ in range(2):
        model.zero_grad()
        logprobs, loss = case.loss(model, batch)
        loss.backward()
        grads = gradients(model)
        assert before is None or all(torch.allclose(before[k], grads[k], rtol=1e-4, atol=1e-6) for k in grads)
        before = grads
    return {"no_grad": unscored, "logprobs": logprobs, "grads": grads}


def main(rank: int, folder: str, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = outcome(CASES[name], rank)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":  # forked, so that what is imported is imported once
    torch.set_num_threads(1)
    mp.start_processes(main, (sys.argv[1], sys.argv[2:]), nprocs=RANKS, start_method="fork")
