"""Who reads adapters, and what form each of them takes.

Source: the readers' own code. vLLM 0.28 to 0.33 `lora/`, SGLang `srt/lora/`, llama.cpp's `convert_lora_to_gguf.py`;
tests/readers runs all three on what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import AdapterError, AmbiguousAdapterError
from ..releases import (
    RULES,
)
from .base_model import BaseModel

__all__ = ["KEEP_THE_BASE", "READERS", "NotTakenError", "Reader", "is_of"]

# Values of `init_lora_weights` that leave the base model as it was: vLLM's list without lora_ga, which does not.
KEEP_THE_BASE = {"gaussian", "eva", "orthogonal", "mica"}


class NotTakenError(AdapterError):
    """The reader takes no such adapter in any form. `kind` is that of a step, see `Reader.lacking`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Reader:
    """What is known of a reader, from one of its releases on.

    Attributes:
        title: What it is called in text.
        since: The release; "" where they do not differ, or are not told apart.
        form: Of the experts' LoRA: `"fused"`, `"per_expert"`, `"gguf"`: 3-D factors under the names that llama.cpp
            gives its own tensors, or `"shared_outer"`: 3-D factors, of one expert on the side that all share.
        fused: Classes of models that it takes fused all the same, as the newest PEFT writes them.
        refuses: Classes on whose experts it takes no LoRA.
        mounted: Classes whose layers it looks for under `model.language_model` alone, not by the text model's names.
        one_lora_A: Families whose gate and up have to share one lora_A.
        complete: Whether every projection of an adapted experts module has to be there.
        scaling: How it scales an update. "config": alpha / r or rsLoRA's, with patterns. "rslora": the same without
            patterns. "uniform": `lora_alpha / r` for all. In these two every rank is `r`. "alpha": `lora_alpha` over
            the rank of the tensor at hand.
        everything: Whether it reads all that PEFT can put into an adapter: modules_to_save, DoRA, biases, embeddings.
        linears: Names it has for every family's linears, by role; None where it goes by the family's own. An up
            projection without a gate bears the gate's.
        renames: Other names of linears that it takes for those.
        targets: Where it wants the names of all linears of an adapted experts module, or "all-linear", in
            `target_modules`: what it takes some of them for. None where it does not, or matches them as PEFT does.
        reads: Those of `config_fields.CHANGES` that it applies; of PEFT's, which applies all, nothing.
        heeds: Fields of the config that make it refuse, of those which say that something else than LoRA is there.
        lacking: What it does with a file on which a step was not taken: its kind, or kind:family, or kind:detail ->
            "fails" or "wrong" (maybe without an error). Of all others nothing is known: it may read the file as it is.
    """

    title: str
    form: str
    since: str = ""
    fused: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    mounted: frozenset[str] = frozenset()
    one_lora_A: frozenset[str] = frozenset()  # noqa: N815
    complete: bool = False
    scaling: str = "config"
    everything: bool = False
    linears: Mapping[str, str] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] | None = None
    reads: tuple[str, ...] = ()
    heeds: tuple[str, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)


# A row for each layout of PEFT's, the oldest first.
_FIRST, _TURNED, _LINEAR = (str(rule.since) for rule in RULES)
_PEFT_LINEAR = Reader(
    "PEFT",
    "fused",
    since=_LINEAR,
    everything=True,
    lacking={
        "from_fused": "wrong",  # it wraps what else the targets name, and fails where that is nothing
        "from_per_expert:gpt_oss": "wrong",  # which it does not convert
        "from_stacked": "fails",
        "from_stacked:targeted": "wrong",  # it wraps what else the targets name, and leaves the stacks out
        "packing": "wrong",
        "rank": "fails",
        "targets": "fails",
        "targets:some": "wrong",
        "dropout": "fails",
        "peft_type": "fails",
        "shards": "fails",
        "upstream_rslora": "wrong",
        "upstream_patterns": "wrong",
        "upstream_roles": "wrong",
    },
)
# It converts single experts into factors of the next layout, the other way round than its own.
_PEFT_TURNED = replace(_PEFT_LINEAR, since=_TURNED, lacking={**_PEFT_LINEAR.lacking, "from_per_expert": "fails"})
_PEFT_FIRST = replace(_PEFT_LINEAR, since=_FIRST, lacking={**_PEFT_LINEAR.lacking, "from_per_expert": "wrong"})
_FUSED_28 = frozenset(
    {
        "GptOssForCausalLM",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
_VLLM_33 = Reader(
    "vLLM",
    "per_expert",
    since="0.33",
    fused=_FUSED_28 | {"Qwen3OmniMoeForConditionalGeneration", "ClefOmniForJointSchema"},
    complete=True,
    heeds=("bias", "lora_bias", "modules_to_save"),
    lacking={
        "from_fused": "fails",
        "from_fused:moved": "wrong",  # it looks at the modules it has, and finds nothing for them
        "from_per_expert": "fails",
        "from_stacked": "fails",
        "packing": "wrong",
        "path": "wrong",
        "linears": "fails",
        "linears:mixtral": "unknown",  # its mapper renames gate_proj, up_proj and down_proj
        "filled": "fails",
        "experts_filled": "fails",
        "experts_padded": "fails",
        "rank": "wrong",
        "dropped": "fails",
        "heeded": "fails",
        "initialised": "fails",
        "dora": "fails",
        "shards": "fails",
    },
)
_VLLM_32 = replace(
    _VLLM_33,
    since="0.32",
    mounted=frozenset({"Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"}),
)
_PATTERNS = dict.fromkeys(("folded", "experts_folded", "scaling"), "wrong")
_UNSEEN = dict.fromkeys(("alora_invocation_tokens", "layer_replication"), "wrong")
_VLLM_30 = replace(
    _VLLM_32,
    since="0.30",
    fused=_VLLM_32.fused - {"ClefOmniForJointSchema"},
    scaling="rslora",
    lacking={**_VLLM_32.lacking, **_PATTERNS, **_UNSEEN, "initialised": "wrong"},
)
_VLLM_29 = replace(
    _VLLM_30,
    since="0.29",
    scaling="uniform",
    lacking={**_VLLM_30.lacking, "scaling:fused": "unknown"},  # rsLoRA it ignores for single experts alone
)
_VLLM_28 = replace(
    _VLLM_29,
    since="0.28",
    fused=_FUSED_28,
    lacking={**_VLLM_29.lacking, "linears:mixtral": "fails"},
)
_SGLANG = Reader(
    "SGLang",
    "per_expert",
    refuses=frozenset({"Llama4ForConditionalGeneration"}),
    one_lora_A=frozenset({"gpt_oss"}),
    complete=True,
    scaling="uniform",
    linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    renames={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    targets={"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
    lacking={
        "from_fused": "fails",
        "from_stacked:gguf": "wrong",
        "from_stacked:gpt_oss": "wrong",  # gate, then up: it alternates them itself
        "linears": "fails",
        "filled:gate": "fails",
        "filled:gate and down": "fails",
        "targets": "fails",
        "more_targets": "wrong",
        "folded": "wrong",
        "experts_folded": "wrong",
        "scaling": "wrong",
        "joined": "wrong",
        "rank": "fails",
        "experts_padded": "fails",
        "initialised": "wrong",
        "dora": "fails",
        "no_experts": "fails",
        **_UNSEEN,
    },
)
_LLAMA_CPP = Reader(
    "llama.cpp",
    "gguf",
    scaling="alpha",
    reads=("alora_invocation_tokens",),
    lacking={
        "from_fused": "fails",
        "from_stacked:gate_up": "fails",
        "from_per_expert:gpt_oss": "fails",
        "from_per_expert:llama4": "fails",
        "experts_filled": "fails",
        "experts_padded": "fails",
        "folded": "wrong",
        "experts_folded": "wrong",
        "scaling": "wrong",
        "dropped": "fails",
        "initialised": "wrong",
        "dora": "fails",
        "shards": "fails",
    },
)
# Reader -> its rows, the oldest first; each holds until the next one's `since`.
READERS: dict[str, tuple[Reader, ...]] = {
    "peft": (_PEFT_FIRST, _PEFT_TURNED, _PEFT_LINEAR),
    "per-expert": (Reader("a reader of single experts", "per_expert", everything=True),),
    "vllm": (_VLLM_28, _VLLM_29, _VLLM_30, _VLLM_32, _VLLM_33),
    "sglang": (_SGLANG,),
    "shared-outer": (
        Reader(
            "a server of shared factors",
            "shared_outer",
            refuses=_SGLANG.refuses,
            one_lora_A=frozenset({"gpt_oss"}),
            complete=True,
            scaling="uniform",
            linears=_SGLANG.linears,
        ),
    ),
    "llama.cpp": (_LLAMA_CPP,),
}
# What a config without `architectures` is of, if it describes the whole model.
_CLASSES = {
    "gpt_oss": "GptOssForCausalLM",
    "interns1_pro": "InternS1ProForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def is_of(model: BaseModel, classes: frozenset[str]) -> bool:
    """Whether a base model is one of these classes.

    Raises:
        AmbiguousAdapterError: Its config is that of a text model, without `architectures`; whether it is a model of its
            own or a part of one of those classes is open.
    """
    if model.architectures:
        return not classes.isdisjoint(model.architectures)
    name = _CLASSES.get(model.model_type, "")
    if name in classes and model.text_part:
        raise AmbiguousAdapterError(
            f"{model.name} describes a text model without saying of which class: alone, and as a part of {name}, the "
            "reader takes other forms. Pass --model (model=...) with the config.json that is served, whose "
            "`architectures` says."
        )
    return name in classes
