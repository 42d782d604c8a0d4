"""A table of 16 floats read from registers: bytes of its entries are picked by `prmt`, eight numbers at a time.

Loads of its entries, one for each number, bound the kernels of few rows; this takes six instructions a number, more
than a kernel can hide that decodes whole stacks and multiplies nothing. triton's interpreter loads from the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED

__all__ = ["ASSEMBLY", "in_registers", "looked_up"]


def _assembly() -> str:
    """PTX: four bytes in $8 become the floats of their high halves in $0 to $3 and of their low halves in $4 to $7.

    Byte p of entry 4 w + j is byte j of word 4 p + w, operand $(9 + 4 (4 p + w)): each operand stands for four numbers.
    A selector's halves pick among the eight entries below or above, by three bits of a code; the fourth then picks one.
    """
    lines = [".reg .b32 code, pick, side, below, above, byte<4>, pair<4>;"]
    for half in range(2):
        lines += [
            f"shr.u32 code, $8, {16 * half};",
            "and.b32 pick, code, 0x7777;",
            "and.b32 side, code, 0x8888;",
            "shr.u32 side, side, 1;",
            "or.b32 side, side, 0x3210;",
        ]
        for p in range(4):
            words = [f"${9 + 4 * (4 * p + w)}" for w in range(4)]
            lines += [
                f"prmt.b32 below, {words[0]}, {words[1]}, pick;",
                f"prmt.b32 above, {words[2]}, {words[3]}, pick;",
                f"prmt.b32 byte{p}, below, above, side;",
            ]
        # From bytes of four numbers to numbers of four bytes.
        for pair, (first, second, order) in enumerate(
            [("byte0", "byte1", "0x5140"), ("byte2", "byte3", "0x5140"), ("byte0", "byte1", "0x7362"),
             ("byte2", "byte3", "0x7362")]
        ):  # fmt: skip
            lines.append(f"prmt.b32 pair{pair}, {first}, {second}, {order};")
        for i in range(2):
            low, high, pairs = 4 + 2 * half + i, 2 * half + i, f"pair{2 * i}, pair{2 * i + 1}"
            lines += [f"prmt.b32 ${low}, {pairs}, 0x5410;", f"prmt.b32 ${high}, {pairs}, 0x7632;"]
    return "{\n" + "\n".join(lines) + "\n}"


ASSEMBLY = tl.constexpr(_assembly())
_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * (1 + 4 * 16)))


@triton.jit
def _bits(table, first):
    return (
        tl.load(table + first).to(tl.int32, bitcast=True),
        tl.load(table + first + 1).to(tl.int32, bitcast=True),
        tl.load(table + first + 2).to(tl.int32, bitcast=True),
        tl.load(table + first + 3).to(tl.int32, bitcast=True),
    )


@triton.jit
def _word(entries, p: tl.constexpr):
    """Byte p of four entries."""
    a, b, c, d = entries
    shift: tl.constexpr = 8 * p
    return (
        ((a >> shift) & 255) | (((b >> shift) & 255) << 8) | (((c >> shift) & 255) << 16) | (((d >> shift) & 255) << 24)
    )


@triton.jit
def in_registers(table, CODEC: tl.constexpr):
    """What `looked_up` takes, made once by a program: 16 words, or the table as it is where none is read so."""
    found = table
    if CODEC[0] == 0 and not CODEC[4] and not INTERPRETED:
        a, b, c, d = _bits(table, 0), _bits(table, 4), _bits(table, 8), _bits(table, 12)
        found = (
            _word(a, 0), _word(b, 0), _word(c, 0), _word(d, 0),
            _word(a, 1), _word(b, 1), _word(c, 1), _word(d, 1),
            _word(a, 2), _word(b, 2), _word(c, 2), _word(d, 2),
            _word(a, 3), _word(b, 3), _word(c, 3), _word(d, 3),
        )  # fmt: skip
    return found


@triton.jit
def looked_up(byte, table):
    """(numbers of the high halves of bytes, numbers of the low halves), float32; from a table in registers or not."""
    if isinstance(table, tl.tuple):
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, _OPERANDS,
            [byte, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7], table[8], table[9],
             table[10], table[11], table[12], table[13], table[14], table[15]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        high, low = tl.load(table + (byte >> 4).to(tl.int32)), tl.load(table + (byte & 15).to(tl.int32))
    return high, low
