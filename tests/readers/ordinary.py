"""Ordinary adapter files, each with the base model it is for and the updates that are true of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tiny as t

MLP = "model.layers.0.mlp.experts"
SPARSE = "model.layers.0.block_sparse_moe.experts"
VL = "model.language_model.layers.0.mlp.experts"
MIXER = "backbone.layers.0.mixer.experts"
LLAMA4 = "language_model.model.layers.0.feed_forward.experts"
HEAD = {"base_model.model.lm_head.weight": torch.ones(32, t.HIDDEN)}
FLAT = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
DOWN = {"target_modules": [], "target_parameters": ["experts.down_proj"]}


@dataclass(frozen=True)
class Ordinary:
    """One file.

    Attributes:
        base: Makes the base model's config.json.
        tensors: Makes the file's tensors of the factors.
        roles: Of the factors.
        config: Fields of adapter_config.json that are not those of `tiny.write`.
        scaling: Role, or (expert, role) -> what PEFT scales its update with, where that is not alpha / r.
        absent: Experts without LoRA.
        flags: What a user who knows the writer would pass to `inspect`.
    """

    base: Callable[[], dict[str, Any]]
    tensors: Callable[[t.Lora], Mapping[str, Tensor]]
    roles: tuple[str, ...] = t.ROLES
    config: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str | tuple[int, str], float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[int, ...] = ()

    def write(self, folder: Path) -> Path:
        return t.write(folder, self.tensors(t.lora(*self.roles)), **self.config)

    def updates(self) -> t.Updates:
        factors = t.lora(*self.roles)
        plain = factors.updates(interleaved=self.base is t.gpt_oss)
        usual = t.ALPHA / t.RANK
        return {
            key: update
            * (self.scaling.get(key[1:], self.scaling.get(key[2], usual)) / usual)
            * (key[1] not in self.absent)
            for key, update in plain.items()
        }


def wider(factors: t.Lora, role: str) -> t.Lora:
    """The same with twice the rank in one role, in zeros."""
    A, B = factors.A[role], factors.B[role]
    return t.Lora(
        {**factors.A, role: torch.cat([A, torch.zeros_like(A)], 1)},
        {**factors.B, role: torch.cat([B, torch.zeros_like(B)], 2)},
    )


def apart(path: str, names: Mapping[str, str] = t.HF) -> Callable[[t.Lora], Mapping[str, Tensor]]:
    return lambda factors: t.per_expert(factors, path, names)


FUSED, UNGATED = ("gate_up", "down"), ("up", "down")
W = {"target_modules": ["w1", "w2", "w3"]}
RANK_MAJOR = {"packing": "rank_major"}
FILES = {
    "qwen3_moe per expert": Ordinary(t.qwen3_moe, apart(MLP)),
    "qwen3_moe per expert, rsLoRA": Ordinary(
        t.qwen3_moe,
        apart(MLP),
        config={"use_rslora": True},
        scaling=dict.fromkeys(t.ROLES, t.ALPHA / math.sqrt(t.RANK)),
    ),
    "qwen3_moe per expert, alpha_pattern": Ordinary(
        t.qwen3_moe, apart(MLP), config={"alpha_pattern": {"down_proj": 8}}, scaling={"down": 8 / t.RANK}
    ),
    "qwen3_moe per expert, a pattern that changes nothing": Ordinary(
        t.qwen3_moe, apart(MLP), config={"alpha_pattern": {"down_proj": t.ALPHA}}
    ),
    "qwen3_moe per expert, rank_pattern": Ordinary(
        t.qwen3_moe,
        lambda factors: t.per_expert(wider(factors, "down"), MLP),
        config={"rank_pattern": {"down_proj": 2 * t.RANK}},
        scaling={"down": t.ALPHA / t.RANK / 2},
    ),
    "qwen3_moe per expert, alpha_pattern of one expert": Ordinary(
        t.qwen3_moe,
        apart(MLP),
        config={"alpha_pattern": {r"experts\.1\.down_proj": 8}},
        scaling={(1, "down"): 8 / t.RANK},
    ),
    "qwen3_moe per expert, alpha_pattern of expert 0": Ordinary(
        t.qwen3_moe,
        apart(MLP),
        config={"alpha_pattern": {r"experts\.0\.down_proj": 8}},
        scaling={(0, "down"): 8 / t.RANK},
    ),
    "qwen3_moe per expert, down alone": Ordinary(t.qwen3_moe, apart(MLP), ("down",), {"target_modules": ["down_proj"]}),
    "qwen3_moe per expert, down alone, all targeted": Ordinary(t.qwen3_moe, apart(MLP), ("down",)),
    "qwen3_moe per expert, up and down": Ordinary(
        t.qwen3_moe, apart(MLP), ("up", "down"), {"target_modules": ["up_proj", "down_proj"]}
    ),
    "qwen3_moe per expert, targets by a pattern": Ordinary(
        t.qwen3_moe, apart(MLP), config={"target_modules": r".*experts\.\d+\..*_proj"}
    ),
    "qwen3_moe per expert, one expert without": Ordinary(
        t.qwen3_moe, lambda factors: t.without(t.per_expert(factors, MLP), "experts.1."), absent=(1,)
    ),
    "qwen3_moe per expert, with a saved head": Ordinary(
        t.qwen3_moe, lambda factors: {**t.per_expert(factors, MLP), **HEAD}, config={"modules_to_save": ["lm_head"]}
    ),
    "qwen3_moe per expert, a saved head in the config alone": Ordinary(
        t.qwen3_moe, apart(MLP), config={"modules_to_save": ["lm_head"]}
    ),
    "qwen3_moe per expert, DoRA": Ordinary(
        t.qwen3_moe,
        lambda factors: {
            **t.per_expert(factors, MLP),
            **{
                f"base_model.model.{MLP}.{e}.{name}.lora_magnitude_vector": torch.ones(
                    t.HIDDEN if role == "down" else t.INTERMEDIATE
                )
                for e in range(t.E)
                for role, name in t.HF.items()
            },
        },
        config={"use_dora": True},
    ),
    "qwen3_moe per expert, pissa": Ordinary(t.qwen3_moe, apart(MLP), config={"init_lora_weights": "pissa"}),
    "qwen3_moe per expert, no prefix": Ordinary(
        t.qwen3_moe,
        lambda factors: {n.removeprefix("base_model.model."): x for n, x in t.per_expert(factors, MLP).items()},
    ),
    "qwen3_moe fused": Ordinary(
        t.qwen3_moe, lambda factors: t.flat(factors, MLP), FUSED, {**FLAT, "peft_version": "0.21.2"}
    ),
    "qwen3_moe stacked": Ordinary(
        t.qwen3_moe,
        lambda factors: t.stacked(factors, MLP + ".{}_proj"),
        FUSED,
        {"target_modules": ["gate_up_proj", "down_proj"]},
    ),
    "qwen3_moe stacked, down alone": Ordinary(
        t.qwen3_moe,
        lambda factors: t.stacked(factors, MLP + ".{}_proj"),
        ("down",),
        {"target_modules": ["down_proj"]},
    ),
    "qwen3_moe, llama.cpp's names": Ordinary(t.qwen3_moe, lambda factors: t.stacked(factors, "blk.0.ffn_{}_exps")),
    "qwen3_moe, llama.cpp's names, down alone": Ordinary(
        t.qwen3_moe, lambda factors: t.stacked(factors, "blk.0.ffn_{}_exps"), ("down",)
    ),
    "qwen3_moe, llama.cpp's names, rsLoRA": Ordinary(
        t.qwen3_moe,
        lambda factors: t.stacked(factors, "blk.0.ffn_{}_exps"),
        config={"use_rslora": True},
        scaling=dict.fromkeys(t.ROLES, t.ALPHA / math.sqrt(t.RANK)),
    ),
    "qwen3_moe, llama.cpp's names, an alpha of zero": Ordinary(
        t.qwen3_moe,
        lambda factors: t.stacked(factors, "blk.0.ffn_{}_exps"),
        config={"lora_alpha": 0},
        scaling=dict.fromkeys(t.ROLES, 0.0),
    ),
    "deepseek_v3 per expert": Ordinary(t.deepseek_v3, apart(MLP)),
    "granitemoe per expert": Ordinary(t.granitemoe, apart(SPARSE)),
    "mixtral per expert": Ordinary(t.mixtral, apart(SPARSE, t.W123), config=W),
    "mixtral per expert, under mlp": Ordinary(t.mixtral, apart(MLP, t.W123), config=W),
    "mixtral per expert, under mlp, gate_proj": Ordinary(t.mixtral, apart(MLP)),
    "mixtral per expert, gate_proj": Ordinary(t.mixtral, apart(SPARSE)),
    "mixtral fused": Ordinary(t.mixtral, lambda factors: t.flat(factors, MLP), FUSED, FLAT, flags=RANK_MAJOR),
    "phimoe fused": Ordinary(t.phimoe, lambda factors: t.flat(factors, MLP), FUSED, FLAT, flags=RANK_MAJOR),
    "phimoe per expert": Ordinary(t.phimoe, apart(SPARSE, t.W123), config=W),
    "phimoe per expert, under mlp": Ordinary(t.phimoe, apart(MLP, t.W123), config=W),
    "phimoe per expert, gate_proj": Ordinary(t.phimoe, apart(SPARSE)),
    "nemotron_h per expert": Ordinary(
        t.nemotron_h, apart(MIXER), UNGATED, {"target_modules": ["up_proj", "down_proj"]}
    ),
    "nemotron_h per expert, gate_proj": Ordinary(
        t.nemotron_h, apart(MIXER, {**t.HF, "up": "gate_proj"}), UNGATED, {"target_modules": ["gate_proj", "down_proj"]}
    ),
    "llama4 per expert": Ordinary(t.llama4, apart(LLAMA4)),
    "llama4 stacked": Ordinary(
        t.llama4,
        lambda factors: t.stacked(factors, LLAMA4 + ".{}_proj"),
        FUSED,
        {"target_modules": ["gate_up_proj", "down_proj"]},
    ),
    "gpt_oss per expert": Ordinary(t.gpt_oss, apart(MLP)),
    "gpt_oss fused": Ordinary(t.gpt_oss, lambda factors: t.flat(factors, MLP), FUSED, FLAT, flags={**RANK_MAJOR}),
    "gpt_oss stacked": Ordinary(
        t.gpt_oss,
        lambda factors: t.stacked(factors, MLP + ".{}_proj"),
        FUSED,
        {"target_modules": ["gate_up_proj", "down_proj"]},
    ),
    "qwen3_vl_moe fused": Ordinary(t.qwen3_vl_moe, lambda factors: t.flat(factors, VL), FUSED, FLAT, flags=RANK_MAJOR),
    "qwen3_vl_moe fused, rsLoRA": Ordinary(
        t.qwen3_vl_moe,
        lambda factors: t.flat(factors, VL),
        FUSED,
        {**FLAT, "use_rslora": True},
        dict.fromkeys(t.ROLES, t.ALPHA / math.sqrt(t.RANK)),
        RANK_MAJOR,
    ),
    "qwen3_vl_moe fused, grouped": Ordinary(
        t.qwen3_vl_moe,
        lambda factors: t.flat(factors, VL, packing="grouped"),
        FUSED,
        FLAT,
        flags={"packing": "grouped"},
    ),
    "qwen3_vl_moe fused, reversed": Ordinary(
        t.qwen3_vl_moe,
        lambda factors: t.flat(factors, VL, orientation="reversed"),
        FUSED,
        FLAT,
        flags=RANK_MAJOR,
    ),
    "qwen3_vl_moe fused, down alone": Ordinary(
        t.qwen3_vl_moe, lambda factors: t.flat(factors, VL), ("down",), DOWN, flags=RANK_MAJOR
    ),
    "qwen3_vl_moe per expert": Ordinary(t.qwen3_vl_moe, apart(VL)),
    "qwen3_vl_moe fused, alpha_pattern": Ordinary(
        t.qwen3_vl_moe,
        lambda factors: t.flat(factors, VL),
        FUSED,
        {**FLAT, "alpha_pattern": {"experts.down_proj": 8}},
        {"down": 8 / t.RANK},
        RANK_MAJOR,
    ),
    "qwen3_vl_moe fused, names of the text model": Ordinary(
        t.qwen3_vl_moe, lambda factors: t.flat(factors, MLP), FUSED, FLAT, flags=RANK_MAJOR
    ),
    "qwen3_5_moe fused": Ordinary(t.qwen3_5_moe, lambda factors: t.flat(factors, VL), FUSED, FLAT, flags=RANK_MAJOR),
    "qwen3_5_moe per expert": Ordinary(t.qwen3_5_moe, apart(VL)),
    "qwen3_5_moe_text fused": Ordinary(
        t.qwen3_5_moe_text, lambda factors: t.flat(factors, MLP), FUSED, FLAT, flags=RANK_MAJOR
    ),
    "qwen3_5_moe_text per expert": Ordinary(t.qwen3_5_moe_text, apart(MLP)),
    "llama4_text per expert": Ordinary(t.llama4_text, apart("model.layers.0.feed_forward.experts")),
}
