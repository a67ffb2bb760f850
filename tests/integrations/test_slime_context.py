"""slime's and miles' losses where context parallelism splits sequences: the ranks' shares add up to one process's."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations import slime_batches as host
from tests.integrations.test_slime import CASES, PATH
from tests.ranks import over_ranks
from trajkern.integrations import _slime_batch, slime

pytestmark = pytest.mark.slow
RANKS = 2
REDUCED = {"custom_pg_loss_reducer_function_path": PATH + "pg_loss_reducer", "advantage_estimator": "gspo"}
SPLIT = CASES | {"a reducer, gspo": REDUCED | {"use_kl_loss": True, "entropy_coef": 0.05, "eps_clip": 0.01}}
HOSTS = {"slime": host.SLIME, "miles": host.MILES}
OF_TOKENS = ("advantages", "log_probs", "ref_log_probs", "rollout_log_probs")


def offsets(total: int, response: int, rank: int) -> tuple[Any, ...]:
    """As the hosts' ``get_logits_and_tokens_offset_with_cp``: the rank's two chunks of 2 RANKS, one from either end."""
    chunk = -(-total // (2 * RANKS))
    bounds = [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * RANKS - 1 - rank)]
    rows = [(max(begin, total - response - 1), min(end, total - 1)) for begin, end in bounds]
    rows = [(begin, end) if begin < end else (0, 0) for begin, end in rows]
    return chunk, bounds, rows, [(begin + 1, end + 1) if begin < end else (0, 0) for begin, end in rows]


def own(x: torch.Tensor, total: int, rank: int) -> torch.Tensor:
    """The rank's tokens of a response's."""
    prompt = total - x.shape[0]
    parts = [x[begin - prompt : end - prompt] for begin, end in offsets(total, x.shape[0], rank)[3] if end]
    return torch.cat([x[:0], *parts])


def _shares(parts: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    return [own(x, total, rank) for x, total in zip(parts, host.TOTALS, strict=True)]


def _modules(rank: int) -> dict[str, ModuleType]:
    """The hosts' as far as the adapter asks them, of ranks that hold all logits and have a gradient in their rows'."""
    found = {}
    for scorer, splitter in zip(_slime_batch.SCORERS, _slime_batch.SPLITTERS, strict=True):
        modules: list[Any] = [ModuleType(scorer), ModuleType(splitter)]
        modules[1].get_logits_and_tokens_offset_with_cp = lambda total, response: offsets(total, response, rank)
        modules[1].mpu = SimpleNamespace(get_context_parallel_group=lambda: dist.group.WORLD)
        modules[1].get_parallel_state = lambda: SimpleNamespace(cp=SimpleNamespace(group=dist.group.WORLD))
        modules[0].get_rollout_top_p_logprob_kwargs = lambda args, batch: {}

        def scored(logits: torch.Tensor, *, args: Any, with_entropy: bool, unconcat_tokens: Any, **_: Any) -> Any:
            of_batch = {"unconcat_tokens": unconcat_tokens}
            names = ("log_probs", "entropy")[: 1 + with_entropy]
            whole = (host.log_probs(of_batch, logits, args.rollout_temperature, name == "entropy") for name in names)
            return {name: _shares(x, rank) for name, x in zip(names, whole, strict=True)}

        modules[0].get_log_probs_and_entropy = scored
        found |= {scorer: modules[0], splitter: modules[1]}
    return found


def _outcome(args: Namespace, batch: dict[str, Any], logits: torch.Tensor, masks: list[torch.Tensor]) -> Any:
    """``masks``: of the tokens that the rank holds."""
    sums, x = batch["rollout_mask_sums"], logits.clone().requires_grad_()

    def reducer(values: torch.Tensor) -> torch.Tensor:
        parts = zip(values.split([m.shape[0] for m in masks]), masks, sums, strict=True)
        totals = [((v * m).sum(), 1.0 if args.calculate_per_token_loss else max(float(n), 1)) for v, m, n in parts]
        return sum(total / by for total, by in totals)

    loss, metrics = slime.policy_loss(args, batch, x * 1.0, reducer)
    (3 * loss).backward()
    return {"": loss.detach(), "grad": x.grad, **metrics}


def _every(rank: int | None) -> dict[Any, Any]:
    """All cases' outcomes of a rank's share, or of the whole in one process."""
    found: dict[Any, Any] = {}
    for name, options in HOSTS.items():
        if rank is not None:  # one host is loaded at a time
            for module in (*_slime_batch.SCORERS, *_slime_batch.SPLITTERS):
                sys.modules.pop(module, None)
            sys.modules |= {key: x for key, x in _modules(rank).items() if key.startswith(name)}
        for case, changes in SPLIT.items():
            for per_token in (False, True):
                batch, logits = host.micro_batch(1)
                masks = batch["loss_masks"]
                args = Namespace(**(options | changes | {"calculate_per_token_loss": per_token}))
                if rank is not None:
                    args.context_parallel_size, masks = RANKS, _shares(masks, rank)
                    batch |= {field: _shares(batch[field], rank) for field in OF_TOKENS}
                found[name, case, per_token] = _outcome(args, batch, logits, masks)
    return found


def _corrected(rank: int | None) -> Any:
    batch, _ = host.micro_batch(1)
    names, masks = {"train_log_probs": "log_probs", "rollout_log_probs": "rollout_log_probs"}, batch["loss_masks"]
    lists = {
        ours: [torch.where(m != 0, x, 0.0) for x, m in zip(batch[theirs], masks, strict=True)]
        for ours, theirs in names.items()
    }
    if rank is not None:
        lists = {name: _shares(x, rank) for name, x in lists.items()}
    args = Namespace(tis_clip_low=0.95, tis_clip=1.05, context_parallel_size=1 if rank is None else RANKS)
    lengths = {name: batch[name] for name in ("total_lengths", "response_lengths", "loss_masks")}
    pg_loss = torch.ones(sum(x.shape[0] for x in lists["train_log_probs"]))
    return slime.sequence_mask(args, pg_loss=pg_loss, **lists, **lengths)[1]


def _rank(rank: int) -> dict[Any, Any]:
    found = _every(rank)
    for module in (*_slime_batch.SCORERS, *_slime_batch.SPLITTERS):
        sys.modules.pop(module, None)
    sys.modules |= {key: x for key, x in _modules(rank).items() if key.startswith("slime")}
    found["masks"] = _corrected(rank)
    found["error"] = _refused({"context_parallel_size": 3})
    for name, wrong in WRONG.items():
        host_module: Any = sys.modules[_slime_batch.SPLITTERS[0]]
        host_module.get_logits_and_tokens_offset_with_cp = functools.partial(wrong, rank=rank)
        found[name] = _refused({"context_parallel_size": RANKS})
    return found


def _refused(changed: dict[str, Any]) -> str:
    batch, logits = host.micro_batch(1)
    try:
        slime.policy_loss(Namespace(**(host.SLIME | changed)), batch, logits, host.reducer(batch, False))
    except ValueError as error:
        return str(error)
    return "nothing"


def _moved(total: int, response: int, rank: int) -> Any:
    """One token too far, as if the offsets were those of the logits."""
    *rest, tokens = offsets(total, response, rank)
    return *rest, [(begin - 1, end - 1) for begin, end in tokens]


def _twice(total: int, response: int, rank: int) -> Any:
    return offsets(total, response, 0)


def _in_two(total: int, response: int, rank: int) -> Any:
    """Each rank a half, of whose tokens the first one's last is nobody's."""
    half = total - response // 2
    return None, [(total - response, half - 1) if rank == 0 else (half, total)]


WRONG = {"moved": _moved, "twice": _twice, "in two": _in_two}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return over_ranks(RANKS, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole() -> dict[Any, Any]:
    return _every(None)


@pytest.mark.parametrize("per_token", [False, True], ids=["per rollout", "per token"])
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("case", SPLIT)
def test_shares_add_up(of_ranks: list[Any], whole: dict[Any, Any], case: str, name: str, per_token: bool) -> None:
    key = name, case, per_token
    shares, expected = [found[key] for found in of_ranks], whole[key]
    assert shares[0].keys() == shares[1].keys() == expected.keys()
    for of, x in expected.items():
        total = shares[0][of] + shares[1][of]
        torch.testing.assert_close(total, x, rtol=1e-4, atol=2e-6, msg=lambda m, of=of: f"{of}: {m}")
    assert case != "ppo with entropy" or all(bool(share["grad"].any()) for share in shares)


def test_a_sequence_mask_is_of_whole_sequences(of_ranks: list[Any]) -> None:
    masks = _corrected(None)
    for found in of_ranks:
        torch.testing.assert_close(list(found["masks"]), list(masks))
        assert found["error"] == "context_parallel_size must be the 2 ranks of the host's group, got 3"
    kept = [bool(m.any()) for m in masks]
    assert any(kept) and sum(kept) < sum(bool(m.any()) for m in host.micro_batch(1)[0]["loss_masks"])


def test_offsets_that_are_no_split_are_refused_by_all_ranks(of_ranks: list[Any]) -> None:
    for name in WRONG:
        for found in of_ranks:
            assert found[name].startswith("get_logits_and_tokens_offset_with_cp must give each of the "), found[name]
            assert found[name] == of_ranks[0][name]
