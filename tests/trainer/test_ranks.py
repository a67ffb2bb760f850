"""Several ranks, and micro-batches of any size, take the steps that one process takes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.credit.test_ranks import everything, share
from trajkern import credit
from trajkern.trainer import cli_main
from trajkern.trainer.checkpoint import CHECKPOINT, WARM, load
from trajkern.trainer.collect import moments_of
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.folder import METRICS
from trajkern.trainer.ranks import ALONE, Moments, Ranks, of_this_start
from trajkern.trainer.setup import check_ranks
from trajkern.trainer.tasks import Action, Answer, Question, Task
from trajkern.trainer.train import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun and gloo as on Linux")

SIZES = "--threads 1 --steps 3 --prompts 7 --rollouts 4 --eval.heldout 10 --eval.validation 9 --eval.samples 3"
SIZES += " --eval.every 2 --questions 300"
WARM_UP = "--warmup.steps 60 --warmup.check-every 60 --warmup.batch 20 --warmup.demonstrations 128 --warmup.lr 1e-2"
TINY = "--tiny.layers 1 --tiny.width 32 --tiny.heads 2 --tiny.ffn 64"
FEW_STEPS = "--warmup.steps 3 --warmup.check-every 3"
AVERAGED = ("val_", "pass@", "greedy", "reward", "live_groups", "num_tokens")  # of whole numbers: the same rollouts


def launch(
    ranks: int, out: Path, *arguments: str, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "-m", "trajkern", "train", *arguments, "--out", str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240 * (1 + 2 * restarts), env=os.environ | environment
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def check_same(out: Path, expected: Path) -> None:
    """Rollouts are the same ones; losses and gradient norms agree as float32 sums in another order do."""
    ours, theirs = lines(out), lines(expected)
    assert [(x["phase"], x["step"], set(x)) for x in ours] == [(x["phase"], x["step"], set(x)) for x in theirs]
    assert any("grad_norm" in x for x in theirs), "no step trained"
    for x, y in zip(ours, theirs, strict=True):
        for name in x.keys() - {"tokens/s", "seconds", "phase", "step", "sampler_drift"}:
            rel = 1e-6 if name.startswith(AVERAGED) else 1e-4
            expected = y[name] if y[name] is None else pytest.approx(y[name], rel=rel, abs=1e-6)
            assert x[name] == expected, (x["phase"], x["step"], name)


def check_weights(out: Path, expected: Path, shift: float) -> None:
    """The checkpoint has the same tensors; Adam divides by a gradient's size, so the smallest ones move weights."""
    ours, theirs = load(out / CHECKPOINT).tensors, load(expected / CHECKPOINT).tensors
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert torch.equal(ours["generator"], theirs["generator"])
    for name in (k for k in ours if k.startswith("policy.")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=shift)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run in this process, made once."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str) -> Path:
        if arguments not in folders:
            folders[arguments] = tmp_path_factory.mktemp("alone")
            assert cli_main([*arguments, "--out", str(folders[arguments])]) == 0
        return folders[arguments]

    return run


@pytest.fixture(scope="module")
def warm(alone: Callable[..., Path]) -> list[str]:
    """Arguments that continue from the warm-up of one process."""
    folder = alone(*f"{SIZES} {WARM_UP} {TINY} --loss.kl-coef 0.1".split())
    return ["--resume", str(folder / "warmup.safetensors")]


@pytest.mark.parametrize(
    "arguments", ["--updates 2", "--loss.kind dapo --head eager", "--recipe gigpo --loss.aggregate token_mean"]
)
def test_micro_batches(alone: Callable[..., Path], warm: list[str], arguments: str, tmp_path: Path) -> None:
    changed = [*warm, *arguments.split()]
    assert cli_main([*changed, "--micro-tokens", "25", "--out", str(tmp_path)]) == 0
    check_same(tmp_path, alone(*changed))


class Folds(Task):
    """Sums in whose answers an even digit is a call and an odd one a fold; right are those of an even length."""

    def questions(self, split: int) -> Iterator[Question]:
        for n in range(1000):
            prompt = f"{split}{n}+{7 * n % 100}="
            yield Question(prompt, prompt, str(n), {})

    def read(self, question: Question, text: str) -> Answer:
        return Answer(len(text) % 2 == 0)

    def action_spans(self, question: Question, text: str) -> list[Action]:
        digits = [(at, x) for at, x in enumerate(text) if x in "0123456789"]
        return [Action(at, at + 1, x in "02468", folds=x in "13579") for at, x in digits]


NO_KL = "--loss.kl-coef 0 --max-new 12"
DRO = f"--recipe dro --task chain_sum_steps --temperature 3 --dro.drop-fraction 0.3 {NO_KL}"
LAGGED = "--dro.reward-policy lagged --dro.lag-rate 0.5 --dro.lag-every 2 --dro.round-steps 2 --dro.candidates 9"
TREES = f"--recipe treerl --task chain_sum_steps --compose.rubric well_formed {NO_KL}"
RUNS = {
    "2_ranks_that_split_groups": (2, "--updates 2", "--micro-tokens 40"),
    "3_ranks_that_split_groups": (3, "--updates 2", "--micro-tokens 40"),
    "2_by_2_ranks_of_trees": (4, "--recipe gigpo --loss.kl-coef 0", "--micro-tokens 60 --tensor-parallel 2"),
    "3_ranks_of_gated_trees": (3, TREES, "--micro-tokens 40"),
    "3_ranks_of_dro": (3, DRO, ""),
    "2_ranks_of_a_random_drop": (2, f"{DRO} --control random-drop", ""),
    "2_ranks_of_dro_in_rounds": (2, f"{DRO} {LAGGED}", ""),
    "3_ranks_of_delta_belief": (3, f"--recipe delta_belief --task twenty_questions {NO_KL}", ""),
    "3_ranks_of_srl": (3, f"--recipe srl --task chain_sum_steps {NO_KL} --then.recipe grpo --then.steps 1", ""),
    "3_ranks_of_toolpo": (3, f"--recipe toolpo --task tools {NO_KL} --max-new 40", ""),
    "3_ranks_that_fold": (3, f"--task {__name__}:Folds --recipe toolpo --temperature 3 {NO_KL}", ""),
    "2_ranks_of_feedback": (2, f"--recipe feedback --task chain_sum_steps {NO_KL}", ""),
}
QUICK = ("2_ranks_that_split_groups",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_ranks_take_the_same_steps(alone: Callable[..., Path], warm: list[str], name: str, tmp_path: Path) -> None:
    ranks, arguments, of_ranks = RUNS[name]
    done = launch(ranks, tmp_path, *warm, *arguments.split(), *of_ranks.split())
    assert done.returncode == 0, done.stderr[-3000:]
    expected = alone(*warm, *arguments.split())
    check_same(tmp_path, expected)
    check_weights(tmp_path, expected, 2e-4)
    assert done.stdout.count("evaluating on 10 held-out questions") == 1, "rank 0 alone speaks"


@pytest.fixture(scope="module")
def warm_on_a_file(alone: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that continue, on a file with every column, from the warm-up of one process; half of it has hints."""
    rows = []
    for n in range(300):
        row = {"prompt": f"{n}=", "verifier": "regex", "answer": f"<tool>[0-9]</tool>\n[{n % 5}-9]"}
        row |= {"reference": f"<tool>{n % 3}</tool>\n{5 + n % 5}", "actions": [str(n % 3)], "family": "ab"[n % 2]}
        rows.append(row | ({"hint": f"{n % 3}"} if n % 2 else {}))
    path = tmp_path_factory.mktemp("file") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    folder = alone(*f"--task {path} {SIZES} {WARM_UP} {TINY} --warmup.pass-at-1 2 --max-new 24".split())
    return ["--resume", str(folder / "warmup.safetensors")]


def length(rollouts: credit.Rollouts) -> torch.Tensor:
    """Of each text: a policy that has never seen a bank of skills is right nowhere, but not alike."""
    assert rollouts.texts is not None
    return torch.tensor([len(text) for text in rollouts.texts])


length.needs = {"texts"}  # type: ignore[attr-defined]
LENGTH = credit.outcome(length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks"),
    [("toolpo", 3), ("feedback", 2), (f"skillrl --credit {__name__}:LENGTH", 3), ("dro", 2), ("srl", 3)],
)
def test_a_file_of_rows_over_ranks(
    alone: Callable[..., Path], warm_on_a_file: list[str], recipe: str, ranks: int, tmp_path: Path
) -> None:
    hot = ["--temperature", "4" if "LENGTH" in recipe else "1.5"]
    arguments = [*warm_on_a_file, "--recipe", *recipe.split(), *hot]
    done = launch(ranks, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = alone(*arguments)
    check_same(tmp_path, expected)
    check_weights(tmp_path, expected, 2e-4)


@pytest.mark.slow
def test_a_tied_head_over_ranks(alone: Callable[..., Path], make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Warm-up, policy steps and checkpoints of a HuggingFace model whose vocabulary of 257 is split unevenly."""
    model = ["--model", str(make_llama(tie_word_embeddings=True)), "--max-new", "4", "--lr", "1e-3"]
    arguments = [*model, *f"{SIZES} {FEW_STEPS} --warmup.batch 6".split(), "--recipe", "w_reinforce"]
    done = launch(2, tmp_path, *arguments, "--tensor-parallel", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = alone(*arguments)
    check_same(tmp_path, expected)
    check_weights(tmp_path, expected, 2e-3)


FATAL = """
import os, signal
calls = 0

def check(questions, texts):
    global calls
    calls += 1
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if os.environ["RANK"] == os.environ.get("WHO", "1") and calls == int(os.environ.get("AT", 3)) and not restarted:
        if os.environ["HOW"] == "raise":
            raise OSError("the disk is full")
        os.kill(os.getpid(), getattr(signal, os.environ["HOW"]))
    return [True] * len(texts)
"""
FATAL_OPTIONS = ["--compose.rubric", "fatal:check", "--checkpoint-every", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "SIGKILL"])
def test_a_rank_that_dies(warm: list[str], how: str, tmp_path: Path) -> None:
    (tmp_path / "fatal.py").write_text(FATAL)
    out = tmp_path / "run"
    done = launch(2, out, *warm, *FATAL_OPTIONS, PYTHONPATH=path_with(tmp_path), HOW=how)
    assert done.returncode != 0
    if how == "raise":
        assert "trajkern train: rank 1 of 2: OSError: the disk is full; the last checkpoint stands" in done.stderr
    else:
        assert "rank      : 1" in done.stderr and "Signal 9 (SIGKILL)" in done.stderr, "torchrun names it"
    assert load(out / CHECKPOINT).place["step"] == 2


def path_with(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="module")
def two_ranks(warm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two ranks that nothing has stopped."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "fatal.py").write_text(FATAL)
    done = launch(2, folder / "run", *warm, *FATAL_OPTIONS, PYTHONPATH=path_with(folder), WHO="none", HOW="")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def check_identical(out: Path, expected: Path) -> None:
    """Every completed step is there once, and all bits are those of the run that went through."""
    timeless = [
        [{k: v for k, v in x.items() if k not in ("tokens/s", "seconds")} for x in lines(y)] for y in (out, expected)
    ]
    assert timeless[0] == timeless[1]
    check_weights(out, expected, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "who", "status"), [("SIGTERM", "1", 143), ("SIGHUP", "0", 129)])
def test_a_signal_to_one_rank_stops_all_at_one_step(
    warm: list[str], two_ranks: Path, number: str, who: str, status: int, tmp_path: Path
) -> None:
    """None is left waiting in a collective; the checkpoint is whole, and the run goes on from it."""
    (tmp_path / "fatal.py").write_text(FATAL)
    out = tmp_path / "run"
    environment = {"PYTHONPATH": path_with(tmp_path), "HOW": number, "AT": "2"}
    done = launch(2, out, *warm, *FATAL_OPTIONS[:2], "--checkpoint-every", "0", WHO=who, **environment)
    told = f"stopped by {number}; continue with --resume {out / CHECKPOINT}"
    assert done.returncode != 0 and done.stderr.count(told) == 1, done.stderr[-3000:]
    assert f"exitcode  : {status}" in done.stderr and load(out / CHECKPOINT).place["step"] == 2
    done = launch(2, out, "--resume", "last", *FATAL_OPTIONS, WHO="none", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    check_identical(out, two_ranks)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(
    warm: list[str], two_ranks: Path, tmp_path: Path
) -> None:
    (tmp_path / "fatal.py").write_text(FATAL)
    out = tmp_path / "run"
    out.mkdir()
    for name in (WARM, METRICS):
        shutil.copy(Path(warm[1]).with_name(name), out)
    environment = {"PYTHONPATH": path_with(tmp_path), "HOW": "SIGKILL"}
    done = launch(2, out, "--resume", "last", *FATAL_OPTIONS, restarts=1, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
    check_identical(out, two_ranks)


def test_a_start_reads_nothing_of_the_one_before() -> None:
    """Three starts of three ranks on one store, of which the second ends halfway."""
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=30))
    seen: list[set[str]] = []
    for begun in ((0, 1, 2), (0, 2), (2, 1, 0)):
        with ThreadPoolExecutor(3) as pool:
            if len(begun) < 3:
                store.set_timeout(timedelta(seconds=1))
                failed = [pool.submit(of_this_start, store, rank, 3) for rank in begun]
                assert all("not all of 3 ranks" in str(x.exception()) for x in failed)
                store.set_timeout(timedelta(seconds=30))
                continue
            found = list(pool.map(lambda rank: of_this_start(store, rank, 3), begun))
        assert not any(part.check(["address/0"]) for part in found)
        for rank, part in zip(begun, found, strict=True):
            part.set(f"address/{rank}", f"{len(seen)}")
        seen.append({part.get(f"address/{n}").decode() for part in found for n in range(3)})
    assert seen == [{"0"}, {"1"}]


def test_ranks_that_cannot_share_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^tensor_parallel must divide the number of ranks, 1; got 2"):
        train(TrainConfig(tensor_parallel=2, out=tmp_path))
    with pytest.raises(ValueError, match="^device must be cpu, or cuda where torch sees a GPU; got 'abacus'"):
        train(TrainConfig(device="abacus", out=tmp_path))
    three: Any = SimpleNamespace(parts=3)
    for splits, changes, text in (
        (False, {"prompts": 2}, r"prompts must be enough for 3 ranks of data \(the recipe grpo, or"),
        (True, {"prompts": 2, "control": "random-rewards"}, r"prompts must be enough for 3 ranks of data \(the recipe"),
        (True, {"prompts": 1, "rollouts": 2}, "prompts must be enough for 3 ranks of data; got 1"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            system: Any = SimpleNamespace(splits_groups=splits)
            check_ranks(TrainConfig(**changes), system, three)


def test_losses_of_whole_batches_are_refused() -> None:
    from trajkern import PolicyLoss

    with pytest.raises(ValueError, match=r"^micro_tokens must not be given with loss.kind 'kl_cov'"):
        TrainConfig(loss=PolicyLoss(kind="kl_cov"), micro_tokens=100)
    with pytest.raises(ValueError, match=r"^micro_tokens must not be given with loss.sampler_correction"):
        TrainConfig(loss=PolicyLoss(sampler_correction="sequence_mask"), micro_tokens=100)
    with pytest.raises(ValueError, match="^micro_tokens must be at least 1, got 0"):
        TrainConfig(micro_tokens=0)


@pytest.mark.parametrize(("total", "whole"), [(28, 1), (28, 4), (2, 1), (7, 7), (0, 1)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_shares(total: int, whole: int, parts: int) -> None:
    """They cover the rows in order, differ by one at most, and keep what belongs together."""

    class Part(Ranks):
        part, parts = 0, 1

    shares = []
    for number in range(parts):
        Part.part, Part.parts = number, parts  # type: ignore[misc]
        shares.append(Part().rows(total, whole))
    assert [row for share in shares for row in range(share.begin, share.end)] == list(range(total))
    sizes = [(share.end - share.begin) / whole for share in shares]
    assert max(sizes) - min(sizes) <= 1 and all(size == int(size) for size in sizes)


def test_merged_metrics() -> None:
    merged = ALONE.merged({"mean": torch.tensor([1.0, 2.0]), "pair": (3.0, 4), "count": 5, "same": 0.5, "none": None})
    assert merged == {"mean": 1.5, "pair": 3.0, "count": 5, "same": 0.5, "none": None}
    assert ALONE.merged({"mean": torch.zeros(0)}) == {"mean": None}


def test_moments_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    each, nothing = (torch.tensor([5.0, 7.0, 9.0]), torch.tensor([8.0])), Moments(math.nan, math.nan, 0)
    parts = [Moments(x.mean().item(), x.std(correction=0).item(), len(x)) for x in each]
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [{"a": x, "b": nothing} for x in (*parts, nothing)])
    merged = ALONE.merged({})
    assert merged["a/mean"] == 7.25 and merged["a/std"] == pytest.approx(torch.cat(each).std(correction=0).item())
    assert merged["b/mean"] is merged["b/std"] is None


def test_the_metrics_of_a_credit_are_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose groups are their own, against one rank with both."""
    both = everything()
    spec = credit.outcome().gate("ok") + credit.spans("call").only("call") + credit.directive(where="failed")
    parts = [moments_of(spec(share(both, *ends, None))) for ends in ((0, 4), (4, 12))]
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: parts if mine == [parts[0]] else mine)
    merged, alone = ALONE.merged(parts[0]), spec(both).metrics
    assert merged.keys() == {f"credit/{name}" for name in alone} and len(merged) == 8
    for name, value in alone.items():
        assert merged[f"credit/{name}"] == pytest.approx(value.item(), rel=2e-7, abs=1e-12), name  # shares are float32


def test_one_process_has_no_mesh() -> None:
    assert ALONE.mesh is None and ALONE.data is None and ALONE.rows(3) == (0, 3, 3, ALONE)
