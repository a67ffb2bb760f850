"""slime's and miles' functions by path: trajkern's numbers beside their own formulas, read from their sources."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trajkern as tk
from tests.integrations import slime_batches as host
from trajkern.integrations import _slime_batch, _slime_credit, slime

PATH = "trajkern.integrations.slime."
fixed = slime.fixed_length(17)
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dual clip": {"eps_clip_c": 1.1, "eps_clip": 0.02, "eps_clip_high": 0.03},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.01, "eps_clip_high": 0.02},
    "cispo": {"advantage_estimator": "cispo", "eps_clip_c": 1.1},
    "ppo with entropy": {"advantage_estimator": "ppo", "entropy_coef": 0.05},
    "k1": {"use_kl_loss": True, "advantage_estimator": "reinforce_plus_plus"},
    "k2": {"use_kl_loss": True, "kl_loss_type": "k2", "entropy_coef": 0.05},
    "k3, unbiased": {"use_kl_loss": True, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    "a metric alone": {"use_kl_loss": True, "kl_loss_coef": 0.0},
    "tis": {"use_tis": True},
    "mismatch metrics": {"get_mismatch_metrics": True, "use_rollout_logprobs": True},
    "icepop": {"use_tis": True, "custom_tis_function_path": PATH + "icepop", "entropy_coef": 0.05},
    "the host's icepop": {
        "use_tis": True,
        "custom_tis_function_path": "slime.backends.megatron_utils.loss.icepop_function",
    },
    "sequence_mask": {
        "use_tis": True,
        "custom_tis_function_path": PATH + "sequence_mask",
        "tis_clip_low": 0.95,
        "tis_clip": 1.05,
        "entropy_coef": 0.05,
        "use_kl_loss": True,
    },
    "opsm": {"use_opsm": True},
    "opsm, gspo, tis": {"use_opsm": True, "advantage_estimator": "gspo", "use_tis": True, "eps_clip": 0.01},
    "rollout log-probs": {"use_rollout_logprobs": True},
}


def _results(args: Namespace, batch: dict[str, Any], logits: torch.Tensor, function, reducer) -> tuple:
    x = logits.clone().requires_grad_()
    loss, metrics = function(args, batch, x * 1.0, reducer)
    (3 * loss).backward()
    assert not any(value.requires_grad or value.ndim for value in metrics.values())
    return loss.detach(), x.grad, metrics


@pytest.fixture(autouse=True)
def unchecked_reducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds its reducer against the weights anew."""
    monkeypatch.setattr(_slime_batch, "_held", set())


@pytest.mark.parametrize("per_token", [False, True], ids=["per rollout", "per token"])
@pytest.mark.parametrize("options", [host.SLIME, host.MILES], ids=["slime", "miles"])
@pytest.mark.parametrize("case", CASES)
def test_policy_loss(case: str, options: dict[str, Any], per_token: bool) -> None:
    args = Namespace(**(options | CASES[case] | {"calculate_per_token_loss": per_token}))
    batch, logits = host.micro_batch(1)
    check(args, batch, logits)


def check(args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> dict[str, torch.Tensor]:
    reducer = host.reducer(batch, args.calculate_per_token_loss)
    loss, grad, metrics = _results(args, batch, logits, slime.policy_loss, reducer)
    theirs, their_grad, their_metrics = _results(
        args, batch, logits.double(), lambda args, batch, x, _: host.expected(args, batch, x), reducer
    )
    torch.testing.assert_close(loss.double(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), their_grad, rtol=1e-4, atol=1e-6)
    assert bool(their_grad.any())
    assert metrics.keys() == their_metrics.keys()
    for name, x in their_metrics.items():
        torch.testing.assert_close(
            metrics[name].double(), x.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    return metrics


def test_the_cases_clip_and_mask() -> None:
    """What the cases above are about happens in their batch."""
    for case, name in (("gspo", "pg_clipfrac"), ("icepop", "tis_clipfrac"), ("opsm", "opsm_clipfrac")):
        args = Namespace(**(host.SLIME | CASES[case]))
        batch, logits = host.micro_batch(1)
        assert float(host.expected(args, batch, logits.double())[1][name]) > 0, case
    w = (host.joined(batch, "log_probs") - host.joined(batch, "rollout_log_probs")).exp()
    _, masks, dropped = host.corrected(Namespace(**(host.SLIME | CASES["sequence_mask"])), batch, w)
    assert 0 < float(dropped.mean()) < 1 and sum(int(m.sum()) for m in masks) > 0


@pytest.mark.parametrize(
    "options", [host.SLIME, host.MILES | {"skip_actor_forward_only": True}], ids=["slime", "miles"]
)
def test_without_scored_log_probs(options: dict[str, Any]) -> None:
    """The ratio is 1, and a correction is of what the policy says now."""
    batch, logits = host.micro_batch(2)
    batch["log_probs"] = None
    check(Namespace(**(options | {"use_tis": True})), batch, logits)
    batch["rollout_log_probs"] = None
    check(Namespace(**options), batch, logits)


def test_each_sample_by_its_own_tokens() -> None:
    """As an older host has it, whose batch has no rollout_mask_sums."""
    batch, logits = host.micro_batch(3)
    own = batch | {"rollout_mask_sums": [m.sum().float() for m in batch["loss_masks"]]}
    args = Namespace(**host.SLIME)
    loss, _ = slime.policy_loss(args, batch | {"rollout_mask_sums": None}, logits, host.reducer(own, False))
    torch.testing.assert_close(loss.double(), host.expected(args, own, logits.double())[0])
    assert not torch.isclose(loss.double(), host.expected(args, batch, logits.double())[0])


@pytest.mark.parametrize("path, per_token", [("pg_loss_reducer", False), ("pg_loss_reducer", True), ("fixed", False)])
@pytest.mark.parametrize("correction", [None, "sequence_mask"])
def test_reducers(path: str, per_token: bool, correction: str | None) -> None:
    """The policy term by the reducer, the others by the host's; the loss inside of policy_loss and outside agree."""
    name = f"{__name__}.fixed" if path == "fixed" else PATH + path
    batch, logits = host.micro_batch(4)
    options: dict[str, Any] = {"calculate_per_token_loss": per_token, "entropy_coef": 0.05}
    if correction:
        options |= CASES[correction] | {"use_kl_loss": False}
    args = Namespace(**(host.SLIME | options))
    plain = host.expected(args, batch, logits.double())[1]
    lengths, masks = (batch["total_lengths"], batch["response_lengths"]), batch["loss_masks"]
    if correction:
        ones = torch.ones(sum(host.RESPONSES))
        held = (
            [torch.nan_to_num(x) for x in batch["log_probs"]],
            [torch.nan_to_num(x) for x in batch["rollout_log_probs"]],
        )
        _, masks, _ = slime.sequence_mask(
            args,
            pg_loss=ones,
            train_log_probs=held[0],
            rollout_log_probs=held[1],
            loss_masks=masks,
            total_lengths=lengths[0],
            response_lengths=lengths[1],
        )
    losses = []
    for n, (a, m) in enumerate(zip(batch["advantages"], masks, strict=True)):
        new = host.log_probs(batch, logits.double(), 0.8)[n]
        r = (new - torch.where(m != 0, batch["log_probs"][n], new)).exp()
        a = torch.where(m != 0, a, 0)
        own = torch.maximum(-r * a, -r.clamp(0.9, 1.2) * a)
        divided = 1 if per_token else (17 if path == "fixed" else max(int(m.sum()), 1))
        losses.append((own * m).sum() / divided)
    args.custom_pg_loss_reducer_function_path = name
    loss, metrics = slime.policy_loss(args, batch, logits, host.reducer(batch, per_token))
    torch.testing.assert_close(metrics["pg_loss"].double(), sum(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["ppo_kl"].double(), plain["ppo_kl"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, metrics["pg_loss"] - 0.05 * metrics["entropy_loss"])
    x = torch.randn(sum(host.RESPONSES), requires_grad=True)
    reduce = (fixed if path == "fixed" else slime.pg_loss_reducer)(*lengths, masks, per_token)
    reduce(x).backward()
    sizes = [1.0 if per_token else (17.0 if path == "fixed" else max(int(m.sum()), 1)) for m in masks]
    torch.testing.assert_close(x.grad, torch.cat([m / size for m, size in zip(masks, sizes, strict=True)]))


@pytest.mark.parametrize("kind", ["tis", "icepop", "sequence_mask"])
def test_corrections_by_path(kind: str) -> None:
    """Called with the host's keywords, of which miles has two more than slime."""
    g = torch.Generator().manual_seed(0)
    train, rollout = ([0.4 * torch.randn(n, generator=g) - 2 for n in host.RESPONSES] for _ in range(2))
    batch, _ = host.micro_batch(0)
    loss = torch.randn(sum(host.RESPONSES), generator=g, requires_grad=True)
    args = Namespace(tis_clip_low=0.7, tis_clip=1.3, custom_tis_function_path=kind, context_parallel_size=1)
    found, masks, metrics = getattr(slime, kind)(
        args=args,
        pg_loss=loss,
        train_log_probs=train,
        rollout_log_probs=rollout,
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        parallel_state=None,
        max_seq_lens=None,
    )
    w = (torch.cat(train) - torch.cat(rollout)).exp()
    factor, expected_masks, changed = host.corrected(args, batch, w)
    torch.testing.assert_close(found, loss * factor)
    assert found.requires_grad and 0 < float(changed.mean()) < 1
    torch.testing.assert_close(list(masks), expected_masks)
    if kind != "sequence_mask":
        torch.testing.assert_close(metrics, {"tis": w, "tis_clipfrac": changed.float(), "tis_abs": (w - 1).abs()})
    assert list(metrics) == ["tis", "tis_clipfrac", "tis_abs"] and all(x.shape == loss.shape for x in metrics.values())


def test_one_packed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples: one policy_loss, and the host's reducer once in a process."""
    calls = []
    theirs = tk.policy_loss
    monkeypatch.setattr(tk, "policy_loss", lambda *args, **options: calls.append("loss") or theirs(*args, **options))
    batch, logits = host.micro_batch(5)
    reduce = host.reducer(batch, False)

    def reducer(x: torch.Tensor) -> torch.Tensor:
        calls.append("reducer")
        return reduce(x)

    for _ in range(2):
        slime.policy_loss(Namespace(**(host.SLIME | CASES["k2"])), batch, logits, reducer)
    assert sorted(calls) == ["loss", "loss", "reducer"]


def test_nobody_responds() -> None:
    batch, logits = host.micro_batch(6)
    empty = {
        name: [y[:0] for y in x] if name not in ("unconcat_tokens", "rollout_mask_sums") else x
        for name, x in batch.items()
        if x is not None and not isinstance(x[0], int)
    }
    batch |= empty | {"response_lengths": [0] * 6}
    x = logits.clone().requires_grad_()
    loss, metrics = slime.policy_loss(Namespace(**(host.SLIME | CASES["k2"])), batch, x * 1, lambda x: x.new_zeros(()))
    loss.backward()
    assert float(loss.detach()) == 0 and x.grad is not None and not x.grad.any()
    assert not any(float(value) for value in metrics.values())


@pytest.mark.parametrize("options", [host.SLIME, host.MILES], ids=["slime", "miles"])
def test_a_spread_vocabulary_is_the_hosts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hosts' function of log-probs and entropy, by the signatures of their sources; slime's also with top-p."""
    batch, logits = host.micro_batch(7)
    module, asked = ModuleType("scorer"), {}

    def scored(x, args, entropy: bool):
        found = {"log_probs": host.log_probs(batch, x, 0.8)}
        return found | ({"entropy": host.log_probs(batch, x, 0.8, entropy=True)} if entropy else {})

    def of_slime(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, non_loss_data=True,
        top_p_token_ids=None, top_p_token_offsets=None,
    ):  # fmt: off
        asked["top_p"] = top_p_token_ids
        return torch.empty(0), scored(logits, args, with_entropy)

    def of_miles(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False,
        entropy_requires_grad=True, non_loss_data=True, max_seq_lens=None,
    ):  # fmt: off
        return scored(logits, args, with_entropy)

    miles = options is host.MILES
    module.get_log_probs_and_entropy = of_miles if miles else of_slime
    module.get_rollout_top_p_logprob_kwargs = lambda args, batch: (
        {} if args.rollout_top_p == 1.0 else {"top_p_token_ids": batch["top"], "top_p_token_offsets": batch["top"]}
    )
    monkeypatch.setitem(sys.modules, _slime_batch.SCORERS[miles], module)
    check(Namespace(**(options | CASES["k2"] | {"tensor_model_parallel_size": 2})), batch, logits)
    args = Namespace(**(options | {"rollout_top_p": 0.9}))
    check(args, batch | {"top": [[1]]}, logits)
    assert asked == ({} if miles else {"top_p": [[1]]})
    monkeypatch.delitem(sys.modules, _slime_batch.SCORERS[miles])
    args.tensor_model_parallel_size = 2
    with pytest.raises(RuntimeError, match="tensor_model_parallel_size .* and rollout_top_p below 1 need the host's"):
        slime.policy_loss(args, batch, logits, host.reducer(batch, False))
    args.context_parallel_size = 2
    with pytest.raises(RuntimeError, match="context_parallel_size above 1 needs the host's get_logits_and_tokens"):
        slime.policy_loss(args, batch, logits, host.reducer(batch, False))


REFUSED = [
    ({"qkv_format": "bshd"}, "qkv_format must be 'thd'"),
    ({"qkv_format": "thd", "true_on_policy_mode": True}, "true_on_policy_mode must be False"),
    ({"advantage_estimator": "maxrl"}, "advantage_estimator must be one of gspo, cispo, grpo"),
    ({"use_kl_loss": True, "kl_loss_type": "abs"}, "kl_loss_type must be one of k1, k2, k3, low_var_kl, got 'abs'"),
    ({"use_tis": True, "custom_tis_function_path": "mis.weights"}, "custom_tis_function_path must be None or one of"),
    ({"use_tis": True, "tis_clip_low": 2.0}, "tis_clip_low must be from 0 to tis_clip = 1.2, got 2.0"),
    (
        {"custom_pg_loss_reducer_function_path": "math.sqrt"},
        "custom_pg_loss_reducer_function_path must be None or name",
    ),
    ({"eps_clip_c": 0.9}, "eps_clip_c must be"),
    ({"rollout_temperature": 0.0}, "temperature must be"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[next(reversed(x)) for x, _ in REFUSED])
def test_refused_options(options: dict[str, Any], message: str) -> None:
    batch, logits = host.micro_batch(0)
    with pytest.raises(ValueError, match=message):
        slime.policy_loss(Namespace(**(host.SLIME | options)), batch, logits, host.reducer(batch, False))


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"advantages": None}, ValueError, "the batch must have advantages"),
    ({"loss_masks": None}, ValueError, "it has no loss_masks"),
    ({"rollout_log_probs": None}, ValueError, "the batch must have rollout_log_probs where use_tis"),
    ({"ref_log_probs": None}, ValueError, "the batch must have ref_log_probs where use_kl_loss is True"),
    ({"total_lengths": host.TOTALS[1:]}, ValueError, "total_lengths must have a number for each"),
    (
        {"total_lengths": [4, *host.TOTALS[1:]]},
        ValueError,
        "response_lengths must be from 0 to less than total_lengths",
    ),
    ({"total_lengths": torch.tensor(host.TOTALS)}, TypeError, "total_lengths must be a list"),
    ({"advantages": torch.zeros(17)}, TypeError, "advantages must be a list of tensors"),
    (
        {"advantages": [torch.zeros(n - n // 2) for n in host.RESPONSES]},
        ValueError,
        "advantages must have the 4 tokens",
    ),
    ({"log_probs": [torch.zeros(2)]}, ValueError, "log_probs must have a tensor for each of the 6 samples, got 1"),
    ({"rollout_mask_sums": torch.ones(2)}, ValueError, "rollout_mask_sums must have a number for each of the 6"),
    (
        {"loss_masks": [torch.full((n,), 0.5) for n in host.RESPONSES]},
        ValueError,
        "loss_masks must hold 0 and 1 alone, which choose tokens; got 0.5",
    ),
    ({"unconcat_tokens": [torch.zeros(3).long()]}, ValueError, "unconcat_tokens must be the 34 tokens"),
]


@pytest.mark.parametrize("fields, error, message", BAD)
def test_bad_batches(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    batch, logits = host.micro_batch(0)
    args = Namespace(**(host.SLIME | {"use_tis": True, "use_kl_loss": True}))
    with pytest.raises(error, match=message):
        slime.policy_loss(args, batch | fields, logits, host.reducer(batch, False))


def test_bad_arguments() -> None:
    batch, logits = host.micro_batch(0)
    args, reducer = Namespace(**host.SLIME), host.reducer(batch, False)
    with pytest.raises(ValueError, match="sum_of_sample_mean must divide each sample by its rollout_mask_sums"):
        slime.policy_loss(args, batch, logits, host.reducer(batch, True))
    with pytest.raises(ValueError, match=r"logits must have shape \[1, T, V\] with T at least the 34 tokens"):
        slime.policy_loss(args, batch, logits[:, :20], reducer)
    del args.use_opsm
    with pytest.raises(ValueError, match="args must have use_opsm, which slime and miles have"):
        slime.policy_loss(args, batch, logits, reducer)
    miles = Namespace(**host.MILES)
    with pytest.raises(ValueError, match="the batch must have log_probs where skip_actor_forward_only is False"):
        slime.policy_loss(miles, batch | {"log_probs": None}, logits, reducer)
    sizes, masks = (batch["total_lengths"], batch["response_lengths"]), batch["loss_masks"]
    with pytest.raises(ValueError, match="calculate_per_token_loss must be False with fixed_length"):
        fixed(*sizes, masks, True)
    with pytest.raises(ValueError, match=r"the loss must have the \[17\] tokens of response_lengths"):
        fixed(*sizes, masks)(torch.zeros(9))
    with pytest.raises(ValueError, match="length must be"):
        slime.fixed_length(0)
    rest = {"rollout_log_probs": [torch.zeros(2)], "loss_masks": masks, "pg_loss": torch.zeros(2)}
    with pytest.raises(TypeError, match="train_log_probs must be a list of tensors, got None"):
        slime.tis(args, train_log_probs=None, **rest)
    with pytest.raises(ValueError, match=r"train_log_probs must have the \[2\] tokens of pg_loss"):
        slime.icepop(args, train_log_probs=[torch.zeros(3)], **rest)


def test_signatures() -> None:
    """As the hosts call them at the commits that tests/integrations/slime_batches.py names."""
    assert list(inspect.signature(slime.policy_loss).parameters) == ["args", "batch", "logits", "sum_of_sample_mean"]
    assert list(inspect.signature(slime.advantages).parameters) == ["args", "rollout_data"]
    assert list(inspect.signature(slime.pg_loss_reducer.__call__).parameters) == [
        *("total_lengths", "response_lengths", "loss_masks", "calculate_per_token_loss")
    ]


def test_page() -> None:
    """docs/slime.md: its paths load as the hosts load them, its script runs, its file names the option that is read."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "slime.md").read_text()
    paths = set(re.findall(r"trajkern\.integrations\.slime\.\w+", page))
    assert {callable(_slime_batch.loaded("flag", path)) for path in paths} == {True} and len(paths) == 4
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, re.S | re.M))
    script: dict[str, Any] = {}
    exec(blocks["python"], script)
    assert script["reducer"] == slime.fixed_length(4096)
    assert blocks["yaml"] == f"{_slime_credit.OPTION}: my_module:spec\n"
    refused = re.search(r"^\| refused \|.*$", page, re.M)
    assert refused and all(
        f"--{name.replace('_', '-')}" in refused[0] for name in ("true_on_policy_mode", "qkv_format")
    )
