"""Reads what a kernel was assembled to, as `cuobjdump -sass` prints it."""

import re

__all__ = ["overwritten"]


def overwritten(assembly):
    """Instructions that write registers which a multiplication under way may still read, in a kernel for Hopper."""
    line = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9_.]+)\s*(.*?)\s*;")
    code = [match.groups() for match in map(line.match, assembly.splitlines()) if match]
    places = {int(address, 16): place for place, (address, _, _) in enumerate(code)}
    # (registers of a left operand, whether it ends a group) of one multiplication after another
    under_way, found = [], []

    def step(operation, operands):
        if operation.startswith("WARPGROUP.DEPBAR"):  # waits for all groups but so many
            ends = [place + 1 for place, (_, last) in enumerate(under_way) if last]
            left = int(operands.split(",")[1], 16)
            del under_way[: ends[-left - 1] if left < len(ends) else 0]
        register = re.match(r"R(\d+)", operands)
        if operation.startswith("HGMMA"):
            left = re.match(r"R(\d+)", operands.split(", ")[1])
            registers = range(int(left[1]), int(left[1]) + 4) if left else range(0)
            under_way.append((registers, operands.endswith("gsb0")))
        elif register and not operation.startswith(("ST", "RED")):
            wide = next((n for n, ends in ((4, (".128", ".4")), (2, (".64", ".2"))) if operation.endswith(ends)), 1)
            wide = 2 if "WIDE" in operation else wide
            written = {*range(int(register[1]), int(register[1]) + wide)}
            if any(written.intersection(registers) for registers, _ in under_way):
                found.append(f"{operation} {operands}")

    for place, (address, operation, operands) in enumerate(code):
        step(operation, operands)
        target = re.search(r"0x([0-9a-f]+)$", operands) if operation == "BRA" else None
        if target and int(target[1], 16) < int(address, 16):  # once more round a loop
            before = under_way.copy()
            for _, *again in code[places[int(target[1], 16)] : place]:
                step(*again)
            under_way[:] = before
    return found
