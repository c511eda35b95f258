"""What a compiled TPU program does, read from its text: cycles, and bytes that chips send each other.

The compiler's own summary (`cost_analysis`) counts the body of a loop once. Here it counts as often as the
loop runs; one whose number of rounds depends on data as often as the caller says, and within another such
loop once.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "s4": 0.5, "u4": 0.5, "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip


@dataclasses.dataclass
class Costs:
    """Of one run on one chip.

    Attributes:
      cycles: that the compiler expects of all fusions, one after the other.
      counts: collectives by kind.
      bytes: that they send, by kind.
    """

    cycles: float = 0.0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds what runs `times` times."""
        self.cycles += times * other.cycles
        for kind in other.counts:
            self.counts[kind] += times * other.counts[kind]
            self.bytes[kind] += times * other.bytes[kind]


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str


_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")


def analyse(text: str, rounds: int = 1) -> Costs:
    """The costs of a program.

    Args:
      text: the optimised HLO module, as `Compiled.as_text` gives it.
      rounds: of a loop that ends when data say so; one within such a loop runs once.
    """
    computations, entry = _parse(text)
    known: dict[tuple[str, int], Costs] = {}

    def of(name: str, rounds: int) -> Costs:
        if (name, rounds) not in known:
            known[name, rounds] = total = Costs()
            for instruction in computations[name].values():
                total.add(_own(computations[name], instruction))
                if instruction.opcode == "while":
                    body = _attribute(instruction, "body")
                    if times := _rounds(computations, name, instruction):
                        total.add(of(body, rounds), times)
                    else:
                        total.add(of(body, 1), rounds)
                elif instruction.opcode == "conditional":
                    branches = [of(b, rounds) for b in _branches(instruction)]
                    total.add(max(branches, key=lambda c: c.cycles))
                elif instruction.opcode in ("call", "async-start"):
                    total.add(of(_attribute(instruction, "(?:calls|to_apply)"), rounds))
                elif instruction.opcode == "fusion" and _starts(computations, instruction):
                    total.add(of(_attribute(instruction, "calls"), rounds))
        return known[name, rounds]

    return of(entry, rounds)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, here = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            name, shape, opcode, rest = found.groups()
            operands = re.findall(r"%([^\s,)]+)", rest.split("), ")[0])
            here[name] = _Instruction(name, shape, opcode, operands, rest)
    return computations, entry


def _own(computation: dict[str, _Instruction], instruction: _Instruction) -> Costs:
    costs = Costs()
    if found := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
        costs.cycles = float(found[1])
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        costs.counts[kind] = 1
        costs.bytes[kind] = _sent(kind, computation, instruction)
    return costs


def _starts(computations: dict[str, dict[str, _Instruction]], fusion: _Instruction) -> bool:
    """Whether a fusion begins a collective; what runs beside it and what ends it name the same one again."""
    inner = computations.get(_attribute(fusion, "calls"), {})
    return any('custom_call_target="AsyncCollectiveStart"' in i.rest for i in inner.values())


def _sent(kind: str, computation: dict[str, _Instruction], instruction: _Instruction) -> float:
    """Bytes that a chip sends of its operands, in a ring of the N chips of a group."""
    n = _group(instruction.rest)
    operands = [computation[name].shape for name in instruction.operands if name in computation]
    size = sum(_size(*shape) for operand in operands for shape in _shapes(operand))
    passed = {"collective-permute": 1.0, "all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return size * passed.get(kind, (n - 1) / n)


def _group(text: str) -> int:
    """Chips of a group: listed, as a shape, or as axes of a mesh."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", text)
    return 1 if not found else int(found[2]) if found[2] else found[1].count(",") + 1


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", text)


def _size(dtype: str, dimensions: str) -> float:
    size = _BYTES.get(dtype, 0)
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def _attribute(instruction: _Instruction, name: str) -> str:
    return re.findall(rf"{name}=%([^\s,}}]+)", instruction.rest)[0]


def _branches(instruction: _Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return re.findall(r"%([^\s,]+)", found[1])
    return [_attribute(instruction, f"{which}_computation") for which in ("true", "false")]


def _rounds(computations: dict[str, dict[str, _Instruction]], name: str, loop: _Instruction) -> int:
    """How often a loop runs that counts from a constant to a constant; else 0."""
    condition = computations[_attribute(loop, "condition")]
    body = computations[_attribute(loop, "body")]
    test = list(condition.values())[-1]
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return 0
    counter, end = (condition.get(operand) for operand in test.operands)
    last = _constant(end)
    if last is None or counter is None or counter.opcode != "get-tuple-element":
        return 0
    at = int(re.findall(r"index=(\d+)", counter.rest)[0])
    step = body[list(body.values())[-1].operands[at]]
    by = [c for o in step.operands if (c := _constant(body.get(o)))] if step.opcode == "add" else []
    start = computations[name].get(loop.operands[0])
    first = _constant(computations[name].get(start.operands[at])) if start and start.operands[at:] else 0
    return -(-(last - (first or 0)) // by[0]) if by else 0


def _constant(instruction: _Instruction | None) -> int | None:
    found = instruction and instruction.opcode == "constant" and re.match(r"(\d+)\)", instruction.rest)
    return int(found[1]) if found else None
