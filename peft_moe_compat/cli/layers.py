"""Experts layers of transformers with random weights, plain or packed: what `bench` measures."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import PeftMoeCompatError
from ..quantising.mxfp4 import hold_packed
from ..quantising.packing import Packing, held_tensors, need_bitsandbytes, pack, packed_stacks

__all__ = ["FORMATS", "Shape", "held_mib", "make_experts"]

_STD = 0.02
_TORCHAO = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-float8": "Float8WeightOnlyConfig"}
_PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Experts, experts per token, hidden size, intermediate size."""

    E: int
    k: int
    H: int
    I: int  # noqa: E741 (the letter of the shape legend)


def _bitsandbytes(experts: nn.Module, stored: str) -> nn.Module:
    need_bitsandbytes()
    for name in _PROJECTIONS:
        pack(experts, name, experts.get_parameter(name).detach(), Packing(stored))
    return experts


def _torchao(experts: nn.Module, stored: str) -> nn.Module:
    if importlib.util.find_spec("torchao") is None:
        raise PeftMoeCompatError(f"--format {stored} needs torchao, which is not installed: pip install torchao.")
    upstream = importlib.import_module("torchao.quantization")
    config = getattr(upstream, _TORCHAO[stored])
    upstream.quantize_(experts, upstream.FqnToConfig({name: config() for name in _PROJECTIONS}), filter_fn=None)
    return experts


def _fp8(experts: nn.Module, _: str) -> nn.Module:
    """transformers' class for fine-grained FP8, as its loader makes it, with blocks of 128 x 128 where they fit."""
    try:
        from transformers.integrations import finegrained_fp8 as upstream

        Experts, functions = upstream.FP8Experts, upstream.ALL_FP8_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError) as error:  # of an older release, or without triton
        raise PeftMoeCompatError(f"--format fp8 needs FP8Experts of a newer transformers: {error}.") from error
    config: Any = experts.config
    block = min(128, config.hidden_size, config.moe_intermediate_size)
    decorated = upstream.use_experts_implementation(experts_class=Experts, experts_interface=functions)
    with next(experts.parameters()).device:
        packed: nn.Module = decorated(config, block_size=(block, block))
    for name in _PROJECTIONS:
        weight = packed.get_parameter(name)
        weight.data = torch.randn(weight.shape, device=weight.device, dtype=torch.bfloat16).to(weight.dtype)
        packed.get_parameter(f"{name}_scale_inv").data.fill_(_STD)
    return packed


def _mxfp4(experts: nn.Module, _: str) -> nn.Module:
    for name in _PROJECTIONS:
        hold_packed(experts, name)
        held = dict(experts.named_parameters()) | dict(experts.named_buffers())
        held[f"parametrizations.{name}.original"].random_(0, 256)
        held[f"parametrizations.{name}.0.scales"].fill_(127 - 7)  # 2 ** -7, times 2.9 on average
    return experts


# --format -> packs plain experts, or makes others like them.
FORMATS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "nf4": _bitsandbytes,
    "fp4": _bitsandbytes,
    "int8": _bitsandbytes,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "torchao-int8": _torchao,
    "torchao-float8": _torchao,
}


def make_experts(shape: Shape, dtype: torch.dtype, device: str, kind: str, *, packed: bool) -> nn.Module:
    """Experts of Qwen3-MoE, or of gpt-oss for MXFP4, which no other class is published in; frozen.

    Args:
        shape: Any.
        dtype: Of the weights before they are packed.
        device: Where they are made.
        kind: One of `FORMATS`, or "" for plain weights.
        packed: Whether they are packed; otherwise they are what would be.

    Raises:
        PeftMoeCompatError: What makes or packs them is not installed, or too old.
    """
    try:
        from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise PeftMoeCompatError(
            f"bench needs transformers 5.0 or newer, whose Qwen3-MoE has its experts in fused weights: {error}."
        ) from error
    config: Any
    if kind == "mxfp4":
        Experts: Any = modeling_gpt_oss.GptOssExperts
        config = configuration_gpt_oss.GptOssConfig(num_local_experts=shape.E, intermediate_size=shape.I)
    else:
        Experts = Qwen3MoeExperts
        config = Qwen3MoeConfig(num_experts=shape.E, moe_intermediate_size=shape.I)
    config.hidden_size, config.num_experts_per_tok = shape.H, shape.k
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts: nn.Module = Experts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=_STD).requires_grad_(False)
    return FORMATS[kind](experts, kind).requires_grad_(False) if packed else experts


def held_mib(model: nn.Module) -> float:
    """What the weights take, scales included, be it of experts alone."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    for _, module, name in packed_stacks(model):
        held += held_tensors(module, name).values()
    for tensor in [tensor for tensor in held if is_traceable_wrapper_subclass(tensor)]:
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        held += [getattr(tensor, name) for name in names]
    plain = [tensor for tensor in held if not is_traceable_wrapper_subclass(tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in plain}.values()) / 2**20
