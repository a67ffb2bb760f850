"""``trajkern validate``: what passes, what is caught, what is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trajkern as tk
from trajkern import cli, validate
from trajkern.testing import spec_of


def test_a_sound_op_in_a_fresh_process(tmp_path) -> None:
    command = [sys.executable, "-m", "trajkern", "validate", "--op", "whiten", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= cli.WIDTH
    rows = [line for line in done.stdout.splitlines() if line.startswith("whiten")]
    assert [row.split()[2] for row in rows] == ["float32", "float64"]
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["version"] == tk.__version__ and all(r["passed"] and r["worst"] <= 1 for r in saved["results"])


def _wrong_on(length: int):
    whiten = tk.whiten

    def wrong(x, **options):
        return whiten(x, **options) * (1.001 if x.shape[0] >= length else 1)

    return wrong


def test_an_error_is_caught_with_its_smallest_case(monkeypatch, capsys) -> None:
    monkeypatch.setattr(tk, "whiten", _wrong_on(3))
    assert validate.main(["--op", "whiten", "--dtype", "float32"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^whiten +native +float32 .* FAIL$", shown, re.M)
    assert "times its budget" in shown
    assert max(map(len, shown.splitlines())) <= cli.WIDTH
    name = re.search(r"^  the smallest, (\w+)", shown, re.M)[1]
    assert spec_of("whiten").case(name).reason in shown
    told = r"whitened is off by (.* times its budget, worst at \[\d+\]: got\s+\S+,\s+expected \S+)"
    worst = re.search(told, shown)[1]
    code = shown[shown.index("import torch\n") : shown.rindex("\n\n")]
    exec(compile(code, "what was pasted", "exec"), {})
    assert " ".join(worst.split()) in " ".join(capsys.readouterr().out.split())


def test_bits_that_depend_on_the_run_or_the_batch_fail(monkeypatch, capsys) -> None:
    calls, advantages = iter(range(10**9)), tk.group_advantages

    def unsteady(rewards, group_ids, **options):
        return advantages(rewards, group_ids, **options) + 1e-30 * next(calls)

    monkeypatch.setattr(tk, "group_advantages", unsteady)
    assert validate.main(["--op", "group_advantages", "--dtype", "float32"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_fresh_draws_repeat_with_their_seed(capsys) -> None:
    shown = []
    for seed in ("7", "7", "8"):
        assert validate.main(["--op", "whiten", "--dtype", "float32", "--seed", seed]) == 0
        shown.append([line.rsplit(None, 2)[0] for line in capsys.readouterr().out.splitlines()[3:4]])
    assert shown[0] == shown[1]


def test_seeds_in_a_row_take_every_draw_once(tmp_path, capsys) -> None:
    """Four draws of seed 7, 8 and 9 each are 8 to 13."""
    args = ["--op", "whiten", "--dtype", "float32", "--intensity", "2", "--seed", "7"]
    counts = []
    for more in ([], ["--seeds", "3", "--json", str(tmp_path / "out.json")]):
        assert validate.main([*args, *more]) == 0
        counts.append(int(re.search(r"^whiten +native +float32 +(\d+)", shown := capsys.readouterr().out, re.M)[1]))
    small = sum(not case.large for case in spec_of("whiten").cases)
    assert counts[1] - counts[0] == 2 * small and "seeds 7 to 9: all within budget" in shown
    assert json.loads((tmp_path / "out.json").read_text())["seeds"] == 3


def test_own_tensors(tmp_path, capsys) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "mine.safetensors"
    x = torch.randn(9)
    tensors = {
        "logprobs": x - 3,
        "old_logprobs": x - 3.1,
        "advantages": torch.randn(2),
        "cu_seqlens": torch.tensor([0, 4, 9]),
    }
    save_file(tensors, path, {"config": json.dumps({"kind": "dapo", "clip_high": 0.28}), "normalizer": "4.5"})
    assert validate.main(["--op", "policy_loss", "--inputs", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "loss" in shown and "grad_logprobs" in shown
    assert validate.main(["--inputs", str(path)]) == 2
    assert "--inputs needs exactly one --op" in capsys.readouterr().err


def test_a_file_that_is_none_is_told(tmp_path, capsys) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    text, odd = tmp_path / "text.safetensors", tmp_path / "odd.safetensors"
    text.write_text("no tensors")
    save_file({"x": torch.ones(3), "y": torch.ones(3)}, odd)
    for path in (tmp_path / "missing", text, odd):
        assert validate.main(["--op", "whiten", "--inputs", str(path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"trajkern validate: --inputs {path}: ") and len(told.splitlines()) == 1


def test_a_tree_of_ones_own(tmp_path, capsys) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "tree.safetensors"
    tensors = {"tree.parent": torch.tensor([-1, 0, 0]), "tree.node_lengths": torch.tensor([1, 2, 3])}
    save_file(tensors | {"leaf_values": torch.randn(2)}, path, {"op": '"var"'})
    assert validate.main(["--op", "subtree_reduce", "--inputs", str(path)]) == 0


class TestCompiled:
    def test_the_same_report_of_compiled_kernels(self, capsys, tmp_path) -> None:
        pytest.importorskip("triton")
        args = ["--compiled", "sm_90", "--op", "linear_logprobs", "--json", str(tmp_path / "out.json")]
        assert validate.main(args) == 0
        shown = capsys.readouterr().out
        assert re.search(r"^linear_logprobs +triton +float32 +\d+ +0\.\d\d +same +same", shown, re.M)
        assert re.search(r"^kernels for sm_90: \d+ launches, .* instructions of threads$", shown, re.M)
        assert json.loads((tmp_path / "out.json").read_text())["compiled"] == "sm_90"

    def test_a_failure_is_shown_with_its_context(self, monkeypatch, capsys) -> None:
        pytest.importorskip("triton")
        logprobs = tk.linear_logprobs
        monkeypatch.setattr(tk, "linear_logprobs", lambda *args, **options: logprobs(*args, **options) * 1.01)
        assert validate.main(["--compiled", "sm_90", "--op", "linear_logprobs"]) == 1
        shown = capsys.readouterr().out
        assert 'with compiled("sm_90"), tk.use_backend("triton"):' in shown and "import compiled, differences" in shown

    def test_what_does_not_go_together(self, capsys) -> None:
        assert validate.main(["--compiled", "sm_90", "--device", "cpu"]) == 2
        assert "--compiled goes with neither --device nor --inputs" in capsys.readouterr().err

    def test_a_missing_compiler(self, monkeypatch, capsys) -> None:
        def missing(capability: int) -> None:
            raise RuntimeError("there is no nvcc on the PATH; install the CUDA toolkit")

        monkeypatch.setattr("trajkern.testing.ptx.context._library", missing)
        assert validate.main(["--compiled", "sm_90", "--op", "whiten"]) == 2
        assert "install the CUDA toolkit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "tokens"], "invalid choice: 'tokens'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--compiled", "sm_42"], "invalid choice: 'sm_42'"),
        (["--intensity", "9"], "invalid choice: 9"),
        (["--seeds", "0"], "--seeds: must be a whole number from 1 to 1,000,000, got '0'"),
    ],
)
def test_bad_flags(args, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        validate.main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_run(tmp_path, capsys) -> None:
    assert validate.main(["--op", "whiten", "--json", str(tmp_path / "missing" / "out.json")]) == 2
    captured = capsys.readouterr()
    assert "existing folder" in captured.err and not captured.out


def test_nothing_tried_is_no_success(capsys) -> None:
    assert validate.main(["--op", "gae", "--dtype", "float16"]) == 2
    assert capsys.readouterr().err.startswith("trajkern validate: no --op runs here in any of these --dtype")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_disk_that_fills_up_during_the_run_is_told(capsys) -> None:
    assert validate.main(["--op", "gae", "--intensity", "0", "--json", "/dev/full"]) == 1
    assert capsys.readouterr().err == "trajkern validate: --json /dev/full: No space left on device\n"
