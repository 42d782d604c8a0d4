"""Loads models with their experts packed as they were published, by transformers' own registry of quantisers.

The one module here that imports transformers when it is imported: it is reached by the public name alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from ..errors import ParallelismError, PeftMoeCompatError
from .mxfp4 import hold_packed

__all__ = ["PackedMxfp4Config"]

_METHOD = "mxfp4_packed"
_STACKS = ("gate_up_proj", "down_proj")
# In a checkpoint -> in the experts module.
_NAMES = {
    f"{name}_{published}": f"parametrizations.{name}.{held}"
    for name in _STACKS
    for published, held in (("blocks", "original"), ("scales", "0.scales"))
}


class PackedMxfp4Config(Mxfp4Config):  # type: ignore[misc]
    """For `from_pretrained` of a checkpoint in MXFP4: its experts stay packed, and LoRA trains on them.

    Needs neither a GPU nor the package `kernels`. The stacks remain readable, dequantised, as attributes of the experts
    modules; `save_pretrained` writes the published blocks and scales, and the config it was loaded with.

    Raises:
        PeftMoeCompatError: transformers 4, whose loader cannot be told so.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = peft_moe_compat.PackedMxfp4Config()
        >>> model = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b", quantization_config=config)
    """

    def __init__(self) -> None:
        if not hasattr(HfQuantizer, "get_weight_conversions"):
            raise PeftMoeCompatError(
                "PackedMxfp4Config needs transformers 5.0 or newer, whose quantisers can say how a checkpoint is "
                f"loaded; transformers {transformers.__version__} is installed. Update it, or load the model with "
                "Mxfp4Config(dequantize=True)."
            )
        super().__init__()
        self.quant_method = _METHOD

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers puts over the checkpoint's own config; by its `quant_method` it finds the quantiser."""
        return {"dequantize": False, "quant_method": _METHOD}


# `AutoHfQuantizer.merge_quantization_configs` takes a config for a checkpoint by the name of its class.
PackedMxfp4Config.__name__ = Mxfp4Config.__name__


@register_quantizer(_METHOD)
class PackedMxfp4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Leaves room for blocks and scales in gpt-oss's own experts modules, and has the loader fill it."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise PeftMoeCompatError(
                "PackedMxfp4Config is for checkpoints published in MXFP4, whose config.json has a quantization_config; "
                "this one has none. Load it without the config."
            )
        # What is saved with the model is the published config again.
        self.quantization_config.quant_method = QuantizationMethod.MXFP4

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        others = self.quantization_config.modules_to_not_convert
        found = [m for n, m in model.named_modules() if _is_gpt_oss(m) and should_convert_module(n, others)]
        if not found:
            raise PeftMoeCompatError(
                f"PackedMxfp4Config is for gpt-oss: {type(model).__name__} has no GptOssExperts to keep packed. Load "
                "it with Mxfp4Config(dequantize=True)."
            )
        for experts in found:
            for name in _STACKS:
                hold_packed(experts, name)
            experts._is_hf_initialized = True  # to initialise a stack, transformers would dequantise it

    def get_weight_conversions(self) -> list[Any]:
        """The published names of blocks and scales, and those in the module: renamed to load, and back to save."""
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(published, held) for published, held in _NAMES.items()]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Under the published names already: transformers 5.0 cannot sort "0.scales" beside "original" to rename them.

        What is offloaded to a disk has to be found there by its name in the model, and is renamed afterwards.
        """
        state = model.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            return None, {}
        for published, held in _NAMES.items():
            state = {key.replace(held, published): tensor for key, tensor in state.items()}
        return state, {}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if getattr(model, "_device_mesh", None) is not None:
            raise ParallelismError(
                "Experts packed in MXFP4 were loaded with a plan that spreads them over ranks (tp_plan or "
                "distributed_config), which would have to spread blocks and scales alike. Load them without one, and "
                "train with DistributedDataParallel or FSDP2; or dequantised, with Mxfp4Config(dequantize=True)."
            )
        if missing := list(_missing(model)):
            raise PeftMoeCompatError(
                f"The checkpoint has nothing for {len(missing)} tensors of experts, {missing[0]} first. Of gpt-oss as "
                f"it is published, {', '.join(_NAMES)} and biases were expected in every layer."
            )

    def _dequantize(self, *_: Any, **__: Any) -> None:
        raise PeftMoeCompatError("Load the model with Mxfp4Config(dequantize=True) to have its experts dequantised.")

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _is_gpt_oss(module: nn.Module) -> bool:
    return type(module).__name__ == "GptOssExperts"


def _missing(model: nn.Module) -> Iterator[str]:
    """The tensors of packed experts that the loader has not filled; it marks those that it has.

    Not of what accelerate has put elsewhere, where marks may be lost.
    """
    for path, experts in model.named_modules():
        if "parametrizations" not in experts._modules or hasattr(experts, "_hf_hook"):
            continue
        for name, tensor in (*experts.named_parameters(), *experts.named_buffers()):
            if not getattr(tensor, "_is_hf_initialized", False):
                yield f"{path}.{name}"
