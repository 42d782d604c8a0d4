"""Well-formed adapters of every form, drawn from an integer: the folder, what it means, and what a caller would say."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fuzz.families import FAMILIES, PAIRS, orientation
from fuzz.oracle import PREFIX, Facts, Meaning, lookup, scaling

FORMS = ("fused", "single", "single_gate_up", "stacked", "stacked_gate_up", "transposed", "shared", "gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SIZES = ((8, 6), (8, 4), (8, 8), (6, 8), (12, 5), (5, 7))
TARGETS = ("peft==0.21.2,transformers==5.23.0", "per-expert", "vllm", "sglang", "llama.cpp")


@dataclass(frozen=True)
class Case:
    """One adapter and what is done to it, in plain values: what a failure prints, and what shrinking makes simpler.

    Attributes:
        seed: Of the numbers in it, and of what the damages choose.
        only: Fused role that alone is adapted, "" for all.
        pair: (PEFT, transformers) that wrote it, an index of `PAIRS`.
        turned: Whether it is in the orientation that this pair would not write.
        swapped: Whether the wrappers are nested the other way round.
        packing: Of fused factors; `mark` is Unsloth's word for it, and where it stands.
        patterns: How many patterns of ranks and alphas the config has.
        beside: Letters: attention, router, router as parameter, shared experts, dense layer, head saved whole.
        one_A: Whether gate and up share lora_A.
        missing: Experts without LoRA.
        prefix: How names begin and end: "peft", "bare", "named" (an adapter's name in them), "compiled".
        told: Whether the caller says all there is to say; else the file alone, with the model or without.
        damages: Names of `damages.DAMAGES`.
        to: The readers to convert for.
    """

    seed: int = 0
    family: str = "qwen3_moe"
    form: str = "fused"
    E: int = 4
    H: int = 8
    I: int = 6
    r: int = 2
    layers: int = 1
    dtype: str = "float32"
    alpha: float = 4
    rslora: bool = False
    only: str = ""
    pair: int = len(PAIRS) - 1
    turned: bool = False
    swapped: bool = False
    packing: str = "rank_major"
    mark: str = ""
    patterns: int = 0
    beside: str = ""
    one_A: bool = False
    missing: int = 0
    prefix: str = "peft"
    shards: int = 1
    told: bool = True
    model: bool = True
    damages: tuple[str, ...] = ()
    to: tuple[str, ...] = TARGETS

    def to_json(self) -> str:
        """What differs from the defaults."""
        there = asdict(self)
        return json.dumps({f.name: there[f.name] for f in fields(self) if there[f.name] != f.default})

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def draw(seed: int, damages: Sequence[str]) -> Case:
    """The case of an integer; `damages` are the names to choose from."""
    rng = random.Random(seed)
    family = FAMILIES[rng.choice(list(FAMILIES))]
    form = "fused" if rng.random() < 0.45 else rng.choice(FORMS)
    if not family.gated and form.endswith("gate_up"):
        form = "stacked"
    H, I = rng.choice(SIZES)
    pairs = [i for i, (_, beside) in enumerate(PAIRS) if form != "fused" or not family.single_experts(beside)]
    grouped = form == "fused" and rng.random() < 0.2
    told = rng.random() < 0.6
    counts = rng.choices((0, 1, 2), (40, 45, 15))[0]
    targets = [f"peft=={peft},transformers=={beside}" for peft, beside in PAIRS]
    return Case(
        seed=seed,
        family=family.model_type,
        form=form,
        E=rng.choice((2, 3, 4, 4, 8, 11)),  # one expert's LoRA is that of a matrix
        H=H,
        I=I,
        r=rng.choice((1, 2, 2, 3, 4)),
        layers=rng.choice((1, 1, 2, 3)),
        dtype=rng.choice(("float32", "float32", *DTYPES)),
        alpha=rng.choice((1, 2, 4, 16, 3.5, 0.1)),
        rslora=rng.random() < 0.3,
        only=rng.choice(("", "", "", *family.roles)) if form != "gguf" else "",
        pair=rng.choice(pairs),
        turned=form == "fused" and rng.random() < 0.2,
        swapped=form == "fused" and rng.random() < 0.2,
        packing="grouped" if grouped else "rank_major",
        mark=rng.choice(("top", "mapping")) if form == "fused" and rng.random() < (0.7 if grouped else 0.1) else "",
        patterns=rng.choice((0, 0, 0, 1, 2, 4)),
        beside="".join(letter for letter in "arRsdh" if rng.random() < (0.1 if letter == "h" else 0.25)),
        one_A=rng.random() < 0.3,
        missing=rng.choice((0, 0, 0, 1, 2)),
        prefix=rng.choice(("peft", "peft", "peft", "bare", "named", "compiled")),
        shards=rng.choice((1, 1, 1, 2)),
        told=told,
        model=told or rng.random() < 0.7,
        damages=tuple(rng.choice(damages) for _ in range(counts)) if damages else (),
        to=tuple(rng.sample([*TARGETS[1:], *targets], 2)),
    )


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
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model: dict[str, Any]
    facts: Facts
    meaning: Meaning
    said: dict[str, Any]
    metadata: dict[str, str]


class _Making:
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
        whole = case.form in ("fused", "single_gate_up", "stacked_gate_up") or not family.gated
        if not case.only:
            return family.roles if whole else family.apart_roles
        return (case.only,) if whole or case.only == "down" else ("gate", "up")

    def places(self) -> Iterator[tuple[int, str, str]]:
        """(layer, role, the name that patterns are matched with, {} in it for an expert)."""
        case, family = self.case, self.family
        for layer in range(self.first, self.first + case.layers):
            for role in self.roles():
                if case.form == "fused":
                    path, name = family.place(role, PAIRS[case.pair][1])
                    yield layer, role, f"{path.format(layer)}.{name}"
                elif case.form.startswith("single"):
                    name = "gate_up_proj" if role == "gate_up" else family.linear(role)
                    yield layer, role, f"{family.apart_path().format(layer)}.{{}}.{name}"
                elif case.form == "gguf":
                    yield layer, role, f"blk.{layer}.ffn_{role}_exps"
                else:
                    yield layer, role, f"{family.path.format(layer)}.{role}_proj"

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
                found |= {f"{stem}.{n}_proj": (case.H, case.I) for n in ("gate", "up")}
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
        singles = self.case.form.startswith("single")
        for table, values in (("rank_pattern", (1, 2, 3, 4)), ("alpha_pattern", (1, 2, 5, 0.5, 8))):
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
        if self.case.prefix == "compiled":
            module = module.replace(".layers.", ".layers._orig_mod.", 1)
        start = "" if self.case.prefix == "bare" else PREFIX
        end = ".default.weight" if self.case.prefix == "named" else ".weight"
        self.tensors |= {f"{start}{module}.lora_A{end}": A.contiguous(), f"{start}{module}.lora_B{end}": B.contiguous()}

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

    def fused(self, facts: Facts) -> None:
        E = self.case.E
        for layer, role, key in self.places():
            rank = lookup(self.config, "rank_pattern", "r", key)
            A, B = self.factors(role, rank, E)
            self.keep(layer, role, (B.double() @ A.double()) * scaling(self.config, key, rank))
            rows, columns = (A, B) if facts.orientation == "linear" else (B.transpose(1, 2), A.transpose(1, 2))
            order = "q r E" if facts.packing == "rank_major" else "q E r"
            wide = columns.permute(1, 2, 0) if order == "q r E" else columns.permute(1, 0, 2)
            path = key.rpartition(".")[0]
            here = [one for one in facts.nesting if self.family.place(one, facts.pair[1])[0].format(layer) == path]
            depth = len(here) - 1 - here.index(role)
            self.write(path + ".base_layer" * depth, rows.reshape(E * rank, -1), wide.reshape(wide.shape[0], -1))
            self.parameters.append(key)

    def single(self) -> None:
        case = self.case
        shared: dict[tuple[int, int, int], Tensor] = {}
        absent = set(self.rng.sample(range(case.E), min(case.missing, case.E - 1)))
        for layer, role, name in self.places():
            fan_in, fan_out = self.family.size(role, case.H, case.I)
            stack = torch.zeros(case.E, fan_out, fan_in, dtype=torch.float64)
            for e in (e for e in range(case.E) if e not in absent):
                key = name.format(e)
                rank = lookup(self.config, "rank_pattern", "r", key)
                A, B = (factor[0] for factor in self.factors(role, rank, 1))
                if case.one_A and role in ("gate", "up"):
                    A = shared.setdefault((layer, e, rank), A)
                stack[e] = (B.double() @ A.double()) * scaling(self.config, key, rank)
                self.write(key, A, B)
            self.keep(layer, role, stack, halves=True)
            self.linears.append(name.rpartition(".")[2])

    def stacked(self) -> None:
        case = self.case
        for layer, role, key in self.places():
            rank = lookup(self.config, "rank_pattern", "r", key)
            A, B = self.factors(role, rank, 1 if case.form == "shared" else case.E)
            update = (B.double() @ A.double()) * scaling(self.config, key, rank)
            self.keep(layer, role, update.expand(case.E, -1, -1))
            if case.form == "shared":
                A, B = A[0], B[0]
            elif case.form == "transposed":
                A, B = A.transpose(1, 2), B.transpose(1, 2)
            self.write(key, A, B)
            self.linears.append(key.rpartition(".")[2])

    def make(self) -> Adapter:
        case, family = self.case, self.family
        pair = PAIRS[case.pair]
        own = orientation(*pair, family)
        turned = {"linear": "reversed", "reversed": "linear"}[own] if case.turned else own
        nesting = tuple(role for role in family.roles if role in self.roles())
        if case.swapped:
            nesting = nesting[::-1]
        transposed = case.form == "transposed"
        facts = Facts(family, case.E, case.H, case.I, turned, case.packing, nesting, pair, transposed)
        self.config = {"r": case.r, "lora_alpha": case.alpha, "use_rslora": case.rslora}
        self.patterns()
        if case.form == "fused":
            self.fused(facts)
        elif case.form.startswith("single"):
            self.single()
        else:
            self.stacked()
        self.others()
        said: dict[str, Any] = {}
        if case.told and case.form == "fused":
            said = {"orientation": turned, "packing": case.packing}
            said["nesting"] = [family.place(role, pair[1])[1] for role in facts.nesting]
            if said["nesting"] == ["weight"] * len(said["nesting"]):
                del said["nesting"]
        elif case.form == "fused":  # what neither the file nor its writer can tell
            if case.packing == "grouped" and not case.mark:
                said["packing"] = case.packing
            square = any(len(set(family.size(role, case.H, case.I))) == 1 for role in nesting)
            if case.turned and (square or not family.gated):
                said["orientation"] = turned
        model = family.config(case.E, case.H, case.I)
        if case.model:
            said["model"] = model
        return Adapter(self.tensors, self.config, model, facts, self.meaning, said, {"format": "pt"})

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
        version = PAIRS[case.pair][0]
        if case.form in ("fused", "single") and not version.startswith("0.17"):
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
    return _Making(replace(case, damages=())).make()


def save(adapter: Adapter, folder: Path, shards: int = 1) -> None:
    """Writes it as its writer would."""
    folder.mkdir()
    adapter.tensors = {name: tensor.contiguous().clone() for name, tensor in adapter.tensors.items()}
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2))
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
