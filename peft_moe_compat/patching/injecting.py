"""Whether PEFT is about to make the LoRA that a file holds on experts, asked before it puts anything into the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..adapters.names import linear_role
from ..adapters.ranks import lora_rank
from ..adapters.slots import ExpertSlot
from ..adapters.source import AdapterSource
from ..adapters.targets import any_ending
from ..errors import LayoutError
from ..model.probe import installed_rule
from .matching import UnderstoodFile, counterparts, facts_of, live_path

__all__ = ["check_config", "convert_command"]

# What PEFT has a layer for, among what a model's own file may define or derive from. Source: peft/tuners/lora/model.py,
# LoraModel._create_new_module, and the dispatchers it asks; those for quantised linears are by classes of others.
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_HAS_NO_LAYER = ("transformers.models.", "transformers_modules.", "torch.nn.modules.container")


def convert_command(model_id: object) -> str:
    """The command that makes of an adapter what PEFT takes."""
    return f"`peft-moe-compat convert {model_id} OUT --to peft --model BASE`"


def check_config(config: Any, model: Any, model_id: str, file: UnderstoodFile | AdapterSource | None) -> None:
    """Whether PEFT can take a config, and makes the LoRA of it that the file has on experts.

    Args:
        config: The `LoraConfig` that counts, after upstream's conversion.
        model: Before the adapter is in it.
        model_id: For messages.
        file: None where it was not opened.

    Raises:
        LayoutError: It cannot, or does not.
    """
    source = file.source if isinstance(file, UnderstoodFile) else file
    if isinstance(file, UnderstoodFile):
        reasons = _of_fused(config, file)
    else:
        reasons = _of_single_experts(config, model, source) if source is not None else iter(())
    reason = _of_modules(config, model, source) or next(reasons, None)
    if reason is not None:
        raise LayoutError(f"PEFT cannot take {model_id} as it is: {reason}. Convert it: {convert_command(model_id)}.")


def _of_modules(config: Any, model: Any, source: AdapterSource | None) -> str | None:
    """Which module, of those in target_modules, is none that PEFT has LoRA for."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not config.target_modules or getattr(config, "_custom_modules", None):
        return None
    for name, wrapper in model.named_modules():
        module = wrapper.get_base_layer() if hasattr(wrapper, "get_base_layer") else wrapper
        if isinstance(module, _LAYERS) or not type(module).__module__.startswith(_HAS_NO_LAYER):
            continue
        if (source is not None or name.endswith("experts")) and check_target_module_exists(config, name):
            return f"target_modules names {live_path(name)!r}, a {type(module).__name__}, which PEFT has no LoRA for"
    return None


def _of_fused(config: Any, file: UnderstoodFile) -> Iterator[str]:
    targets = set(config.target_parameters or ())
    for module in file.source.modules:
        reading = file.decision.readings[module.path]
        for name, slot, count in zip(reading.nesting, module.slots, reading.counts, strict=True):
            yield from _of_parameter(config, targets, f"{file.paths[module.path]}.{name}", slot.rows // count)


def _of_parameter(config: Any, targets: set[str], key: str, rank: int) -> Iterator[str]:
    if not any_ending(key, targets):
        yield f"it has LoRA on {key!r}, which no target in its config reaches"
    elif (made := lora_rank({"r": config.r, "rank_pattern": config.rank_pattern}, key)) != rank:
        yield f"its LoRA on {key!r} is of rank {rank}, and its config makes one of {made}"


def _of_single_experts(config: Any, model: Any, source: AdapterSource) -> Iterator[str]:
    """Of LoRA on every expert by itself; for a model whose experts are fused some releases of PEFT fuse it too."""
    facts = facts_of(model)
    paths = counterparts((facts.fused_path(module.path) for module in source.modules), facts)
    targets = set(config.target_parameters or ())
    for module in source.modules:
        if len({name for slot in module.experts for name in slot.names}) < 2 * len(module.experts):
            yield f"the experts of {module.path!r} share factors of their LoRA"
        path = paths.get(facts.fused_path(module.path), "")
        for role, parameter in facts.parameters.items():
            branches = ("gate", "up") if role == "gate_up" else (role,)
            slots = [slot for slot in module.experts if linear_role(slot.linear) in (role, *branches)]
            count, key = facts.stacks.get((path, parameter), (0,))[0], f"{path}.{parameter}"
            if not slots or not count:
                continue
            if reason := _not_fused(slots, key, len(branches) * count, any_ending(key, targets)):
                yield reason
            else:
                yield from _of_parameter(config, targets, key, len(branches) * slots[0].lora_A.shape[-2])


def _not_fused(slots: Sequence[ExpertSlot], key: str, count: int, targeted: bool) -> str | None:
    """Why PEFT does not fuse the LoRA of single experts for a parameter, rightly."""
    import peft
    from peft.tuners.lora.layer import ParamWrapper

    if not targeted:
        return f"it has LoRA on every expert by itself, and PEFT {peft.__version__} puts none on {key!r} for that"
    named = all(f".{slot.expert}.{slot.linear}." in slot.lora_A.name for slot in slots)
    if not named or len(slots) != count or len({slot.lora_A.shape[-2] for slot in slots}) > 1:
        return f"PEFT fuses LoRA for {key!r} where all experts have some, of one rank and under their linears' names"
    rewritten = hasattr(
        ParamWrapper.update_layer, "__wrapped__"
    )  # by transformers, which turns these round (5.0 to 5.12)
    if installed_rule().orientation(False) == "reversed" and not rewritten:
        return f"the LoRA that PEFT {peft.__version__} makes on {key!r} does not fit what it fuses for it"
    return None
