"""From an experts module to the fused kernels: what they can run, their trial, and the hand-over."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import CompatWarning
from ..families import CLAMPED_CLASSES
from ..model.experts import REGISTRY_MODULE, constant_when_compiled, up_name
from ..model.packed import PackedWeight
from ..model.weights import FP8_MODULE, is_plain, packed, stored_format
from ..reasons import Reason, because
from .backend import chosen
from .grouped_mm import device_backend, fits_torch, sizes_fit_torch
from .kernels.interface import HeldProjection, Nonlinearity, on_device

__all__ = ["backend_of", "fastest", "fused_reason", "run_fused", "runs_fused"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Activations by their class; a plain function is known by its own name.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
}
_FP8_GATES = ("swiglu_alpha", "limit")  # attributes of FP8 experts that have another gate than the default
_TRIED_ON = ("cuda",)  # types of devices; triton's interpreter compiles nothing
_TRIAL_ERROR = 0.05  # of a tensor's largest entry; bfloat16 rounds each intermediate to 0.004, which adds up to 0.02

_given_up: dict[torch.device, Reason] = {}
_tried: dict[torch.device, set[tuple[Any, ...]]] = {}


@constant_when_compiled
def _device_reason(device: torch.device) -> Reason | None:
    """Why the fused kernels cannot run on a device, None where they can."""
    return _given_up.get(device) or _unsupported(device)


@cache
def _unsupported(device: torch.device) -> Reason | None:
    """The same of what does not change while a process runs."""
    if device.type == "cuda" and torch.version.hip is not None:
        return because("rocm")
    if importlib.util.find_spec("triton") is None:
        return because("no_triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return because("not_cuda")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return because("old_device")
    return None


@constant_when_compiled
def _trial_reason(device: torch.device, kind: tuple[Any, ...], rows: int) -> Reason | None:
    """Why a trial of the fused kernels on a device failed, None where it gave the numbers it should.

    The first question about a kind, of `kernels.kinds.kind_of`, tries all kernels that such a layer launches, so that
    one that cannot be built is found out before a backward needs it.
    """
    if device in _given_up:
        return _given_up[device]
    if kind in _tried.get(device, ()):
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return because("while_capturing")
    try:
        # A thread of its own has none of the caller's autocast, grad mode, saved-tensor hooks and dispatch modes.
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(_trial, device, kind, rows).result()
        if not error <= _TRIAL_ERROR:
            raise ArithmeticError(f"{kind[0][-1]} results of a trial are off by {error:.2g}")  # noqa: TRY301
    except torch.OutOfMemoryError:
        return because("no_memory")
    except Exception as error:  # noqa: BLE001 (whatever it is, torch computes the same)
        _give_up(device, error)
        return _given_up[device]
    _tried.setdefault(device, set()).add(kind)
    return None


def _trial(device: torch.device, kind: tuple[Any, ...], rows: int) -> float:
    from .kernels.trial import worst_error  # with triton

    # What it draws for a dropout is not the caller's: a checkpointed forward is repeated without a trial.
    with on_device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return worst_error(device, kind, rows)


def _give_up(device: torch.device, error: Exception) -> None:
    """Notes, with one warning, that the kernels fail on a device; they are not tried again there."""
    first_line = str(error).splitlines()[0] if str(error) else ""
    reason = because("kernel_failed", str(device), type(error).__name__, first_line)
    _given_up[device] = reason
    warnings.warn(
        f"peft_moe_compat runs without its fused kernels from here on, with the same numbers but slower: {reason}",
        CompatWarning,
        stacklevel=3,
    )


def fastest(device: torch.device) -> str:
    """The backend of layers on a device, as far as the device and `set_backend` decide it."""
    fused = chosen() in ("auto", "triton") and _device_reason(device) is None
    return "triton" if fused else device_backend(device)


def fused_reason(module: Any, device: torch.device) -> Reason | None:
    """Why a module's forward does not run in the fused kernels, None where it does; sizes of batches and what a trial
    will say aside."""
    choice = chosen()
    if choice not in ("auto", "triton"):
        return because("backend_set", choice)
    if reason := _device_reason(device):
        return reason
    if getattr(module, "has_post_expert_norm", False):
        return because("norm_follows")
    if not hasattr(module, "_apply_gate"):
        return because("own_forward", type(module).__name__)
    names = [up_name(module), "down_proj"]
    held = []
    for name in names + ([f"{n}_bias" for n in names] if getattr(module, "has_bias", False) else []):
        frozen = _frozen(module, name)
        if isinstance(frozen, Reason):
            return frozen
        held.append(frozen)
    dtype = held[0].dtype
    if dtype not in _DTYPES:
        return because("dtype", str(dtype))
    if isinstance(held[0], Tensor) and isinstance(held[1], Tensor) and held[1].dtype != dtype:
        return because("dtype", f"{dtype} and {held[1].dtype}")
    if dtype == torch.float32 and choice == "auto":
        return because("float32")
    (_, *of_up), (_, *of_down) = held[0].shape, held[1].shape
    if math.gcd(*of_up, *of_down) % 8:
        return because("width")
    return None


def _frozen(module: Any, name: str) -> Tensor | PackedWeight | Reason:
    """A parameter as the kernels read it, or why they cannot."""
    if stored := stored_format(module, name):
        return packed(module, name, torch.bfloat16) or because("quantised", name, stored)
    weight: Tensor | None = module._parameters.get(name)
    if weight is None:
        return because("computed", name)
    return because("trained", name) if weight.requires_grad else weight


def _device_of(module: Any) -> torch.device:
    """Where a module's forward runs: where its parameters are, or where accelerate takes those it has offloaded."""
    held = next((parameter.device for parameter in module.parameters()), torch.device("meta"))
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,))]
    taken_to = next((device for device in devices if device is not None), None)
    if held.type != "meta" or taken_to is None:
        return held
    return torch.device("cuda", taken_to) if isinstance(taken_to, int) else torch.device(taken_to)


def backend_of(module: Any, name: str, dropped_apart: bool = False) -> tuple[str, Reason | None]:
    """(backend, why it is not a faster one) of a module's forward with its parameter of that name.

    `dropped_apart`: several adapters are active, one at least with a dropout.
    """
    device = _device_of(module)
    reason = fused_reason(module, device) or (because("dropped_apart") if dropped_apart else None)
    if reason is None:
        return "triton", None
    reason = None if device.type == "cpu" else because("no_kernels", reason)
    weight = module._parameters[name] if is_plain(module, name) else None  # others as they are dequantised
    if weight is not None and weight.ndim == 3 and not fits_torch(weight):
        return "loop", reason or because("unaligned" if sizes_fit_torch(weight) else "not_for_torch")
    return device_backend(device), reason


def _nonlinearity(module: Any) -> Nonlinearity | Callable[[Tensor], Tensor]:
    """What the kernels know by name, or the module's own function of the up projection's rows."""
    act: Any = module._modules.get("act_fn")
    if act is None:  # a plain function
        act = getattr(module, "act_fn", None)
    name = _ACTIVATIONS.get(type(act).__name__ if isinstance(act, torch.nn.Module) else getattr(act, "__name__", ""))
    if isinstance(act, torch.nn.GELU):
        name = "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if not getattr(module, "has_gate", True):
        return Nonlinearity(name, False) if name else act
    gate: Any = type(module)._apply_gate
    home = gate.__module__
    plain = home == REGISTRY_MODULE
    if home == FP8_MODULE:
        plain = all(getattr(module, attribute, None) is None for attribute in _FP8_GATES)
    elif home.startswith("transformers.models."):
        # By the class that has the gate: parametrize makes a subclass of it.
        of = next((cls.__name__ for cls in type(module).__mro__ if cls.__dict__.get("_apply_gate") is gate), "")
        if of in CLAMPED_CLASSES:
            return Nonlinearity("clamped", True, CLAMPED_CLASSES[of], float(module.alpha), float(module.limit))
    if name and plain:
        return Nonlinearity(name, True)
    own: Callable[[Tensor], Tensor] = module._apply_gate
    return own


def runs_fused(module: Any, hidden_states: Tensor, index: Tensor) -> bool:
    """Whether this forward goes to the fused kernels. Under torch.compile a gate they do not know goes to torch."""
    if not index.numel() or fused_reason(module, hidden_states.device):
        return False
    return not torch.compiler.is_compiling() or isinstance(_nonlinearity(module), Nonlinearity)


def _trial_fails(
    nonlinearity: Nonlinearity | Callable[[Tensor], Tensor],
    routed: tuple[Tensor, Tensor, Tensor],
    up: HeldProjection,
    down: HeldProjection,
) -> bool:
    """Whether the kernels of this layer and batch, or of any batch that a graph may get, are not to be trusted."""
    hidden, index, _ = routed
    if hidden.device.type not in _TRIED_ON:
        return False
    if torch.compiler.is_compiling():
        from .kernels import kinds  # with triton; dynamo warns of `_kernels`

        some_packed = any(isinstance(held[0], PackedWeight) for held in (up, down))
        sizes = kinds.rows_of_every_kind(up[0].shape[0], index.shape[1], some_packed)
    else:
        (_, kinds), sizes = _kernels(), [index.numel()]
    for rows in sizes:
        kind = kinds.kind_of(nonlinearity, routed, up, down, rows)
        if _trial_reason(hidden.device, kind, rows) is not None:
            return True
    return False


@cache  # an import statement takes 2 us of each forward
def _kernels() -> tuple[Any, Any]:
    from .kernels import kinds, layer  # with triton

    return layer, kinds


def _dropped_apart(held: HeldProjection) -> bool:
    """Whether the rows have several masks, which the kernels have not."""
    return held[2] is not None and len(held[2].dropout) > 1


class _NotHereError(Exception):
    """Raised through the kernels' layer for what torch has to compute."""


def run_fused(
    module: Any,
    routed: tuple[Tensor, Tensor, Tensor],
    up: HeldProjection,
    read_down: Callable[[], HeldProjection],
    places: Tensor | None = None,
) -> Tensor | None:
    """The layer's output from the fused kernels, or None where there is a dropout that they have not, or they fail: to
    compile for the device, or their trial.

    Args:
        routed: hidden_states "T H", top_k_index and top_k_weights "T k".
        up: Of the up projection.
        read_down: Gives that of the down projection, once the device is busy with the other.
        places: "T k", see `experts_forward`.
    """
    nonlinearity, device = _nonlinearity(module), routed[0].device
    if torch.compiler.is_compiling() and isinstance(nonlinearity, Nonlinearity):
        down = read_down()
        if any(lora is not None and lora.dropout for _, _, lora in (up, down)):
            return None  # torch's own dropout, of which a graph knows how to repeat it
        if _trial_fails(nonlinearity, routed, up, down):
            return None
        from .fused_ops import experts  # with triton

        return experts(nonlinearity, routed, up, down)
    layer, _ = _kernels()
    read: list[Any] = []  # `functools.cache` would take 5 us to make

    def tried_down() -> Any:
        if not read:
            down = read_down()
            if _dropped_apart(down) or _trial_fails(nonlinearity, routed, up, down):
                raise _NotHereError
            read.append(layer.Projection.of(*down))
        return read[0]

    if _dropped_apart(up):
        return None
    of_up = layer.Projection.of(*up)  # draws the seed of its dropout, always before that of the down projection
    try:
        if device not in _tried:
            tried_down()  # before anything is launched, since it may be that nothing can be
        with on_device(device):
            out: Tensor = layer.fused_experts(nonlinearity, *routed, of_up, tried_down, places)
            return out
    except _NotHereError:
        return None
    except layer.LAUNCH_ERRORS as error:
        _give_up(device, error)
        return None
