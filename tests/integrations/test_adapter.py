"""What the adapters share: what is put into modules and classes, now or when they are loaded, is taken back."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from trajkern.integrations._adapter import Patches, WhenImported


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
