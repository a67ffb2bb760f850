"""What installs a package that is optional: a command that works wherever trajkern itself came from."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import metadata

_REQUIREMENT = re.compile(r"""(?P<spec>(?P<name>[\w.-]+)[^;]*?)\s*;(?P<marker>.*\bextra == ["'](?P<extra>\w+)["'].*)""")
_PYTHON = re.compile(r"""python_version (<|>=) ["']3\.(\d+)["']""")


def pip_install(extra: str, *names: str) -> str:
    """``pip install`` with the packages ``names``, and whatever else of trajkern's extra is not installed.

    They stand by their own names and versions: ``trajkern[extra]`` can only be had where trajkern is on an index.
    """
    try:
        listed = metadata.requires("trajkern") or []
    except metadata.PackageNotFoundError:  # a source tree on the path
        listed = []
    specs = {}
    for found in filter(None, map(_REQUIREMENT.match, listed)):
        if found["extra"] == extra and _fits(found["marker"]):
            specs[_normal(found["name"])] = found["spec"].replace(" ", "")
    first = [specs.pop(_normal(name), name) for name in names]
    wanted = [*first, *(spec for name, spec in specs.items() if not _installed(name))]
    return " ".join(["pip install", *map(shlex.quote, wanted)])


def _fits(marker: str) -> bool:
    """Whether what a marker says of Python holds here."""
    minor = sys.version_info.minor
    return all(minor < int(n) if sign == "<" else minor >= int(n) for sign, n in _PYTHON.findall(marker))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
