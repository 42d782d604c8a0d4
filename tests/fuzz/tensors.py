"""Damage to the tensors of an adapter and to their names. See `damages` for what may come of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import torch

from fuzz.cases import FUSED, Case
from fuzz.made import Adapter

OnAdapter = Callable[[Adapter, Case, random.Random], str]
ON_TENSORS: dict[str, OnAdapter] = {}


def _damage(function: OnAdapter) -> OnAdapter:
    ON_TENSORS[function.__name__] = function
    return function


def experts(adapter: Adapter) -> list[str]:
    return [name for name in adapter.tensors if "lora_" in name and ("expert" in name or "blk" in name)]


def _one(adapter: Adapter, rng: random.Random) -> str:
    return rng.choice(experts(adapter) if rng.random() < 0.7 and experts(adapter) else list(adapter.tensors))


def _rename(adapter: Adapter, change: Callable[[str], str]) -> None:
    adapter.tensors = {change(name): tensor for name, tensor in adapter.tensors.items()}


_SEGMENTS = {
    "experts": ("expert", "experts_", "Experts", "moe_experts", "experts.experts", "éxperts", ""),
    "lora_A": ("lora_B", "lora_a", "lora_C", "lora_A.default", "lora_A.other", "lora_embedding_A", "lora_A.bias"),
    "lora_B": ("lora_A", "lora_B.bias", "lora_magnitude_vector", "lora_B.default"),
    "weight": ("bias", "weights", "", "weight.weight"),
    "base_layer": ("base_layer.base_layer", "base", ""),
    "gate_up_proj": ("gate_up", "up_gate_proj", "w13"),
    "gate_proj": ("w1", "up_proj", "gate"),
    "down_proj": ("w2", "down", "gate_up_proj"),
    "layers": ("layer", "h", "layers.0"),
    "base_model": ("base_model.model.base_model", "module.base_model", ""),
    "model": ("", "_orig_mod.model", "model._fsdp_wrapped_module"),
    "mlp": ("block_sparse_moe", "feed_forward", "mlp.mlp", "mixer"),
}


def _renamed(name: str, rng: random.Random) -> str:
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part in _SEGMENTS or part.isdigit()]
    if not places:
        return name  # it was changed before
    i = rng.choice(places)
    numbers = ("0", "1", "7", "03", "-1", "1e3", "999999999", "9" * 5000, "٣", "²", "1_0", " 1", "")
    parts[i] = rng.choice(numbers if parts[i].isdigit() else _SEGMENTS[parts[i]])
    return ".".join(part for part in parts if part)


@_damage
def name_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    new = _renamed(one, rng)
    if new in adapter.tensors:
        del adapter.tensors[new]
    _rename(adapter, lambda name: new if name == one else name)
    return "read"


@_damage
def all_names_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    part = rng.choice(("experts", "lora_A", "weight", "base_layer", "gate_proj", "down_proj", "mlp", "model"))
    to = rng.choice(_SEGMENTS[part])
    before = len(adapter.tensors)
    _rename(adapter, lambda name: ".".join(to if p == part else p for p in name.split(".")).replace("..", "."))
    # What is called moe_experts may be a module of experts or not; experts under another path are not renamed.
    told = to != "moe_experts" and not (part == "experts" and adapter.facts.family.apart_in)
    return "read" if len(adapter.tensors) == before and told else "any"


@_damage
def name_doubled(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    other = re.sub(r"(\.default)?\.weight$", ".other.weight", one)
    again = rng.choice((other, "_orig_mod." + one, one.replace("layers", "layers._orig_mod")))
    adapter.tensors[again] = adapter.tensors[one].clone()
    return "read"


@_damage
def tensor_missing(adapter: Adapter, case: Case, rng: random.Random) -> str:
    if len(adapter.tensors) > 1:
        del adapter.tensors[_one(adapter, rng)]
    return "read"


@_damage
def pair_missing(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    if len(adapter.tensors) <= 2:  # something is left to read, and to damage further
        return "read"
    for half in "AB":
        adapter.tensors.pop(re.sub(r"lora_[AB]", f"lora_{half}", one), None)
    return "any" if case.swapped else "read"  # which wrapper is left, PEFT tells by the order of the parameters


@_damage
def halves_exchanged(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    swap = {one: re.sub(r"lora_[AB]", lambda found: other[found[0]], one)}
    swap |= {b: a for a, b in swap.items()}
    _rename(adapter, lambda name: swap.get(name, name))
    return "read"


@_damage
def contents_exchanged(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one, other = _one(adapter, rng), _one(adapter, rng)
    adapter.tensors[one], adapter.tensors[other] = adapter.tensors[other], adapter.tensors[one].clone()
    # Between two wrappers: shapes may say then that they are nested the other way, which is a file too.
    return "any" if case.form in FUSED and not case.told else "read"


@_damage
def shape_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    tensor = adapter.tensors[one]
    if not tensor.ndim or not tensor.numel():
        return "read"  # it was changed before
    ways = (
        lambda: tensor.transpose(0, -1),
        lambda: tensor[:-1],
        lambda: tensor[..., :-1],
        lambda: torch.cat([tensor, tensor[:1]]),
        lambda: tensor[:0],
        lambda: tensor[..., :0],
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[None, None],
        lambda: tensor.flatten()[0],
        lambda: tensor.reshape(-1, *tensor.shape[:1]),
    )
    adapter.tensors[one] = rng.choice(ways)().contiguous().clone()
    return "read"


_TYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool, torch.complex64)


@_damage
def type_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one, dtype = _one(adapter, rng), rng.choice((*_TYPES, torch.float8_e4m3fn, torch.float8_e5m2))
    adapter.tensors[one] = adapter.tensors[one].to(dtype)
    return "any" if dtype.is_complex else "read"


@_damage
def all_types_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    dtype = rng.choice((torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2))
    adapter.tensors = {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()}
    return "read"


@_damage
def value_odd(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    tensor = adapter.tensors[one] = adapter.tensors[one].clone()
    if not tensor.is_floating_point() or not tensor.numel():
        return "read"  # it was changed before, or is of a projection that is not there
    if rng.random() < 0.5:
        tensor.view(-1)[0] = rng.choice((float("nan"), float("inf"), float("-inf")))
        return "read"
    if tensor.dtype.itemsize > 1:  # torch multiplies no float8
        tensor *= rng.choice((0, 1e30, 1e38, 1e-38, 1e-45, -1))
    return "read"
