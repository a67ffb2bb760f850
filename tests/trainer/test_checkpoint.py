"""Checkpoints: whole or not at all, and only into the model they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trajkern.trainer import checkpoint
from trajkern.trainer.models.transformer import ModelConfig, Transformer
from trajkern.trainer.run import CHECKPOINT, results_folder

SMALL = ModelConfig(layers=1, width=16, heads=2, ffn=24)


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
    checkpoint.save(
        path, models={"policy": model}, optimizer=optimizer, generator=generator, place={"step": 7, "phase": "main"}
    )
    return model, optimizer, generator


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer, generator = _save(tmp_path / "c")
    stored = checkpoint.load(tmp_path / "c")
    assert stored.place == {"step": 7, "phase": "main"}
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
def test_truncated(tmp_path: Path, size: int) -> None:
    path = tmp_path / "c"
    _save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"checkpoint must be a whole safetensors file; {path} is damaged"):
        checkpoint.load(path)


def test_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint must be an existing file; got .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="checkpoint must be one of this trainer's; .*foreign"):
        checkpoint.load(tmp_path / "foreign")


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path := tmp_path / "old", metadata={checkpoint._KEY: '{"step": 3}'})
    with pytest.raises(ValueError, match=f"checkpoint must have format 2; {path} has None"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ModelConfig(layers=1, width=32, heads=2, ffn=24), r"\[16\] as policy.blocks.0.attention_norm.*, not \[32\]"),
        (ModelConfig(layers=2, width=16, heads=2, ffn=24), r"has nothing as policy.blocks.1.attention_norm.weight"),
    ],
    ids=["wider", "deeper"],
)
def test_other_model_is_refused_and_left_alone(tmp_path: Path, other: ModelConfig, message: str) -> None:
    _save(tmp_path / "c")
    model = _model(5, other)
    before = _state(model)
    with pytest.raises(ValueError, match=f"checkpoint must be of the same model; .* {message}"):
        checkpoint.restore_model(checkpoint.load(tmp_path / "c"), "policy", model)
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


def test_a_folder_that_holds_a_run_is_refused(config) -> None:
    settings = config()
    settings.out.mkdir()
    (settings.out / CHECKPOINT).write_bytes(b"precious")
    with pytest.raises(ValueError, match="out must be a new folder, or resume given; .* already holds"):
        results_folder(settings)
    assert (settings.out / CHECKPOINT).read_bytes() == b"precious"
