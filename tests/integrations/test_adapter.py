"""What the adapters share: what is put into modules and classes, now or when they are loaded, is taken back."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import pytest
import torch

from trajkern.integrations._adapter import Enabled, Patches, WhenImported, credited_by, padded_rows
from trajkern.integrations._handle import Registered


def test_a_module_that_is_imported_later(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loaded_later.py").write_text("value = 1\n")
    (tmp_path / "loaded_never.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def doubled(module: Any) -> None:
        module.value *= 2

    watching = WhenImported({"loaded_later": doubled, "loaded_never": doubled, "there_is_none": doubled})
    watching.start()
    assert importlib.import_module("loaded_later").value == 2
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("there_is_none")
    again = WhenImported({"loaded_later": doubled})
    again.start()
    assert importlib.import_module("loaded_later").value == 4
    for x in (watching, again, watching):
        x.stop()
    assert importlib.import_module("loaded_never").value == 1
    for name in ("loaded_later", "loaded_never"):
        del sys.modules[name]


def test_patches_of_a_class() -> None:
    class Base:
        def f(self) -> int:
            return 1

    class Derived(Base):
        pass

    patches = Patches()
    patches.put(Base, "f", lambda self: 2)
    patches.put(Derived, "f", lambda self: 3)
    assert (Base().f(), Derived().f()) == (2, 3)
    patches.undo()
    assert (Base().f(), Derived().f()) == (1, 1) and "f" not in vars(Derived)


# what an adapter says, and its handle


@pytest.fixture
def host() -> dict[str, Any]:
    return {"__name__": "host.losses", "loss": 1, "other": 2}


def enabled(patches: Patches, host: dict[str, Any], value: int) -> Enabled:
    patches.undo()
    patches.put(host, "loss", value)
    return patches.enabled("Host", patches.undo, credited_by(None))


def test_a_handle_says_what_was_replaced_and_takes_it_back(host: dict[str, Any], capsys) -> None:
    logging.getLogger().handlers, before = [], logging.getLogger().handlers
    try:
        with enabled(Patches(), host, 3) as handle:
            assert host["loss"] == 3 and handle.active
            line = "Host: trajkern stands in for loss of host.losses"
            assert capsys.readouterr().err == f"{line}\n" and repr(handle) == f"<{line}>"
        assert host["loss"] == 1 and not handle.active and repr(handle).endswith("(taken back)>")
        handle.disable()
        with pytest.raises(KeyError), enabled(Patches(), host, 3):
            raise KeyError
        assert host["loss"] == 1
    finally:
        logging.getLogger().handlers = before


def test_a_handle_undoes_nothing_but_its_own(host: dict[str, Any]) -> None:
    patches = Patches()
    first = enabled(patches, host, 3)
    second = enabled(patches, host, 4)
    first.disable()
    assert (first.active, second.active, host["loss"]) == (False, True, 4)
    patches.undo()
    host["loss"] = 5
    second.disable()
    assert host["loss"] == 5


def test_the_line_is_the_program_s_to_silence(host: dict[str, Any], caplog, capsys) -> None:
    with caplog.at_level(logging.INFO, "trajkern"):
        enabled(Patches(), host, 3)
        assert [x.getMessage() for x in caplog.records] == ["Host: trajkern stands in for loss of host.losses"]
        assert not capsys.readouterr().err  # not twice
    with caplog.at_level(logging.WARNING, "trajkern"):
        enabled(Patches(), host, 3)
        assert len(caplog.records) == 1


def test_registered_names_are_a_tuple_and_a_handle() -> None:
    stands = [True]
    found = Registered.of("Host", stands.clear, lambda: bool(stands), ["a"], ["b"])
    assert found == (["a"], ["b"]) and isinstance(found, tuple) and repr(found) == "(['a'], ['b'])"
    with found as (estimators, losses):
        assert (estimators, losses) == (["a"], ["b"]) and stands
    assert not stands and not found.active


DTYPES = [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_any_dtype_chooses(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    rows = padded_rows("mask", mask.to(dtype))
    assert torch.equal(rows.mask, mask.bool().reshape(-1)) and rows.cu_seqlens.tolist() == [0, 3, 6]
    assert padded_rows("mask", mask.to(dtype)[:, 1:]).mask.tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, torch.nan, torch.inf])
def test_a_mask_that_weighs_is_refused(value: float) -> None:
    mask = torch.tensor([[1.0, 0.0, value]])
    with pytest.raises(ValueError, match=f"mask must hold 0 and 1 alone, which choose tokens; got {value:g}"):
        padded_rows("mask", mask)
    if value >= 0:
        assert padded_rows("mask", mask, weighs=True).mask.tolist() == [True, False, True]
