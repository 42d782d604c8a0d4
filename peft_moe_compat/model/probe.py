"""What the installed PEFT does with the axes of an expert parameter, measured on tiny ParamWrappers that it makes."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..errors import LayoutError, UnsupportedPeftError
from ..releases import LayoutRule, parse_version, release_for, verified_rule
from .experts import REGISTRY_MODULE

__all__ = ["installed_rule", "measure_rule", "tiny_wrapper"]

# The rule, and the PEFT functions it was measured on: a patched one is measured again.
_rule: tuple[LayoutRule, tuple[Any, ...]] | None = None
_rule_lock = threading.Lock()


def installed_rule() -> LayoutRule:
    """The layout rule of the installed PEFT: chosen by its version, verified by a probe of its ParamWrapper.

    Raises:
        UnsupportedPeftError: No ParamWrapper, or the probe contradicts the table.
    """
    global _rule
    import peft  # before the lock: its post-import hook may come back here

    version = parse_version(peft.__version__)
    release_for(version)  # refuses a release without ParamWrapper before the probe would trip over it
    with _rule_lock:
        try:
            from peft.tuners.lora.layer import ParamWrapper

            measured_on = (ParamWrapper.__init__, ParamWrapper.update_layer, ParamWrapper.get_delta_weight)
            if _rule is not None and _rule[1] == measured_on:
                return _rule[0]
            measured = measure_rule(version)
        # Whatever a PEFT unlike the known ones answers a probe with.
        except (AttributeError, ImportError, LayoutError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedPeftError(
                f"The ParamWrapper of PEFT {version} could not be probed ({type(error).__name__}: {error}). Update "
                "peft-moe-compat; until then PEFT's own forward stays in place."
            ) from error
        rule = verified_rule(version, measured)
        _rule = rule, measured_on
        return rule


def measure_rule(since: Any) -> LayoutRule:
    """What the installed PEFT really does, read off tiny ParamWrappers it makes itself.

    Shapes say which axis lora_A spans; whether `get_delta_weight` obeys the swap flag, and that it computes what
    `from_flat` does with "(r E)" packing, is compared in numbers. The default random generator is left as it was.

    Args:
        since: The version to put into the result.

    Raises:
        LayoutError: The product of the factors is not PEFT's own delta, in either orientation.
    """
    with _undisturbed():
        axes = {transposed: _measured_axis(transposed) for transposed in (False, True)}
        # Square, so that the delta has the parameter's shape in both readings and only the numbers differ.
        square = _probe_wrapper(False, (2, 3, 3))
        deltas = []
        for flag in (False, True):
            square._did_swap_in_out_features = flag
            deltas.append(square.get_delta_weight("default"))
    return LayoutRule(since, axes[False], axes[True], reads_swap_flag=not torch.equal(*deltas))


def tiny_wrapper() -> tuple[Any, tuple[Tensor, ...]]:
    """A `ParamWrapper` on a tiny Qwen3-MoE's experts, and what its forward takes.

    Of a real model, since others look at the experts before they decide. transformers 4 keeps its experts one by one:
    there it is around a module that gives back its input.
    """
    with _undisturbed():
        if importlib.util.find_spec(REGISTRY_MODULE) is None:
            return _probe_wrapper(False, (2, 3, 3)), (torch.zeros(1, 3),)
        from peft import LoraConfig, inject_adapter_in_model

        config = importlib.import_module("transformers.models.qwen3_moe.configuration_qwen3_moe").Qwen3MoeConfig(
            hidden_size=8, moe_intermediate_size=8, num_experts=2
        )
        config._experts_implementation = "grouped_mm"
        experts = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts(config)
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
        lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
        wrapper = inject_adapter_in_model(lora, model)["mlp"]["experts"]
        return wrapper, (torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


@contextmanager
def _undisturbed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT does not know the probe's own module class
        yield


def _probe_wrapper(transposed: bool, shape: tuple[int, int, int]) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = transposed
            self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    model = nn.ModuleDict({"experts": Experts()})
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["experts.weight"])
    wrapper = inject_adapter_in_model(config, model)["experts"]
    for linear in (wrapper.lora_A["default"], wrapper.lora_B["default"]):
        linear.weight.normal_()
    return wrapper


def _measured_axis(transposed: bool) -> int:
    """Stored axis that lora_A's columns span in a fresh wrapper, once its delta has been checked against it."""
    wrapper = _probe_wrapper(transposed, (2, 3, 5))
    lora_A, lora_B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    axis = {3: 1, 5: 2}.get(lora_A.shape[1], 0)
    delta = wrapper.get_delta_weight("default")
    # "linear" of an (E, out, in) reading: lora_A spans the last axis, and the delta comes out as stored.
    orientation = "linear" if axis == 2 else "reversed"
    expected = layout.from_flat(lora_A, lora_B, 2, orientation=orientation, scaling=wrapper.scaling["default"]).delta()
    if axis == 0 or delta.shape != expected.shape or not torch.allclose(delta, expected, atol=1e-5):
        raise LayoutError(
            f"The installed PEFT's get_delta_weight gives a {tuple(delta.shape)} update for a (2, 3, 5) parameter "
            f"(lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}) that matches no known layout. "
            "Is its ParamWrapper patched by another library?"
        )
    return axis
