"""What is known of an experts module: its true orientation, its projections, and whether its forward can be taken over.

A module's true orientation is what the user declared for it, else its own `is_transposed`, else a table of the
transformers classes that hold `(E, in, out)` without saying so. It is never inferred from shapes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import LayoutError
from ..families import FLAT_CLASSES, PACKED_CLASSES, UNDECLARED_CLASSES
from .weights import FP8_MODULE, format_of

__all__ = [
    "REGISTRIES",
    "REGISTRY_MODULE",
    "bare",
    "constant_when_compiled",
    "declare_layout",
    "dispatching_registry",
    "features",
    "held_parameters",
    "is_transposed",
    "projections",
    "routed_experts",
    "stored_shape",
    "stored_transposed",
    "strip_base_layer",
    "up_name",
]

REGISTRY_MODULE = "transformers.integrations.moe"
# The modules of transformers that hold a registry of experts forwards -> its name there.
REGISTRIES = {REGISTRY_MODULE: "ALL_EXPERTS_FUNCTIONS", FP8_MODULE: "ALL_FP8_EXPERTS_FUNCTIONS"}

_DECLARED_ATTRIBUTE = "_peft_moe_compat_is_transposed"


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """As `torch.compiler.assume_constant_result`, which imports all of dynamo, and triton where it is, to set this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def declare_layout(cls_or_module: type[nn.Module] | nn.Module, *, is_transposed: bool | None) -> None:
    """States how the expert weights of a class, or of one module, are stored.

    For third-party experts that do not declare `is_transposed`, and for weights that another library has turned into
    grouped-mm layout without saying so. A declaration wins over the module's own attribute, and one for a module over
    one for its class. It is kept as an attribute of what it was said of, and so goes where a copy or pickle goes.

    Args:
        cls_or_module: The experts class or one experts module (not a PEFT wrapper around it).
        is_transposed: True for weights "E in out", False for "E out in", None to take an earlier declaration back.

    Raises:
        LayoutError: Not an `nn.Module`, a PEFT wrapper, or `is_transposed` of another type.
    """
    cls = cls_or_module if isinstance(cls_or_module, type) else type(cls_or_module)
    if not issubclass(cls, nn.Module):
        raise LayoutError(f"declare_layout needs an experts class or module, but got {cls_or_module!r}.")
    if hasattr(cls_or_module, "get_base_layer"):
        raise LayoutError(f"declare_layout got a PEFT wrapper, {cls.__name__}: pass wrapper.get_base_layer() instead.")
    if not (is_transposed is None or isinstance(is_transposed, bool)):
        raise LayoutError(f"is_transposed is {is_transposed!r}; True, False or None was expected.")
    setattr(cls_or_module, _DECLARED_ATTRIBUTE, is_transposed)


def _is_transformers_class(cls: type) -> bool:
    return cls.__module__.startswith("transformers.models.")


def is_transposed(module: nn.Module) -> bool | None:
    """Whether the module's expert weights are "E in out" (True) or "E out in" (False); None where nobody said."""
    # Not through nn.Module's own lookup, which is slow where there is nothing: this is asked at every forward.
    declared = vars(module).get(_DECLARED_ATTRIBUTE, getattr(type(module), _DECLARED_ATTRIBUTE, None))
    if declared is not None:
        return bool(declared)
    own = getattr(module, "is_transposed", None)
    if isinstance(own, bool):
        return own
    # Along the bases, since parametrising a module gives it a class of its own.
    known = (UNDECLARED_CLASSES.get(c.__name__) for c in type(module).__mro__ if _is_transformers_class(c))
    return next((value for value in known if value is not None), None)


@constant_when_compiled
def dispatching_registry(cls: type[nn.Module]) -> str | None:
    """The module of the registry in which `cls.forward`, made by `@use_experts_implementation`, looks its function up.

    None for a class with a forward of its own, a subclass included, and for one on a registry not in `REGISTRIES`.
    """
    return _registry_of(cls.forward)


@cache
def _registry_of(forward: Any) -> str | None:
    """Of a class's forward, which keeps what its decorator closed over."""
    if getattr(forward, "__globals__", {}).get("__name__") != REGISTRY_MODULE:
        return None
    free = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "experts_interface" not in free:
        return REGISTRY_MODULE  # transformers 5.0 has this one only
    registry = free["experts_interface"].cell_contents
    held = ((module, getattr(sys.modules.get(module), name, None)) for module, name in REGISTRIES.items())
    return next((module for module, known in held if known is registry), None)


def stored_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Shape of an expert parameter as stored, None where the module has no tensor of that name.

    Reads a parametrised (quantised) weight's shape through attribute access; ZeRO-3 keeps it in `ds_shape`.
    """
    row = format_of(module, name)
    if row is not None and (shape := row.shape(module, name)) is not None:
        return shape
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        return None
    return tuple(getattr(weight, "ds_shape", weight.shape))


def stored_transposed(module: nn.Module, name: str) -> bool:
    """Whether a parameter is "E in out" as PEFT takes it: what nobody said, and a matrix, count as "E out in"."""
    shape = stored_shape(module, name)
    return bool(is_transposed(module)) and not (shape is not None and len(shape) == 2)


def features(module: nn.Module, name: str) -> tuple[int, int]:
    """(in, out) of an expert parameter, read as `stored_transposed` says."""
    shape = stored_shape(module, name)
    if shape is None:
        raise LayoutError(f"{type(module).__name__} has no weight {name!r}, which is targeted.")
    return (shape[-2], shape[-1]) if stored_transposed(module, name) else (shape[-1], shape[-2])


def held_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters a module holds itself, those under `torch.nn.utils.parametrize` included."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    return names + list(getattr(module, "parametrizations", ()))


def up_name(module: Any) -> str:
    """The parameter that stands before the activation; transformers 5.0 knows gated experts only."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's routed expert weights, in the order of the computation; empty for any other module."""
    cls = type(module)
    flat = FLAT_CLASSES.get(cls.__name__) if _is_transformers_class(cls) else None
    if flat is not None:
        return flat
    if cls.__name__ in PACKED_CLASSES:
        return PACKED_CLASSES[cls.__name__]
    decorated = hasattr(cls, "_apply_gate") and hasattr(module, "is_transposed")
    held = held_parameters(module)
    names = ("gate_up_proj", "up_proj", "down_proj") if decorated else held
    if not decorated and is_transposed(module) is None and not re.search(r"Experts?(Gemm)?$", cls.__name__):
        return ()
    return tuple(n for n in names if n in held and len(stored_shape(module, n) or ()) == 3)


def routed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """(name, experts module, its projections) for every stack of routed experts, PEFT wrappers looked through.

    Shared experts run on every token and are left out: they are the modules whose own name says "shared".
    """
    for name, module in model.named_modules():
        if hasattr(module, "get_base_layer"):
            continue
        clean = strip_base_layer(name)
        if "shared" in clean.rpartition(".")[2]:
            continue
        found = projections(module)
        if found:
            yield clean, module, found


def bare(model: Any) -> nn.Module:
    """The model inside a PeftModel: what PEFT matches, and names in adapter files, are relative to it."""
    if not hasattr(model, "get_base_model"):
        found: nn.Module = model
        return found
    try:
        return model.get_base_model()  # type: ignore[no-any-return]
    except KeyError:  # it asks the active adapter, which has been deleted
        return model.base_model.model  # type: ignore[no-any-return]


def strip_base_layer(name: str) -> str:
    """A module's name as it was before PEFT wrapped it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
