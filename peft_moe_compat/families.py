"""Every fact of a model family: one row each, of what differs from `Family`'s defaults.

Imports neither torch, peft nor transformers. tests/test_families.py compares the rows with the classes, models and
conversion mappings of the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import Version

__all__ = [
    "CLAMPED_CLASSES",
    "FAMILIES",
    "FLAT_CLASSES",
    "LINEAR_NAMES",
    "OWN_FORWARDS",
    "PACKED_CLASSES",
    "REWRITTEN",
    "ROLES",
    "ROLE_ORDER",
    "ROUTERS",
    "STORED_OTHERWISE",
    "UNDECLARED_CLASSES",
    "Family",
    "RenamedExperts",
    "StoredTransposed",
    "family",
    "is_rewritten",
]


@dataclass(frozen=True)
class StoredTransposed:
    """A family that transformers holds as `(E, in, out)`, and since when its experts module says so.

    Attributes:
        until: First transformers release that holds it as `(E, out, in)`; None while there is none.
        declared: First transformers release whose module has `is_transposed=True`; None while there is none.
    """

    until: Version | None = None
    declared: Version | None = None

    def at(self, transformers: Version) -> tuple[bool, bool]:
        """(stored as `(E, in, out)`, declared so) in a release."""
        return (
            self.until is None or transformers < self.until,
            self.declared is not None and transformers >= self.declared,
        )


@dataclass(frozen=True)
class RenamedExperts:
    """A family whose experts once were two modules with a `weight` each, and are one module with two parameters now.

    Attributes:
        since: First transformers release with the one module.
        apart: Role -> end of the path of its old module.
        together: End of the path of the new module; its parameters are `gate_up_proj` and `down_proj`.
    """

    since: Version
    apart: Mapping[str, str]
    together: str


_PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_W123 = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Family:
    """What is known of the routed experts of a family. The defaults are what most families are.

    Attributes:
        transposed: How it is held as `(E, in, out)`; None where every release holds `(E, out, in)`. Source: the experts
            classes of transformers 4.57.6 to 5.24.0.
        renamed: How transformers renamed its experts; None where it never did. Source: the same classes, and
            `conversion_mapping.py` of transformers 5.24.
        fused_in_4: Whether transformers 4 holds fused stacks rather than one linear per expert and projection. Source:
            the classes of 4.57.6. Says nothing of families that came with transformers 5.
        gated: Whether gate_up_proj rather than up_proj stands before the activation. Source: `has_gate` and the
            parameters of the experts classes.
        interleaved: Whether gate and up rows alternate in gate_up_proj instead of lying one after the other. Source:
            the classes' `_apply_gate`, or their forward.
        linears: Role -> an expert's linear in the Hub's checkpoints: as transformers 4 has it, and as readers of
            per-expert adapters want it. Source: `conversion_mapping.py` of transformers 5.24, the models of 4.57.6.
        on_hub: Path of modules in transformers 5, or its end -> in the Hub's checkpoints: routers, shared experts,
            attention. Source: `conversion_mapping.py` of transformers 5.24.
        block_sparse_moe: Whether the experts stand in `block_sparse_moe` there, and in `mlp` in transformers 5. Source:
            the same.
        unsloth_grouped: Whether Unsloth ran its experts with a forward of its own before it left markers, whose lora_B
            is grouped by expert; all others ran PEFT's. Source: unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py.
        undeclared: Class of transformers without `is_transposed` -> whether its weights are `(E, in, out)`. Where a
            later release decorates the class, its own attribute comes first, so the class stands here with the
            orientation it had before. Source: the shapes in the classes' `__init__` and the products in their forward.
        own_forward: Class that transformers does not decorate -> which of forward/undecorated.py computes what its
            forward does. Source: that forward, 4.57.6 to 5.24.0.
        flat: Class that keeps its stacks as 2-D "(E I) H" matrices, which PEFT takes for one wide expert -> their
            names. Source: the same. The class around it reads them, and has an own forward too.
        packed: Class whose loading replaces its weights with packed MXFP4 objects, which PEFT cannot wrap -> their
            names. Source: transformers' `integrations/mxfp4.py`, 4.57.6 to 5.24.0.
        clamped: Classes whose `_apply_gate` is gpt-oss's clamped GLU of the module's `alpha` and `limit`. Source: it.
    """

    transposed: StoredTransposed | None = None
    renamed: RenamedExperts | None = None
    fused_in_4: bool = False
    gated: bool = True
    interleaved: bool = False
    linears: Mapping[str, str] = field(default_factory=lambda: _PROJ)
    on_hub: Mapping[str, str] = field(default_factory=dict)
    block_sparse_moe: bool = False
    unsloth_grouped: bool = False
    undeclared: Mapping[str, bool] = field(default_factory=dict)
    own_forward: Mapping[str, str] = field(default_factory=dict)
    flat: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clamped: tuple[str, ...] = ()


_ARIA = RenamedExperts(Version("5.18.0"), {"gate_up": "mlp.experts.fc1", "down": "mlp.experts.fc2"}, "mlp.experts")
_GRANITE = RenamedExperts(
    Version("5.13.0"),
    {"gate_up": "block_sparse_moe.input_linear", "down": "block_sparse_moe.output_linear"},
    "block_sparse_moe.experts",
)
_EXPERTS = ("gate_up_proj", "down_proj")
_GRANITE_ROUTER = {"block_sparse_moe.router": "block_sparse_moe.router.layer"}
_FORGET_GATE = {f"self_attn.forget_gate.{name}": f"self_attn.{name}" for name in ("f_a_proj", "f_b_proj")}
_NORMS, _AXK2 = ("input_layernorm", "post_attention_layernorm"), (("fc1", "W_down"), ("fc2", "W_up"))
_DEEPSEEK_V4 = {
    "compressor.indexer.scorer.weights_proj": "indexer.weights_proj",
    "compressor.indexer.q_b_proj": "indexer.wq_b",
    "compressor.indexer": "indexer.compressor",
    "compressor.gate_proj": "compressor.wgate",
    "q_a_proj": "wq_a",
    "q_b_proj": "wq_b",
    "kv_proj": "wkv",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    **{f"shared_experts.{name}": f"shared_experts.{_W123[role]}" for role, name in _PROJ.items()},
    "self_attn": "attn",
    "mlp": "ffn",
}

# model_type without `_text` -> what is known of it.
# fmt: off
FAMILIES: dict[str, Family] = {
    "aria": Family(StoredTransposed(declared=Version("5.18.0")), _ARIA, fused_in_4=True,
                   undeclared={"AriaGroupedExpertsGemm": True},
                   own_forward={"AriaGroupedExpertsGemm": "one_projection"}),
    "axk2": Family(on_hub={"self_attn.q_gate_proj": "self_attn.q_b_proj",
                           **{f"{norm}.mlp.{name}": f"{norm}.{hub}" for norm in _NORMS for name, hub in _AXK2}}),
    "bailing_hybrid": Family(on_hub={"self_attn.forget_gate.f_proj": "attention.f_proj",
                                     "self_attn.o_proj": "attention.dense", "self_attn": "attention"}),
    "dbrx": Family(fused_in_4=True, undeclared={"DbrxExpertGLU": False}, flat={"DbrxExpertGLU": ("w1", "v1", "w2")},
                   own_forward={"DbrxExpertGLU": "matrices", "DbrxExperts": "around_matrices"}),
    "deepseek_v3": Family(unsloth_grouped=True),
    "deepseek_v4": Family(linears=_W123, on_hub=_DEEPSEEK_V4),
    "ernie4_5_moe": Family(unsloth_grouped=True),
    "ernie4_5_vl_moe": Family(unsloth_grouped=True),
    "gemma4": Family(unsloth_grouped=True),
    "glm4_moe": Family(unsloth_grouped=True),
    "glm4_moe_lite": Family(unsloth_grouped=True),
    "glm5_next": Family(on_hub=_FORGET_GATE),
    "gpt_oss": Family(StoredTransposed(declared=Version("5.0.0")), fused_in_4=True, interleaved=True,
                      unsloth_grouped=True, undeclared={"GptOssExperts": True},
                      packed={"Mxfp4GptOssExperts": _EXPERTS}, clamped=("GptOssExperts",)),
    "granitemoe": Family(renamed=_GRANITE, fused_in_4=True, on_hub=_GRANITE_ROUTER,
                         undeclared={"GraniteMoeParallelExperts": False},
                         own_forward={"GraniteMoeParallelExperts": "one_projection"}),
    "granitemoehybrid": Family(renamed=_GRANITE, fused_in_4=True, on_hub=_GRANITE_ROUTER,
                               undeclared={"GraniteMoeHybridParallelExperts": False},
                               own_forward={"GraniteMoeHybridParallelExperts": "one_projection"}),
    "granitemoeshared": Family(renamed=_GRANITE, fused_in_4=True, on_hub=_GRANITE_ROUTER,
                               undeclared={"GraniteMoeSharedParallelExperts": False},
                               own_forward={"GraniteMoeSharedParallelExperts": "one_projection"}),
    "hy_v3": Family(on_hub={"mlp.gate": "mlp.router.gate", "mlp.shared_experts": "mlp.shared_mlp"}),
    "hy_v4": Family(on_hub={"gate_proj": "linear_gate"}),
    "jetmoe": Family(fused_in_4=True, undeclared={"JetMoeParallelExperts": False},
                     own_forward={"JetMoeParallelExperts": "one_projection"}),
    "kimi_linear": Family(linears=_W123, on_hub=_FORGET_GATE, block_sparse_moe=True),
    "laguna": Family(on_hub={"mlp.shared_experts": "mlp.shared_expert"}),
    "lfm2_moe": Family(linears=_W123, unsloth_grouped=True),
    "llama4": Family(StoredTransposed(), fused_in_4=True, undeclared={"Llama4TextExperts": True},
                     own_forward={"Llama4TextExperts": "every_token"}),
    "longcat_flash": Family(undeclared={"LongcatFlashExperts": False},
                            own_forward={"LongcatFlashExperts": "with_identities"}),
    "minimax": Family(linears=_W123, block_sparse_moe=True),
    "minimax_m2": Family(linears=_W123, block_sparse_moe=True),
    "minimax_m3_vl": Family(linears=_W123, block_sparse_moe=True),
    "mistral_large4": Family(linears=_W123),
    "mixtral": Family(linears=_W123, block_sparse_moe=True, unsloth_grouped=True),
    "nemotron_h": Family(gated=False),
    "openai_privacy_filter": Family(StoredTransposed(declared=Version("5.0.0")),
                                    clamped=("OpenAIPrivacyFilterExperts",)),
    "phimoe": Family(linears=_W123, on_hub={"mlp.router": "block_sparse_moe.gate"}, block_sparse_moe=True),
    "qwen3_5_moe": Family(unsloth_grouped=True),
    "qwen3_moe": Family(unsloth_grouped=True),
    "qwen3_next": Family(unsloth_grouped=True),
    "qwen3_vl_moe": Family(StoredTransposed(until=Version("5.0.0")), fused_in_4=True, unsloth_grouped=True,
                           undeclared={"Qwen3VLMoeTextExperts": True}),
    "sarvam_moe": Family(on_hub={"self_attn.o_proj": "attention.dense"}),
    "step3p7": Family(undeclared={"Step3p7Experts": False}, own_forward={"Step3p7Experts": "routed"}),
}
# fmt: on
_DEFAULT = Family()


def family(model_type: str) -> Family:
    """The row of a model_type without `_text`; the defaults for a family that differs in nothing known."""
    return FAMILIES.get(model_type, _DEFAULT)


# The columns of classes, by class; of the clamped ones, whether gate and up are interleaved.
UNDECLARED_CLASSES = {name: value for row in FAMILIES.values() for name, value in row.undeclared.items()}
# Class -> (module of transformers, which forward).
OWN_FORWARDS = {
    name: (f"transformers.models.{model_type}.modeling_{model_type}", kind)
    for model_type, row in FAMILIES.items()
    for name, kind in row.own_forward.items()
}
FLAT_CLASSES = {name: parameters for row in FAMILIES.values() for name, parameters in row.flat.items()}
PACKED_CLASSES = {name: parameters for row in FAMILIES.values() for name, parameters in row.packed.items()}
CLAMPED_CLASSES = {name: row.interleaved for row in FAMILIES.values() for name in row.clamped}

# Names of an expert's linears in any family -> role; a writer may leave gate and up together.
LINEAR_NAMES = {"gate_up_proj": "gate_up"} | {
    name: role for row in (_DEFAULT, *FAMILIES.values()) for role, name in row.linears.items()
}
# Expert parameters in any family -> role, by their own name or, where that is `weight`, with the name of its module.
ROLES = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"} | {
    f"{path.rpartition('.')[2]}.weight": role
    for row in FAMILIES.values()
    if row.renamed is not None
    for role, path in row.renamed.apart.items()
}
# The order in which every experts class of transformers registers its parameters, and hence PEFT nests: inner first.
ROLE_ORDER = ("gate_up", "up", "down")
# What transformers calls the routers that are bare parameters in one release and linears in another. Source: the
# modules beside `experts` in the classes of transformers 4.57.6 to 5.24.0.
ROUTERS = frozenset({"gate", "router"})
# The families in which PEFT from 0.19 on, and `model.load_adapter` of transformers 5, take the names of an expert's
# linears in `target_modules` for the fused parameters, and `gate` for its weight, whatever the file holds. Source:
# `_MODEL_TO_CONVERSION_PATTERN` in transformers' conversion_mapping.py, 5.0.0 to 5.24.0, `_MOE_TARGET_MODULE_MAPPING`
# in peft/utils/transformers_weight_conversion.py. See `is_rewritten`.
# fmt: off
REWRITTEN = frozenset({
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
})
# fmt: on
# Of those that some release of transformers 5 has and leaves alone: the first one that does not, and that does again.
_REWRITTEN_FROM = {"afmoe": Version("5.4.0"), "qwen3_5_moe": Version("5.2.0")}
_REWRITTEN_UNTIL = {"qwen2_moe": Version("5.5.2"), "qwen3_5_moe": Version("5.4.0")}


def is_rewritten(model_type: str, transformers: Version | None) -> bool:
    """Whether a family is of `REWRITTEN` in a release of transformers 5; of None, whether in any."""
    if model_type not in REWRITTEN or transformers is None:
        return model_type in REWRITTEN
    since, until = _REWRITTEN_FROM.get(model_type), _REWRITTEN_UNTIL.get(model_type)
    return (since is None or transformers >= since) and (until is None or transformers < until)


# Families whose checkpoints hold weights that are not told by a name: several in one, or parameters of other modules.
# Source: `conversion_mapping.py` of transformers 5.24.
STORED_OTHERWISE = frozenset(
    {
        "ernie4_5_vl_moe",
        "inkling",
        "inkling2",
        "inkling2_loop",
        "lara_mini",
        "mistral_large4",
        "sarvam_moe",
        "step3p7",
    }
)
