"""What an adapter means, for a reader of its own that shares no code with the package: `reading` is the other half.

Sums are made in float64. Written from PEFT's `ParamWrapper` and `get_pattern_key`, and from what vLLM, SGLang and
llama.cpp document or do. It knows from the fuzzer what the package has to find out: family, sizes, orientation, packing
and nesting. Files that leave anything open are `Unreadable`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fuzz.families import Family

PREFIX = "base_model.model."
_SMALLEST = 1e-36


class UnreadableError(Exception):
    """The file means nothing in particular."""


@dataclass(frozen=True)
class Facts:
    """What the fuzzer knows of a file.

    Attributes:
        orientation, packing: Of fused factors.
        nesting: Roles of fused factors, innermost first.
        pair: (PEFT, transformers) whose names fused factors have.
        transposed: Whether 3-D factors are "E in r" and "E r out", where their shapes leave it open.
        scaled: Whether the experts' rank is another one than the config says, as that of the tensors.
        rename: (part of the paths in the file, what it is called here).
        targeted: Whether `target_parameters` says which of `nesting` are there, as it does to PEFT.
    """

    family: Family
    E: int
    H: int
    I: int
    orientation: str = "linear"
    packing: str = "rank_major"
    nesting: tuple[str, ...] = ()
    pair: tuple[str, str] = ("0.21.2", "5.23.0")
    transposed: bool = False
    scaled: bool = False
    rename: tuple[str, str] | None = None
    targeted: bool = False


def in_one_place(linears: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what is beside the experts of Mixtral's relatives where transformers 5 has it."""
    return {path.replace(".block_sparse_moe.", ".mlp."): update for path, update in linears.items()}


@dataclass
class Meaning:
    """What an adapter does: (layer, role) -> updates "E out in", of gate, up and down; path -> update of a linear;
    name -> tensor of all else. Experts or roles that are not there have no update, as those of zeros."""

    experts: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    linears: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)

    def difference(self, other: Meaning, tolerance: float) -> str | None:
        """The first thing in which the other one differs by more than the tolerance, relatively; None if nothing."""
        for what, ours, theirs in (
            ("experts", self.experts, other.experts),
            ("linear", in_one_place(self.linears), in_one_place(other.linears)),
            ("tensor", self.rest, other.rest),
        ):
            for key in [*ours, *(key for key in theirs if key not in ours)]:
                a, b = ours.get(key), theirs.get(key)
                a = torch.zeros_like(b) if a is None and what == "experts" else a
                b = torch.zeros_like(a) if b is None and what == "experts" else b
                if a is None or b is None:
                    return f"{what} {key}: only one of the two has it"
                if a.shape != b.shape:
                    return f"{what} {key}: {tuple(a.shape)} and {tuple(b.shape)}"
                if what == "tensor":
                    same = a.dtype == b.dtype and torch.equal(a, b)
                else:
                    finite = (one[one.isfinite()].abs() for one in (a, b))
                    largest = max((one.max().item() for one in finite if one.numel()), default=0.0)
                    # Below, float32 has less than its precision, and whoever folds into it loses some.
                    allowed = tolerance * largest + (_SMALLEST if tolerance > 1e-9 else 0)
                    same = bool(((a == b) | ((a - b).abs() <= allowed)).all())
                if not same:
                    return f"{what} {key}: different values"
        return None


def lookup(config: Mapping[str, Any], patterns: str, default: str, key: str) -> Any:
    """PEFT's `get_pattern_key`: the first pattern that matches the key's end."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return config[default]


def scaling(config: Mapping[str, Any], key: str, rank: int, rule: str = "config") -> float:
    """What the reader multiplies B A with."""
    if rule == "alpha":  # llama.cpp: 0 means no scaling at all
        return config["lora_alpha"] / rank if config["lora_alpha"] else 1.0
    if rule in ("uniform", "rslora"):
        rank = config["r"]
        return config["lora_alpha"] / (rank**0.5 if rule == "rslora" and config.get("use_rslora") else rank)
    alpha = lookup(config, "alpha_pattern", "lora_alpha", key)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a folder, shards together, by the safetensors package."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("adapter_model*.safetensors")):
        tensors |= safetensors.torch.load(file.read_bytes())
    return config, tensors


def metadata(folder: Path) -> dict[str, str]:
    """The safetensors metadata."""
    raw = (folder / "adapter_model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]).get("__metadata__", {})


def rebuild(A: Tensor, B: Tensor, E: int, orientation: str, packing: str) -> Tensor:
    """Updates "E out in" of a flat pair, one expert and one rank at a time."""
    rank = A.shape[0] // E
    A, B = A.double(), B.double()
    found = []
    for e in range(E):
        columns = [e + E * j if packing == "rank_major" else e * rank + j for j in range(rank)]
        product = B[:, columns] @ A[e * rank : (e + 1) * rank]
        found.append(product if orientation == "linear" else product.T)
    return torch.stack(found)
