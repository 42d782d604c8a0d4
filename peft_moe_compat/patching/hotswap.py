"""PEFT's hot swap, right on experts too.

PEFT copies a lower rank over the first rows, which are those of other experts, matches patterns with the module's name
instead of the parameter's, and saves with the rank and alpha of before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from ..adapters.ranks import lora_numbers
from ..errors import ParallelismError
from ..model.wrappers import is_dtensor, is_param_wrapper
from .arguments import naming
from .displaced import notice
from .given import STATE_DICT, understand_tensors
from .loading import as_held, is_loading
from .matching import live_path

__all__ = ["hotswap_adapter_from_state_dict"]


def hotswap_adapter_from_state_dict(stock: Any) -> Any:
    """The function of that name, put right for models with LoRA on parameters."""
    needed = "model", "state_dict", "adapter_name", "config"
    named = naming(stock, *needed)

    @wraps(stock)
    def from_state_dict(*args: Any, **kwargs: Any) -> Any:
        notice()
        given = named(args, kwargs)
        if not given.keys() >= set(needed):
            return stock(*args, **kwargs)  # which says what is missing
        model, tensors, name = given["model"], given["state_dict"], given["adapter_name"]
        model = getattr(model, "_orig_mod", model)
        wrappers = {p: m for p, m in model.named_modules() if is_param_wrapper(m) and name in m.lora_A}
        if not wrappers:
            return stock(*args, **kwargs)
        if any(is_dtensor(wrapper.lora_A[name].weight) for wrapper in wrappers.values()):
            raise ParallelismError(
                "A hot swap copies into whole factors, but these are spread over ranks with the experts. Put the "
                "weights in place by set_peft_model_state_dict(model, whole_state_dict), on every rank."
            )
        if not is_loading():
            tensors = _as_held(model, name, given["config"], tensors)
            args, kwargs = (), {**given, "state_dict": tensors}
        held = dict(model.named_parameters())
        smaller = {n: t.clone() for n, t in tensors.items() if n in held and held[n].numel() > t.numel()}
        result = stock(*args, **kwargs)
        for tensor_name, tensor in smaller.items():
            held[tensor_name].data = tensor.to(held[tensor_name])
        config = given["config"].to_dict()
        for path, wrapper in wrappers.items():
            wrapper.r[name] = wrapper.lora_A[name].weight.shape[0] // wrapper.num_experts
            key = f"{live_path(path)}.{wrapper.parameter_name}"
            wrapper.scaling[name] = lora_numbers(config, key, wrapper.r[name]).scaling
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
            setattr(model.peft_config[name], field, config[field])
        return result

    return from_state_dict


def _as_held(model: Any, adapter_name: str, config: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors that come without a file as the live wrappers hold them; their names have the adapter's in them."""
    there = re.compile(rf"(\.lora_[AB])\.{re.escape(adapter_name)}\.weight$")
    plain = {there.sub(r"\1.weight", name): tensor for name, tensor in tensors.items()}
    file = understand_tensors(model, config, plain)
    held = None if file is None else as_held(model, adapter_name, file, lambda: plain, STATE_DICT)
    if held is None:
        return tensors
    return {re.sub(r"(\.lora_[AB])\.weight$", rf"\1.{adapter_name}.weight", n): t for n, t in held.items()}
