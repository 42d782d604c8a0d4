"""Experts packed by bitsandbytes: while a model loads, by a config, or in one that is loaded already.

Imports transformers, and is reached by its public names alone, and by `registering`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import transformers
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import register_quantization_config

from ..errors import NoExpertParametersError, ParallelismError, PeftMoeCompatError
from ..model.experts import bare, routed_experts
from ..model.weights import is_plain
from .packing import Packing, need_bitsandbytes, pack

# The registry of transformers 4 could take the quantiser as well, but its loader has nothing to ask it for.
_LOADS = importlib.util.find_spec("transformers.core_model_loading") is not None
if _LOADS:
    from .loading import METHOD, ExpertsQuantizer

__all__ = ["BitsAndBytesExpertsConfig", "quantize_experts"]


def _need_transformers_5() -> None:
    if not _LOADS:
        raise PeftMoeCompatError(
            f"Packing fused experts needs transformers 5.0 or newer, and {transformers.__version__} is installed: "
            "older ones hold the experts of most families as linear layers, which BitsAndBytesConfig packs."
        )


class BitsAndBytesExpertsConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """For `from_pretrained`: packs experts in fused weights as each is read, and linear layers as bitsandbytes does.

    transformers' `BitsAndBytesConfig` by itself leaves fused experts in bfloat16. A model that is saved so is loaded
    packed again, without a config.

    Args:
        experts: "nf4", "fp4" or "int8" (one scale for each row).
        linears: What becomes of linear layers; None leaves them as they are.
        double_quant: Whether the scales of 4-bit blocks are packed too: 0.52 instead of 0.56 bytes for a weight.
        blocksize: Weights to a block in 4 bits.

    Raises:
        PeftMoeCompatError: Not a format or blocksize of bitsandbytes; transformers 4.

    Example:
        >>> from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        >>> linears = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        >>> config = peft_moe_compat.BitsAndBytesExpertsConfig("nf4", linears=linears)
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", quantization_config=config)
    """

    def __init__(
        self,
        experts: str = "nf4",
        *,
        linears: BitsAndBytesConfig | None = None,
        double_quant: bool = False,
        blocksize: int = 64,
    ) -> None:
        _need_transformers_5()
        if not isinstance(linears, BitsAndBytesConfig | None):
            raise PeftMoeCompatError(
                f"linears is a {type(linears).__name__}; a BitsAndBytesConfig was expected, or None, which leaves "
                "linear layers as they are."
            )
        super().__init__()
        self.__dict__.update(vars(linears or BitsAndBytesConfig()))
        self.quant_method = METHOD
        self.packing = Packing(experts, double_quant, blocksize)
        self.linears = linears

    def to_dict(self) -> dict[str, Any]:
        packing = self.packing
        return {
            "quant_method": METHOD,
            "experts": packing.format,
            "double_quant": packing.double_quant,
            "blocksize": packing.blocksize,
            "linears": None if self.linears is None else self.linears.to_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        given = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if given.get("linears") is not None:
            given["linears"] = BitsAndBytesConfig.from_dict(given["linears"])
        config = cls(**given)
        return (config, kwargs) if return_unused_kwargs else config


if _LOADS:
    register_quantization_config(METHOD)(BitsAndBytesExpertsConfig)


def quantize_experts(
    model: nn.Module, experts: str = "nf4", *, double_quant: bool = False, blocksize: int = 64
) -> nn.Module:
    """Packs the experts of a loaded model in place, one stack after the other, on the device each is on.

    Args:
        model: Wrapped by PEFT or not, its linear layers packed by bitsandbytes or not; on the meta device what a stack
            is packed to is there as well.
        experts: See `BitsAndBytesExpertsConfig`, as for the rest.
        double_quant: As there.
        blocksize: As there.

    Returns:
        The model. A model of transformers saves its experts packed from here on.

    Raises:
        NoExpertParametersError: It has no fused experts that are not packed yet.
        ParallelismError: They are spread over ranks.
        PeftMoeCompatError: They are offloaded or trained, or the model was loaded with a quantiser other than
            bitsandbytes'; and what `BitsAndBytesExpertsConfig` raises.
    """
    _need_transformers_5()
    need_bitsandbytes()
    packing, base = Packing(experts, double_quant, blocksize), bare(model)
    stacks = [(path, m, name) for path, m, names in routed_experts(base) for name in names if is_plain(m, name)]
    if not stacks:
        raise NoExpertParametersError(
            f"{type(base).__name__} has no experts in fused weights that are not packed already."
        )
    loaded_with = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if loaded_with is not None and type(loaded_with) is not BitsAndBytesConfig:
        raise PeftMoeCompatError(
            f"{type(base).__name__} was loaded with {type(loaded_with).__name__}, which would save and load the packed "
            "experts in its own way. Load it without, or with BitsAndBytesConfig, and pack the experts then."
        )
    for path, module, name in stacks:
        _refuse(path, module, name)
    for _, module, name in stacks:
        pack(module, name, module.get_parameter(name).detach(), packing)
    if isinstance(base, transformers.PreTrainedModel):
        config = BitsAndBytesExpertsConfig(experts, linears=loaded_with, double_quant=double_quant, blocksize=blocksize)
        _saves_packed(base, ExpertsQuantizer(config, pre_quantized=True))
    return model


def _refuse(path: str, module: nn.Module, name: str) -> None:
    weight = module.get_parameter(name)
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
        raise ParallelismError(f"{path}.{name} is spread over ranks: pack experts before the model is sharded.")
    if weight.is_meta and getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise PeftMoeCompatError(f"{path}.{name} is offloaded: pack experts before the model is offloaded.")


def _saves_packed(model: Any, quantizer: Any) -> None:
    """What `from_pretrained` leaves on a model that it has loaded with this quantiser."""
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    model.config._is_quantized = True
