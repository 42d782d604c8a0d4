"""Well-formed adapters of every form, drawn from an integer: the folder, what it means, and what a caller would say."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fuzz.cases import DTYPES, FUSED, SINGLE, Case
from fuzz.families import FAMILIES, PAIRS, orientation
from fuzz.oracle import PREFIX, Facts, Meaning, lookup, scaling
from fuzz.written import WRITERS, name_of, stacked

OTHER_LAYERS = "trunk.layers"  # what a renamed file calls them
AUTOMODEL = "automodel_peft_config.json"


@dataclass
class Adapter:
    """A file in the making, and what it means.

    Attributes:
        tensors: By their names in the file.
        config: adapter_config.json.
        model: The base model's config.json.
        facts: What the oracle needs to read it.
        meaning: What it does.
        said: Arguments for the package's functions.
        metadata: Of the safetensors file.
        rename: Parts of paths in the file -> what the model calls them.
        beside: Names of further files -> what is in them.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model: dict[str, Any]
    facts: Facts
    meaning: Meaning
    said: dict[str, Any]
    metadata: dict[str, str]
    rename: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)


class Making:
    """Makes the adapter of a case."""

    def __init__(self, case: Case) -> None:
        self.case, self.family = case, FAMILIES[case.family]
        self.rng = random.Random(case.seed + 1)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.tensors: dict[str, Tensor] = {}
        self.meaning = Meaning()
        self.first = 1 if "d" in case.beside else 0  # a dense layer comes first
        self.linears: list[str] = []
        self.parameters: list[str] = []
        self.config: dict[str, Any] = {}

    def roles(self) -> tuple[str, ...]:
        """Of the file's own form."""
        case, family = self.case, self.family
        together = ("fused", "unfolded", "single_gate_up", "stacked_gate_up", "native", "listed")
        whole = case.form in together or not family.gated
        if not case.only:
            return family.roles if whole else family.apart_roles
        return (case.only,) if whole or case.only == "down" else ("gate", "up")

    def places(self) -> Iterator[tuple[int, str, str]]:
        """(layer, role, the name that patterns are matched with, {} in it for an expert)."""
        case, family = self.case, self.family
        for layer in range(self.first, self.first + case.layers):
            for role in self.roles():
                name = name_of(case.family, case.form, case.way, role)
                if case.form in FUSED:
                    path, name = family.place(role, PAIRS[case.pair][1])
                    yield layer, role, f"{path.format(layer)}.{name}"
                elif case.form == "listed":
                    yield layer, role, f"{family.path.format(layer)}.{name}s.{{}}"
                elif case.form in SINGLE:
                    yield layer, role, f"{family.apart_path().format(layer)}.{{}}.{name}"
                elif case.form == "gguf":
                    yield layer, role, f"blk.{layer}.ffn_{role}_exps"
                else:
                    yield layer, role, f"{family.path.format(layer)}.{name}"

    def beside(self) -> dict[str, tuple[int, int]]:
        """Path of an ordinary module with LoRA -> (in, out)."""
        case, family = self.case, self.family
        found = {}
        for layer in range(self.first + case.layers):
            stem = family.path.format(layer).rpartition(".experts")[0]
            attention = f"{stem.rpartition('.')[0]}.self_attn"
            if "a" in case.beside:
                found |= {f"{attention}.{name}": (case.H, case.H) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            if layer < self.first:
                dense = re.sub(r"\.\w*moe\w*$", ".mlp", stem)  # a block called so has nothing but experts
                found |= {f"{dense}.{n}_proj": (case.H, case.I) for n in ("gate", "up")}
                continue
            if "r" in case.beside or "R" in case.beside:
                found[f"{stem}.{family.router}"] = (case.H, case.E)
            if "s" in case.beside and family.shared:
                found |= {f"{stem}.{family.shared}.{n}_proj": (case.H, case.I) for n in ("gate", "up")}
                found[f"{stem}.{family.shared}.down_proj"] = (case.I, case.H)
        return found

    def patterns(self) -> None:
        """Random tables, in every way in which people write patterns; what they reach is what `lookup` says."""
        keys = [name.format(0) for _, _, name in self.places()] + list(self.beside())
        singles = self.case.form in SINGLE
        ranks = (1, 2, 3) if self.case.form == "unfolded" else (1, 2, 3, 4)  # as in `draw`
        for table, values in (("rank_pattern", ranks), ("alpha_pattern", (1, 2, 5, 0.5, 8))):
            found: dict[str, Any] = {}
            for _ in range(self.rng.randint(0, self.case.patterns)):
                key = self.rng.choice(keys)
                if singles and self.rng.random() < 0.7:
                    key = key.replace(".0.", r"\.\d+\.") if "experts.0." in key else key
                last = key.rpartition(".")[2]
                ways = (
                    key,
                    last,
                    f"experts.{last}",
                    rf".*\.{last}",
                    f"({last}|other)",
                    f"x{last}",
                    f"^{key}",
                    f"{last}s?",
                )
                found[self.rng.choice(ways)] = self.rng.choice(values)
            self.config[table] = found

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DTYPES[self.case.dtype])

    def factors(self, role: str, rank: int, experts: int) -> tuple[Tensor, Tensor]:
        fan_in, fan_out = self.family.size(role, self.case.H, self.case.I)
        return self.random(experts, rank, fan_in), self.random(experts, fan_out, rank)

    def write(self, module: str, A: Tensor, B: Tensor) -> None:
        self.put(module, {"A": A, "B": B})

    def put(self, module: str, factors: Mapping[str, Tensor]) -> None:
        """One LoRA, or one side of it, under a module's name; NeMo's parameters begin the last part."""
        if self.case.prefix == "compiled":
            module = module.replace(".layers.", ".layers._orig_mod.", 1)
        start = "" if self.case.prefix == "bare" else PREFIX
        end = ".default.weight" if self.case.prefix == "named" else ".weight"
        own = module.rpartition(".")[2].startswith("lora_")
        for half, factor in factors.items():
            name = f"{module}_{half}" if own else f"{module}.lora_{half}{end}"
            self.tensors[start + name] = factor.contiguous()

    def keep(self, layer: int, role: str, update: Tensor, halves: bool = False) -> None:
        if role != "gate_up":
            self.meaning.experts[layer, role] = update
            return
        half = update.shape[1] // 2
        rows = self.family.halves(update.shape[1])
        if halves:
            rows = {"gate": slice(0, half), "up": slice(half, None)}
        for part, which in rows.items():
            self.meaning.experts[layer, part] = update[:, which]

    def make(self) -> Adapter:
        case, family = self.case, self.family
        pair = PAIRS[case.pair]
        own = orientation(*pair, family)
        turned = {"linear": "reversed", "reversed": "linear"}[own] if case.turned else own
        if case.mark == "experts":  # whoever is beside
            turned = "linear"
        nesting = tuple(role for role in family.roles if role in self.roles())
        if case.swapped:
            nesting = nesting[::-1]
        transposed = case.form in ("transposed", "native")
        facts = Facts(family, case.E, case.H, case.I, turned, case.packing, nesting, pair, transposed)
        facts = replace(facts, scaled=case.mark == "scaled")
        self.facts = facts
        self.config = {"r": case.r, "lora_alpha": case.alpha, "use_rslora": case.rslora}
        self.patterns()
        WRITERS.get(case.form, stacked)(self)
        if case.mark == "scaled":  # the experts' rank is r over the experts per token
            self.config["r"] *= 2
        self.others()
        said: dict[str, Any] = {}
        if case.told and case.form in FUSED:
            said = {"orientation": turned, "packing": case.packing} if case.form == "fused" else {}
            said["nesting"] = [family.place(role, pair[1])[1] for role in facts.nesting]
            if said["nesting"] == ["weight"] * len(said["nesting"]):
                del said["nesting"]
        elif case.form in FUSED:  # what neither the file nor its writer can tell
            if case.packing == "grouped" and not case.mark:
                said["packing"] = case.packing
            square = any(len(set(family.size(role, case.H, case.I))) == 1 for role in nesting)
            if case.turned and (square or not family.gated):
                said["orientation"] = turned
        model = family.config(case.E, case.H, case.I)
        if case.model:
            said["model"] = model
        adapter = Adapter(self.tensors, self.config, model, facts, self.meaning, said, {"format": "pt"})
        if case.mark in ("automodel", "scaled"):
            self.automodel(adapter)
        if case.renamed:
            self.rename(adapter)
        return adapter

    def automodel(self, adapter: Adapter) -> None:
        """NeMo's own file, and without what its config has not."""
        case, version = self.case, adapter.facts.pair[0]
        adapter.beside[AUTOMODEL] = {"moe_rank_scaling": case.mark == "scaled", "target_modules": ["*.experts"]}
        if case.form == "fused" and not (version < "0.19" and case.way):
            adapter.beside[AUTOMODEL]["paramwrapper_layout"] = "peft-0.18" if version < "0.19" else "peft-0.19.1"
        adapter.config.pop("peft_version", None)

    def rename(self, adapter: Adapter) -> None:
        """The layers under another name, in the tensors and wherever the config speaks of them."""
        old = self.family.path.partition(".{}")[0]

        def changed(value: Any) -> Any:
            if isinstance(value, str):
                return re.sub(rf"(^|[.(^]){re.escape(old)}(?=\\?\.)", rf"\g<1>{OTHER_LAYERS}", value)
            if isinstance(value, dict):
                return {changed(key): one for key, one in value.items()}
            return [changed(one) for one in value] if isinstance(value, list) else value

        adapter.tensors = {changed(name): tensor for name, tensor in adapter.tensors.items()}
        for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            adapter.config[name] = changed(adapter.config[name])
        adapter.rename = {OTHER_LAYERS: old}
        adapter.facts = replace(adapter.facts, rename=(OTHER_LAYERS, old))

    def others(self) -> None:
        """Everything that is no LoRA of experts, and the rest of the config."""
        case = self.case
        modules = set()
        for path, (fan_in, fan_out) in self.beside().items():
            bare = path.endswith(f".{self.family.router}")
            parameter = bare and "R" in case.beside
            key = f"{path}.weight" if parameter else path
            rank = lookup(self.config, "rank_pattern", "r", key)
            A, B = self.random(rank, fan_in), self.random(fan_out, rank)
            self.meaning.linears[path] = (B.double() @ A.double()) * scaling(self.config, key, rank)
            self.write(path, A, B)
            if parameter:
                self.parameters.append(f"{self.family.router}.weight")
            else:
                modules.add(path.rpartition(".")[2] if self.rng.random() < 0.7 else path)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "somebody/a-model",
            "bias": "none",
            "use_dora": False,
            "target_modules": sorted({*modules, *self.linears}),
            "target_parameters": sorted(set(self.parameters)) or None,
            "modules_to_save": None,
        }
        if "h" in case.beside:
            head = self.random(9, case.H)
            self.tensors[("" if case.prefix == "bare" else PREFIX) + "lm_head.weight"] = head
            self.meaning.rest[PREFIX + "lm_head.weight"] = head
            config["modules_to_save"] = ["lm_head"]
        if case.mark == "experts":
            config |= {"target_modules": sorted({*modules, "experts"}), "target_parameters": None}
        version = PAIRS[case.pair][0]
        if case.form in (*FUSED, "single", "listed") and case.mark != "experts" and not version.startswith("0.17"):
            config["peft_version"] = version
        if self.rng.random() < 0.3 and config["target_parameters"] and case.form == "fused":
            config["target_parameters"] = sorted({".".join(t.split(".")[-2:]) for t in config["target_parameters"]})
        word = {"rank_major": "rank_major", "grouped": "grouped_by_expert"}[case.packing]
        if case.mark == "top":
            config["lora_B_layout"] = word
        elif case.mark == "mapping":
            config["auto_mapping"] = {"lora_B_layout": word, "unsloth_fixed": True}
        self.config |= config


def make(case: Case) -> Adapter:
    """The adapter of a case, without its damages."""
    return Making(replace(case, damages=())).make()


def save(adapter: Adapter, folder: Path, shards: int = 1) -> None:
    """Writes it as its writer would."""
    folder.mkdir()
    adapter.tensors = {name: tensor.contiguous().clone() for name, tensor in adapter.tensors.items()}
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2))
    for name, content in adapter.beside.items():
        (folder / name).write_text(json.dumps(content))
    names = list(adapter.tensors)
    if shards == 1 or len(names) < shards:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(safetensors.torch.save(adapter.tensors, adapter.metadata))
        return
    weight_map = {}
    for index in range(shards):
        file = f"adapter_model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: adapter.tensors[name] for name in names[index::shards]}
        (folder / file).write_bytes(safetensors.torch.save(part, adapter.metadata))
        weight_map |= dict.fromkeys(part, file)
    listed = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "adapter_model.safetensors.index.json").write_text(listed)
