"""A reader of adapter files that shares no code with the package: names by name, shapes by shape, sums in float64.

Written from PEFT's `ParamWrapper` and `get_pattern_key`, and from what vLLM, SGLang and llama.cpp document or do. It
knows from the fuzzer what the package has to find out: family, sizes, orientation, packing and nesting. Files that
leave anything open are `Unreadable`.
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
_LORA = re.compile(r"(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<half>[AB])\.weight", re.ASCII)
_SINGLE = re.compile(r"(?P<path>.*experts)\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<linear>\w+)", re.ASCII)
_GGUF = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)_exps", re.ASCII)
_WRAPPED = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_NAMES |= {"gate_up_proj": "gate_up"} | {role: role for role in ("gate_up", "gate", "up", "down")}


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
    targeted: bool = False


def _in_one_place(linears: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the routers of Mixtral's relatives where transformers 5 has them."""
    return {re.sub(r"\.block_sparse_moe\.gate$", ".mlp.gate", path): update for path, update in linears.items()}


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
            ("linear", _in_one_place(self.linears), _in_one_place(other.linears)),
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
                    largest = max(a.abs().max().item(), b.abs().max().item())
                    same = (a - b).abs().max().item() <= tolerance * largest
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
    if rule == "uniform":
        return config["lora_alpha"] / config["r"]
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


class Reading:
    """One file, read."""

    def __init__(self, folder: Path, facts: Facts, rule: str = "config") -> None:
        self.facts, self.rule = facts, rule
        try:
            self.config, self.tensors = load(folder)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UnreadableError(str(error)) from None
        self.meaning = Meaning()
        self.names: set[str] = set()  # what the file calls its experts modules and linears
        self.ranks: dict[str, int] = {}
        self.single: dict[tuple[int, str], dict[int, Tensor]] = {}
        pairs = self._pairs()
        fused = [(path, depth) for path, depth in pairs if self._fused(path, depth)]
        for (path, depth), pair in pairs.items():
            if len(pair) != 2:
                if "expert" in path.replace("shared_expert", "shared") or (path, depth) in fused or "blk" in path:
                    raise UnreadableError(f"half of {path}")
                self.meaning.rest |= {f"{PREFIX}{path}.lora_{half}.weight": tensor for half, tensor in pair.items()}
                continue
            if (path, depth) in fused:
                self._add_fused(path, depth, pair["A"], pair["B"])
            else:
                self._add(path, pair["A"], pair["B"])
        for path, depth in fused:
            if depth and (path, depth - 1) not in fused:
                raise UnreadableError(f"{path} lacks a level")
        for (layer, role), experts in self.single.items():
            shape = next(iter(experts.values())).shape
            if max(experts) >= facts.E or any(one.shape != shape for one in experts.values()):
                raise UnreadableError("experts that do not belong together")
            stack = torch.stack([experts.get(e, torch.zeros(shape, dtype=torch.float64)) for e in range(facts.E)])
            self._keep(layer, role, stack, halves=True)  # ms-swift's gate_up_proj has gate, then up, in every family

    def _pairs(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        pairs: dict[tuple[str, int], dict[str, Tensor]] = {}
        bare = not any(name.startswith(PREFIX) for name in self.tensors)
        for full, tensor in self.tensors.items():
            name = full if bare else full.removeprefix(PREFIX)
            name = re.sub(r"\.lora_([AB])(\.(?!bias)[^.]+)??(\.weight)?$", r".lora_\1.weight", _WRAPPED.sub("", name))
            found = _LORA.fullmatch(name)
            if found is None or (tensor.ndim not in (2, 3)):
                if "expert" in name and "lora" in name and "shared_expert" not in name:
                    raise UnreadableError(f"{name} is nothing known")
                self.meaning.rest[PREFIX + name] = tensor
                continue
            experts = "expert" in name.replace("shared_expert", "shared")
            if not (tensor.is_floating_point() or not experts) or not tensor.float().isfinite().all():
                raise UnreadableError(f"{name} has no numbers to count with")
            pair = pairs.setdefault((found["path"], found["depth"].count(".base_layer")), {})
            if found["half"] in pair:
                raise UnreadableError(f"two of {name}")
            pair[found["half"]] = tensor
        return pairs

    def _fused(self, path: str, depth: int) -> bool:
        return depth > 0 or path.endswith((".experts", ".input_linear", ".output_linear"))

    def _layer(self, path: str) -> int:
        found = re.search(r"(?:layers|blk)\.([0-9]+)\.", path)
        if found is None:
            raise UnreadableError(f"{path} is in no layer")
        return int(found[1])

    def _keep(self, layer: int, role: str, update: Tensor, halves: bool) -> None:
        facts = self.facts
        fan_in, fan_out = facts.family.size(role, facts.H, facts.I)
        if update.shape != (facts.E, fan_out, fan_in):
            raise UnreadableError(f"{role} of layer {layer} is {tuple(update.shape)}")
        parts = {role: update}
        if role == "gate_up":
            rows = facts.family.halves(fan_out)
            if halves:
                rows = {"gate": slice(0, fan_out // 2), "up": slice(fan_out // 2, None)}
            parts = {part: update[:, which] for part, which in rows.items()}
        for part, one in parts.items():
            if (layer, part) in self.meaning.experts:
                raise UnreadableError(f"two {part} in layer {layer}")
            self.meaning.experts[layer, part] = one

    def _add_fused(self, path: str, depth: int, A: Tensor, B: Tensor) -> None:
        facts, family = self.facts, self.facts.family
        layer = self._layer(path)
        places = {role: family.place(role, facts.pair[1]) for role in facts.nesting}
        here = [role for role in facts.nesting if places[role][0].rpartition(".")[2] == path.rpartition(".")[2]]
        if facts.targeted:
            targets = self.config.get("target_parameters") or ()
            here = [role for role in here if f"{path}.{places[role][1]}".endswith(tuple(targets))]
        if depth >= len(here):
            raise UnreadableError(f"{path} has LoRA on nothing known")
        role = here[len(here) - 1 - depth]  # the last is the outermost wrapper
        key = f"{path}.{places[role][1]}"
        rank = lookup(self.config, "rank_pattern", "r", key)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] != rank * facts.E:
            raise UnreadableError(f"{key}: {tuple(A.shape)}, {tuple(B.shape)} at rank {rank}")
        update = rebuild(A, B, facts.E, facts.orientation, facts.packing) * scaling(self.config, key, rank, self.rule)
        self.names.add(path)
        self.ranks[key] = rank
        self._keep(layer, role, update, halves=False)

    def _add(self, path: str, A: Tensor, B: Tensor) -> None:
        gguf, single = _GGUF.fullmatch(path), _SINGLE.fullmatch(path)
        module, _, last = path.rpartition(".")
        role = gguf[2] if gguf else _NAMES.get(last)
        if role in ("gate", "up") and not self.facts.family.gated:
            role = "up"
        if A.ndim == 3 or (role and module.endswith(".experts")):
            if role is None or not (gguf or module.endswith("experts")):
                raise UnreadableError(f"{path} is nothing known")
            self._add_stack(path, role, A, B)
        elif single:
            if A.shape[0] != B.shape[1] or not A.shape[0] or role is None:
                raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
            update = (B.double() @ A.double()) * scaling(self.config, path, A.shape[0], self.rule)
            self.names.add(f"{single['path']}.{single['linear']}")
            self.ranks[path] = A.shape[0]
            self.single.setdefault((self._layer(path), role), {})[int(single["expert"])] = update
        elif re.search(r"(^|\.)(\w*experts?)(\.|$)", path.replace("shared_expert", "shared")):
            raise UnreadableError(f"{path} is nothing known")
        else:
            self._add_linear(path, A, B)

    def _add_stack(self, path: str, role: str, A: Tensor, B: Tensor) -> None:
        facts = self.facts
        fan_in, fan_out = facts.family.size(role, facts.H, facts.I)
        if A.ndim == 2 and B.ndim == 2:
            A, B = A.expand(facts.E, -1, -1), B.expand(facts.E, -1, -1)
        if A.ndim == B.ndim == 3 and (
            A.shape[1:] != (B.shape[2], fan_in) or (facts.transposed and A.shape[1:] == (fan_in, B.shape[1]))
        ):
            A, B = A.transpose(1, 2), B.transpose(1, 2)
        fits = A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] == facts.E and A.shape[1] == B.shape[2]
        if not fits or not A.shape[1] or (A.shape[2], B.shape[1]) != (fan_in, fan_out):
            raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
        update = (B.double() @ A.double()) * scaling(self.config, path, A.shape[1], self.rule)
        self.names.add(path)
        self.ranks[path] = A.shape[1]
        self._keep(self._layer(path), role, update, halves=False)

    def _add_linear(self, path: str, A: Tensor, B: Tensor) -> None:
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
        key = path
        for target in self.config.get("target_parameters") or ():
            owner, _, parameter = target.rpartition(".")
            if owner and (path == owner or path.endswith(f".{owner}")):
                key = f"{path}.{parameter}"
        self.ranks[path] = A.shape[0]
        factor = scaling(self.config, key, A.shape[0], self.rule)
        self.meaning.linears[path] = (B.double() @ A.double()) * factor


def read(folder: Path, facts: Facts, rule: str = "config") -> Meaning:
    """What the adapter in a folder does.

    Raises:
        UnreadableError: Nothing in particular.
    """
    try:
        return Reading(folder, facts, rule).meaning
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from None
