"""Damage that knows the structure of an adapter, and what may come of it.

same     a refusal, or what the file meant before
read     a refusal, or what the oracle reads in the damaged file; where it reads nothing, a refusal
any      an answer or a refusal: what the file means now is not for the oracle to say
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuzz import files
from fuzz.cases import SINGLE, Case
from fuzz.made import Adapter
from fuzz.oracle import Meaning, UnreadableError
from fuzz.reading import read

_ORDER = ("same", "read", "any")


@dataclass(frozen=True)
class Expected:
    """What may come of a file: the verdict, and why."""

    verdict: str = "same"
    why: str = ""

    def then(self, other: str, why: str) -> Expected:
        """After one more damage."""
        return Expected(max(self.verdict, other, key=_ORDER.index), f"{self.why} {why}".strip())

    def meaning(self, adapter: Adapter, folder: Path) -> Meaning | str | None:
        """What a conversion has to mean; "refuse" where there is to be none, None for whatever it does."""
        if self.verdict == "any":
            return None
        if self.verdict == "same":
            return adapter.meaning
        try:
            return read(folder, adapter.facts)
        except UnreadableError as error:
            self.__dict__["why"] = f"{self.why} ({error})"
            return "refuse"


OnAdapter = Callable[[Adapter, Case, random.Random], str]
_ON_ADAPTERS: dict[str, OnAdapter] = {}


def _damage(function: OnAdapter) -> OnAdapter:
    _ON_ADAPTERS[function.__name__] = function
    return function


def _experts(adapter: Adapter) -> list[str]:
    return [name for name in adapter.tensors if "lora_" in name and ("expert" in name or "blk" in name)]


def _one(adapter: Adapter, rng: random.Random) -> str:
    return rng.choice(_experts(adapter) if rng.random() < 0.7 and _experts(adapter) else list(adapter.tensors))


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
    # What is called moe_experts may be a module of experts or not.
    return "read" if len(adapter.tensors) == before and to != "moe_experts" else "any"


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
    return "read"


@_damage
def shape_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    one = _one(adapter, rng)
    tensor = adapter.tensors[one]
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
    if rng.random() < 0.5:
        tensor.view(-1)[0] = rng.choice((float("nan"), float("inf"), float("-inf")))
        return "read"
    if tensor.dtype.itemsize > 1:  # torch multiplies no float8
        tensor *= rng.choice((0, 1e30, 1e38, 1e-38, 1e-45, -1))
    return "read"


_ODD: tuple[Any, ...] = (None, 1, -1, 0, 1.5, "x", "", [], [1], [""], {}, {"a": None}, True, 10**400, 1e400, [[]], "4")
_FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters", "target_modules", "use_dora"),
    *("peft_type", "bias", "modules_to_save", "auto_mapping", "peft_version", "init_lora_weights", "use_rslora"),
    *("base_model_name_or_path", "lora_B_layout", "layers_to_transform", "exclude_modules", "trainable_token_indices"),
)


@_damage
def field_odd(adapter: Adapter, case: Case, rng: random.Random) -> str:
    field, value = rng.choice(_FIELDS), rng.choice(_ODD)
    adapter.config[field] = value
    if field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        plain = value is None or type(value) in (int, float, dict, bool)
        return ("read" if case.model or field != "r" else "any") if plain else "same"
    if field == "target_parameters":
        return "read"
    # Without a word of the caller, version and marks are what tells orientation and packing.
    return "same" if case.told or field not in ("peft_version", "auto_mapping", "lora_B_layout") else "any"


@_damage
def field_missing(adapter: Adapter, case: Case, rng: random.Random) -> str:
    field = rng.choice(sorted(adapter.config))
    del adapter.config[field]
    if field in ("use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"):
        return "read"
    return "same" if case.told or field not in ("peft_version", "auto_mapping", "lora_B_layout") else "any"


@_damage
def number_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    numbers = {
        "r": (1, 2, 3, 8, 10**9),
        "lora_alpha": (-3, 0, 1, 7.25, 1e-3, 1e29, 1e-30, 1e-45, 1e-300, 1e300, 2**63),
        "use_rslora": (True, False),
    }
    field = rng.choice(list(numbers))
    adapter.config[field] = rng.choice(numbers[field])
    return "read" if case.model or field != "r" else "any"


def _keys(adapter: Adapter) -> list[str]:
    names = (re.sub(r"\.lora_[AB].*|\.base_layer|base_model\.model\.", "", name) for name in _experts(adapter))
    return list(dict.fromkeys(names)) or ["a"]


@_damage
def patterns_odd(adapter: Adapter, case: Case, rng: random.Random) -> str:
    key = rng.choice(_keys(adapter))
    last = key.rpartition(".")[2]
    ways = (
        key,
        last,
        f"{last}|other",
        f"(?i:{last.upper()})",
        ".*",
        "",
        "^",
        "$",
        f"{key}$",
        "(?=x)",
        "[a-z_.]+",
        last[:-1] + ".",
        "é",
    )
    table = rng.choice(("rank_pattern", "alpha_pattern"))
    there = adapter.config.get(table)
    added = {rng.choice(ways): rng.choice((1, 2, 3, 7))}
    adapter.config[table] = {**added, **there} if isinstance(there, dict) else added
    return "read" if case.model or table == "alpha_pattern" else "any"


@_damage
def patterns_hostile(adapter: Adapter, case: Case, rng: random.Random) -> str:
    key = rng.choice(_keys(adapter))
    ways: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"(([a-z_.0-9]+)+)+x": 2},
        lambda: {"(.*)*(.*)*(.*)*!": 2},
        lambda: {"(" * 3000 + ")" * 3000: 2},
        lambda: {f"harmless.{i}": 2 for i in range(20_000)},
        lambda: {f"h.*{i}": 2 for i in range(2_000)},
        lambda: {"x{0,60000}" * 20 + key: 2},
        lambda: {"[": 2},
        lambda: {"(?P<a>.)(?P=b)": 2},
        lambda: {"\\" * 7: 2},
        lambda: {"(?<=a+)b": 2},
        lambda: {"a{99999999999}": 2},
        lambda: {"." * 100_000: 2},
        lambda: {key: 10**400},
    )
    adapter.config[rng.choice(("rank_pattern", "alpha_pattern"))] = rng.choice(ways)()
    return "any"


@_damage
def targets_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    ways: tuple[Any, ...] = (
        *(["experts"], "all-linear", ".*", [], None, ["gate", "up_proj"], ["nothing"], "(((", ["down_proj"] * 3),
        *(["(.*)"], [f"q{i}" for i in range(5000)], "(([a-z.]+)+)+x", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    )
    field = rng.choice(("target_modules", "target_modules", "target_parameters", "exclude_modules"))
    adapter.config[field] = rng.choice(ways)
    return "same" if field != "target_parameters" else "read"


@_damage
def beside_lora(adapter: Adapter, case: Case, rng: random.Random) -> str:
    ways: tuple[dict[str, Any], ...] = (
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2]]},
        {"use_qalora": True},
        {"megatron_config": {}},
        {"lora_bias": True},
        {"peft_type": "LOHA"},
        {"inference_mode": "x", "revision": 7, "corda_config": []},
    )
    adapter.config |= rng.choice(ways)
    return "same"


@_damage
def version_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    versions = ("0.16.0", "0.18.0", "0.19.0", "0.21.2", "0.19.0.dev0@abc", "9.0", "x", "", "0.18.1.post1", "1" * 5000)
    adapter.config["peft_version"] = rng.choice(versions)
    return "same" if case.told else "any"


def _stamp(adapter: Adapter, case: Case) -> dict[str, Any]:
    """What the package says of such a file in its metadata."""
    facts = adapter.facts
    modules: dict[str, Any] = {}
    for layer in sorted({layer for layer, _ in adapter.meaning.experts}):
        for role in facts.nesting:
            path, name = facts.family.place(role, facts.pair[1])
            entry = modules.setdefault(
                path.format(layer),
                {"num_experts": facts.E, "nesting": [], "orientation": facts.orientation, "features": []},
            )
            entry["nesting"].append(name)
            entry["features"].append(list(facts.family.size(role, facts.H, facts.I)))
    return {"peft": facts.pair[0], "transformers": facts.pair[1], "packing": facts.packing, "modules": modules}


@_damage
def stamp_edited(adapter: Adapter, case: Case, rng: random.Random) -> str:
    stamp = _stamp(adapter, case)
    if not stamp["modules"]:
        return "same"
    module = rng.choice(list(stamp["modules"].values()))
    deep = "[" * 100_000 + "]" * 100_000
    ways: dict[str, Callable[[], object]] = {
        "right": lambda: None,
        "count": lambda: module.update(num_experts=rng.choice((case.E + 1, 0, -1, "4", None, 10**400, 4.5, [1]))),
        "features": lambda: module.update(
            features=rng.choice(([[1, 2]], [], None, [[case.I, case.H]] * 2, [["a", 1]]))
        ),
        "swapped features": lambda: module.update(features=[size[::-1] for size in module["features"]]),
        "joined": lambda: module.update(joined=rng.choice(([1, 1], [1, 3], [case.r, 0], [-1, 3], ["x", 1], 7, [1]))),
        "release": lambda: stamp.update(peft=rng.choice(("0.1", "x", 7, None, {}, "9" * 5000))),
        "missing": lambda: stamp.pop(rng.choice(list(stamp))),
        "module": lambda: stamp.update(modules={"other": module}),
        "odd": lambda: module.update({rng.choice(list(module)): rng.choice(_ODD)}),
        "odd top": lambda: stamp.update({rng.choice(list(stamp)): rng.choice(_ODD)}),
    }
    way = rng.choice(list(ways))
    ways[way]()
    text = json.dumps(stamp)
    if rng.random() < 0.2:
        text = rng.choice(
            (deep, text.replace("4", "Infinity"), text[:-1], "null", '"\\ud800"', "[]", '{"modules": {}}', "{" * 9)
        )
    adapter.metadata["peft_moe_compat"] = text
    return "same" if case.told else "any"


@_damage
def model_changed(adapter: Adapter, case: Case, rng: random.Random) -> str:
    if "model" not in adapter.said:
        return "same"
    family = adapter.facts.family
    sizes = dict(family.config(case.E, case.H, case.I))
    inner = sizes[family.nested] = dict(sizes[family.nested]) if family.nested else sizes
    if not family.nested:
        sizes.pop(None, None)
    field = rng.choice((family.count, "hidden_size", family.width, "model_type"))
    values: tuple[Any, ...] = (case.E + 1, case.H * 2, 1, 10**9, *_ODD, [case.E] * 3)
    if field == "model_type":
        values = ("qwen3_moe", "gpt_oss", "mixtral", "", None, 7, "nobody", "nemotron_h", "é", [])
    inner[field] = rng.choice(values)
    adapter.said["model"] = sizes
    # Where experts may be missing, or share their factors, the number of them is the caller's to say.
    counted = field == family.count and (case.form in SINGLE or case.form == "shared")
    return "any" if field == "model_type" or counted else "same"


@_damage
def model_file(adapter: Adapter, case: Case, rng: random.Random) -> str:
    missing = os.fsdecode(b"/nowhere/\xff")
    adapter.said["model"] = rng.choice(
        ("/dev/null", "/", "", "a\0b", "x" * 5000, missing, "no/such/model/here", {}, {"a": {}})
    )
    return "same"


class Damage:
    """One damage, on the way to the folder and in it."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.rng = random.Random(f"{case.seed} {name}")

    def before(self, adapter: Adapter) -> tuple[str, str]:
        """Changes what will be written; (verdict, what was done)."""
        if self.name not in _ON_ADAPTERS:
            return "same", ""
        return _ON_ADAPTERS[self.name](adapter, self.case, self.rng), self.name

    def after(self, folder: Path) -> tuple[str, str]:
        """Changes what was written."""
        if self.name not in files.ON_FOLDERS:
            return "same", ""
        return files.ON_FOLDERS[self.name](folder, self.rng), self.name


NAMES = (*_ON_ADAPTERS, *files.ON_FOLDERS)
