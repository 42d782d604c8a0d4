"""Damage to what an adapter's config, its stamp and its base's config say. See `damages` for what may come of it."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from typing import Any

from fuzz.cases import SINGLE, Case
from fuzz.made import Adapter
from fuzz.tensors import OnAdapter, experts

ON_CONFIGS: dict[str, OnAdapter] = {}


def _damage(function: OnAdapter) -> OnAdapter:
    ON_CONFIGS[function.__name__] = function
    return function


def _read(case: Case, field: str) -> str:
    """The file says it, unless it is a rank and no model tells the experts: 4 of rank 4 are 8 of rank 2 as well."""
    return "read" if case.model or field not in ("r", "rank_pattern") else "any"


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
        return _read(case, field) if plain else "same"
    if field == "target_parameters":
        return "read"
    # Without a word of the caller, version and marks are what tells orientation and packing.
    return "same" if case.told or field not in ("peft_version", "auto_mapping", "lora_B_layout") else "any"


@_damage
def field_missing(adapter: Adapter, case: Case, rng: random.Random) -> str:
    field = rng.choice(sorted(adapter.config))
    del adapter.config[field]
    if field in ("use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"):
        return _read(case, field)
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
    return _read(case, field)


def _keys(adapter: Adapter) -> list[str]:
    names = (re.sub(r"\.lora_[AB].*|\.base_layer|base_model\.model\.", "", name) for name in experts(adapter))
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
    return _read(case, table)


@_damage
def patterns_hostile(adapter: Adapter, case: Case, rng: random.Random) -> str:
    key = rng.choice(_keys(adapter))
    ways: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"(([a-z_.0-9]+)+)+x": 2},
        lambda: {"(.*)*(.*)*(.*)*!": 2},
        lambda: {"(" * 3000 + ")" * 3000: 2},
        # PEFT itself compiles each of them for every module that it wraps.
        lambda: {f"harmless.{i}": 2 for i in range(1_000 if case.also == "loading" else 20_000)},
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
    # Where experts may be missing, or share their factors, or have a rank that the config does not say, the number of
    # them is the caller's to say.
    counted = field == family.count and (case.form in (*SINGLE, "shared") or case.mark == "scaled")
    return "any" if field == "model_type" or counted else "same"


@_damage
def model_file(adapter: Adapter, case: Case, rng: random.Random) -> str:
    missing = os.fsdecode(b"/nowhere/\xff")
    adapter.said["model"] = rng.choice(
        ("/dev/null", "/", "", "a\0b", "x" * 5000, missing, "no/such/model/here", {}, {"a": {}})
    )
    return "same"
