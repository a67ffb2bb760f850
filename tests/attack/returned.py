"""What a user's own code returns in a run, and what it raises: at its first call, and in the middle."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import io
import json
import os
import random
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attack import hostile_task
from tests.attack.case import Case
from tests.attack.returned_values import EFFECTS, ERRORS, HARMLESS, RIGHT, VALUES
from trajkern.trainer import cli_main
from trajkern.trainer.checkpoint import PARTIAL, load
from trajkern.trainer.compose import Compose
from trajkern.trainer.config import Evaluation, TrainConfig, WarmUp
from trajkern.trainer.folder import CHECKPOINT, LOCK, METRICS, WARM
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.systems.judge import Judge
from trajkern.trainer.systems.skillrl import SkillRL
from trajkern.trainer.systems.toolpo import ToolPO
from trajkern.trainer.tasks import Task, capabilities

MODULE = hostile_task.__name__
TRIES = 6  # runs in which answers differ between calls
IN_THE_MIDDLE = 20  # values, drawn by the seed: the checks are those of the first call


class Misbehaved(Exception):
    pass


class Scenario:
    """A run in which some methods are asked."""

    def __init__(self, methods: str, task: str = "Hostile", **settings: Any) -> None:
        self.methods, self.task, self.settings = methods.split(), task, settings


SCENARIOS = {
    "grpo": Scenario("questions a_question read reward reply pieces statistics identity distinct splits ballot family"),
    "rlcr": Scenario("read", "Sure", recipe="rlcr"),
    "tree_grpo": Scenario("reward", "Quiet", recipe="tree_grpo"),
    "feedback": Scenario("hint", recipe="feedback"),
    "skillrl": Scenario("family", recipe="skillrl"),
    "srl": Scenario("reference", recipe="srl"),
    "dro": Scenario("reference reasoning", recipe="dro"),
    "toolpo": Scenario("action_spans", recipe="toolpo"),
    "delta_belief": Scenario("belief_target penalties", recipe="delta_belief"),
    "judge": Scenario("responses critique", recipe="judge", judge=Judge(form="pairwise", brief=True)),
    "toolpo.simulate": Scenario("simulated simulate", recipe="toolpo", toolpo=ToolPO(simulate=f"{MODULE}:simulate")),
    "skillrl.embed": Scenario("embed", recipe="skillrl", skillrl=SkillRL(embed=f"{MODULE}:embed")),
    "skillrl.teacher": Scenario(
        "teacher distiller",
        recipe="skillrl",
        skillrl=SkillRL(teacher=f"{MODULE}:teacher", distiller=f"{MODULE}:distiller", threshold=1.0),
    ),
    "compose.rubric": Scenario("rubric", compose=Compose(rubric=f"{MODULE}:rubric")),
    "credit": Scenario("of_rollouts", credit=f"{MODULE}:spec"),
    "verifier": Scenario("verifier", "rows.jsonl"),
}


def cases(seed: int = 0) -> Iterator[Case]:
    """``seed`` draws which call in the middle."""
    missing = set(asked()) - {name for scenario in SCENARIOS.values() for name in scenario.methods}
    if missing:
        raise NotImplementedError(f"no scenario asks {missing}")
    for label in SCENARIOS:
        yield Case(label, "as it should be", partial(run, label, "", 0, lambda: None), (), may_pass=True)
        for number in range(TRIES):
            call = partial(fickle, label, f"{seed} {label} {number}")
            named = (*hostile_task.OTHERS, "responses", "of_rollouts")
            yield Case(label, f"answers that differ between calls, {number}", call, named, may_pass=True)
        for method in SCENARIOS[label].methods:
            yield from _of_method(label, method.replace("_question", " question"), seed)


def asked() -> dict[str, str]:
    """Every method of a task and of its capabilities -> the annotation of what it returns."""
    kinds = [x for name, x in vars(capabilities).items() if name.endswith("Task") and name != "Task"]
    found = {m: getattr(kind, m) for kind in kinds for m in vars(kind) if not m.startswith("_")}
    found |= {m: x for m, x in vars(Task).items() if inspect.isfunction(x) and not m.startswith("_")}
    return {name: str(inspect.signature(x).return_annotation) for name, x in found.items()}


def _of_method(label: str, method: str, seed: int) -> Iterator[Case]:
    function = getattr(hostile_task, method, None) or getattr(hostile_task.Hostile, method, None)
    annotation = asked().get(method) or ("" if function is None else str(inspect.signature(function).return_annotation))
    right, name = RIGHT.get(annotation, []), f"{label}: {method}"
    if method in ("identity", "family"):  # which no model reads
        right = [*right, "NUL", "right to left"]
    calls = counted(label)[method]
    if not calls:
        raise NotImplementedError(f"{name} is never called")
    named = (method, *(["questions", "splits"] if method in ("a question", "questions", "distinct") else []))
    named = (*named, "credit") if label == "credit" else named
    draw = random.Random(f"{seed} {name}")
    middle = draw.randint(min(2, calls), calls)
    for at in sorted({1, middle}):
        some = list(VALUES) if at == 1 else draw.sample(list(VALUES), IN_THE_MIDDLE)
        for what in some:
            call = partial(run, label, method, at, VALUES[what])
            yield Case(name, f"call {at} of {calls}: {what}", call, named, may_pass=what in right)
        for what, give in ERRORS.items():
            call = partial(run, label, method, at, give, 130 if what == "KeyboardInterrupt" else None)
            yield Case(name, f"call {at} of {calls} raises {what}", call, named)
        for what, effect in EFFECTS.items():
            call = partial(run, label, method, at, effect)
            off = what == "turns gradients off"  # as they are where rollouts are drawn
            yield Case(name, f"call {at} of {calls} {what}", call, named, may_pass=off)
        for what, effect in HARMLESS.items():
            yield Case(name, f"call {at} of {calls} {what}", partial(run, label, method, at, effect), (), may_pass=True)


@cache
def counted(label: str) -> dict[str, int]:
    """How often each method is called in a run where nothing is wrong."""
    run(label, "", 0, lambda: None)
    return dict(hostile_task.CALLS)


def config(label: str, out: Path) -> TrainConfig:
    scenario = SCENARIOS[label]
    task = str(rows()) if scenario.task.endswith(".jsonl") else f"{MODULE}:{scenario.task}"
    sizes: dict[str, Any] = {"steps": 2, "prompts": 2, "rollouts": 2, "questions": 8, "threads": 1, "max_new": 3}
    sizes |= {"warmup": WarmUp(steps=1, batch=2, demonstrations=4, check_every=1), "tiny": ModelConfig(1, 8, 1, 8)}
    sizes |= {"eval": Evaluation(heldout=2, validation=2, samples=2, every=1), "checkpoint_every": 1}
    return TrainConfig(task=task, out=out, **(sizes | scenario.settings))


@cache
def rows() -> Path:
    path = Path(tempfile.mkdtemp(prefix="attack-")) / "rows.jsonl"
    row = {"answer": "1", "verifier": f"{MODULE}:verifier"}
    path.write_text("\n".join(json.dumps({"prompt": f"{n}=", **row}) for n in range(100)))
    return path


def fickle(label: str, seed: str) -> None:
    """A run in which methods answer now this and now that, each of which would be right."""
    hostile_task.FICKLE.append(random.Random(seed))
    try:
        run(label, "", 0, lambda: None)
    finally:
        hostile_task.FICKLE.clear()


def run(label: str, method: str, at: int, give: Callable[..., Any], status: int | None = None) -> None:
    """A run in which ``method`` gives that at one of its calls. Raises ValueError with the words of one that ended, and
    Misbehaved where its status, its words or what it leaves behind are not as they should be."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    made, err = config(label, folder / "run"), io.StringIO()
    before = signal.getsignal(signal.SIGINT), torch.get_num_threads(), Path.cwd()
    try:
        hostile_task.tell(method, at, give)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), _light(made):
            came = _ended()
        if before != (signal.getsignal(signal.SIGINT), torch.get_num_threads(), Path.cwd()):
            raise Misbehaved("signals, threads or folder are not as they were")
        words = err.getvalue()
        stands = _left_behind(made.out or folder, words, whole=came == 0)
        if came not in ((0, 1, 2) if status is None else (status,)) or "Traceback" in words:
            raise Misbehaved(f"exit status {came}: {words[-200:]}")
        if came and (len(words.splitlines()) != 1 or not words.strip().isprintable()):
            raise Misbehaved(f"{len(words.splitlines())} lines: {words[:300]!r}")
        if came == 1 and str(stands or "no checkpoint yet") not in words:
            raise Misbehaved(f"not where it goes on, {stands}: {words}")
        if came == 2 and stands is not None:
            raise Misbehaved(f"status 2 of a run that has {stands}: {words}")
        if came:
            raise ValueError(f"{method}: {words}" if came == status else words)
    finally:
        hostile_task.TOLD.clear()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        os.chdir(before[-1])
        shutil.rmtree(folder, ignore_errors=True)


def _ended() -> int:
    """The status of the command. Raises Misbehaved where it raises."""
    try:
        return cli_main([])
    except BaseException as error:
        raise Misbehaved(f"{type(error).__name__}: {str(error)[:200]}") from error


@contextlib.contextmanager
def _light(made: TrainConfig) -> Iterator[None]:
    """The command of these settings, without its curve."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("trajkern.trainer.config.parse", lambda argv: made)
        patch.setattr("trajkern.trainer.train.plot", lambda *_: None)
        yield


def _left_behind(out: Path, words: str, whole: bool) -> Path | None:
    """The checkpoint from which it goes on, where there is one. Raises Misbehaved over what is damaged."""
    if not out.exists():
        return None
    for path in out.iterdir():
        if path.name.endswith((PARTIAL, ".part")):
            raise Misbehaved(f"{path.name} was left behind")
    with open(out / LOCK, "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    found = [out / name for name in (CHECKPOINT, WARM) if (out / name).exists()]
    for path in found:
        load(path)
    for line in (out / METRICS).read_text().splitlines() if (out / METRICS).exists() else ():
        values = json.loads(line, parse_constant=_no_number)
        if not isinstance(values, dict):
            raise Misbehaved(f"metrics of {values!r}")
    if whole and not found:
        raise Misbehaved("no checkpoint")
    return found[0] if found else None


def _no_number(word: str) -> float:
    raise Misbehaved(f"metrics of {word}")
