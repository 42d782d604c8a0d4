"""PEFT's two functions for state dicts without a file, which carry the layout of LoRA on experts and heed it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ..adapters.stamp import STAMP_KEY
from ..errors import LayoutError
from ..model.wrappers import is_param_wrapper
from .arguments import naming
from .arrival import check_fused
from .given import STATE_DICT, carrying, understand_tensors, whole
from .loading import as_held, is_loading
from .matching import differences, live_wrappers
from .saving import stamp_of

__all__ = ["get_peft_model_state_dict", "set_peft_model_state_dict"]


def get_peft_model_state_dict(stock: Any) -> Any:
    named = naming(stock, "model", "state_dict", "adapter_name")

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        found, model = stock(*args, **kwargs), named(args, kwargs)["model"]
        factors = {name: t for name, t in found.items() if whole(t) and t.ndim == 2}
        stamp = stamp_of(model, {name: tuple(tensor.shape) for name, tensor in factors.items()})
        if stamp is None:
            return found
        name = next(name for name in factors if ".lora_A." in name and any(path in name for path in stamp.modules))
        return carrying(found, name, STAMP_KEY, stamp.to_metadata()[STAMP_KEY])

    return replacement


def set_peft_model_state_dict(stock: Any) -> Any:
    named = naming(stock, "model", "peft_model_state_dict", "adapter_name")

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        given = named(args, kwargs)
        model: Any = given.get("model")
        adapter_name = given.get("adapter_name", "default")
        tensors: Mapping[str, Tensor] = given.get("peft_model_state_dict", {})
        file = None
        if not is_loading() and _on_experts(model, adapter_name):
            file = understand_tensors(model, model.peft_config[adapter_name], tensors)
        if file is None:
            return stock(*args, **kwargs)
        held, sharded = None, not all(map(whole, tensors.values()))
        if not sharded:
            held = as_held(model, adapter_name, file, lambda: tensors, STATE_DICT)
        elif said := set().union(*(differences(*m, file.decision) for m in live_wrappers(file, model, adapter_name))):
            raise LayoutError(
                f"A state dict of sharded tensors is not converted, and this one is laid out otherwise than the model: "
                f"{', and '.join(sorted(said))}. Load the adapter from a file that save_pretrained wrote."
            )
        result = stock(*args, **kwargs) if held is None else stock(**{**given, "peft_model_state_dict": held})
        if not sharded and not given.get("ignore_mismatched_sizes"):
            check_fused(file, model, adapter_name)
        return result

    return replacement


def _on_experts(model: Any, adapter_name: str) -> bool:
    wrappers: Any = filter(is_param_wrapper, model.modules() if isinstance(model, nn.Module) else ())
    return any(wrapper.num_experts > 1 and adapter_name in wrapper.lora_A for wrapper in wrappers)
