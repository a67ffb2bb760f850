"""The pages of the public names that are no op: found by their modules and their ``__all__``, documented by autodoc."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import trajkern as tk
from _site import facts
from _site.docstrings import summary
from _site.rest import code, heading, plain, table, toctree

# title -> the modules whose names of trajkern's own __all__ stand on its page; the last page has all others
OF_TRAJKERN = {
    "Layouts": ("trajkern.layouts.",),
    "Losses": ("trajkern.losses.", "trajkern.ops.tree_loss"),
    "Results": ("trajkern._results",),
    "Tools": ("",),
}
ONE_PAGE = ("credit", "testing", "bench")  # packages whose __all__ is one page, where they exist
MEMBERS = ("   :members:", "   :special-members: __call__, __getitem__, __len__")  # those that are documented
PAGE_A_MODULE = {"recipes": "Recipes", "integrations": "Adapters"}


def pages() -> dict[str, list[str]]:
    """Page -> its lines."""
    found = {f"api/{title.lower()}": of_trajkern(title, names) for title, names in grouped().items()}
    for name in ONE_PAGE:
        if importlib.util.find_spec(f"trajkern.{name}") is not None:
            found[f"api/{name}"] = _package(importlib.import_module(f"trajkern.{name}"))
    for name, title in PAGE_A_MODULE.items():
        package = importlib.import_module(f"trajkern.{name}")
        modules = public_modules(package)
        found[f"api/{name}"] = _with_modules(package, title, modules)
        homes: dict[Any, str] = {}
        found |= {f"api/{name}/{module}": _module(f"trajkern.{name}.{module}", homes) for module in modules}
    top = [page.removeprefix("api/") for page in found if page.count("/") == 1]
    return {"api/index": _index(top), **found}


def public_modules(package: ModuleType) -> list[str]:
    return sorted(x.name for x in pkgutil.iter_modules(package.__path__) if not x.name.startswith("_"))


def _index(pages: list[str]) -> list[str]:
    rows = [
        (f":py:obj:`{name} <trajkern.{name}>`", _summary(name)) for name in sorted(tk.__all__) if not _is_module(name)
    ]
    return [
        *heading("API"),
        ".. currentmodule:: trajkern",
        "",
        "Every public name, from its docstring: what ``help()`` shows. ``import trajkern as tk`` has",
        "",
        *table(("name", "what it is"), rows),
        "and the packages below have the rest.",
        "",
        *toctree(pages, hidden=False),
    ]


def _is_module(name: str) -> bool:
    return isinstance(getattr(tk, name), ModuleType)


def _summary(name: str) -> str:
    value = getattr(tk, name)
    documented = inspect.isclass(value) or inspect.isfunction(value)
    return summary(value.__doc__ or "") if documented else plain(f"a {type(value).__name__} of {len(value)}")


def grouped() -> dict[str, list[str]]:
    ops = {name for names in facts.ops().values() for name in names}
    found: dict[str, list[str]] = {title: [] for title in OF_TRAJKERN}
    for name in tk.__all__:
        if name not in ops and not _is_module(name):
            home = getattr(getattr(tk, name), "__module__", "trajkern.losses.kinds")
            found[next(title for title, homes in OF_TRAJKERN.items() if home.startswith(homes))].append(name)
    return found


def of_trajkern(title: str, names: list[str]) -> list[str]:
    lines = [*heading(title), ".. currentmodule:: trajkern", ""]
    for name in names:
        lines += heading(name, 1)
        value = getattr(tk, name)
        if inspect.isclass(value) and issubclass(value, tuple):
            lines += [f".. autoclass:: trajkern.{name}", *MEMBERS, "", *_fields(value)]
        elif inspect.isclass(value):
            lines += [f".. autoclass:: trajkern.{name}", *MEMBERS, ""]
        elif inspect.isfunction(value):
            lines += [f".. autofunction:: trajkern.{name}", ""]
        else:
            lines += [f".. py:data:: {name}", "", f"   {', '.join(code(str(x)) for x in value)}", ""]
    return lines


def _fields(kind: type) -> list[str]:
    rows = [(code(x.name), plain(x.annotation), code(x.default), plain(x.comment)) for x in facts.fields(kind)]
    return table(("field", "type", "default", "what it is"), rows)


def _package(package: ModuleType) -> list[str]:
    return [*heading(package.__name__), f".. automodule:: {package.__name__}", *MEMBERS, ""]


def _with_modules(package: ModuleType, title: str, modules: list[str]) -> list[str]:
    rows = []
    for module in modules:
        documented = importlib.import_module(f"{package.__name__}.{module}").__doc__ or ""
        rows.append((f":doc:`{module} <{package.__name__.rpartition('.')[2]}/{module}>`", summary(documented)))
    own = [name for name in getattr(package, "__all__", ()) if name not in modules]
    lines = [*heading(title), *table(("module", "what it is"), rows), f".. automodule:: {package.__name__}", ""]
    if own:
        lines[-1:] = [f"   :members: {', '.join(own)}", MEMBERS[1], ""]
    return lines + toctree(f"{package.__name__.rpartition('.')[2]}/{module}" for module in modules)


def _module(name: str, homes: dict[Any, str]) -> list[str]:
    """``homes`` are the modules on whose pages things stand already: a second page refers to the first."""
    module = importlib.import_module(name)
    public = [getattr(module, x) for x in getattr(module, "__all__", ())]
    again = [x for x in public if inspect.isclass(x) and homes.setdefault(x, name) != name]
    lines = [*heading(name.rpartition(".")[2]), f".. automodule:: {name}", *MEMBERS]
    lines += [f"   :exclude-members: {', '.join(x.__name__ for x in again)}"] * bool(again)
    told = [f"{code(x.__name__)} is :class:`{homes[x]}.{x.__name__}`." for x in again]
    return [*lines, "", *told, ""]
