"""The experts' LoRA of a case, as each writer writes it; tests/fixtures/FORMS.md says which of them do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fuzz.families import FAMILIES
from fuzz.oracle import lookup, scaling

if TYPE_CHECKING:
    from fuzz.made import Making

OUTER = {"gate": "w1", "up": "w3", "down": "w2"}  # Tinker's; an up projection without a gate is w1
NATIVE = {"gate_up": "gate_and_up", "up": "gate_and_up", "down": "down"}  # NeMo Automodel's


def product(A: Tensor, B: Tensor) -> Tensor:
    """ "E out in" of "E r in" and "E out r", either of them perhaps a stack of one."""
    return B.double() @ A.double()


def fused(making: Making) -> None:
    """PEFT's flat pairs; or the same names with 3-D factors, experts first (twinkle) or last in B (for vLLM)."""
    case, family, facts = making.case, making.family, making.facts
    for layer, role, key in making.places():
        rank = lookup(making.config, "rank_pattern", "r", key)
        A, B = making.factors(role, rank, case.E)
        making.keep(layer, role, product(A, B) * scaling(making.config, key, rank))
        path = key.rpartition(".")[0]
        here = [one for one in facts.nesting if family.place(one, facts.pair[1])[0].format(layer) == path]
        depth = len(here) - 1 - here.index(role)
        if case.form == "unfolded":
            B = B.permute(1, 2, 0) if case.way else B
        else:
            rows, columns = (A, B) if facts.orientation == "linear" else (B.transpose(1, 2), A.transpose(1, 2))
            wide = columns.permute(1, 2, 0) if facts.packing == "rank_major" else columns.permute(1, 0, 2)
            A, B = rows.reshape(case.E * rank, -1), wide.reshape(wide.shape[0], -1)
        making.write(path + ".base_layer" * depth, A, B)
        making.parameters.append(key)


def single(making: Making) -> None:
    """A pair for each expert, whose outer side may be shared by all: then that is written once."""
    case = making.case
    outer = case.form == "outer_single"
    shared: dict[tuple[int, int, int], Tensor] = {}
    absent = set() if outer else set(making.rng.sample(range(case.E), min(case.missing, case.E - 1)))
    for layer, role, name in making.places():
        fan_in, fan_out = making.family.size(role, case.H, case.I)
        stack = torch.zeros(case.E, fan_out, fan_in, dtype=torch.float64)
        first = name.format(0)
        of_all = making.factors(role, lookup(making.config, "rank_pattern", "r", first), 1)
        if outer:
            once = {"B": of_all[1]} if role == "down" else {"A": of_all[0]}
            making.put(name.replace(".{}", ""), {half: one if case.way else one[0] for half, one in once.items()})
        for e in (e for e in range(case.E) if e not in absent):
            key = name.format(e)
            rank = of_all[0].shape[1] if outer else lookup(making.config, "rank_pattern", "r", key)
            A, B = (factor[0] for factor in making.factors(role, rank, 1))
            if outer:
                A, B = (A, of_all[1][0]) if role == "down" else (of_all[0][0], B)
            elif case.one_A and role in ("gate", "up"):
                A = shared.setdefault((layer, e, rank), A)
            stack[e] = product(A, B) * scaling(making.config, key, rank)
            making.put(key, {"A": A, "B": B} if not outer else {"A": A} if role == "down" else {"B": B})
        making.keep(layer, role, stack, halves=case.form != "listed")
        listed = [f"{role}_projs.{e}" for e in range(case.E)]
        making.linears += listed if case.form == "listed" else [name.rpartition(".")[2]]


def stacked(making: Making) -> None:
    """3-D factors, or one pair of matrices for all experts."""
    case = making.case
    of_gate: dict[tuple[int, int], Tensor] = {}
    for layer, role, key in making.places():
        rank = lookup(making.config, "rank_pattern", "r", key)
        A, B = making.factors(role, rank, 1 if case.form == "shared" else case.E)
        if case.form == "outer":
            A, B = (A, B[:1]) if role == "down" else (A[:1], B)
            if case.one_A and role in ("gate", "up"):
                A = of_gate.setdefault((layer, rank), A)
        update = product(A, B) * scaling(making.config, key, rank)
        making.keep(layer, role, update.expand(case.E, -1, -1))
        if case.form == "shared":
            A, B = A[0], B[0]
        elif case.form in ("transposed", "native"):
            A, B = A.transpose(1, 2), B.transpose(1, 2)
        if case.form == "native":
            making.put(f"{key.rpartition('.')[0]}.lora_{NATIVE[role]}", {"A": A, "B": B})
            continue
        making.write(key, A, B)
        making.linears.append(key.rpartition(".")[2])
        if case.form == "outer" and not making.family.gated and not case.way and role == "up":
            empty = torch.zeros(0)
            making.put(f"{key.rpartition('.')[0]}.w3", {"A": empty, "B": empty})  # of the projection that is not there


def name_of(family: str, form: str, way: int, role: str) -> str:
    """What a form calls a role."""
    row = FAMILIES[family]
    if form == "outer" and not way:
        return OUTER["gate"] if role == "up" and not row.gated else OUTER[role]
    if form in ("single", "single_gate_up"):
        return "gate_up_proj" if role == "gate_up" else row.linear(role)
    return f"{role}_proj"


WRITERS: dict[str, Callable[[Making], None]] = dict.fromkeys(("fused", "unfolded"), fused)
WRITERS |= dict.fromkeys(("single", "single_gate_up", "listed", "outer_single"), single)
