"""TRL's trainers with and without trajkern: whole runs, what is enabled, recipes, refusals."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.trl_trainers import (
    batch,
    datasets,
    length_reward,
    tiny,
    trainer_of,
    transformers,
    trl,
)
from trajkern import credit
from trajkern.integrations import trl as adapter

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / ".venv" / "oldest"  # what the Makefile installs beside the newest


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test enables is gone behind it."""
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)
    assert trl.trainer.utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProbFunction"


def run(folder: Path, enabled: bool, kind: str = "GRPO", **options: Any) -> tuple[list[dict[str, float]], Any]:
    trainer = trainer_of(folder, kind, **options)
    if enabled:
        adapter.enable(trainer)
    trainer.train()
    return [x for x in trainer.state.log_history if "loss" in x], trainer.model


LOGGED = {"loss", "grad_norm", "reward", "entropy", "kl", "clip_ratio/region_mean"}


def same_run(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in LOGGED & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "kind, options",
    [
        ("GRPO", {"beta": 0.05, "num_iterations": 2, "gradient_accumulation_steps": 2}),
        ("GRPO", {"loss_type": "cispo", "epsilon_high": 4.0, "steps_per_generation": 2}),
        ("RLOO", {"beta": 0.05, "num_iterations": 2}),
    ],
)
def test_a_run_is_the_same(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every logged figure, and the weights at the end."""
    (theirs, model), (ours, our_model) = (run(tmp_path, x, kind, **options) for x in (False, True))
    same_run(ours, theirs)
    for a, b in zip(our_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_smollm2_is_the_same(tmp_path: Path, smollm2: str) -> None:
    """A real instruct model on reasoning-gym's chain sums."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym.create_dataset("chain_sum", size=8, seed=1)
    prompts = [[{"role": "user", "content": f"{x['question']} Answer with the number."}] for x in tasks]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    processing = transformers.AutoTokenizer.from_pretrained(smollm2)
    logs = []
    for enabled, policy in ((False, copy.deepcopy(model)), (True, model)):
        options = {"beta": 0.0, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-5}
        trainer = trainer_of(tmp_path, model=policy, processing=processing, **options)
        trainer.train_dataset = datasets.Dataset.from_dict({"prompt": prompts})
        trainer.reward_funcs = [lambda completions, **_: [float(len(x[0]["content"])) for x in completions]]
        if enabled:
            adapter.enable(trainer)
        trainer.train()
        logs.append([x for x in trainer.state.log_history if "loss" in x])
    same_run(logs[1], logs[0])


# what is enabled


def test_the_head_scores_labels_only(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trajkern import linear_token_stats

    seen = []
    monkeypatch.setattr(
        adapter.tk,
        "linear_token_stats",
        lambda hidden, *x, **y: seen.append(hidden.shape[0]) or linear_token_stats(hidden, *x, **y),
    )
    adapter.enable(grpo)
    grpo.compute_loss(grpo.model, batch())
    assert seen == [int(batch()["completion_mask"].sum())]


def test_every_output_of_the_head() -> None:
    from trl.kernels import ChunkedLogProbFunction

    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(6, 5, generator=g), torch.randn(9, 5, generator=g))
    arguments = (hidden, weight, torch.randn(9, generator=g), torch.arange(6), 0.7, 4, 2.0, 1.3)
    for ours, theirs in zip(
        adapter._FusedHead.apply(*arguments), ChunkedLogProbFunction.apply(*arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [x is None for x in adapter._FusedHead.apply(*arguments, ())] == [False, True, True, True, True]


def test_enable_is_idempotent_and_disable_restores(grpo: Any) -> None:
    attributes = set(vars(grpo))
    before = vars(trl.trainer.utils)["_ChunkedLogProbFunction"], trl.GRPOTrainer._compute_loss
    for _ in range(2):
        adapter.enable(grpo, recipe="nsr")
        adapter.enable(trl.GRPOTrainer)
    assert trl.trainer.utils._ChunkedLogProbFunction is adapter._FusedHead
    adapter.disable(grpo)
    assert trl.trainer.utils._ChunkedLogProbFunction is adapter._FusedHead  # the class has it still
    adapter.disable(trl.GRPOTrainer)
    adapter.disable(trl.GRPOTrainer)
    assert (vars(trl.trainer.utils)["_ChunkedLogProbFunction"], trl.GRPOTrainer._compute_loss) == before
    assert vars(grpo).keys() == attributes and type(grpo) is trl.GRPOTrainer


def test_the_handle_takes_back_what_it_said(grpo: Any, caplog: pytest.LogCaptureFixture) -> None:
    attributes, head = set(vars(grpo)), trl.trainer.utils._ChunkedLogProbFunction
    with caplog.at_level(logging.INFO, "trajkern"), adapter.enable(grpo, recipe="nsr") as handle:
        assert trl.trainer.utils._ChunkedLogProbFunction is adapter._FusedHead and handle.active
        line = "TRL: trajkern stands in for GRPOTrainer._compute_loss of this trainer and for TRL's fused head"
        assert caplog.messages == [f"{line}; advantages by credit.terms.Signs(kind='nsr')"]
    assert trl.trainer.utils._ChunkedLogProbFunction is head and vars(grpo).keys() == attributes
    first, second = adapter.enable(grpo), adapter.enable(grpo)
    first.disable()
    assert second.active and type(grpo) is not trl.GRPOTrainer
    with adapter.enable(trl.GRPOTrainer) as whole:
        assert "of every one made from now on and for TRL's fused head; advantages are TRL's" in repr(whole)
    second.disable()
    assert vars(grpo).keys() == attributes


def test_what_is_logged_is_read_by_who_wants_numbers(grpo: Any, tmp_path: Path) -> None:
    """The lists hold tensors until the trainer logs, or is given back."""
    adapter.enable(grpo)

    def kinds() -> set[type]:
        return {type(x) for values in grpo._metrics["train"].values() for x in values}

    grpo.compute_loss(grpo.model, batch())
    assert Tensor in kinds()
    logged: dict[str, float] = {}
    grpo.log(logged)
    assert {"entropy", "clip_ratio/low_min"} <= logged.keys()
    assert {type(x) for x in logged.values()} <= {float, int} and not kinds()
    grpo.compute_loss(grpo.model, batch())
    adapter.disable(grpo)
    assert kinds() == {float}


def test_a_recipe_s_advantages(tmp_path: Path) -> None:
    seen: list[adapter.Rollouts] = []

    def recipe(rollouts: adapter.Rollouts) -> Tensor:
        seen.append(rollouts)
        return (rollouts.rewards[rollouts.here] - 1)[:, None] * rollouts.completion_mask

    trainer = trainer_of(tmp_path)
    adapter.enable(trainer, recipe)
    trainer.train()
    first = seen[0]
    assert first.group_ids.tolist() == [0, 0, 1, 1] and first.here == slice(0, 4)
    assert first.completion_ids.shape == first.completion_mask.shape
    assert {"prompt", "n"} <= first.examples[0].keys() and "prompt_ids" in first.inputs
    decode = trainer.processing_class.batch_decode
    texts = decode(first.completion_ids * first.completion_mask, skip_special_tokens=True)
    assert first.rewards.tolist() == length_reward(texts)


def test_a_recipe_by_name(tmp_path: Path) -> None:
    ours, theirs = trainer_of(tmp_path), trainer_of(tmp_path)
    adapter.enable(ours, "grpo")
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.prepared = trainer._generate_and_score_completions([{"prompt": "a b"}] * 2 + [{"prompt": "c"}] * 2)
    torch.testing.assert_close(ours.prepared["advantages"], theirs.prepared["advantages"], rtol=1e-3, atol=1e-3)


def page_of_recipes() -> str:
    """The section of docs/trl.md that lists recipes."""
    return (ROOT / "docs" / "trl.md").read_text().partition("## Recipes by name")[2].partition("\n## ")[0]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/trl.md run in order."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), re.S)
    exec(compile("\n".join(blocks), "docs/trl.md", "exec"), {})
    assert set(re.findall(r"`(\w+)`", page_of_recipes())) >= credit.PRESETS.keys()


# refusals


@pytest.mark.parametrize(
    "options, says",
    [
        ({"loss_type": "dapo", "args.delta": 1.1}, r"delta must be at least 1 \+ epsilon_high = 1.2, got 1.1"),
        ({"loss_type": "cispo"}, "epsilon_high must be at least 1 for loss_type 'cispo'"),
        ({"loss_type": "new"}, "loss_type must be one that TRL's GRPOTrainer of the tested versions has, got 'new'"),
    ],
)
def test_options_it_cannot_honour(
    options: dict[str, Any], says: str, grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in options.items():
        owner, _, last = name.rpartition(".")
        monkeypatch.setattr(grpo.args if owner else grpo, last, value)
    with pytest.raises(ValueError, match=says):
        adapter.enable(grpo)
    assert not list(adapter._enabled)


def test_refusals_of_a_class_come_when_a_trainer_is_made(tmp_path: Path) -> None:
    adapter.enable(trl.GRPOTrainer)
    with pytest.raises(ValueError, match="delta must be at least"):
        trainer_of(tmp_path, delta=0.9)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have tokens that the model has, 20 of them; it has id 28"):
        adapter.enable(trainer_of(tmp_path, model=tiny(20)))


def test_what_is_no_such_trainer(grpo: Any) -> None:
    class Own(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any: ...

    for target, says in ((Own, "Own has one of its own"), (torch.nn.Linear, "got Linear"), (3, "got int")):
        with pytest.raises(TypeError, match=says):
            adapter.enable(target)
    with pytest.raises(ValueError, match="recipe must be a function or one of grpo, .*; got 'none'"):
        adapter.enable(grpo, "none")
    with pytest.raises(TypeError, match="recipe must be a name, a function or None, got 3"):
        adapter.enable(grpo, 3)  # type: ignore[arg-type]


def test_a_recipe_s_shape(tmp_path: Path) -> None:
    adapter.enable(trainer := trainer_of(tmp_path), lambda rollouts: torch.zeros(3))
    with pytest.raises(ValueError, match=re.escape("recipe must return advantages of shape [4] or [4, ")):
        trainer.train()


@pytest.mark.filterwarnings("error")
def test_another_version_is_warned_of_once(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "TESTED", ("0.1",))
    monkeypatch.setattr("trajkern.integrations._adapter._warned", set())
    adapter.enable(grpo, any_version=True)
    with pytest.warns(UserWarning, match=f"tested with trl 0.1, not with {trl.__version__}"):
        adapter.enable(grpo)
    adapter.enable(grpo)


class Later(trl.GRPOTrainer):
    """What a release might add to the loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if self.args.unbiased_importance_sampling and "sampling_support" in inputs:
            return inputs["advantages"] * self.beta + inputs.get("sampling_mass") + inputs["support_ids"] + self.top_p


class Wider(trl.GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any, support: Any = None) -> Any: ...


class WiderHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, support: Any) -> Any: ...


def test_a_loss_or_a_head_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trl.trainer.grpo_trainer
    monkeypatch.setattr(loss, "GRPOTrainer", Later)
    unknown = "args.unbiased_importance_sampling, inputs.sampling_mass, inputs.sampling_support, inputs.support_ids"
    with pytest.raises(RuntimeError, match=f"GRPOTrainer._compute_loss must read .* also reads {unknown}, self.top_p"):
        adapter.enable(Later)
    monkeypatch.setattr(loss, "GRPOTrainer", Wider)
    with pytest.raises(RuntimeError, match=r"must take \(model, inputs\) .*takes \(model, inputs, support\)"):
        adapter.enable(Wider)
    monkeypatch.undo()
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", WiderHead)
    with pytest.raises(RuntimeError, match="trl's fused head must take .* this version takes .*support"):
        adapter.enable(trl.GRPOTrainer)
    assert not list(adapter._enabled)


@pytest.mark.slow
@pytest.mark.skipif(not (OLDEST / "trl").exists(), reason="no .venv/oldest: make setup installs the oldest TRL there")
def test_the_oldest_version() -> None:
    """These tests and those of the losses again, with the oldest release whose hooks fit first on the path."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(OLDEST), str(ROOT)))}
    imported = subprocess.run(
        [sys.executable, "-c", "import trl; print(trl.__version__)"], env=environment, capture_output=True, text=True
    )
    assert imported.stdout.strip().splitlines()[-1:] == [adapter.TESTED[0]], imported.stdout + imported.stderr
    others = [str(Path(__file__).with_name(f"test_trl_{x}.py")) for x in ("loss", "credit", "credit_rloo")]
    chosen = ["-k", "(kl] or same or composed or score or own_adv) and not smollm2", __file__, *others]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
