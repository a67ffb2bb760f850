"""docs/errors.md: what hostile calls come to, by what is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

COMMANDS = ("command", "returned")  # surfaces of which a call is a whole command
RULES = """# Errors

What is wrong with a call is said before anything is computed:

- A **TypeError** is about a kind of thing: something else than a tensor, another dtype, a number where a flag is due.
  A **ValueError** is about this one: a shape, a range, a device, values that contradict each other.
- The message names the argument (an adapter's by the host's name for it), then what it must be, then what it was.
- A tensor must be dense, of strides and in memory: sparse, nested, quantised and freed ones are refused before a
  pointer is taken. A meta or fake tensor gives a result of its shape wherever torch's own functions do.
- Numbers must be finite, and where a kernel reads them also finite in its precision. Flags are True or False, no text.
- Values are checked where reading them costs nothing: on the CPU, and where layouts and credits are built. What nobody
  may read, a target on a GPU, never reads out of bounds: its result is NaN.
- The command line ends with exit status 2 and one line on stderr (of a training flag, a box with what is like it);
  with 1 where a check or a file failed, 141 where who read its output has gone, 130 after Ctrl-C.

Other errors come from elsewhere: ImportError where an optional package is missing, RuntimeError where a host's version
lacks what an adapter replaces, ConnectionError from a server, ResultsError where a run cannot go on: a file could not
be written, or code that a flag names (a task's, a credit's, a rubric's, a verifier's) failed or returned what is
refused. A line says whose it is, what and where, and from which checkpoint to go on; `python -X dev -m trajkern` shows
the rest.

Each row below counts calls with one hostile argument (another kind, layout, device or memory; out of range, NaN or too
large for a float; a name too many) and what they came to. A result is right where nothing was wrong: each function is
also called as it should be. Odd arguments may be right (every dtype and shape, numbers of all kinds, edges): such a
call is refused too, or its result is what the plain torch reference has, wherever that holds the numbers; several of
them at once are drawn by `--seed`. Of users' code each method and function, by the run in which it is asked, gives
back or raises something hostile at one of its calls; a result is right where the run goes on to its end, its files
whole. Of structures that come from outside (what an engine or a server answers, a host's batch) each node in turn is
another, or gone; a result is right where that was not read, may be missing, or may be meant. `make attack` makes the
calls and this page.
"""


def text(found: Iterable[Any], surfaces: Mapping[str, str]) -> str:
    """The page of all calls that were found."""
    found = list(found)
    lines = [RULES]
    for surface, title in surfaces.items():
        of_surface = [x for x in found if x.surface == surface]
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        is_command = surface in COMMANDS
        refused = "status 2 or 1" if is_command else "TypeError | ValueError"
        lines.append(f"| called | calls | {refused} | result | bad |")
        lines.append("|---|--:|" + "--:|" * (3 if is_command else 4))
        for name in dict.fromkeys(x.name for x in of_surface):
            lines.append(_row(name, [x for x in of_surface if x.name == name], is_command))
        lines.append("")
    bad = sum(bool(x.fault) for x in found)
    return "\n".join([*lines, f"{len(found):,} calls, {bad} bad.", ""])


def _row(name: str, calls: list[Any], is_command: bool) -> str:
    came = Counter(x.came for x in calls if not x.fault)
    kinds = [came["ValueError"]] if is_command else [came["TypeError"], came["ValueError"]]
    numbers = [len(calls), *kinds, came["result"], sum(bool(x.fault) for x in calls)]
    return f"| `{name}` | " + " | ".join(f"{x:,}" for x in numbers) + " |"
