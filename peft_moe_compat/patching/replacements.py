"""Everything that is replaced in PEFT and transformers while the library is active: one row each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..families import OWN_FORWARDS
from ..model.experts import REGISTRY_MODULE, dispatching_registry
from ..model.weights import FP8_MODULE
from ..model.wrappers import TAKEN_IMPLEMENTATIONS, TAKES_LORA
from ..others import owner_of
from ..releases import installed_issue
from . import (
    adapter_names,
    combining,
    dispatch,
    dropout,
    hotswap,
    kbit,
    loading,
    parametrised,
    resuming,
    saving,
    sharding,
    state_dicts,
    whole_state,
)
from .forward import experts_registry, own_forward, registered_forward, wrapper_forward
from .reach import watched_call
from .replacement import (
    CodeReplacement,
    FileReplacement,
    ForwardReplacement,
    RegistryEntry,
    Replacement,
    WrapperCall,
    WrapperForward,
)
from .resuming import forget_converted

__all__ = ["forget_converted", "replacements", "replacements_in_model", "replacements_in_trainer"]


def _attribute(owner: Any, name: str, home: str, make: Callable[[Any], Any]) -> Replacement:
    return Replacement(owner, name, home, make, f"{owner.__name__}.{name}")


def _of_files(owner: Any, name: str, home: str, make: Callable[[Any], Any]) -> Replacement:
    return FileReplacement(owner, name, home, make, f"{owner.__name__}.{name}")


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
        WrapperForward(ParamWrapper, "forward", "peft.", wrapper_forward, "ParamWrapper.forward"),
        WrapperCall(ParamWrapper, "__call__", "", watched_call, "ParamWrapper.__call__"),
        *_registry_entries(),
        _of_files(PeftModel, "from_pretrained", "peft.", loading.from_pretrained),
        _of_files(PeftModel, "load_adapter", "peft.", partial(loading.load_adapter, "self", "model_id")),
        _of_files(
            PeftAdapterMixin, "load_adapter", "transformers.", partial(loading.load_adapter, "self", "peft_model_id")
        ),
        _of_files(swapping, "hotswap_adapter", "peft.", partial(loading.load_adapter, "model", "model_name_or_path")),
        _of_files(swapping, "hotswap_adapter_from_state_dict", "peft.", hotswap.hotswap_adapter_from_state_dict),
        # Where each of these takes the tensors from: PEFT, transformers before 5.0, hot-swapping, transformers 5.
        _of_files(peft_model, "load_peft_weights", "peft.", loading.load_peft_weights),
        _of_files(peft, "load_peft_weights", "peft.", loading.load_peft_weights),
        _of_files(swapping, "load_peft_weights", "peft.", loading.load_weights_to_swap),
        _attribute(LoraModel, "_prepare_model", "peft.", loading.prepare_model),
        _attribute(LoraModel, "_create_and_replace", "peft.", dropout.create_and_replace),
        _attribute(LoraModel, "_enable_peft_forward_hooks", "contextlib", adapter_names.enable_peft_forward_hooks),
        *_of_combinations(LoraModel),
        _attribute(LoraModel, "_check_merge_allowed", "peft.", parametrised.check_merge_allowed),
        _attribute(BaseTuner, "_inject_parameters", "peft.", parametrised.inject_parameters),
        _of_files(PreTrainedModel, "_load_pretrained_model", "transformers.", loading.load_pretrained_model),
        _of_files(PeftModel, "save_pretrained", "peft.", saving.save_pretrained),
        _of_files(PreTrainedModel, "save_pretrained", "transformers.", saving.save_pretrained),
        _of_files(peft_model, "safe_save_file", "safetensors.", saving.safe_save_file),
        _of_files(modeling, "safe_save_file", "safetensors.", saving.safe_save_file),
        _of_files(accelerator.Accelerator, "save_state", "accelerate.", whole_state.save_state),
        _of_files(
            importlib.import_module("accelerate.utils.other"),
            "safe_save_file",
            "safetensors.",
            whole_state.safe_save_file,
        ),
        *_of_state_dicts(peft),
        *_of_fsdp_files(),
        *_of_kbit_training(peft),
        _of_files(accelerator, "load_accelerator_state", "accelerate.", whole_state.load_accelerator_state),
        *_of_conversions(),
        *_of_sharded_experts(ParamWrapper, BaseTuner),
    ]


def _registry_entries() -> list[RegistryEntry]:
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
                found.append(RegistryEntry(mapping, key, "transformers.", registered_forward, what))
    return found


def _of_combinations(LoraModel: Any) -> list[Replacement]:
    """Where a model can have several adapters on parameters."""
    if installed_issue("second_adapter"):
        return []
    return [
        _attribute(LoraModel, name, "peft.", make)
        for name, make in (
            ("add_weighted_adapter", combining.add_weighted_adapter),
            ("_check_add_weighted_adapter", combining.check_add_weighted_adapter),
            ("_svd_generalized_task_arithmetic_weighted_adapter", combining.svd_weighted_adapter),
        )
    ]


def _of_state_dicts(peft: Any) -> list[Replacement]:
    """PEFT's own two functions, under every name by which others import them."""
    return [
        _of_files(module, name, "peft.", getattr(state_dicts, name))
        for name in ("get_peft_model_state_dict", "set_peft_model_state_dict")
        for module in (peft, peft.utils, peft.utils.save_and_load)
    ]


def _of_fsdp_files() -> list[Replacement]:
    """What accelerate's `save_fsdp_model` and `load_fsdp_model` call, which others hold by name."""
    utils = importlib.import_module("accelerate.utils.fsdp_utils")
    made = {
        "_get_model_state_dict": whole_state.get_model_state_dict,
        "_set_model_state_dict": whole_state.set_model_state_dict,
    }
    return [_of_files(utils, name, "accelerate.", make) for name, make in made.items() if hasattr(utils, name)]


def _of_kbit_training(peft: Any) -> list[Replacement]:
    """PEFT's own function: under its first name where somebody else's calls it under the others."""
    home, what = str(Path(peft.__file__).parent), "peft.prepare_model_for_kbit_training"
    for module in (peft, peft.utils, peft.utils.other):
        function = module.prepare_model_for_kbit_training
        if owner_of(function).startswith("peft."):
            return [CodeReplacement(function, "__code__", home, partial(kbit.take_over, function), what)]
    return []


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


def _of_sharded_experts(ParamWrapper: Any, BaseTuner: Any) -> list[Replacement]:
    """For ZeRO-3, where PEFT reads the shape in a method of its own (0.19 on); for expert parallelism, where
    transformers keeps its shares of the experts as DTensors (5.17 on).
    """
    lora_model = importlib.import_module("peft.tuners.lora.model")
    found = [_attribute(BaseTuner, "inject_adapter", "peft.", sharding.inject_adapter)]
    if "_get_in_out_features" in vars(ParamWrapper):
        found.append(_attribute(ParamWrapper, "_get_in_out_features", "peft.", sharding.get_in_out_features))
    if getattr(lora_model, "is_transformers_dtensor_tp", False):
        found.append(_attribute(ParamWrapper, "update_layer", "peft.", sharding.update_layer))
        layers = importlib.import_module("peft.tuners.lora.layer")
        plans = importlib.import_module("transformers.integrations.tensor_parallel")
        name = "gather_state_dict_for_save"
        found.append(_attribute(plans, name, "transformers.", sharding.gather_state_dict_for_save))
        found.append(_attribute(layers, "_get_in_out_features", "peft.", sharding.linear_features))
        found.append(_attribute(lora_model, "get_tp_plan_and_mesh", "peft.", sharding.get_tp_plan_and_mesh))
    home = "transformers.distributed.expert_parallel"
    exchange = getattr(importlib.import_module(home), "AllToAllEP", None) if importlib.util.find_spec(home) else None
    if exchange is not None:  # from 5.23 on
        found.append(_attribute(exchange, "_dispatch_tokens", "transformers.", dispatch.dispatch_tokens))
    return found


def replacements_in_model(module: Any) -> list[Replacement]:
    """In a module of transformers with experts that it does not decorate, which activation does not import either.

    Without those that a later release decorates, those that have been seen to, and what this release computes wrongly.
    """
    found: list[Replacement] = []
    if module.__name__.endswith(".modeling_dbrx") and installed_issue("dbrx_turned"):
        return []
    for name, (home, kind) in OWN_FORWARDS.items():
        cls = vars(module).get(name) if home == module.__name__ else None
        if cls is not None and not hasattr(cls.forward, TAKES_LORA) and dispatching_registry(cls) is None:
            found.append(ForwardReplacement(cls, "forward", home, own_forward(kind), f"{name}.forward"))
    return found


def replacements_in_trainer(trainer: Any) -> list[Replacement]:
    """In the module `transformers.trainer`, which activation does not import: once somebody has."""
    return [
        _of_files(trainer.Trainer, "train", "transformers.", resuming.train),
        _of_files(
            trainer.Trainer, "_load_optimizer_and_scheduler", "transformers.", resuming.load_optimizer_and_scheduler
        ),
    ]
