"""Whether what upstream has put into the model is what the file holds; it can lose tensors and scale them wrongly.

Updates are compared by what they do to one vector, expert by expert; what is not finite counts as a number, so that
NaN, which differs from nothing by more than a bound, hides nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.parts import Part, expert_parts
from ..adapters.source import AdapterSource
from ..errors import LayoutError
from ..layout import ExpertLora, relative
from ..model.experts import stored_transposed
from ..model.probe import installed_rule
from ..model.sharding import local_experts
from ..model.wrappers import is_dtensor, read_adapter
from .matching import UnderstoodFile, chains, counterparts, facts_of, known_of_this_pair

__all__ = ["check_fused", "check_per_expert"]

# For the rounding of factors held in low precision, and no more.
_TOLERANCE = 0.05


def check_fused(file: UnderstoodFile, model: Any, adapter_name: str) -> None:
    """Whether a fused adapter has arrived; its scaling is the caller's to choose.

    Raises:
        LayoutError: It has not.
    """
    around = chains(model)
    for module in file.source.modules:
        held = _held(around.get(file.paths[module.path], []), adapter_name)
        for part in expert_parts(module, file.decision):
            lora, share = held.get(part.name, _NOTHING)
            if lora is not None and _elsewhere(lora):
                continue
            with file.source.tensors.reading(part.reads) as tensors:
                expected = _applied(replace(part.load(tensors), scaling=1.0))
            if _distance(lora and replace(lora, scaling=1.0), expected[share]) > _TOLERANCE:
                raise LayoutError(
                    f"The LoRA on {module.path}.{part.name} in {file.source.folder} did not reach the model: upstream "
                    f"lost it, or gave it another name.{known_of_this_pair('load_adapter_swaps', 'load_adapter_fails')}"
                )


def check_per_expert(source: AdapterSource, model: Any, adapter_name: str) -> None:
    """Whether per-expert LoRA in an adapter was turned into what it holds, where the model has its experts fused.

    Raises:
        LayoutError: It was not.
    """
    if source.form != "per_expert":
        return
    facts, around = facts_of(model), chains(model)
    paths = counterparts((facts.fused_path(module.path) for module in source.modules), facts)
    for module in source.modules:
        path = paths.get(facts.fused_path(module.path))
        if path is None:
            continue
        held = _held(around.get(path, []), adapter_name)
        for role, parameter in facts.parameters.items():
            E, _, fan_out = facts.stacks.get((path, parameter), (0, 0, 0))
            branches = ("gate", "up") if role == "gate_up" else (role,)
            parts = {p.role: p for p in expert_parts(module, None, (E, max(facts.expert_counts)))} if E else {}
            lora, share = held.get(parameter, _NOTHING)
            if not parts.keys() & set(branches) or (lora is not None and _elsewhere(lora)):
                continue
            rows = [_rows(source, parts.get(branch), (E, fan_out // len(branches))) for branch in branches]
            expected = torch.stack(rows, dim=2).flatten(1) if facts.interleaved else torch.cat(rows, dim=1)
            distance = _distance(lora, expected[share])
            if distance > _TOLERANCE:
                raise LayoutError(
                    f"The file has LoRA on every expert by itself; what upstream made of it for {path}.{parameter} is "
                    f"{distance:.0%} off. Convert the file instead: `peft-moe-compat convert {source.folder} OUT --to "
                    "peft --model BASE`."
                )


# Of a parameter that no wrapper of the adapter is on: no LoRA, to be held against that of all experts.
_NOTHING: tuple[ExpertLora | None, slice] = None, slice(None)


def _held(chain: list[Any], adapter_name: str) -> dict[str, tuple[ExpertLora | None, slice]]:
    """Parameter -> the adapter's LoRA in a chain of live wrappers, and which of the experts it is for.

    Expert parallelism gives other experts to other ranks.
    """
    found: dict[str, tuple[ExpertLora | None, slice]] = {}
    for w in chain:
        if adapter_name in w.lora_A:
            experts, name = w.get_base_layer(), w.parameter_name
            share = local_experts(experts, name)
            lora = read_adapter(w, adapter_name, stored_transposed(experts, name), installed_rule(), share)
            found[name] = lora.canonical(), slice(*share or (None,))
    return found


def _elsewhere(lora: ExpertLora) -> bool:
    """Whether the values are not to be had in this process alone: offloaded, or partitioned or sharded over several."""
    return any(t.is_meta or t.numel() == 0 or is_dtensor(t) for t in (lora.A, lora.B))


def _rows(source: AdapterSource, part: Part | None, shape: tuple[int, int]) -> Tensor:
    if part is None:
        return torch.zeros(shape, dtype=torch.float64)
    with source.tensors.reading(part.reads) as tensors:
        return _applied(part.load(tensors))


def _applied(lora: ExpertLora) -> Tensor:
    """ "E out": what every expert's update makes of one fixed vector."""
    A, B = (f.detach().cpu().double().nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0) for f in (lora.A, lora.B))
    x = torch.linspace(-1, 1, A.shape[2], dtype=torch.float64).cos()
    return (B @ (A @ x).unsqueeze(2)).squeeze(2) * lora.scaling


def _distance(lora: ExpertLora | None, expected: Tensor) -> float:
    """From what should have arrived to what has, None for nothing; relative."""
    found = torch.zeros_like(expected) if lora is None else _applied(lora)
    if found.shape != expected.shape:
        return float("inf")
    return relative(float((found - expected).norm()), float(expected.norm()))
