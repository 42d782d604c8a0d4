"""What a model family means for its adapters, as the fuzzer knows it: from the models and the readers' documents.

Shares nothing with `peft_moe_compat.families`. Where the two disagree one of them is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

# (PEFT, transformers) that write or read the adapters here.
PAIRS = (
    ("0.17.0", "4.57.6"),
    ("0.18.0", "5.0.0"),
    ("0.18.1", "4.57.6"),
    ("0.19.0", "5.5.4"),
    ("0.19.1", "5.5.4"),
    ("0.20.0", "5.12.1"),
    ("0.21.2", "5.23.0"),
)
W123 = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: In config.json, of the part that has the experts.
        path: Of a layer's experts module in transformers 5.
        apart: The same in checkpoints that have single experts; None for the same path.
        count, width: What config.json calls E and I.
        linears: An expert's gate, up and down there.
        gated: Whether gate and up stand before the activation.
        interleaved: Whether their rows alternate in gate_up_proj.
        transposed: Whether parameters are held "E in out", until which transformers, declared since which one.
        fused_in_4: Whether transformers 4 holds them as stacks.
        nested: Name of the sub-config that has the sizes.
        router, shared: Modules beside the experts, from the layer's path.
        takes_fused: Whether vLLM takes its LoRA fused.
        apart_in: Transformers release before which the two parameters were modules, and their names.
    """

    model_type: str
    path: str = "model.layers.{}.mlp.experts"
    apart: str | None = None
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    until: str | None = None
    declared: str | None = None
    fused_in_4: bool = False
    nested: str | None = None
    router: str = "gate"
    shared: str | None = None
    takes_fused: bool = False
    sglang: bool = True
    apart_in: tuple[str, dict[str, str]] | None = field(default=None, hash=False)

    def config(self, E: int, H: int, I: int) -> dict[str, Any]:
        sizes = {"model_type": self.model_type, self.count: E, "hidden_size": H, self.width: I}
        if self.nested is None:
            return sizes
        outer = self.model_type.removesuffix("_text")
        return {"model_type": outer, self.nested: sizes}

    @property
    def roles(self) -> tuple[str, str]:
        """Of the parameters, in the order in which PEFT nests them, innermost first."""
        return ("gate_up" if self.gated else "up", "down")

    @property
    def apart_roles(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def linear(self, role: str) -> str:
        return self.linears[("gate", "up", "down").index(role)]

    def apart_path(self) -> str:
        return self.apart or self.path

    def held(self, transformers: str) -> tuple[bool, bool]:
        """(held "E in out", declared so) in a release."""
        here = Version(transformers)
        held = self.transposed and (self.until is None or here < Version(self.until))
        return held, self.declared is not None and here >= Version(self.declared)

    def single_experts(self, transformers: str) -> bool:
        return Version(transformers) < Version("5.0") and not self.fused_in_4

    def place(self, role: str, transformers: str | None) -> tuple[str, str]:
        """(path of the module, parameter) of a fused role."""
        if self.apart_in is not None and transformers is not None:
            since, names = self.apart_in
            if Version(transformers) < Version(since):
                return self.path.rpartition(".experts")[0] + f".{names[role]}", "weight"
        return self.path, f"{role}_proj"

    def size(self, role: str, H: int, I: int) -> tuple[int, int]:
        """(in, out)."""
        return (I, H) if role == "down" else (H, 2 * I if role == "gate_up" else I)

    def halves(self, out: int) -> dict[str, slice]:
        """Rows of gate and up in gate_up_proj."""
        if self.interleaved:
            return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        return {"gate": slice(0, out // 2), "up": slice(out // 2, None)}


def orientation(peft: str, transformers: str, family: Family) -> str:
    """What a release's lora_A spans for the family: `linear` for in-features, else `reversed`. FACTS, section 2."""
    transposed, declared = family.held(transformers)
    if declared:
        axis = 2 if Version(peft) == Version("0.19.0") else 1
    else:
        axis = 2 if Version(peft) >= Version("0.19.1") else 1
    return "linear" if (axis == 1) == transposed else "reversed"


_BLOCK = "model.layers.{}.block_sparse_moe.experts"
_TEXT = "model.language_model.layers.{}.mlp.experts"
_GRANITE = ("5.13.0", {"gate_up": "input_linear", "down": "output_linear"})
_ALL = (
    Family("qwen3_moe"),
    Family("qwen2_moe", shared="shared_expert"),
    Family("olmoe", width="intermediate_size"),
    Family("deepseek_v3", count="n_routed_experts", shared="shared_experts"),
    Family("glm4_moe", count="n_routed_experts", shared="shared_experts"),
    Family("ernie4_5_moe", count="moe_num_experts", shared="shared_experts"),
    Family("mixtral", apart=_BLOCK, count="num_local_experts", width="intermediate_size", linears=W123),
    Family("minimax_m2", apart=_BLOCK, count="num_local_experts", width="intermediate_size", linears=W123),
    Family("lfm2_moe", path="model.layers.{}.feed_forward.experts", linears=W123),
    Family(
        "gpt_oss",
        count="num_local_experts",
        width="intermediate_size",
        interleaved=True,
        transposed=True,
        declared="5.0.0",
        fused_in_4=True,
        router="router",
        takes_fused=True,
    ),
    Family(
        "nemotron_h",
        path="model.layers.{}.mixer.experts",
        count="n_routed_experts",
        gated=False,
        shared="shared_experts",
    ),
    Family(
        "qwen3_vl_moe_text",
        path=_TEXT,
        transposed=True,
        until="5.0.0",
        fused_in_4=True,
        nested="text_config",
        takes_fused=True,
    ),
    Family("qwen3_5_moe_text", path=_TEXT, nested="text_config", shared="shared_expert", takes_fused=True),
    Family(
        "llama4_text",
        path="language_model.model.layers.{}.feed_forward.experts",
        count="num_local_experts",
        width="intermediate_size",
        transposed=True,
        fused_in_4=True,
        nested="text_config",
        router="router",
        shared="shared_expert",
        sglang=False,
    ),
    Family(
        "granitemoe",
        path=_BLOCK,
        count="num_local_experts",
        width="intermediate_size",
        fused_in_4=True,
        router="router",
        apart_in=_GRANITE,
    ),
)
FAMILIES = {family.model_type: family for family in _ALL}
