"""LoRA on Mixture-of-Experts models: every PEFT release read into one form and run through one grouped-mm forward.

Importing this package activates it, once peft is imported; `PEFT_MOE_COMPAT=0` in the environment imports without
activating. The import itself drags in neither torch, peft nor transformers. The life of an adapter with it:

Train. Nothing on the model changes: parameters, names, optimiser groups and files are PEFT's own.

    import peft_moe_compat
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
    targets = peft_moe_compat.expert_parameters(base)  # names of every routed expert weight, and of nothing else
    model = get_peft_model(base, LoraConfig(r=16, target_modules=[], target_parameters=targets))
    print(peft_moe_compat.report(model))  # which experts run in this forward, which in PEFT's own and why
    model(input_ids=tokens, labels=tokens).loss.backward()  # your loop, Trainer or TRL

Save. The file is PEFT's, with a stamp that says how its experts' LoRA is laid out; stock PEFT ignores it.

    model.save_pretrained("adapter")

Load. A file of any PEFT release, of Unsloth, NeMo Automodel, VeOmni and others is read as what it is. One that does not
tell is refused before anything is put into the model, unless `with written_by("peft==VERSION"):` around the call says.

    base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
    model = PeftModel.from_pretrained(base, "adapter")

Convert, for another PEFT or for a reader that is none. Of the base model only its config is read.

    found = peft_moe_compat.inspect_adapter("adapter", model="Qwen/Qwen3-30B-A3B")
    print(found.writer, found.orientation, found.packing, found.readers)
    peft_moe_compat.convert_adapter("adapter", "for-vllm", to="vllm", model="Qwen/Qwen3-30B-A3B")
    same = peft_moe_compat.verify_adapters("adapter", "for-vllm", model="Qwen/Qwen3-30B-A3B")
    print(same.same, same.worst)

Merge into the base's checkpoint, shard by shard, in its own dtypes and packed formats (FP8 in blocks, MXFP4).

    done = peft_moe_compat.merge_adapter("Qwen/Qwen3-30B-A3B", "adapter", "merged")
    right = peft_moe_compat.verify_merge("Qwen/Qwen3-30B-A3B", "adapter", "merged").same
    print(right, max(row.relative for row in done.rows))

Look inside, and switch. `expert_loras` gives a module's factors in canonical form, `declare_layout` says how a class of
your own is stored, `set_backend` chooses what computes, `quantize_experts` packs experts in 4 or 8 bits, and
`BitsAndBytesExpertsConfig` does so while they load.

    with peft_moe_compat.set_backend("torch"):
        model(input_ids=tokens)
    peft_moe_compat.deactivate()  # PEFT and transformers as they were released
    with peft_moe_compat.activate():
        model(input_ids=tokens)

Errors on purpose are `PeftMoeCompatError`s. On the command line: `peft-moe-compat --help`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    AdapterFileError,
    AmbiguousAdapterError,
    CompatWarning,
    LayoutError,
    LossyConversionError,
    NoExpertParametersError,
    ParallelismError,
    PatchConflictError,
    PeftMoeCompatError,
    UnsupportedPeftError,
)
from .patching.activation import Activation, activate, activate_on_import, deactivate, is_active
from .quantising.registering import register_on_import
from .showing import report_on_import

if TYPE_CHECKING:
    from .adapters.conclusions import Inspection
    from .adapters.convert import Conversion
    from .adapters.inspect import inspect_adapter
    from .adapters.merge import Merge, merge_adapter
    from .adapters.verify import Verification, verify_adapters
    from .adapters.verify_merge import MergeVerification, verify_merge
    from .forward.backend import set_backend
    from .handover import AdapterStream, adapter_tensors, save_adapter
    from .integrations.transformers import HandoverCallback, ReportCallback
    from .layout import ExpertLora
    from .model.experts import declare_layout
    from .model.targets import expert_parameters
    from .model.wrappers import expert_loras
    from .patching.opening import written_by
    from .proving import convert_adapter
    from .quantising.experts import BitsAndBytesExpertsConfig, quantize_experts
    from .quantising.published import PackedMxfp4Config
    from .readings import ExpertReadings, Reading
    from .releases import LayoutRule, release_for
    from .reporting import Report, report

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "AdapterError",
    "AdapterFileError",
    "AdapterStream",
    "AmbiguousAdapterError",
    "BitsAndBytesExpertsConfig",
    "CompatWarning",
    "Conversion",
    "ExpertLora",
    "ExpertReadings",
    "HandoverCallback",
    "Inspection",
    "LayoutError",
    "LayoutRule",
    "LossyConversionError",
    "Merge",
    "MergeVerification",
    "NoExpertParametersError",
    "PackedMxfp4Config",
    "ParallelismError",
    "PatchConflictError",
    "PeftMoeCompatError",
    "Reading",
    "Report",
    "ReportCallback",
    "UnsupportedPeftError",
    "Verification",
    "__version__",
    "activate",
    "adapter_tensors",
    "convert_adapter",
    "deactivate",
    "declare_layout",
    "expert_loras",
    "expert_parameters",
    "inspect_adapter",
    "is_active",
    "merge_adapter",
    "quantize_experts",
    "release_for",
    "report",
    "save_adapter",
    "set_backend",
    "verify_adapters",
    "verify_merge",
    "written_by",
]

# Public names that would slow the import down, most of them by needing torch, and the modules they come from.
_LAZY = {
    "AdapterStream": "handover",
    "BitsAndBytesExpertsConfig": "quantising.experts",
    "Conversion": "adapters.convert",
    "ExpertLora": "layout",
    "ExpertReadings": "readings",
    "HandoverCallback": "integrations.transformers",
    "Inspection": "adapters.conclusions",
    "LayoutRule": "releases",
    "Merge": "adapters.merge",
    "MergeVerification": "adapters.verify_merge",
    "PackedMxfp4Config": "quantising.published",
    "Reading": "readings",
    "Report": "reporting",
    "ReportCallback": "integrations.transformers",
    "Verification": "adapters.verify",
    "adapter_tensors": "handover",
    "convert_adapter": "proving",
    "declare_layout": "model.experts",
    "expert_loras": "model.wrappers",
    "expert_parameters": "model.targets",
    "inspect_adapter": "adapters.inspect",
    "merge_adapter": "adapters.merge",
    "quantize_experts": "quantising.experts",
    "release_for": "releases",
    "report": "reporting",
    "save_adapter": "handover",
    "set_backend": "forward.backend",
    "verify_adapters": "adapters.verify",
    "verify_merge": "adapters.verify_merge",
    "written_by": "patching.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_on_import()
report_on_import()
activate_on_import()
