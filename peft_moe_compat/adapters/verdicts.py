"""What each reader would do with a file as it is. See `targets` for where the rules come from."""

from __future__ import annotations

from ..families import family
from ..releases import NEWEST_TESTED, RULES
from .base_model import BaseModel
from .conclusions import ReaderVerdict
from .decide import Decision
from .names import linear_role
from .orientations import orientations
from .shapes import parameter_order
from .slots import ExpertsModule
from .source import AdapterSource

__all__ = ["reader_verdicts"]

_CONVERT = "convert it with `peft-moe-compat convert ADAPTER OUT --to {}`"


def reader_verdicts(
    source: AdapterSource, decision: Decision, base: BaseModel | None, transformers: str | None
) -> dict[str, ReaderVerdict]:
    """Reader -> what it does with the file: every PEFT layout of the release table, vLLM, SGLang and llama.cpp.

    Args:
        source, decision, base: The file, what it holds, and its base model where that is known.
        transformers: The release that stands beside PEFT; None where it is not known.
    """
    starts = [rule.since for rule in RULES]
    found = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        name = f"PEFT >= {start}" + (f", < {end}" if end else "")
        release = str(start if end else NEWEST_TESTED)
        found[name] = _by_peft(source, decision, base, release, transformers)
    found["vLLM"] = _by_vllm(source, decision, base)
    found["SGLang"] = _by_sglang(source)
    found["llama.cpp"] = _by_llama_cpp(source)
    if source.form == "none":
        return dict.fromkeys(found, ReaderVerdict("reads", "there is no LoRA on routed experts"))
    return found


def _by_peft(
    source: AdapterSource, decision: Decision, base: BaseModel | None, release: str, transformers: str | None
) -> ReaderVerdict:
    if source.form == "stacked":
        return ReaderVerdict("fails", f"3-D factors are not PEFT's; {_CONVERT.format('peft')}")
    if source.form == "per_expert":
        return _per_expert_by_peft(source)
    orientation, packing = decision.orientation.value, decision.packing.value
    if orientation is None or packing is None or not decision.readings:
        return ReaderVerdict("unknown", "the file itself is not settled")
    possible = orientations(release, transformers, base.model_type if base else None)
    help_ = _CONVERT.format(f"peft=={release}")
    if len(possible) > 1:
        asked = "the base model" if base is None else "the transformers release beside it"
        return ReaderVerdict("unknown", f"depends on {asked}")
    swapped = [
        module
        for module in source.modules
        if decision.readings[module.path].nesting
        != parameter_order(module.path, decision.readings[module.path].nesting)
    ]
    if possible != {orientation}:
        verdict = "wrong" if all(_square(module) for module in source.modules) else "fails"
        return ReaderVerdict(verdict, f"its layout is the {next(iter(possible))} one, this file's is not; {help_}")
    if swapped:
        verdict = "wrong" if all(_same_slots(module) for module in swapped) else "fails"
        return ReaderVerdict(verdict, f"the wrappers are nested the other way round; {help_}")
    if packing == "grouped":
        return ReaderVerdict("wrong", f"it takes lora_B's columns in another order; {help_}")
    return ReaderVerdict("reads", "its own layout")


def _square(module: ExpertsModule) -> bool:
    """Whether the flipped factors would have the same shapes."""
    return all(slot.lora_A.shape[1] == slot.lora_B.shape[0] for slot in module.slots)


def _same_slots(module: ExpertsModule) -> bool:
    return len({(slot.lora_A.shape, slot.lora_B.shape) for slot in module.slots}) == 1


def _per_expert_by_peft(source: AdapterSource) -> ReaderVerdict:
    """Under transformers 4 these are ordinary linears; under transformers 5 PEFT converts what it knows."""
    to_peft = _CONVERT.format("peft")
    old = "transformers 4 holds these experts as linears, and PEFT reads them; under transformers 5 "
    roles = {linear_role(linear) for module in source.modules for linear in {slot.linear for slot in module.experts}}
    if source.config.use_rslora:
        return ReaderVerdict("wrong", f"{old}its own conversion has rsLoRA off by sqrt(2); {to_peft}")
    if source.config.alpha_pattern or source.config.rank_pattern:
        return ReaderVerdict("wrong", f"{old}its own conversion drops the patterns of single projections; {to_peft}")
    if roles != {"gate", "up", "down"}:
        return ReaderVerdict("wrong", f"{old}its own conversion loses experts without all three projections; {to_peft}")
    return ReaderVerdict("unknown", f"{old}PEFT >= 0.19 converts some families by itself; {to_peft} to be sure")


def _by_vllm(source: AdapterSource, decision: Decision, base: BaseModel | None) -> ReaderVerdict:
    help_ = _CONVERT.format("vllm")
    if base is None:
        return ReaderVerdict("unknown", "depends on the base model")
    if source.form == "stacked":
        return ReaderVerdict("fails", f"it takes no 3-D factors; {help_}")
    native = family(base.model_type).vllm_fused
    if source.form == "per_expert":
        if native:
            return ReaderVerdict("fails", f"it serves {base.model_type} from fused experts; {help_}")
        return _complete(source, base, "vllm")
    if not native:
        return ReaderVerdict("fails", f"it takes adapters for {base.model_type} per expert; {help_}")
    if decision.orientation.value is None or decision.packing.value is None:
        return ReaderVerdict("unknown", "the file itself is not settled")
    if decision.orientation.value == "reversed":
        return ReaderVerdict("fails", f"it takes linear factors; with several GPUs it may be wrong instead; {help_}")
    if decision.packing.value == "grouped":
        return ReaderVerdict("wrong", f"it takes lora_B's columns in another order; {help_}")
    if any(len(module.slots) < 2 for module in source.modules):
        return ReaderVerdict("fails", f"it asks for both projections; {help_}")
    return ReaderVerdict("reads", "its own layout")


def _by_sglang(source: AdapterSource) -> ReaderVerdict:
    help_ = _CONVERT.format("sglang")
    if source.form == "fused":
        return ReaderVerdict("fails", f"it takes experts one by one; {help_}")
    if _ignored(source):
        return ReaderVerdict("wrong", f"it ignores rsLoRA and patterns; {help_}")
    return ReaderVerdict("reads", "needs gate_proj, up_proj and down_proj among target_modules")


def _by_llama_cpp(source: AdapterSource) -> ReaderVerdict:
    help_ = _CONVERT.format("llama.cpp")
    if source.form != "per_expert":
        return ReaderVerdict("fails", f"its converter takes experts one by one, or under names of its own; {help_}")
    if source.config.use_rslora or source.config.alpha_pattern:
        return ReaderVerdict("wrong", f"it ignores rsLoRA and alpha_pattern; {help_}")
    return _complete(source, None, "llama.cpp")


def _ignored(source: AdapterSource) -> bool:
    """Whether the file needs more than one rank and one alpha over it."""
    return source.config.use_rslora or source.config.rank_pattern or source.config.alpha_pattern


def _complete(source: AdapterSource, base: BaseModel | None, reader: str) -> ReaderVerdict:
    """For readers that want every expert and every projection."""
    for module in source.modules:
        experts = {slot.expert for slot in module.experts}
        total = (base.num_experts if base else None) or 1 + max(experts)
        linears = {slot.linear for slot in module.experts}
        wanted = {"gate", "up", "down"} if base is None or base.gated else {"up", "down"}
        if len(module.experts) < total * len(linears) or {linear_role(linear) for linear in linears} != wanted:
            return ReaderVerdict("fails", f"it wants every expert and projection; {_CONVERT.format(reader)}")
    return ReaderVerdict("reads", "every expert and projection is there")
