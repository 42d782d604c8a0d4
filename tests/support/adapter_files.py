"""Tiny adapters whose factors are known, and a reader of adapter files: plain torch, none of the code under test.

Factors go by (layer, role): A "E r in" and B "E out r", roles `gate_up`, `gate`, `up` and `down`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

PREFIX = "base_model.model."
ROLES = {
    "gate_up_proj": "gate_up",
    "input_linear.weight": "gate_up",
    "fc1.weight": "gate_up",
    "up_proj": "up",
    "w3": "up",
    "ffn_up_exps": "up",
    "gate_proj": "gate",
    "w1": "gate",
    "ffn_gate_exps": "gate",
    "down_proj": "down",
    "w2": "down",
    "ffn_down_exps": "down",
    "output_linear.weight": "down",
    "fc2.weight": "down",
}
_LORA = re.compile(
    r"(?P<path>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<factor>[AB])(?:\.weight)?$",
)
LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")

Key = tuple[int, str]
Factors = dict[Key, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """What a model type means for its adapters: names, and the order of gate and up in gate_up_proj."""

    model_type: str
    counts: str = "num_experts"
    intermediate: str = "moe_intermediate_size"
    gated: bool = True
    interleaved: bool = False
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: str = "model.layers.{}.mlp.experts"
    apart: str = "model.layers.{}.mlp.experts"

    def config(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        """config.json of such a model."""
        sizes = {self.counts: num_experts, "hidden_size": hidden, self.intermediate: intermediate}
        return {"model_type": self.model_type, **sizes}

    @property
    def parameters(self) -> tuple[str, str]:
        """Of the fused experts, in the order in which PEFT nests them."""
        return ("gate_up_proj" if self.gated else "up_proj", "down_proj")

    def linear(self, role: str) -> str:
        return dict(zip(("gate", "up", "down"), self.linears, strict=True))[role]

    def rows(self, out_features: int) -> dict[str, slice]:
        """Of gate and up in gate_up_proj."""
        half = out_features // 2
        if self.interleaved:
            return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        return {"gate": slice(0, half), "up": slice(half, None)}


QWEN = Family("qwen3_moe")
GPT_OSS = Family("gpt_oss", "num_local_experts", "intermediate_size", interleaved=True)
NEMOTRON = Family(
    "nemotron_h",
    "n_routed_experts",
    gated=False,
    fused="model.layers.{}.mixer.experts",
    apart="model.layers.{}.mixer.experts",
)
MIXTRAL = Family(
    "mixtral",
    "num_local_experts",
    "intermediate_size",
    linears=("w1", "w3", "w2"),
    apart="model.layers.{}.block_sparse_moe.experts",
)
FAMILIES = (QWEN, GPT_OSS, NEMOTRON, MIXTRAL)


@dataclass(frozen=True)
class Spec:
    """A tiny adapter: its model, sizes and scalings. `ranks` and `alphas` are those of roles that differ from the rest.

    `shared` says whether gate and up of a per-expert adapter have the same lora_A.
    """

    family: Family = QWEN
    E: int = 4
    H: int = 8
    I: int = 6
    r: int = 2
    alpha: float = 3
    layers: tuple[int, ...] = (0, 1)
    dtype: torch.dtype = torch.float32
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    attention: bool = False
    seed: int = 0

    def model(self) -> dict[str, Any]:
        return self.family.config(self.E, self.H, self.I)

    def rank(self, role: str) -> int:
        return self.ranks.get(role, self.r)

    def scaling(self, role: str) -> float:
        return self.alphas.get(role, self.alpha) / self.rank(role) ** (0.5 if self.rslora else 1)

    def size(self, role: str) -> tuple[int, int]:
        """(in, out)."""
        if role == "down":
            return self.I, self.H
        return self.H, 2 * self.I if role == "gate_up" else self.I

    def factors(self, roles: Sequence[str]) -> Factors:
        """Drawn at random, so that no two entries are alike."""
        generator = torch.Generator().manual_seed(self.seed)
        found: Factors = {}
        for layer in self.layers:
            for role in roles:
                (fan_in, fan_out), r = self.size(role), self.rank(role)
                A = torch.randn(self.E, r, fan_in, generator=generator).to(self.dtype)
                B = torch.randn(self.E, fan_out, r, generator=generator).to(self.dtype)
                found[layer, role] = A, B
        return found

    def fused_roles(self) -> tuple[str, str]:
        return ("gate_up" if self.family.gated else "up", "down")

    def linear_roles(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.family.gated else ("up", "down")

    def updates(self, factors: Factors) -> dict[Key, Tensor]:
        """What the factors add to each expert, gate and up apart."""
        found = {key: (B.double() @ A.double()) * self.scaling(key[1]) for key, (A, B) in factors.items()}
        return apart(found, self.family)


def apart(updates: Mapping[Key, Tensor], family: Family) -> dict[Key, Tensor]:
    """Updates with gate_up divided into gate and up."""
    found = {}
    for (layer, role), update in updates.items():
        if role != "gate_up":
            found[layer, role] = update
            continue
        for part, rows in family.rows(update.shape[1]).items():
            found[layer, part] = update[:, rows]
    return found


def flat(A: Tensor, B: Tensor, orientation: str, packing: str = "rank_major") -> tuple[Tensor, Tensor]:
    """lora_A "(E r) p" and lora_B "q (r E)" or "q (E r)", entry by entry as the formats are defined."""
    E, r = A.shape[:2]
    rows, columns = (A, B) if orientation == "linear" else (B.transpose(1, 2), A.transpose(1, 2))
    lora_A = torch.stack([rows[e, j] for e in range(E) for j in range(r)])
    order = [(e, j) for j in range(r) for e in range(E)]
    if packing == "grouped":
        order = [(e, j) for e in range(E) for j in range(r)]
    lora_B = torch.stack([columns[e, :, j] for e, j in order], dim=1)
    return lora_A.contiguous(), lora_B.contiguous()


def unflat(lora_A: Tensor, lora_B: Tensor, E: int, orientation: str, packing: str) -> tuple[Tensor, Tensor]:
    """The inverse of `flat`."""
    r = lora_A.shape[0] // E
    rows = torch.stack([lora_A[e * r : (e + 1) * r] for e in range(E)])
    step = (lambda e: slice(e, None, E)) if packing == "rank_major" else (lambda e: slice(e * r, (e + 1) * r))
    columns = torch.stack([lora_B[:, step(e)] for e in range(E)])
    if orientation == "linear":
        return rows, columns
    return columns.transpose(1, 2), rows.transpose(1, 2)


def lora_config(spec: Spec, **more: Any) -> dict[str, Any]:
    """adapter_config.json, with the fields that a reader needs."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj"] if spec.attention else [],
        "target_parameters": None,
        "modules_to_save": None,
        **more,
    }


def attention(spec: Spec) -> dict[str, Tensor]:
    """LoRA on q_proj of every layer, if the spec has it."""
    if not spec.attention:
        return {}
    generator = torch.Generator().manual_seed(spec.seed + 1)
    found = {}
    for layer in spec.layers:
        stem = f"{PREFIX}model.layers.{layer}.self_attn.q_proj"
        found[f"{stem}.lora_A.weight"] = torch.randn(spec.r, spec.H, generator=generator).to(spec.dtype)
        found[f"{stem}.lora_B.weight"] = torch.randn(spec.H, spec.r, generator=generator).to(spec.dtype)
    return found


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """An adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, folder / "adapter_model.safetensors", {"format": "pt", **(metadata or {})})
    return folder


def save_fused(
    folder: Path,
    spec: Spec,
    factors: Factors,
    *,
    orientation: str = "linear",
    packing: str = "rank_major",
    nesting: Sequence[str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """PEFT's flat pairs, the first parameter of `nesting` innermost. The version that is claimed: as `config` says."""
    roles = {role for _, role in factors}
    nesting = nesting or [name for name in spec.family.parameters if ROLES[name] in roles]
    tensors = attention(spec)
    for (layer, role), (A, B) in factors.items():
        name = next(name for name in nesting if ROLES[name] == role)
        depth = len(nesting) - 1 - list(nesting).index(name)
        stem = PREFIX + spec.family.fused.format(layer) + ".base_layer" * depth
        lora_A, lora_B = flat(A, B, orientation, packing)
        tensors |= {f"{stem}.lora_A.weight": lora_A, f"{stem}.lora_B.weight": lora_B}
    patterns = {
        "rank_pattern": {f"experts.{n}": spec.ranks[ROLES[n]] for n in nesting if ROLES[n] in spec.ranks},
        "alpha_pattern": {f"experts.{n}": spec.alphas[ROLES[n]] for n in nesting if ROLES[n] in spec.alphas},
    }
    targets = {"target_parameters": [f"experts.{name}" for name in nesting], **patterns}
    return save(folder, tensors | dict(extra or {}), lora_config(spec, **{**targets, **config}))


def save_per_expert(
    folder: Path,
    spec: Spec,
    factors: Factors,
    *,
    skip: Sequence[tuple[int, str]] = (),
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A pair of matrices for each expert's linear, without the (expert, role) pairs of `skip`."""
    tensors = attention(spec)
    for (layer, role), (A, B) in factors.items():
        for e in range(spec.E):
            if (e, role) in skip:
                continue
            stem = f"{PREFIX}{spec.family.apart.format(layer)}.{e}.{spec.family.linear(role)}"
            tensors |= {f"{stem}.lora_A.weight": A[e], f"{stem}.lora_B.weight": B[e]}
    names = sorted({spec.family.linear(role) for _, role in factors})
    patterns = {
        "rank_pattern": {spec.family.linear(role): rank for role, rank in spec.ranks.items()},
        "alpha_pattern": {spec.family.linear(role): alpha for role, alpha in spec.alphas.items()},
    }
    targets = {"target_modules": [*names, *(["q_proj"] if spec.attention else [])], **patterns}
    return save(folder, tensors | dict(extra or {}), lora_config(spec, **{**targets, **config}))


def save_stacked(folder: Path, spec: Spec, factors: Factors, **config: Any) -> Path:
    """3-D factors, "E r in" and "E out r", under the names of the experts' projections."""
    tensors = attention(spec)
    for (layer, role), (A, B) in factors.items():
        name = "gate_up_proj" if role == "gate_up" else f"{role}_proj"
        stem = f"{PREFIX}{spec.family.fused.format(layer)}.{name}"
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    patterns = {
        "rank_pattern": {"gate_up_proj" if r == "gate_up" else f"{r}_proj": n for r, n in spec.ranks.items()},
        "alpha_pattern": {"gate_up_proj" if r == "gate_up" else f"{r}_proj": n for r, n in spec.alphas.items()},
    }
    return save(folder, tensors, lora_config(spec, **{**patterns, **config}))


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder."""
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def pattern_value(config: Mapping[str, Any], patterns: str, default: str, key: str) -> Any:
    """By the rule of `get_pattern_key` in peft/utils/other.py: the first pattern that matches the key's end."""
    table = config.get(patterns) or {}
    found = next((pattern for pattern in table if re.match(rf"(.*\.)?({pattern})$", key)), None)
    return config[default] if found is None else table[found]


def scaling_of(config: Mapping[str, Any], key: str, rank: int) -> float:
    """What PEFT scales the LoRA on `key` with; the rank that the config gives must be that of the tensors."""
    assert pattern_value(config, "rank_pattern", "r", key) == rank, key
    alpha = pattern_value(config, "alpha_pattern", "lora_alpha", key)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


@dataclass
class Contents:
    """An adapter file as its reader sees it: updates of the experts and of ordinary linears, and everything else."""

    experts: dict[Key, Tensor] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)
    linears: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(
    folder: Path,
    family: Family,
    E: int,
    *,
    orientation: str | None = None,
    packing: str = "rank_major",
    nesting: Sequence[str] = (),
    alpha_only: bool = False,
) -> Contents:
    """Reads an adapter by the rules of its reader.

    Args:
        folder: Of the adapter.
        family: Of the base model.
        E: Number of experts.
        orientation, packing, nesting: Of fused factors, innermost parameter first.
        alpha_only: Whether the reader scales by alpha over the rank of each tensor, as llama.cpp does.
    """
    config, tensors = read_config(folder), load(folder)
    pairs: dict[tuple[str, int], dict[str, Tensor]] = {}
    found = Contents()
    for name, tensor in tensors.items():
        match = _LORA.match(name.removeprefix(PREFIX))
        if match is None:
            found.rest[name] = tensor
            continue
        depth = match["depth"].count(".base_layer")
        pairs.setdefault((match["path"], depth), {})[match["factor"]] = tensor

    def scaling(key: str, rank: int) -> float:
        return config["lora_alpha"] / rank if alpha_only else scaling_of(config, key, rank)

    per_expert: dict[Key, dict[int, Tensor]] = {}
    for (path, depth), pair in pairs.items():
        A, B = pair["A"], pair["B"]
        stem, _, last = path.rpartition(".")
        layer = LAYER.search(path)
        owner, _, expert = stem.rpartition(".")
        if last in ROLES and expert.isdigit() and owner.endswith("experts"):
            update = (B.double() @ A.double()) * scaling(path, A.shape[0])
            per_expert.setdefault((int(layer[1]), ROLES[last]), {})[int(expert)] = update
        elif A.ndim == 3:
            update = (B.double() @ A.double()) * scaling(path, A.shape[1])
            found.experts[int(layer[1]), ROLES[last]] = update
        elif orientation is not None and (depth or last in ("experts", "fc1", "fc2") or last.endswith("put_linear")):
            name = nesting[len(nesting) - 1 - depth]
            a, b = unflat(A, B, E, orientation, packing)
            role = ROLES.get(name) or ROLES[f"{last}.{name}"]
            found.factors[int(layer[1]), role] = a, b
            found.experts[int(layer[1]), role] = (b.double() @ a.double()) * scaling(f"{path}.{name}", a.shape[1])
        else:
            found.linears[path] = (B.double() @ A.double()) * scaling(path, A.shape[0])
    for key, updates in per_expert.items():
        found.experts[key] = torch.stack([updates[e] for e in range(E)])
    found.experts = apart(found.experts, family)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().item()
    return (found.double() - expected.double()).abs().max().item() / (scale or 1.0)


def assert_updates(found: Mapping[Key, Tensor], expected: Mapping[Key, Tensor], tolerance: float = 1e-6) -> None:
    """The same updates; those that `found` has beyond the expected ones are zero."""
    assert set(expected) <= set(found), (sorted(found), sorted(expected))
    for key, update in found.items():
        if key in expected:
            assert relative(update, expected[key]) <= tolerance, key
        else:
            assert not update.any(), key


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors under the same names, bit for bit."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        same = torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )
        assert same, name
