"""Checkpoints: whole or not at all, and only into the model they came from."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trajkern.trainer import checkpoint
from trajkern.trainer.folder import CHECKPOINT, Folder
from trajkern.trainer.models.transformer import ModelConfig, Transformer
from trajkern.trainer.place import Clock

SMALL = ModelConfig(layers=1, width=16, heads=2, ffn=24)
BEFORE = {"pass_at_1": 0.5, "pass_at_k": 1.0, "greedy": None, "details": {"pass@2": None}, "families": {}}
BEFORE |= {"pass_at": [0.5], "distinct": 1, "reliability": [[3, 0.5, 0.5]]}
PLACE: dict[str, Any] = {
    "config": {},
    "phase": "main",
    "step": 7,
    "start": {"step": 3, "tokens": 9},
    "before": BEFORE,
    "system": {"skills": []},
    "data": "",
    "clock": asdict(Clock(sampled=9, sampling=0.5)),
    "metrics": "0123abcd",
}


def _model(seed: int, config: ModelConfig = SMALL) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config, 20)


def _state(model: Transformer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(6), torch.tensor([0, 6]), torch.arange(6)).square().mean().backward()
    optimizer.step()


def _trained(seed: int) -> tuple[Transformer, torch.optim.AdamW, torch.Generator]:
    model = _model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        _step(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    torch.rand(3, generator=generator)
    return model, optimizer, generator


def _save(path: Path, seed: int = 1) -> tuple[Transformer, torch.optim.AdamW, torch.Generator]:
    model, optimizer, generator = _trained(seed)
    checkpoint.save(path, models={"policy": model}, optimizer=optimizer, generator=generator, place=PLACE)
    return model, optimizer, generator


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a checkpoint file holds."""
    _save(path := tmp_path_factory.mktemp("whole") / "c")
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> Path:
    """Of a whole checkpoint."""
    (tmp_path / "c").write_bytes(whole)
    return tmp_path / "c"


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer, generator = _save(tmp_path / "c")
    stored = checkpoint.load(tmp_path / "c")
    assert stored.place == PLACE
    twin = _model(2)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    checkpoint.restore_model(stored, "policy", twin)
    checkpoint.restore_optimizer(stored, twin_optimizer, twin)
    assert all(map(torch.equal, _state(model), _state(twin)))
    assert torch.equal(stored.tensors["generator"], generator.get_state())
    for one, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        _step(one, its_optimizer)
    assert all(map(torch.equal, _state(model), _state(twin)))


@pytest.mark.parametrize("size", [0, 5, 400, -1], ids=["empty", "header cut", "tensors cut", "last byte missing"])
def test_truncated(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"checkpoint must be a whole safetensors file; {path} is damaged"):
        checkpoint.load(path)


def test_the_file_and_then_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((stat.S_ISDIR(os.fstat(file).st_mode), path.exists())))
    _save(path := tmp_path / "c")
    assert synced == [(False, False), (True, True)]


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors, file, metadata) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=f"{tmp_path / 'c'} could not be written: .*No space left"):
        _save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint must be an existing file; got .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="checkpoint must be one of this trainer's; .*foreign"):
        checkpoint.load(tmp_path / "foreign")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """To open a pipe would wait for ever."""
    make(tmp_path / "c")
    with pytest.raises(ValueError, match=f"checkpoint must be an existing file; got {tmp_path / 'c'}"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("make", [Path.touch, lambda path: os.symlink("/nowhere", path), Path.mkdir])
def test_what_stands_where_a_checkpoint_is_written(tmp_path: Path, make: Callable[[Path], None]) -> None:
    part = tmp_path / "c.safetensors.part"
    make(part)
    checkpoint.clear(tmp_path)
    assert not os.path.lexists(part)
    make(part)
    _save(tmp_path / "c.safetensors")
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path := tmp_path / "old", metadata={checkpoint._KEY: '{"step": 3}'})
    with pytest.raises(ValueError, match=f"checkpoint must have format {checkpoint.FORMAT}; {path} has None"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ModelConfig(layers=1, width=32, heads=2, ffn=24),
            r"\[16\] as policy.blocks.0.attention_norm.*, not float32\[32\]",
        ),
        (ModelConfig(layers=2, width=16, heads=2, ffn=24), r"has nothing as policy.blocks.1.attention_norm.weight"),
    ],
    ids=["wider", "deeper"],
)
def test_other_model_is_refused_and_left_alone(path: Path, other: ModelConfig, message: str) -> None:
    model = _model(5, other)
    before = _state(model)
    with pytest.raises(ValueError, match=f"checkpoint must be of the same model; .*{message}"):
        checkpoint.restore_model(checkpoint.load(path), "policy", model)
    assert all(map(torch.equal, before, _state(model)))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    _save(path)
    before = path.read_bytes()

    def cut(tensors, file, metadata) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", cut)
    with pytest.raises(OSError, match="disk full"):
        _save(path, seed=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("stride", [251, pytest.param(5, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_refused_wherever_it_is(path: Path, whole: bytes, stride: int) -> None:
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in range(0, len(whole), stride):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="^checkpoint must be") as refused:
            checkpoint.load(path)
        assert str(path) in str(refused.value), at
        assert at < end or " is damaged (the tensor " in str(refused.value), at


def test_the_tensor_that_changed_is_named(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    changed = {
        "is not what was saved": tensors
        | {"policy.norm.weight": tensors["policy.norm.weight"].nextafter(torch.ones(16))},
        "is missing": {k: v for k, v in tensors.items() if k != "policy.norm.weight"},
    }
    for what, some in changed.items():
        save_file(some, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"{path} is damaged .the tensor policy.norm.weight {what}"):
            checkpoint.load(path)


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[arg-type,return-value]


def _with(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with("optimizer.1.exp_avg", torch.zeros(3)), r"has float32\[3\] as optimizer.1.exp_avg, not float32\[16\]"),
        (_with("optimizer.1.step", torch.zeros(9)), r"has float32\[9\] as optimizer.1.step, not float32\[\]"),
        (_with("optimizer.1.exp_avg_sq", torch.zeros(16).half()), r"float16\[16\] as .*, not float32\[16\]"),
        (_without("optimizer.1.exp_avg_sq"), "has nothing as optimizer.1.exp_avg_sq, not float32"),
        (_with("optimizer.99.step", torch.tensor(1.0)), r"has float32\[\] as optimizer.99.step, not nothing"),
        (_with("optimizer.x", torch.tensor(1.0)), r"has float32\[\] as optimizer.x, not nothing"),
        (
            _with("policy.norm.weight", torch.zeros(16).double()),
            r"has float64\[16\] as policy.norm.weight, not float32",
        ),
        (_with("generator", torch.zeros(4).byte()), r"same device; .* has uint8\[4\] as generator, not uint8\[5056\]"),
        (_without("generator"), "has nothing as generator, not uint8"),
        (_with("generator", torch.full((5056,), 255).byte()), "must hold a generator's state; .* does not"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    """Of checkpoints whose checksums hold."""
    stored = checkpoint.load(path)
    change(stored.tensors)
    model, optimizer, generator = _trained(2)
    before = [*_state(model), generator.get_state()], [x.clone() for x in optimizer.state[model.norm.weight].values()]
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_optimizer(stored, optimizer, model)
        before[1][:] = optimizer.state[model.norm.weight].values()
        checkpoint.restore_model(stored, "policy", model)
        before[0][:-1] = _state(model)
        checkpoint.restore_generator(stored, generator)
    assert all(map(torch.equal, before[0], [*_state(model), generator.get_state()]))
    assert all(map(torch.equal, before[1], optimizer.state[model.norm.weight].values()))


def test_a_parameter_that_was_never_moved_comes_back_as_it_was(tmp_path: Path) -> None:
    twins = [_model(1), _model(1)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in twins]
    twins[0].norm.requires_grad_(False)
    _step(twins[0], optimizers[0])
    generator = torch.Generator()
    saved = {"models": {"policy": twins[0]}, "optimizer": optimizers[0], "generator": generator, "place": PLACE}
    checkpoint.save(tmp_path / "c", **saved)
    stored = checkpoint.load(tmp_path / "c")
    checkpoint.restore_model(stored, "policy", twins[1])
    checkpoint.restore_optimizer(stored, optimizers[1], twins[1])
    for model, optimizer in zip(twins, optimizers, strict=True):
        model.norm.requires_grad_(True)
        _step(model, optimizer)
    assert all(map(torch.equal, *map(_state, twins)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "x"}, "place.phase must be one of warmup, main, then; got 'x'"),
        ({"step": -5}, "place.step must be at least 0, got -5"),
        ({"step": 2}, "place.start.step must be at most step = 2, got 3"),
        ({"step": True}, "place.step must be a whole number, got True"),
        ({"step": None}, "place.step must be a whole number, got None"),
        ({"clock": {}}, "place.clock.sampled must be given"),
        ({"clock": PLACE["clock"] | {"sampling": float("nan")}}, "place.clock.sampling must be at least 0, got nan"),
        ({"phase": "warmup"}, "place.before must be None in the warmup"),
        ({"before": BEFORE | {"details": {"x": "y"}}}, "place.before.details.x must be a number, got 'y'"),
        ({"before": BEFORE | {"pass_at": [1, None]}}, r"place.before.pass_at\[1\] must be a number, got None"),
        ({"start": [1, 2]}, "place.start must be a table of step, tokens; got"),
        ({"metrics": 80}, "place.metrics must be a text, got 80"),
        ({"more": 1}, "place.more must not be given, which is none of config, phase, "),
        ({"data": None}, "place.data must be a text, got None"),
    ],
    ids=str,
)
def test_a_place_of_another_schema_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()[checkpoint._KEY])
    text = json.dumps(found | {"place": PLACE | change})
    digest = checkpoint.hashlib.sha256(text.encode()).hexdigest()
    save_file(load_file(path), path, metadata={checkpoint._KEY: text, checkpoint._CHECKSUM: digest})
    with pytest.raises(ValueError, match=f"checkpoint must hold where its run stands; {path} does not: {message}"):
        checkpoint.load(path)


def test_the_mode_is_the_umasks_and_a_killed_save_leaves_nothing(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _save(path := tmp_path / "c.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    left = tmp_path / "c.safetensors.part"
    left.mkdir()
    (left / ".tmpAbC").write_bytes(b"half")
    checkpoint.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    left.mkdir()
    (left / "c.safetensors").write_bytes(b"half")
    _save(path, seed=2)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"] and checkpoint.load(path)


def test_a_folder_that_holds_a_run_is_refused(config) -> None:
    settings = config()
    settings.out.mkdir()
    (settings.out / CHECKPOINT).write_bytes(b"precious")
    with pytest.raises(ValueError, match="out must be a new folder, or resume given; .* already holds"):
        Folder.of(settings)
    assert (settings.out / CHECKPOINT).read_bytes() == b"precious"
