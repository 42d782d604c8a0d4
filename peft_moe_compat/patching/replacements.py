"""Everything that is replaced in PEFT and transformers while the library is active: one row each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..model.experts import REGISTRY_MODULE
from ..model.weights import FP8_MODULE
from ..model.wrappers import TAKEN_IMPLEMENTATIONS
from . import dropout, hotswap, kbit, loading, parametrised, resuming, saving, sharding, whole_state
from .forward import experts_registry, registered_forward, wrapper_forward
from .resuming import forget_converted

__all__ = ["Replacement", "forget_converted", "replacements", "replacements_in_trainer"]


@dataclass(frozen=True)
class Replacement:
    """A function that is replaced while the library is active.

    Attributes:
        owner: The class, module or mapping that holds it.
        name: The attribute or key.
        home: How the name of the module it was written in begins; any other is somebody else's patch.
        make: What was there, as it stands in the owner's `__dict__` -> what goes there instead.
        what: For messages.
        of_forward: Whether a forward depends on it; the others are of loading, saving and making adapters.
    """

    owner: Any
    name: str
    home: str
    make: Callable[[Any], Any]
    what: str
    of_forward: bool = False

    def there(self) -> Any:
        """What is in place now."""
        return (self.owner if isinstance(self.owner, dict) else vars(self.owner)).get(self.name)

    def put(self, function: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = function
        else:
            setattr(self.owner, self.name, function)


class CodeReplacement(Replacement):
    """The code of a function, its `owner`: for one that others hold by its name. See `kbit`."""

    def there(self) -> Any:
        return self.owner.__code__

    def put(self, function: Any) -> None:
        kbit.put_code(self.owner, function)


def _attribute(owner: Any, name: str, home: str, make: Callable[[Any], Any], of_forward: bool = False) -> Replacement:
    return Replacement(owner, name, home, make, f"{owner.__name__}.{name}", of_forward)


def replacements() -> list[Replacement]:
    """The same names in every release of PEFT and transformers, where nothing else is said."""
    import peft.utils.hotswap
    import transformers.modeling_utils
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    peft_model, swapping, modeling = peft.peft_model, peft.utils.hotswap, transformers.modeling_utils
    accelerator = importlib.import_module("accelerate.accelerator")
    PeftModel, PreTrainedModel = peft.PeftModel, transformers.PreTrainedModel
    return [
        _attribute(ParamWrapper, "forward", "peft.", wrapper_forward, of_forward=True),
        *_registry_entries(),
        _attribute(PeftModel, "from_pretrained", "peft.", loading.from_pretrained),
        _attribute(PeftModel, "load_adapter", "peft.", loading.load_adapter),
        _attribute(PeftAdapterMixin, "load_adapter", "transformers.", loading.load_adapter),
        _attribute(swapping, "hotswap_adapter", "peft.", loading.load_adapter),
        _attribute(swapping, "hotswap_adapter_from_state_dict", "peft.", hotswap.hotswap_adapter_from_state_dict),
        # Where each of these takes the tensors from: PEFT, transformers before 5.0, hot-swapping, transformers 5.
        _attribute(peft_model, "load_peft_weights", "peft.", loading.load_peft_weights),
        _attribute(peft, "load_peft_weights", "peft.", loading.load_peft_weights),
        _attribute(swapping, "load_peft_weights", "peft.", loading.load_weights_to_swap),
        _attribute(LoraModel, "_prepare_model", "peft.", loading.prepare_model),
        _attribute(LoraModel, "_create_and_replace", "peft.", dropout.create_and_replace),
        _attribute(LoraModel, "_check_merge_allowed", "peft.", parametrised.check_merge_allowed),
        _attribute(BaseTuner, "_inject_parameters", "peft.", parametrised.inject_parameters),
        _attribute(PreTrainedModel, "_load_pretrained_model", "transformers.", loading.load_pretrained_model),
        _attribute(PeftModel, "save_pretrained", "peft.", saving.save_pretrained),
        _attribute(PreTrainedModel, "save_pretrained", "transformers.", saving.save_pretrained),
        _attribute(peft_model, "safe_save_file", "safetensors.", saving.safe_save_file),
        _attribute(modeling, "safe_save_file", "safetensors.", saving.safe_save_file),
        _of_kbit_training(peft),
        _attribute(accelerator.Accelerator, "save_state", "accelerate.", whole_state.save_state),
        _attribute(
            importlib.import_module("accelerate.utils.other"),
            "safe_save_file",
            "safetensors.",
            whole_state.safe_save_file,
        ),
        _attribute(accelerator, "load_accelerator_state", "accelerate.", whole_state.load_accelerator_state),
        *_of_conversions(),
        *_of_sharded_experts(ParamWrapper),
    ]


def _registry_entries() -> list[Replacement]:
    """Of transformers' registries of experts forwards, each in the layer that holds it.

    So whoever registers another one later is heard.
    """
    found = []
    for whose, module in (("", REGISTRY_MODULE), ("FP8 ", FP8_MODULE)):
        registry = experts_registry(module)
        for key in TAKEN_IMPLEMENTATIONS if registry is not None else ():
            if key in registry:
                mapping = registry._local_mapping if key in registry._local_mapping else registry._global_mapping
                what = f"transformers' {whose}experts implementation {key!r}"
                found.append(Replacement(mapping, key, "transformers.", registered_forward, what, of_forward=True))
    return found


def _of_kbit_training(peft: Any) -> Replacement:
    function = peft.prepare_model_for_kbit_training
    home, what = str(Path(peft.__file__).parent), "peft.prepare_model_for_kbit_training"
    return CodeReplacement(function, "__code__", home, partial(kbit.take_over, function), what)


def _of_conversions() -> list[Replacement]:
    """Where the targets of transformers 4 become those of 5: in PEFT from 0.19, in transformers from 5.0 to 5.12.

    And where PEFT renames an adapter's tensors.
    """
    if importlib.util.find_spec(REGISTRY_MODULE) is None:
        return []  # transformers 4, beside which PEFT's module cannot be imported
    theirs, found = "peft.utils.transformers_weight_conversion", []
    for module, name, make in (
        (theirs, "convert_peft_config_for_transformers", loading.convert_peft_config),
        ("transformers.integrations.peft", "convert_peft_config_for_transformers", loading.convert_peft_config),
        (theirs, "convert_peft_adapter_state_dict_for_transformers", loading.convert_names),
    ):
        owner = importlib.import_module(module) if importlib.util.find_spec(module) else None
        if hasattr(owner, name):
            found.append(_attribute(owner, name, module.partition(".")[0] + ".", make))
    return found


def _of_sharded_experts(ParamWrapper: Any) -> list[Replacement]:
    """For ZeRO-3, where PEFT reads the shape in a method of its own (0.19 on); for expert parallelism, where
    transformers keeps its shares of the experts as DTensors (5.17 on).
    """
    lora_model = importlib.import_module("peft.tuners.lora.model")
    found = []
    if "_get_in_out_features" in vars(ParamWrapper):
        found.append(_attribute(ParamWrapper, "_get_in_out_features", "peft.", sharding.get_in_out_features))
    if getattr(lora_model, "is_transformers_dtensor_tp", False):
        found.append(_attribute(ParamWrapper, "update_layer", "peft.", sharding.update_layer))
        found.append(_attribute(lora_model, "get_tp_plan_and_mesh", "peft.", sharding.get_tp_plan_and_mesh))
    return found


def replacements_in_trainer(trainer: Any) -> list[Replacement]:
    """In the module `transformers.trainer`, which activation does not import: once somebody has."""
    return [
        _attribute(trainer.Trainer, "train", "transformers.", resuming.train),
        _attribute(
            trainer.Trainer, "_load_optimizer_and_scheduler", "transformers.", resuming.load_optimizer_and_scheduler
        ),
    ]
