"""The processes that train together: which rows of a batch each draws, what they add up, and the sharded policy."""

from __future__ import annotations

import contextlib
import signal
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trajkern.trainer.models.policy import Policy
from trajkern.trainer.stopping import Interrupted

if TYPE_CHECKING:  # a run of one process does without
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
PATIENCE = 2.0  # seconds for the other ranks to say how they ended
_CONSEQUENCES = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # of another rank's end


class Rows(NamedTuple):
    """This process's share of a batch's rows: ``begin`` to ``end`` of the ``total`` that ``ranks`` work on."""

    begin: int
    end: int
    total: int
    ranks: Ranks

    def of(self, every: Sequence[T]) -> list[T]:
        return list(every[self.begin : self.end])

    def times(self, copies: int) -> Rows:
        """The same share where every row stands for ``copies``."""
        return Rows(self.begin * copies, self.end * copies, self.total * copies, self.ranks)


class Moments(NamedTuple):
    """The mean and the standard deviation of ``size`` numbers."""

    mean: float
    std: float
    size: int


@dataclass(frozen=True)
class Ranks:
    """One process, or the ranks that torchrun started, as a mesh of (data, vocabulary).

    Ranks that differ in "data" draw and train different rollouts, and hold the policy in shards (FSDP2). Those that
    differ in "vocabulary" only work on the same rollouts, each with its rows of the head.
    """

    mesh: DeviceMesh | None = None
    device: torch.device = torch.device("cpu")

    @property
    def number(self) -> int:
        """Among all ranks; 0 writes and shows."""
        return dist.get_rank() if self.mesh else 0

    @property
    def data(self) -> dist.ProcessGroup | None:
        """Over whose ranks the rollouts are spread; None where this is the only one."""
        return self.mesh["data"].get_group() if self.mesh and self.mesh["data"].size() > 1 else None

    @property
    def parts(self) -> int:
        """Into how many parts a batch is split."""
        return self.mesh["data"].size() if self.mesh else 1

    @property
    def part(self) -> int:
        """Which of the parts this rank works on."""
        return self.mesh["data"].get_local_rank() if self.mesh else 0

    def rows(self, total: int, whole: int = 1) -> Rows:
        """This rank's share of ``total`` rows, as even as it can be where ``whole`` adjacent ones stay together."""
        begin, end = (total // whole * n // self.parts * whole for n in (self.part, self.part + 1))
        return Rows(begin, end, total, self)

    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over the parts."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def most(self, x: int) -> int:
        """The largest ``x`` of the parts."""
        return int(self._reduce(torch.tensor(x), dist.ReduceOp.MAX)) if self.data else x

    def largest(self, x: int) -> int:
        """The largest ``x`` of all ranks, none of which goes on before every one has come here."""
        if not self.mesh:
            return x
        found = torch.tensor(x, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.largest(int(flag)))

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.data:
            x = x.detach().clone()
            dist.all_reduce(x, operation, group=self.data)
        return x

    def gather(self, some: list[T]) -> list[T]:
        """The items of all parts, in their order."""
        if not self.data:
            return some
        every: list[Any] = [None] * self.parts
        dist.all_gather_object(every, some, group=self.data)
        return [item for part in every for item in part]

    def told(self, value: T) -> T:
        """Rank 0's ``value``."""
        box = [value]
        if self.mesh:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @property
    def head(self) -> dist.ProcessGroup | None:
        """The ranks that work on the same rollouts, each with its rows of the head; None where this is the only one."""
        return self.mesh["vocabulary"].get_group() if self.mesh and self.mesh["vocabulary"].size() > 1 else None

    def of_head(self, name: str, value: Any) -> Any:
        """The ``value`` that the first rank of the head has, of what is called ``name``."""
        box, group = [value], self.head
        try:
            dist.broadcast_object_list(box, group=group, group_src=0, device=self.device)
        except RuntimeError:  # of the ranks
            raise
        except Exception as error:
            raise TypeError(f"{name} must return what can be pickled, for the ranks of a head; {error}") from None
        return box[0]

    def tensor_of_head(self, x: Tensor) -> Tensor:
        """The ``x`` that the first rank of the head has; all have one of that shape and dtype."""
        if not self.head:
            return x
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, group=self.head, group_src=0)
        return x

    def merged(self, values: Mapping[str, Any]) -> dict[str, float | int | None]:
        """A step's metrics over all parts.

        A tensor counts with each of its elements, a pair (x, n) as n elements of mean x; :class:`Moments` are pooled to
        NAME/mean and NAME/std; integers are added up; any other value is the same wherever it is known.
        """
        parts = self.gather([{name: _mean(x) for name, x in values.items()}])
        merged: dict[str, float | int | None] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            known = [part[name] for part in parts if name in part]
            if isinstance(known[0], Moments):
                mean = _pooled((x.mean, x.size) for x in known)
                variance = _pooled((x.std**2 + (x.mean - (mean or 0.0)) ** 2, x.size) for x in known)
                merged[f"{name}/mean"], merged[f"{name}/std"] = mean, None if variance is None else variance**0.5
            elif isinstance(known[0], tuple):
                merged[name] = _pooled(known)
            else:
                merged[name] = sum(known) if isinstance(known[0], int) else known[0]
        return merged

    def shard(self, policy: Policy) -> Policy:
        """The policy, from here on in shards over the ranks; gradients are added up, not averaged."""
        if not self.mesh:
            return policy.to(self.device)
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        data, vocabulary = self.mesh["data"], self.mesh["vocabulary"]
        if vocabulary.size() > 1:
            _split_head(policy, vocabulary)
        for module in (*policy.layers(), policy):
            fully_shard(module, mesh=data)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for method in ("hidden", "extend"):
            register_fsdp_forward_method(policy, method)
        return policy

    @contextlib.contextmanager
    def gathered(self, policy: nn.Module) -> Iterator[None]:
        """Hold all of the policy's weights: forwards then wait for no other rank."""
        if not self.mesh:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        modules = [m for m in policy.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not policy, recurse=False)
                module.reshard()


ALONE = Ranks()


def _pooled(parts: Iterable[tuple[float, int]]) -> float | None:  # (mean, count) each
    """The mean of all; what is of nothing may be NaN."""
    counted = [(x, n) for x, n in parts if n]
    return sum(x * n for x, n in counted) / sum(n for _, n in counted) if counted else None


def _mean(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (x.mean().item(), x.numel()) if x.numel() else (0.0, 0)
    return x


def _split_head(policy: Policy, vocabulary: DeviceMesh) -> None:
    """Give each rank its rows of the head, and of the embedding that is tied to it."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    head, embedding = policy.head_modules()
    tied = head.weight is embedding.weight
    parallelize_module(head, vocabulary, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        parallelize_module(embedding, vocabulary, RowwiseParallel(input_layouts=Replicate()))
        embedding.weight = head.weight


def own_shards(policy: nn.Module) -> None:
    """Leave each rank its share of the weights, after a forward that no backward follows, which left all of them."""
    for module in policy.modules():
        if reshard := getattr(module, "reshard", None):
            reshard()


def full(x: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, other: Any) -> Tensor:
    """A whole tensor as ``other`` is sharded."""
    if not hasattr(other, "device_mesh") or x.shape != other.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class RankError(Exception):
    """Another rank ended this run."""


@contextlib.contextmanager
def joined(device: str, tensor_parallel: int) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Raises:
        ValueError: tensor_parallel does not divide the number of ranks, or there is no such device.
        RankError: another rank failed or died; its number and, where it could tell, its error are named.
        Interrupted: what all ranks agreed on, from rank 0; the others exit with the same status.
    """
    alone = not dist.is_torchelastic_launched()
    place = _device(device, 0 if alone else dist.get_node_local_rank())
    store, rank, count = (None, 0, 1) if alone else next(dist.rendezvous("env://"))
    if tensor_parallel < 1 or count % tensor_parallel:
        raise ValueError(f"tensor_parallel must divide the number of ranks, {count}; got {tensor_parallel}")
    if count == 1:
        yield Ranks(device=place)
        return
    from torch.distributed.device_mesh import init_device_mesh

    store = of_this_start(store, rank, count)
    dist.init_process_group(store=store, rank=rank, world_size=count)
    before = signal.getsignal(signal.SIGTERM)
    try:
        shape, names = (count // tensor_parallel, tensor_parallel), ("data", "vocabulary")
        yield Ranks(init_device_mesh(place.type, shape, mesh_dim_names=names), place)
        dist.destroy_process_group()
    except Interrupted as stopped:
        dist.destroy_process_group()
        if rank > 0:
            raise SystemExit(stopped.status) from None
        raise
    except BaseException as error:  # code of a task's may raise SystemExit
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _explain(error, store, rank, count)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def of_this_start(store: Any, rank: int, count: int) -> Any:
    """A part of ``store`` that is of this start alone: torchrun's agent may keep one store over restarts, in which the
    addresses of ranks that have ended still stand.

    Rank 0 asks with a word that nobody has used, and goes on once all have answered with one each; the others go on
    once theirs is among those that it has read.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    if rank == 0:
        store.set("start/asked", own)
    while time.monotonic() < until:
        asked = own if rank == 0 else store.get("start/asked").decode()
        if rank == 0:
            keys = [f"start/answer/{n}" for n in range(1, count)]
            answers = [store.get(key).decode() for key in keys] if store.check(keys) else []
            if len(answers) == count - 1 and all(answer.startswith(own) for answer in answers):
                store.set(f"start/{own}", " ".join(answers))
                return dist.PrefixStore(f"start/{own}", store)
        else:
            store.set(f"start/answer/{rank}", f"{asked}/{own}")
            if store.check([f"start/{asked}"]) and own in store.get(f"start/{asked}").decode():
                return dist.PrefixStore(f"start/{asked}", store)
        time.sleep(0.02)
    raise RuntimeError(f"not all of {count} ranks started within {store.timeout}")


def _device(name: str, local: int) -> torch.device:
    if name == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if name != "cpu":
        raise ValueError(f"device must be cpu, or cuda where torch sees a GPU; got {name!r}")
    return torch.device("cpu")


def _explain(error: BaseException, store: Any, rank: int, count: int) -> None:
    """Tell the others how this rank ended; on one that ended because of another, raise what is known of that one."""
    follows = any(mark in str(error) for mark in _CONSEQUENCES)
    store.set(f"ended/{rank}", "" if follows else f"{type(error).__name__}: {error}")
    # who waits for this rank hears of its end when it ends
    until, told = time.monotonic() + (PATIENCE if follows else 0.5), dict[int, str]()
    while len(told) < count and time.monotonic() < until and not (follows and any(told.values())):
        told |= {n: store.get(f"ended/{n}").decode() for n in range(count) if store.check([f"ended/{n}"])}
        time.sleep(0.05)
    causes = {n: text for n, text in told.items() if text}
    causes = causes or {n: "it ended without a word" for n in range(count) if n not in told}
    if follows and causes:
        failed = "; ".join(f"rank {n} of {count}: {text}" for n, text in causes.items())
        raise RankError(failed) from None
    if any(told.get(n) == told[rank] for n in range(rank)):
        raise SystemExit(2) from None  # all say the same: once is enough
