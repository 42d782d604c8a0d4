"""The forward of a wrapped experts module: ParamWrappers hand their factors down, a registered function takes them.

What cannot run fast goes to PEFT's own forward. No state is kept on any module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, ParallelismError, PeftMoeCompatError
from ..forward.layer import experts_forward
from ..forward.undecorated import FORWARDS
from ..model.experts import REGISTRIES, REGISTRY_MODULE, is_transposed
from ..model.probe import installed_rule
from ..model.sharding import (
    check_zero3,
    exchanges_tokens,
    local_experts,
    refuse_native,
    refuse_quantised,
)
from ..model.wrappers import (
    TAKES_LORA,
    active_adapters,
    dropout_of,
    experts_of,
    experts_reason,
    is_param_wrapper,
    parameter_reason,
)
from ..releases import LayoutRule
from .dropout import no_dropout
from .handed_down import ROUTED, Handover, carried, forward_of_samples
from .reach import TAKEN_FROM_US, passed_by, warn_of
from .reach import state as reach

__all__ = ["KEYWORD", "experts_registry", "own_forward", "registered_forward", "wrapper_forward"]

KEYWORD = "expert_lora"
# Other names the experts classes' own forwards use for their arguments (gpt_oss, openai_privacy_filter).
_ARGUMENT_ALIASES = {"router_indices": "top_k_index", "routing_weights": "top_k_weights"}
# What dbrx calls its routing, in transformers 5 and 4.
_ROUTING = ("top_k_index", "top_experts"), ("top_k_weights", "top_weights")


def experts_registry(module: str = REGISTRY_MODULE) -> Any:
    """transformers' `ALL_EXPERTS_FUNCTIONS`, or that of FP8 experts; None where there is none (transformers 4)."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:  # that of FP8 experts also lacks triton, which it needed up to transformers 5.5
        if module == REGISTRY_MODULE and error.name != module:
            raise
        return None
    return getattr(found, REGISTRIES[module], None)


def wrapper_forward(peft_forward: Any) -> Any:
    """What goes in the place of `ParamWrapper.forward`, around the one of the installed PEFT.

    One function as long as that and the rule are the same: who has kept it comes to it in the next activation too.
    """
    return _wrapper_forward(peft_forward, installed_rule())


@cache
def _wrapper_forward(peft_forward: Any, rule: LayoutRule) -> Any:
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`ParamWrapper.forward` with peft_moe_compat active: hands itself down, or falls back to PEFT's own."""
        if reach.asks and passed_by(self):
            return peft_forward(self, x, *args, **kwargs)
        of_sample = kwargs.pop("adapter_names", None)
        if of_sample is not None and self.merged:
            raise LayoutError("adapter_names needs adapters that are not merged: call model.unmerge_adapter() first.")
        if self.disable_adapters or self.merged:
            return peft_forward(self, x, *args, **kwargs)
        handover: Any = kwargs.get(KEYWORD)
        outermost = handover is None
        reason = None
        if outermost:
            handover = Handover(experts_of(self), rule)
            handover.of_sample = of_sample
            reason = experts_reason(handover.experts, handover.is_transposed)
        experts = handover.experts
        if reason := reason or parameter_reason(self, experts):
            if reason.code in TAKEN_FROM_US:
                warn_of(reason)
            refuse_native(experts, reason)
            if any(dropout_of(self, name) for name in active_adapters(self)):
                raise LayoutError(no_dropout(self.parameter_name, reason))
            if of_sample is not None:
                raise LayoutError(
                    f"adapter_names needs the grouped forward, but the LoRA of {self.parameter_name!r} runs in PEFT's "
                    f"own: {reason}."
                )
            return peft_forward(self, x, *args, **kwargs)
        check_zero3(self, x)
        if handover.of_sample is None:
            names = active_adapters(self)
        else:
            names = [name for name in dict.fromkeys(handover.of_sample) if name in self.lora_A]
            if handover.exchanges:
                raise ParallelismError("adapter_names needs all tokens where they were, but experts exchange them.")
        if not names and handover.of_sample is None:
            return peft_forward(self, x, *args, **kwargs)
        refuse_quantised(experts, self.parameter_name)
        # Asked here, since the exchange of tokens has the experts module hold its local tensors.
        handover.wrappers.append((self, names, local_experts(experts, self.parameter_name)))
        kwargs[KEYWORD] = handover
        base_layer = self._modules["base_layer"]
        if handover.exchanges and base_layer is experts:
            del kwargs[KEYWORD]
            token = carried.set(handover)
            try:
                result = base_layer(x, *args, **kwargs)
            finally:
                carried.reset(token)
        else:
            result = base_layer(x, *args, **kwargs)
        if outermost and not handover.arrived:
            raise PeftMoeCompatError(
                f"{type(self.get_base_layer()).__name__} ran without its LoRA: a hook or wrapper on it dropped the "
                f"keyword argument {KEYWORD!r}. Let it pass keyword arguments on, or call peft_moe_compat.deactivate()."
            )
        return result

    setattr(forward, TAKES_LORA, True)
    return forward


def _narrower(experts: Any, hidden_states: Tensor) -> bool:
    """Whether hidden states are float32 and the stacks are not: left so by `kbit`, or packed from half precision."""
    if hidden_states.dtype != torch.float32 or is_transposed(experts) is None:
        return False
    weight, packed = experts._parameters.get("down_proj"), experts._modules.get("parametrizations", {})
    if "down_proj" in packed:
        weight = packed["down_proj"][0]
        weight = getattr(weight, "quant_state", weight)
    return getattr(weight, "dtype", None) in (torch.bfloat16, torch.float16)


def registered_forward(stock: Any) -> Any:
    """The registry entry that consumes the factors; without any it is transformers' own function.

    But for experts narrower than what they are given, which some of those functions cannot multiply.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        exchanges, names = exchanges_tokens(self), None
        handover: Any = carried.get() if exchanges else kwargs.pop(KEYWORD, None)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if handover is not None:
            handover.arrived = True
            names = handover.check_samples(hidden_states.shape[0])
        elif exchanges or not _narrower(self, hidden_states):
            return stock(self, *args, **kwargs)
        else:
            handover = {}
        named = {_ARGUMENT_ALIASES.get(key, key): value for key, value in kwargs.items()}
        if names is None:
            index = args[1] if len(args) > 1 else named["top_k_index"]
            if isinstance(handover, Handover):
                named["places"] = handover.places(index)
            return experts_forward(self, handover, *args, **named)
        given = dict(zip(ROUTED, args, strict=False)) | named
        return forward_of_samples(self, handover, names, *(given[name] for name in ROUTED))

    setattr(forward, TAKES_LORA, True)
    return forward


def own_forward(kind: str) -> Callable[[Any], Any]:
    """For the forward of a class that transformers does not decorate, and that consumes the factors then."""
    if kind == "around_matrices":
        return _around_matrices
    run = FORWARDS[kind]

    def make(stock: Any) -> Any:
        @wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            handover = kwargs.pop(KEYWORD, None)
            if handover is None:
                # Matrices are routed to by `_around_matrices` alone, whether a LoRA is at work or not.
                routed = kind == "matrices" and "top_k_index" in kwargs
                return run(self, {}, *args, **kwargs) if routed else stock(self, *args, **kwargs)
            if handover.of_sample is not None:
                raise LayoutError(f"adapter_names does not reach {type(self).__name__}, whose forward is its own.")
            handover.arrived = True
            return run(self, handover, *args, **kwargs)

        setattr(forward, TAKES_LORA, True)
        return forward

    return make


def _around_matrices(stock: Any) -> Any:
    """For the forward of the class that reads the matrices of `self.mlp`, which a wrapper around that does not have."""
    names = list(signature(stock).parameters)
    index, weights = (next(n for n in names if n in known) for known in _ROUTING)

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if reach.forward is None or not is_param_wrapper(self.mlp):
            return stock(self, *args, **kwargs)
        given = dict(zip(names, (self, *args), strict=False)) | kwargs
        x = given[names[1]]
        routed = {"top_k_index": given[index], "top_k_weights": given[weights]}
        return self.mlp(x.reshape(-1, x.shape[-1]), **routed).view(x.shape)

    setattr(forward, TAKES_LORA, True)
    return forward
