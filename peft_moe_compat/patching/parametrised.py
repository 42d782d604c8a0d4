"""LoRA on parametrised experts, made as on plain ones.

PEFT finds a parametrised weight by its full name alone, nests the wrappers of a module's weights in another order than
on a plain module, so that the same LoRA has other names in a file, and dequantises a stack whenever it wants its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from ..families import ROLE_ORDER, ROLES
from ..model.experts import dispatching_registry
from ..model.weights import format_of, read, stored_format
from ..model.wrappers import is_param_wrapper
from .matching import live_path
from .sharding import refuse_merge

__all__ = ["check_merge_allowed", "inject_parameters"]

_ORDER = {name: ROLE_ORDER.index(role) for name, role in ROLES.items()}


def inject_parameters(stock: Any) -> Any:
    """For `BaseTuner._inject_parameters`, which wraps the parameters that are targeted."""

    @wraps(stock)
    def replacement(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _plain(model):
            return stock(self, peft_config, model, *args, **kwargs)

    return replacement


def check_merge_allowed(stock: Any) -> Any:
    """For `LoraModel._check_merge_allowed`, which is asked before anything is merged.

    PEFT would add the update to a dequantised copy that nobody keeps, or to values before their scales.
    """

    @wraps(stock)
    def replacement(self: Any) -> None:
        stock(self)
        refuse_merge(self.model)
        for path, wrapper in self.model.named_modules():
            stored = is_param_wrapper(wrapper) and stored_format(wrapper.get_base_layer(), wrapper.parameter_name)
            if stored:
                raise AdapterError(
                    f"{live_path(path)}.{wrapper.parameter_name} is stored as {stored}, which PEFT cannot merge LoRA "
                    "into: the update would be lost. Save the adapter and merge it into the checkpoint, with "
                    "`peft-moe-compat merge BASE ADAPTER OUT`."
                )

    return replacement


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Parametrised weights of experts look like parameters, of the dequantised shape and no data.

    Of experts whose forward can be taken over: PEFT's own goes wrong on parametrised weights.
    """
    hidden = []
    try:
        for module in list(model.modules()):
            lists: Any = module._modules.get("parametrizations")
            names = set() if lists is None else set(lists._modules)
            if not names or names - _ORDER.keys() or dispatching_registry(type(module)) is None:
                continue
            stand_ins = {name: _stand_in(module, name) for name in names}
            parameters = dict(module._parameters)
            hidden.append((module, lists, parameters))
            # Where PEFT looks, and where the class's own property, without its parametrizations, makes torch look.
            del module._modules["parametrizations"]
            named = sorted((parameters | stand_ins).items(), key=lambda item: _ORDER.get(item[0], len(ROLE_ORDER)))
            module._parameters.clear()
            module._parameters.update(named)
        yield
    finally:
        for module, lists, parameters in hidden:
            module._modules["parametrizations"] = lists
            module._parameters.clear()
            module._parameters.update(parameters)


def _stand_in(module: Any, name: str) -> nn.Parameter:
    """A parameter of the shape, dtype and device that the weight is read with; one number."""
    held = module.parametrizations[name]
    row, state = format_of(module, name), getattr(held[0], "quant_state", held[0])
    shape, dtype = row.shape(module, name) if row is not None else None, getattr(state, "dtype", None)
    if shape is None or not isinstance(dtype, torch.dtype):
        weight = read(module, name, torch.get_default_dtype())
        shape, dtype = weight.shape, weight.dtype
    number = torch.zeros((), dtype=dtype, device=[*held.parameters(), *held.buffers()][0].device)
    return nn.Parameter(number.expand(shape), requires_grad=False)
