"""What a compiled module says of itself: its collectives and its memory traffic, with loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and layers are a loop here. So the text of the optimized module is read: every
instruction of the entry computation and of loop bodies, times the trip counts in the loops' conditions. Bytes are those of one chip.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Instructions that move nothing: names for what others made.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
SCATTERS = "all-reduce-scatter"  # the TPU compiler's fused reduce-scatter: a computation of this name with an all-reduce in it


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    size: int  # bytes
    in_hbm: bool  # False: in a memory of the core, as the compiler has placed it


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # attributes, and the literal of a constant

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def hbm(self) -> int:
        return sum(array.size for array in self.arrays if array.in_hbm)

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.text)
        return match[1] if match else None


Computation = Mapping[str, Instruction]  # by name, in order; the last is the root


@dataclasses.dataclass
class Traffic:
    """What one chip moves in one run of the module."""

    counts: Counter = dataclasses.field(default_factory=Counter)  # collectives by kind
    bytes: Counter = dataclasses.field(default_factory=Counter)  # … and what a chip receives by them
    hbm: int = 0  # bytes read from and written to its memory


def traffic(text: str, endless: int = 1) -> Traffic:
    """The traffic of an optimized module. Loops that end by what they compute (decoding) are taken to run `endless` times."""
    computations, entry = parse(text)
    found = Traffic()
    for times, instruction, computation in _executed(computations, entry, 1, endless):
        found.hbm += times * _moved(instruction, computation, computations)
        for kind, size in _collectives(instruction, computations):
            found.counts[kind] += times
            found.bytes[kind] += times * size
    return found


# -- walking ----------------------------------------------------------------------------------------------------------------------------


def _executed(computations, name: str, times: int, endless: int) -> Iterator[tuple[int, Instruction, Computation]]:
    """(how often, instruction, its computation) for all that runs, fusions and asynchronous parts left whole."""
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            trips = trip_count(instruction, computations[instruction.called("condition")]) or endless
            yield from _executed(computations, instruction.called("body"), times * trips, endless)
        elif instruction.opcode == "call":
            yield from _executed(computations, instruction.called("to_apply"), times, endless)
        elif instruction.opcode == "conditional":  # one branch runs; the first is taken for all
            branch = instruction.called("true_computation") or re.search(r"branch_computations=\{%?([\w.-]+)", instruction.text)[1]
            yield from _executed(computations, branch, times, endless)
        else:
            yield times, instruction, computations[name]


def trip_count(loop: Instruction, condition: Computation) -> int | None:
    """Trips of a counted loop, as the compiler notes it or from its condition (`counter < constant`, from 0); None of another one."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    root = next(reversed(condition.values()))
    limits = [condition[name] for name in root.operands if name in condition and condition[name].opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.text or len(limits) != 1:
        return None
    return int(re.match(r"-?\d+", limits[0].text)[0])


def _collectives(instruction: Instruction, computations) -> Iterator[tuple[str, float]]:
    """(kind, bytes that a chip receives) of the collectives that an instruction is, or holds."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield kind, _received(kind, instruction)
    held = instruction.called("calls")
    if held in computations and not instruction.opcode.endswith(("-done", "-update")):
        for inner in computations[held].values():
            for kind, size in _collectives(inner, computations):
                scatters = kind == "all-reduce" and held.startswith(SCATTERS)
                yield ("reduce-scatter", size / 2) if scatters else (kind, size)


def _received(kind: str, instruction: Instruction) -> float:
    """Bytes into one chip, by the best algorithm on a ring of the group's n members."""
    n = group_size(instruction.text)
    # An asynchronous start gives its operands, its results, and flags.
    count = len(instruction.operands)
    asynchronous = instruction.opcode.endswith("-start") and len(instruction.arrays) >= 2 * count
    size = sum(array.size for array in (instruction.arrays[count : 2 * count] if asynchronous else instruction.arrays))
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return size * share.get(kind, (n - 1) / n)


def group_size(text: str) -> int:
    """Members of a group, in any of the three ways in which HLO writes `replica_groups`; 2 where there are none (a permutation)."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2


def _moved(instruction: Instruction, computation: Computation, computations) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode == "dynamic-slice":
        return 2 * instruction.hbm
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm
    if instruction.opcode.endswith("-start"):  # the result holds the operands too
        return instruction.hbm
    body = computations.get(instruction.called("calls")) if instruction.opcode == "fusion" else None
    if body is None:
        return instruction.hbm + sum(operand.hbm for operand in operands)
    return _written(instruction, body) + sum(
        min(operand.hbm, _read_of(i, body, computations)) for i, operand in enumerate(operands) if operand.hbm
    )


def _read_of(number: int, body: Computation, computations) -> float:
    """Bytes of a fusion's operand that its body reads: slices where it only slices, nothing where it only writes a slice into it."""
    names = {i.name for i in body.values() if i.opcode == "parameter" and i.text == str(number)}
    total = 0
    for user in body.values():  # in order: users come after what they use
        used = [at for at, operand in enumerate(user.operands) if operand in names]
        if not used:
            continue
        if user.opcode == "bitcast":
            names.add(user.name)
        elif user.opcode in ("dynamic-slice", "gather", "slice"):
            total += user.size
        elif user.opcode == "fusion":
            total += sum(_read_of(at, computations[user.called("calls")], computations) for at in used)
        elif user.opcode != "dynamic-update-slice" or used != [0]:
            return math.inf
    return total


def _written(fusion: Instruction, body: Computation) -> int:
    """Bytes that a fusion writes: of a result that is another array with a slice replaced, the slice."""
    root = next(reversed(body.values()))
    while root.opcode == "bitcast" and root.operands[0] in body:
        root = body[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and fusion.hbm:
        return body[root.operands[1]].size
    return fusion.hbm


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the entry) of an HLO module's text."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
        elif re.match(r"\}(,|$)", line):  # a kernel's attributes go over lines that begin with "}}"
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
    if not match:
        return None
    kind, rest = _until_balanced(line[match.end() :])
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = _until_balanced("(" + rest)
    literal = inside[1:-1] if opcode in ("parameter", "constant") else ""
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(match[1], opcode, _arrays(kind), operands, literal or attributes)


def _until_balanced(text: str) -> tuple[str, str]:
    """(a type or a parenthesis, what follows)."""
    depth = 0
    for at, letter in enumerate(text):
        depth += letter in "({["
        depth -= letter in ")}]"
        if depth == 0 and (letter == " " or (letter == ")" and text[0] == "(")):
            return text[: at + 1].strip(), text[at + 1 :]
    return text, ""


def _arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type, say ``(f32[8,2]{1,0:T(8,128)S(1)}, s32[])``; S(1) and up are memories of the core."""
    found = []
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?", kind):
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
        count = math.prod(int(size.strip("<= ")) for size in sizes.split(",")) if sizes else 1
        found.append(Array(count * bits // 8, not re.search(r"S\([1-9]", layout)))
    return tuple(found)
