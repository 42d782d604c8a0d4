"""Tiny base configs and adapters with known factors, in the forms that the readers take or refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

E, HIDDEN, INTERMEDIATE, RANK, ALPHA = 3, 16, 12, 2, 3
ROLES = ("gate", "up", "down")
HF = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W123 = {"gate": "w1", "up": "w3", "down": "w2"}
Updates = dict[tuple[int, int, str], Tensor]


def base_config(model_type: str, architecture: str, **extra: Any) -> dict[str, Any]:
    """A config.json of one layer and E experts, as transformers writes it; sizes go to text_config if there is one."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 32,
        "eos_token_id": 1,
        "bos_token_id": 1,
        **extra,
    }
    multimodal = architecture.endswith("ForConditionalGeneration")
    config = AutoConfig.for_model(model_type, **({"text_config": sizes} if multimodal else sizes))
    return {**config.to_dict(), "architectures": [architecture]}


def qwen3_moe() -> dict[str, Any]:
    return base_config("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=E, moe_intermediate_size=INTERMEDIATE)


def qwen3_vl_moe() -> dict[str, Any]:
    return base_config(
        "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", num_experts=E, moe_intermediate_size=INTERMEDIATE
    )


def qwen3_5_moe(**extra: Any) -> dict[str, Any]:
    sizes = {"num_experts": E, "moe_intermediate_size": INTERMEDIATE, "layer_types": ["full_attention"], **extra}
    return base_config("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", **sizes)


def qwen3_5_moe_text() -> dict[str, Any]:
    """The text model alone, which vLLM has as a class of its own."""
    sizes = {"num_experts": E, "moe_intermediate_size": INTERMEDIATE, "layer_types": ["full_attention"]}
    return base_config("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **sizes, mtp_num_hidden_layers=1)


def mixtral() -> dict[str, Any]:
    return base_config("mixtral", "MixtralForCausalLM", num_local_experts=E, intermediate_size=INTERMEDIATE)


def phimoe() -> dict[str, Any]:
    return base_config("phimoe", "PhiMoEForCausalLM", num_local_experts=E, intermediate_size=INTERMEDIATE)


def granitemoe() -> dict[str, Any]:
    return base_config("granitemoe", "GraniteMoeForCausalLM", num_local_experts=E, intermediate_size=INTERMEDIATE)


def gpt_oss() -> dict[str, Any]:
    return base_config("gpt_oss", "GptOssForCausalLM", num_local_experts=E, intermediate_size=INTERMEDIATE)


def deepseek_v3() -> dict[str, Any]:
    sizes = {"n_routed_experts": E, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 32}
    routing = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_experts_per_tok": 2}
    return base_config("deepseek_v3", "DeepseekV3ForCausalLM", **sizes, **routing)


def nemotron_h() -> dict[str, Any]:
    sizes = {"n_routed_experts": E, "moe_intermediate_size": INTERMEDIATE, "layers_block_type": ["moe"]}
    return base_config("nemotron_h", "NemotronHForCausalLM", **sizes)


def llama4() -> dict[str, Any]:
    sizes = {"num_local_experts": E, "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 32}
    return base_config("llama4", "Llama4ForConditionalGeneration", **sizes)


def llama4_text() -> dict[str, Any]:
    sizes = {"num_local_experts": E, "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 32}
    return base_config("llama4_text", "Llama4ForCausalLM", **sizes)


@dataclass(frozen=True)
class Lora:
    """Factors of one layer's experts: role -> A "E r in", B "E out r"; "gate_up" for "gate" and "up" where fused."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def updates(self, scaling: float = ALPHA / RANK, *, interleaved: bool = False) -> Updates:
        """(layer 0, expert, role) -> scaling * B @ A in float64."""
        found: Updates = {}
        for role in self.A:
            product = scaling * self.B[role].double() @ self.A[role].double()
            parts = {role: product}
            if role == "gate_up" and interleaved:
                parts = {"gate": product[:, ::2], "up": product[:, 1::2]}
            elif role == "gate_up":
                parts = dict(zip(("gate", "up"), product.chunk(2, dim=1), strict=True))
            found.update({(0, e, name): part[e] for name, part in parts.items() for e in range(product.shape[0])})
        return found


def lora(*roles: str, rank: int = RANK, seed: int = 0) -> Lora:
    """Random factors of the given roles."""
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for role in roles or ROLES:
        inputs, outputs = (INTERMEDIATE, HIDDEN) if role == "down" else (HIDDEN, INTERMEDIATE)
        outputs = 2 * outputs if role == "gate_up" else outputs
        A[role] = torch.randn(E, rank, inputs, generator=generator)
        B[role] = torch.randn(E, outputs, rank, generator=generator)
    return Lora(A, B)


def shared_A(factors: Lora) -> Lora:
    """The same with up's A set to gate's, as it comes out of a fused gate_up."""
    return Lora({**factors.A, "up": factors.A["gate"]}, factors.B)


def per_expert(factors: Lora, path: str, names: Mapping[str, str] = HF) -> dict[str, Tensor]:
    """2-D tensors `base_model.model.{path}.{e}.{name}.lora_{A,B}.weight`."""
    found = {}
    for role in factors.A:
        for e in range(E):
            key = f"base_model.model.{path}.{e}.{names[role]}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = factors.A[role][e], factors.B[role][e]
    return found


def stacked(factors: Lora, pattern: str, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """3-D tensors; `pattern` is formatted with the role, or with its name where there are names."""
    found = {}
    for role in factors.A:
        key = f"base_model.model.{pattern.format(names[role] if names else role)}"
        found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = factors.A[role], factors.B[role]
    return found


def flat(factors: Lora, path: str, *, packing: str = "rank_major", orientation: str = "linear") -> dict[str, Tensor]:
    """PEFT's flat pairs of "gate_up" (`{path}.base_layer`) and "down" (`{path}`); shapes as in `layout.py`."""
    found = {}
    for role, suffix in (("gate_up", ".base_layer"), ("down", "")):
        if role not in factors.A:
            continue
        A, B = factors.A[role], factors.B[role]
        if orientation == "reversed":
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        order = (1, 2, 0) if packing == "rank_major" else (1, 0, 2)
        key = f"base_model.model.{path}{suffix}"
        found[f"{key}.lora_A.weight"] = A.reshape(-1, A.shape[2])
        found[f"{key}.lora_B.weight"] = B.permute(order).reshape(B.shape[1], -1)
    return found


def without(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The tensors whose name has none of the parts."""
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(HF.values()), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}), encoding="utf-8")
    return folder


def assert_updates(found: Updates, wanted: Updates) -> None:
    """The same keys, and the same matrices to float32, in which SGLang folds the scaling."""
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def differs(found: Updates, wanted: Updates) -> bool:
    """Same keys, another update."""
    return set(found) == set(wanted) and any(not torch.allclose(found[key], wanted[key]) for key in wanted)
