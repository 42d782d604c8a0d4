"""The assembly that reads a table from registers, run instruction by instruction: the interpreter of triton cannot."""

from __future__ import annotations

import re
import struct

import pytest

pytest.importorskip("triton", reason="triton is on no CPU-only install but the tox environment `kernels`")

from peft_moe_compat.forward.kernels import permute

TABLE = [struct.unpack("<f", struct.pack("<f", (n - 7) * 0.37 + n**5))[0] for n in range(16)]


def prmt(a: int, b: int, selector: int) -> int:
    """As PTX defines it, in its default mode: three bits of a selector pick a byte, the fourth spreads its sign."""
    source = (b << 32 | a).to_bytes(8, "little")
    picked = [selector >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes(source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in picked), "little")


OPERATIONS = {
    "prmt": prmt,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shr": lambda a, n: a >> n,
}


def run(packed: int) -> list[int]:
    """Eight results of four bytes."""
    bits = [struct.unpack("<I", struct.pack("<f", number))[0] for number in TABLE]
    words = [sum((bits[4 * w + j] >> 8 * p & 255) << 8 * j for j in range(4)) for p in range(4) for w in range(4)]
    registers = {"$8": packed} | {f"${9 + i}": words[i // 4] for i in range(64)}

    def value(operand: str) -> int:
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    for line in re.findall(r"^(\w+)\.\w+ (\S+), (.*);$", permute.ASSEMBLY.value, re.M):
        name, to, operands = line
        registers[to] = OPERATIONS[name](*map(value, operands.split(", ")))
    return [registers[f"${i}"] for i in range(8)]


def test_every_byte_becomes_its_two_numbers_at_every_place():
    for first in range(256):
        four = [first, (first * 7 + 3) % 256, 255 - first, first ^ 0x5A]
        found = run(int.from_bytes(bytes(four), "little"))
        numbers = struct.unpack("<8f", struct.pack("<8I", *found))
        assert list(numbers[:4]) == [TABLE[byte >> 4] for byte in four]
        assert list(numbers[4:]) == [TABLE[byte & 15] for byte in four]
