"""PTX text as kernels: parameters, register types, labels and instructions. Knows nothing of what an opcode does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

SIZE = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}  # bytes


class Address(NamedTuple):
    base: str  # a register, or the name of a parameter or of a shared array
    offset: int


class Pair(NamedTuple):
    """``d|p``: a value and a predicate."""

    value: str
    predicate: str


class Vector(tuple[str, ...]):
    """``{a, b}``: several registers."""


Operand = str | Address | Pair | Vector


@dataclass(frozen=True)
class Instruction:
    """One line of a kernel's code."""

    name: str  # "add", and its modifiers ("rn", "f64")
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None  # (predicate, the value at which a lane takes part)
    text: str
    where: str  # file:line of the source, as far as the compiler said so

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def registers(self) -> list[str]:
        names = [self.guard[0]] if self.guard else []
        for x in self.operands:
            names += [x] if isinstance(x, str) else [x.base] if isinstance(x, Address) else list(x)
        return [n for n in names if n[0] == "%" or n.isidentifier()]

    def unknown(self, what: str = "") -> NotImplementedError:
        """What is raised where this instruction has no execution on a CPU."""
        place = f" ({self.where})" if self.where else ""
        return NotImplementedError(f"no execution on a CPU of `{self.text}`{what and ': '}{what}{place}")


class Parameter(NamedTuple):
    name: str
    size: int


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    parameters: list[Parameter]
    threads: int | None  # where the text fixes it (.reqntid)
    shared: dict[str, int]  # where a shared array begins; the dynamic one stands last
    static_shared: int
    body: str
    files: dict[int, str]
    types: dict[str, str] = field(default_factory=dict)  # of registers, by their name without its number

    def type_of(self, register: str) -> str:
        return self.types.get(register.rstrip("0123456789"), "u32")  # %tid.x and other special registers

    def is_register(self, name: str) -> bool:
        return name[0] == "%" or name.rstrip("0123456789") in self.types

    @cached_property
    def code(self) -> tuple[list[Instruction], dict[str, int]]:
        """(instructions, where each label stands among them)."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        where = ""
        for line in self.body.split("\n"):
            line = line.split("//")[0].strip()
            if line.startswith(".loc"):
                where = self._place(line)
            elif found := re.fullmatch(r"([$\w]+):", line):
                labels[found[1]] = len(instructions)
            else:
                for text in "" if line in ("{", "}") else line.split(";"):
                    text = text.strip().removeprefix("{ ").strip()
                    if declared := re.match(r"\.reg\s+\.(\w+)\s+([%\w]+)", text):
                        self.types[declared[2].rstrip("0123456789")] = declared[1]
                    elif text.startswith(".local"):
                        raise NotImplementedError(f"{self.name} keeps local memory, which no CPU execution has: {text}")
                    elif text and text[0] not in ".}":
                        instructions.append(_instruction(text, where))
        return instructions, labels

    def _place(self, line: str) -> str:
        """A ``.loc`` as file:line, and from where that was called where the code was inlined."""
        places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line)
        names = [f"{self.files.get(int(file), file).rsplit('/', 1)[-1]}:{number}" for file, number in places]
        return ", called at ".join(names)


def _instruction(text: str, where: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if not found:
        raise NotImplementedError(f"no instruction: {text}")
    negated, predicate, opcode, rest = found.groups()
    name, *modifiers = opcode.replace("::", "_").split(".")
    operands = tuple(map(_operand, re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+", rest)))
    return Instruction(name, tuple(modifiers), operands, (predicate, not negated) if predicate else None, text, where)


def _operand(text: str) -> Operand:
    if text[0] == "[":
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise NotImplementedError(f"no address: {text}")
        return Address(found[1], int(found[2] or "0", 0))
    if text[0] == "{":
        return Vector(x.strip() for x in text.strip("{}").split(","))
    return Pair(*text.split("|")) if "|" in text else text


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX module, by its name."""
    files = {int(n): path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    shared: dict[str, int] = {}
    used = 0
    for align, width, name, count in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\[(\d*)\]", text):
        used = -(-used // int(align)) * int(align)
        shared[name] = used
        used += int(count or 0) * int(width) // 8
    kernels = {}
    entry = r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{(.*?)\n\}"
    parameter = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)"
    for name, head, directives, body in re.findall(entry, text, re.DOTALL):
        parameters = [Parameter(x, SIZE[kind] * int(count or 1)) for kind, x, count in re.findall(parameter, head)]
        threads = re.search(r"reqntid\s+(\d+)", directives)
        kernels[name] = Kernel(name, parameters, int(threads[1]) if threads else None, shared, used, body, files)
    return kernels
