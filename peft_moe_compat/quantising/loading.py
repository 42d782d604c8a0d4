"""The quantiser of `BitsAndBytesExpertsConfig`, in transformers' registry: packs each stack as it has been read.

Written for the loader of transformers 5.0 and newer, which converts a checkpoint parameter by parameter.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from ..errors import NoExpertParametersError, ParallelismError, PeftMoeCompatError
from ..model.experts import routed_experts
from .packing import FORMATS, held_tensors, need_bitsandbytes, pack, packed_stacks, put_together

__all__ = ["METHOD", "ExpertsQuantizer"]

METHOD = "bitsandbytes_experts"
_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"


def _first(value: list[Tensor] | Tensor) -> Tensor:
    return value[0] if isinstance(value, list) else value


class _Pack(ConversionOps):  # type: ignore[misc]
    """Packs what is a stack of experts; the rest is for the operation of the linear layers."""

    def __init__(self, hf_quantizer: Any, others: Any) -> None:
        self.hf_quantizer, self.others = hf_quantizer, others

    def convert(self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any) -> Any:
        self.hf_quantizer.load_asynchronously_again()  # by now the loader has decided
        stacks = input_dict.keys() & self.hf_quantizer.stacks
        for key in stacks:
            path, _, name = key.rpartition(".")
            experts = model.get_submodule(path)
            weight = _first(input_dict.pop(key)).to(experts.get_parameter(name).dtype)
            pack(experts, name, weight, self.hf_quantizer.quantization_config.packing)
            _is_loaded(experts, key, missing_keys)
        if not input_dict or self.others is None:
            return input_dict
        return self.others.convert(input_dict, model=model, missing_keys=missing_keys, **kwargs)


class _PutTogether(ConversionOps):  # type: ignore[misc]
    """Packed tensors of a checkpoint -> the packed stack."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, missing_keys: Any = None, **_: Any
    ) -> Any:
        path, __, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(path)
        tensors = {key.partition(f".{name}.")[2]: _first(value) for key, value in input_dict.items()}
        put_together(experts, name, tensors)
        _is_loaded(experts, full_layer_name, missing_keys)
        return {}


def _is_loaded(experts: Any, key: str, missing_keys: Any) -> None:
    """The loader sets no parameter then, and does not initialise the module, for which it would be dequantised."""
    missing_keys.discard(key)
    experts._is_hf_initialized = True


def _is_of_a_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


class _Experts:
    """What is the same whatever becomes of the linear layers: before the quantiser of those in the order of bases."""

    quantization_config: Any
    pre_quantized: bool
    stacks: tuple[str, ...] = ()  # full names of the parameters
    _synchronous: str | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        need_bitsandbytes()
        device_map = kwargs.get("device_map")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
            raise PeftMoeCompatError(
                f"The device_map puts modules on {', '.join(sorted(devices))}; packed experts cannot be offloaded "
                "while they load. Load all of the model on one device, or over several GPUs; offload after "
                "get_peft_model, the modules called base_layer alone."
            )
        super().validate_environment(*args, **kwargs)  # type: ignore[misc]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param_name in self.stacks:
            return self.quantization_config.packing.bytes_per_weight  # type: ignore[no-any-return]
        return super().param_element_size(model, param_name, param)  # type: ignore[misc,no-any-return]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]
        self.stacks = tuple(f"{path}.{name}" for path, _, names in routed_experts(model) for name in names)
        if not self.stacks:
            raise NoExpertParametersError(
                f"{type(model).__name__} has no experts in fused weights that could be packed. Load it with "
                "BitsAndBytesConfig, which packs linear layers."
            )
        if not self.pre_quantized:  # transformers 5.0 reads ahead of what is converted, up to the whole checkpoint
            self._synchronous = os.environ.get(_SYNCHRONOUS, "")
            os.environ[_SYNCHRONOUS] = "1"

    def load_asynchronously_again(self) -> None:
        if self._synchronous is not None:
            os.environ[_SYNCHRONOUS] = self._synchronous
            self._synchronous = None

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self, self._of_linears())

    def _of_linears(self) -> ConversionOps | None:
        return super().get_quantize_ops()  # type: ignore[misc]

    def get_weight_conversions(self) -> list[WeightConverter]:
        others: list[WeightConverter] = super().get_weight_conversions()  # type: ignore[misc]
        if not self.pre_quantized:
            return others
        tails = {tuple(key.split(".")[-2:]) for key in self.stacks}
        parts = FORMATS[self.quantization_config.packing.format]
        return [
            WeightConverter(
                [f"{module}.parametrizations.{name}.{part}" for part in parts],
                f"{module}.{name}",
                operations=[_PutTogether(self)],
            )
            for module, name in sorted(tails)
        ] + others

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.load_asynchronously_again()
        if getattr(model, "_device_mesh", None) is not None:
            raise ParallelismError(
                "Packed experts were loaded with a plan that spreads them over ranks (tp_plan or distributed_config), "
                "which would have to spread scales alike. Load them without one, and train with "
                "DistributedDataParallel or FSDP2."
            )
        # To save, transformers reverses what it has loaded with, and bitsandbytes' own cannot be: it changes no name.
        model._weight_conversions = [c for c in model._weight_conversions if not _is_of_a_quantizer(c)]
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Of packed stacks under `parametrizations`, where no conversion of the model's own checkpoints reaches."""
        state: dict[str, Tensor] = model.state_dict()
        for path, experts, name in packed_stacks(model):
            held, other = f"{path}.parametrizations.{name}.", f"{path}.{name}"
            state = {k: t for k, t in state.items() if k != other and not k.startswith((held, f"{other}."))}
            state |= {held + part: tensor for part, tensor in held_tensors(experts, name).items()}
        return state, {}

    def _dequantize(self, *_: Any, **__: Any) -> Any:
        raise PeftMoeCompatError("To have the experts in their own precision again, load the model without the config.")

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _With4bitLinears(_Experts, Bnb4BitHfQuantizer):  # type: ignore[misc]
    pass


class _With8bitLinears(_Experts, Bnb8BitHfQuantizer):  # type: ignore[misc]
    pass


class _Alone(_Experts, HfQuantizer):  # type: ignore[misc]
    update_device_map = Bnb4BitHfQuantizer.update_device_map

    def _of_linears(self) -> None:
        return None


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the one for the config: transformers looks quantisers up by the method's name alone."""

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        if quantization_config.load_in_4bit:
            return _With4bitLinears(quantization_config, **kwargs)
        return (_With8bitLinears if quantization_config.load_in_8bit else _Alone)(quantization_config, **kwargs)
