"""TRL's AsyncGRPOTrainer with and without trajkern; its flash attention is a plain function of that signature here."""

from __future__ import annotations

import queue
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.flash_reference import of_lengths
from tests.integrations.trl_trainers import datasets, length_reward, tiny, tokenizer, trl
from trajkern import credit
from trajkern.integrations import trl as adapter
from trajkern.integrations._trl_async import Sizes, async_grpo_loss
from trajkern.integrations._trl_loss import read_logged

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    async_grpo = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
packing = pytest.importorskip("trl.experimental.async_grpo.packing", reason="TRL 1.15 has another loss")
PROMPTS, COMPLETIONS = 6, 4


def generated() -> list[Any]:
    """Prompts that begin alike, completions that fork late, one of them twice; what a tool wrote is not learnt."""
    g = torch.Generator().manual_seed(1)
    rows = []
    for group in range(PROMPTS):
        for n in range(COMPLETIONS):
            prompt = [3, 4, 5 + group]
            written = [10, 11, *torch.randint(3, 29, (2 + n,), generator=g).tolist()] if n < 3 else [10, 11, 12]
            mask = [0] * len(prompt) + [1] * len(written)
            mask[4] = int(n != 1)
            rows.append(
                async_grpo.RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=torch.tensor(prompt + written).numpy(),
                    completion_mask=torch.tensor(mask).numpy(),
                    old_log_probs=(-3.3 + torch.randn(len(mask), generator=g) * 0.4).numpy(),
                    advantage=float(torch.randn((), generator=g)),
                    model_version=1000,
                    group_id=group,
                    metrics={"reward": float(n)},
                )
            )
    return rows


class Worker:
    """One that has generated everything already."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for sample in generated() * 4:  # batches are fetched ahead, and a full one is known by what no longer fits
            self.rollout_buffer.put(sample)

    def _nothing(self, *arguments: Any, **options: Any) -> None: ...

    start = stop = update_model_version = check_health = _nothing
    init_weight_transfer = pause = resume = destroy = _nothing

    def send_weights(self, parameters: Any) -> None:
        list(parameters)


@pytest.fixture(autouse=True)
def attention_and_nothing_left(monkeypatch: pytest.MonkeyPatch):
    kernel = SimpleNamespace(flash_attn_varlen_func=of_lengths)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernel)
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)


def trainer_of(folder: Path, **options: Any) -> Any:
    tiny().save_pretrained(folder / "model")
    config = async_grpo.AsyncGRPOConfig(
        **{
            "output_dir": str(folder),
            "dtype": "float32",
            "token_budget": 0,
            "per_device_train_batch_size": 6,
            "num_generations": COMPLETIONS,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        | options
    )
    data = datasets.Dataset.from_dict({"prompt": ["a b c"] * 8})
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(async_grpo, "get_peak_flops_per_device", lambda accelerator, dtype: None)  # it asks CUDA
        return async_grpo.AsyncGRPOTrainer(
            str(folder / "model"),
            reward_funcs=length_reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer(),
            rollout_worker=Worker(),
            weight_transfer=Worker(),
        )


def batch(padding: int = 0) -> dict[str, Tensor]:
    """What the collator makes of a row; with padding as behind another rank's longer row."""
    row, empty = packing.TreeRow(), packing.TreeRow()
    for sample in generated()[: 2 * COMPLETIONS]:
        row.add(
            {name: getattr(sample, name) for name in ("input_ids", "completion_mask", "old_log_probs", "advantage")}
            | {"group_id": sample.group_id, "metrics": {}}
        )
    rows = [row]
    if padding:
        for sample in generated():
            empty.add(
                {name: getattr(sample, name) for name in ("input_ids", "completion_mask", "old_log_probs")}
                | {"advantage": 0.0, "group_id": sample.group_id, "metrics": {}}
            )
        rows.append(empty)
    made = async_grpo.DataCollatorForRollout(0, len(rows)).torch_call([rows])
    return {name: x[:1] for name, x in made.items()}


STEPS = ("_step_forward_tokens", "_step_trained_tokens", "_step_seq_len_weighted", "_step_samples")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer_of(tmp_path_factory.mktemp("async"))
    made.model.train()
    made.current_gradient_accumulation_steps = 3
    return made


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("epsilon", [0.2, 0.01])
def test_loss_gradients_and_metrics_are_trl_s(
    padding: int, epsilon: float, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "epsilon_low", epsilon)
    outcomes = []
    for function in (async_grpo.AsyncGRPOTrainer.compute_loss, async_grpo_loss):
        trainer._metrics["train"].clear()
        vars(trainer).update(dict.fromkeys(STEPS, 0.0))
        loss = function(trainer, trainer.model, batch(padding))
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
        read_logged(trainer)
        outcomes.append((loss.detach(), gradients, dict(trainer._metrics["train"]), [vars(trainer)[x] for x in STEPS]))
    (loss, gradients, logged, steps), (our_loss, our_gradients, our_logged, our_steps) = outcomes
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert our_logged.keys() == logged.keys() and our_steps == pytest.approx(steps)
    for name, values in logged.items():
        assert our_logged[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name
    assert logged["clip_ratio/low_mean"][0] > 0


def test_a_batch_s_sizes_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    made = batch(padding=1)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        own = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *x, n=name, own=own: reads.append(n) or own(*x))
    sizes = Sizes.of(made)
    assert reads == ["tolist"] and sizes.samples == 2 * COMPLETIONS
    alone = batch()
    assert sizes.tokens == alone["input_ids"].shape[1] < made["input_ids"].shape[1]
    assert sizes.terms == alone["token_index"].shape[1] and sizes.keys == alone["tree_kv_index"].shape[1]


@pytest.mark.parametrize("token_budget", [0, 40])
def test_a_run_is_the_same(token_budget: int, tmp_path: Path) -> None:
    logs, weights = [], []
    for enabled in (False, True):
        ran = trainer_of(tmp_path, token_budget=token_budget)
        if enabled:
            adapter.enable(ran)
        ran.train()
        logs.append([x for x in ran.state.log_history if "loss" in x])
        weights.append(list(ran.model.parameters()))
    theirs, ours = logs
    assert len(ours) == len(theirs) == 2
    timed = ("perf/", "sample/time", "sample/rollout_queue")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in (x for x in a if not x.startswith(timed)):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_a_class_is_enabled_and_given_back() -> None:
    kind = async_grpo.AsyncGRPOTrainer
    before = kind.compute_loss
    adapter.enable(kind)
    assert trl.trainer.utils._ChunkedLogProbFunction is adapter._FusedHead
    adapter.disable(kind)
    assert kind.compute_loss is before


def test_what_it_cannot_feed_or_stand_in_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = async_grpo.AsyncGRPOTrainer
    for more in ({"credit": credit.outcome()}, {"recipe": "nsr"}, {"recipe": lambda rollouts: rollouts.rewards}):
        with pytest.raises(ValueError, match="recipe and credit must be None for AsyncGRPOTrainer: its worker process"):
            adapter.enable(kind, **more)

    class Own(kind):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False) -> Any: ...

    with pytest.raises(TypeError, match="must have AsyncGRPOTrainer's loss; Own has one of its own"):
        adapter.enable(Own)

    def later(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return inputs["completion_mask"] * self.beta

    monkeypatch.setattr(kind, "compute_loss", later)
    with pytest.raises(
        RuntimeError, match="AsyncGRPOTrainer.compute_loss must read .* inputs.completion_mask, self.beta"
    ):
        adapter.enable(kind)
    assert not list(adapter._enabled)
