"""`add_weighted_adapter` on experts, which PEFT refuses: what it does with the flat factors is that of one wide expert.

Its sums of factors, "linear" and what prunes before it, go element by element and are the same in any layout. "cat" has
to join the ranks of each expert, and what ends on "svd" to decompose the update of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import layout
from ..errors import ParallelismError
from ..layout import ExpertLora
from ..model.experts import stored_transposed
from ..model.probe import installed_rule
from ..model.wrappers import is_dtensor, is_param_wrapper, read_adapter
from .matching import orientation_of

__all__ = ["add_weighted_adapter", "check_add_weighted_adapter", "svd_weighted_adapter"]


def check_add_weighted_adapter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraModel._check_add_weighted_adapter`, without its refusal of parameters."""

    @wraps(stock)
    def replacement(self: Any, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        with _without_parameters([self.peft_config[name] for name in adapters if name in self.peft_config]):
            return stock(self, adapters, *args, **kwargs)

    return replacement


@contextmanager
def _without_parameters(configs: Sequence[Any]) -> Iterator[None]:
    before = [config.target_parameters for config in configs]
    try:
        for config in configs:
            config.target_parameters = None
        yield
    finally:
        for config, targets in zip(configs, before, strict=True):
            config.target_parameters = targets


@contextmanager
def _parameters_of_all(configs: dict[str, Any], adapters: Sequence[str]) -> Iterator[None]:
    """Of linear layers the new adapter has those of all. Of parameters it would have the first config's alone."""
    known = [configs[name] for name in adapters if name in configs]
    named = list(dict.fromkeys(name for config in known for name in config.target_parameters or ()))
    if not named or len(known) < len(adapters):  # PEFT refuses names that it does not know
        yield
        return
    configs[adapters[0]] = copy.copy(known[0])
    configs[adapters[0]].target_parameters = named
    try:
        yield
    finally:
        configs[adapters[0]] = known[0]


def add_weighted_adapter(stock: Callable[..., None]) -> Callable[..., None]:
    """`LoraModel.add_weighted_adapter`, which joins ranks as of one wide expert, and takes its scaling for 1."""

    @wraps(stock)
    def replacement(
        self: Any, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        there = adapter_name in self.peft_config
        _check_whole(self.model, adapters)
        with _parameters_of_all(self.peft_config, adapters):
            stock(self, adapters, weights, adapter_name, combination_type, *args, **kwargs)
        for wrapper in () if there else self.model.modules():
            if not (is_param_wrapper(wrapper) and adapter_name in wrapper.lora_A and wrapper.num_experts > 1):
                continue
            if combination_type == "cat" and len(adapters) > 1:
                weighted = [
                    (_read(wrapper, a), w) for a, w in zip(adapters, weights, strict=True) if a in wrapper.lora_A
                ]
                joined = layout.concat([ExpertLora(x.A, x.B, x.scaling * weight) for x, weight in weighted])
                factors = joined.A, joined.B * joined.scaling
                linears = wrapper.lora_A[adapter_name], wrapper.lora_B[adapter_name]
                for linear, flat in zip(linears, _flat(wrapper, *factors, wrapper.r[adapter_name]), strict=True):
                    linear.weight.data.copy_(flat)
            wrapper.lora_B[adapter_name].weight.data /= wrapper.scaling[adapter_name]  # not 1 with rsLoRA

    return replacement


def svd_weighted_adapter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraModel._svd_generalized_task_arithmetic_weighted_adapter`, of every expert as of a linear layer."""

    @wraps(stock)
    def replacement(
        self: Any, combination_type: str, adapters: list[str], weights: list[float], new_rank: int, target: Any,
        target_lora_A: Tensor, target_lora_B: Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = combination_type, adapters, weights, new_rank
        if not is_param_wrapper(target) or target.num_experts == 1:
            return stock(self, *given, target, target_lora_A, target_lora_B, *args, **kwargs)
        deltas = {name: _read(target, name).delta().float() for name in adapters if name in target.lora_A}
        A, B = [], []
        for expert in range(target.num_experts):
            linear = SimpleNamespace(
                lora_A=deltas,
                lora_embedding_A={},
                scaling=dict.fromkeys(deltas, 1.0),  # which PEFT before 0.21 multiplies to an update that has it
                get_delta_weight=lambda name, e=expert: deltas[name][e],
            )
            thin = {**kwargs, "full_matrices": False}  # the same numbers, and of any rank
            of_A, of_B = stock(self, *given, linear, target_lora_A, target_lora_B, *args, **thin)
            A.append(of_A)
            B.append(of_B)
        flat = _flat(target, torch.stack(A), torch.stack(B), new_rank)
        return tuple(factor.to(like.dtype) for factor, like in zip(flat, (target_lora_A, target_lora_B), strict=True))

    return replacement


def _check_whole(model: Any, adapters: Sequence[str]) -> None:
    """Raises `ParallelismError`, before anything is made."""
    held = (module.lora_A for module in model.modules() if is_param_wrapper(module))
    if any(is_dtensor(lora_A[name].weight) for lora_A in held for name in adapters if name in lora_A):
        raise ParallelismError(
            "add_weighted_adapter needs whole adapters, but these are spread over ranks with the experts. Combine them "
            "in a process that holds the whole model, and save the result."
        )


def _read(wrapper: Any, adapter_name: str) -> ExpertLora:
    transposed = stored_transposed(wrapper.get_base_layer(), wrapper.parameter_name)
    return read_adapter(wrapper, adapter_name, transposed, installed_rule(), None).canonical()


def _flat(wrapper: Any, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A "E r in" and B "E out r" as the wrapper holds an adapter of that rank, which may be more than r."""
    missing = rank - A.shape[1]
    whole = ExpertLora(pad(A, (0, 0, 0, missing)), pad(B, (0, missing)))
    lora_A, lora_B = layout.to_flat(whole, orientation=orientation_of(wrapper))
    return lora_A.contiguous(), lora_B.contiguous()
