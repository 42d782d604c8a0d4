"""What each reader would do with a file as it is: whether a conversion for it would change anything, and if so, what.

`reads` is said exactly where it would not, in names, tensors, or the config as that reader takes it. What a reader does
without a step of the conversion is a fact of its row in `readers`, or follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from ..errors import AdapterError, AmbiguousAdapterError
from ..releases import FIRST_PEFT_FOR_TRANSFORMERS_5, NEWEST_TESTED, RULES
from .conclusions import ReaderVerdict
from .decide import Decision
from .names import linear_role
from .outputs import GGUF_PATH, Output
from .plan import Plan, others, plan_conversion
from .ranks import lora_alpha, lora_rank
from .reader_target import Target
from .readers import READERS, NotTakenError
from .refit import Refit, linears_taken_for_experts, module_parts, refit, require_read
from .rewriting import as_peft_reads, named_as, reaching
from .shapes import parameter_order
from .source import AdapterSource
from .steps import Step
from .targets import Targets, any_ending
from .tensors import SAFETENSORS

__all__ = ["reader_verdict", "reader_verdicts"]

_WORDS = {
    "reads": "as it is written for it",
    "fails": "it needs {}; convert it with {}",
    "wrong": "it needs {}: as the file is, it may load other numbers without a word; convert it with {}",
    "unknown": "it may take the file as it is: nobody has tried. A conversion would give it {}; to be sure, convert it "
    "with {}",
}


def reader_verdicts(source: AdapterSource, decision: Decision, transformers: str | None) -> dict[str, ReaderVerdict]:
    """Reader -> what it does with the file: every PEFT layout of the release table, vLLM, SGLang and llama.cpp.

    Args:
        source, decision: The file, and what it holds.
        transformers: The release that stands beside PEFT; None where it is not known.
    """
    starts = [rule.since for rule in RULES]
    targets = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        # One with that layout that imports beside any transformers.
        release = str(max(start, FIRST_PEFT_FOR_TRANSFORMERS_5) if end else NEWEST_TESTED)
        targets[f"PEFT >= {start}" + (f", < {end}" if end else "")] = Target("peft", release, transformers)
    for name in ("vllm", "sglang", "llama.cpp"):
        targets |= _of_releases(name)
    if source.form == "none":
        return {name: _of_linears(source, decision, target) for name, target in targets.items()}
    return {name: reader_verdict(source, decision, target) for name, target in targets.items()}


def _of_linears(source: AdapterSource, decision: Decision, target: Target) -> ReaderVerdict:
    """What a reader does with a file that holds no LoRA on experts."""
    reader = target.reader
    try:
        require_read(source, target)
        steps = others(Refit(source, decision, target, reader.form))[2]
    except NotTakenError as error:
        return ReaderVerdict(reader.lacking.get(error.kind, "fails"), str(error))
    except AdapterError as error:
        return ReaderVerdict("unknown", str(error))
    given = source.config.raw
    steps += [Step("heeded", (name,)) for name in reader.heeds if given.get(name) not in (None, False, "none", [])]
    if steps:
        found = {_without(step, source, target) for step in steps}
        verdict = next(verdict for verdict in ("fails", "wrong", "unknown") if verdict in found)
        return ReaderVerdict(verdict, f"it would need {' and '.join(map(str, steps))}")
    if not linears_taken_for_experts(source, target):
        return ReaderVerdict("reads", "there is no LoRA on routed experts")
    command = f"`peft-moe-compat convert ADAPTER OUT --to peft=={target.peft} --model BASE`"
    return ReaderVerdict("wrong", _WORDS["wrong"].format(Step("targets"), command))


def _of_releases(name: str) -> dict[str, Target]:
    """Reader with its releases -> the reader, a row after the other."""
    rows = READERS[name]
    found = {}
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        shown = f"{row.title} >= {row.since}" if row.since else row.title
        release = row.since or None
        found[shown + (f", < {following.since}" if following else "")] = Target(name, release=release)
    return found


def reader_verdict(source: AdapterSource, decision: Decision, target: Target) -> ReaderVerdict:
    """What one reader does with a file that holds LoRA on experts."""
    try:
        steps = _steps(source, decision, target)
    except NotTakenError as error:
        refused = ReaderVerdict(target.reader.lacking.get(error.kind, "fails"), str(error))
        return replace(refused, in_general=refused)
    except AdapterError as error:
        return ReaderVerdict("unknown", str(error))
    found = {_without(step, source, target) for step in steps}
    verdict = next(v for v in ("fails", "wrong", "unknown", "reads") if v in found or v == "reads")
    newest = target.reader == READERS[target.name][-1]
    to = target.name if newest and target.peft is None else str(target)
    needed = " and ".join(dict.fromkeys(map(str, steps)))

    def said(to: str) -> str:
        return _WORDS[verdict].format(needed, f"`peft-moe-compat convert ADAPTER OUT --to {to} --model BASE`")

    if target.peft is not None and verdict != "reads":  # of two layouts, each takes a conversion of its own
        return ReaderVerdict(verdict, said(to))
    return ReaderVerdict(verdict, said(to), ReaderVerdict(verdict, said(target.name)))


def _without(step: Step, source: AdapterSource, target: Target) -> str:
    """What the reader does with the file where the step is not taken."""
    if target.name == "peft" and target.transformers is None and step.kind in ("from_fused", "from_per_expert"):
        return "unknown"  # one beside transformers 4 and one beside 5 take different forms
    shapes = [[(slot.lora_A.shape, slot.lora_B.shape) for slot in module.slots] for module in source.modules]
    if step.kind == "orientation":
        return "wrong" if all(A[1] == B[0] for slots in shapes for A, B in slots) else "fails"
    if step.kind == "nesting":
        return "wrong" if all(len(set(slots)) == 1 for slots in shapes) else "fails"
    finer = [f"{step.kind}:{detail}" for detail in (source.base.model_type if source.base else "", *step.details)]
    lacking = target.reader.lacking
    return next((lacking[kind] for kind in (*finer, step.kind) if kind in lacking), "unknown")


def _steps(source: AdapterSource, decision: Decision, target: Target) -> list[Step]:
    """What a conversion would do, the layout of the same numbers included.

    Raises:
        NotTakenError: The reader takes no such adapter.
        AdapterError: It cannot be told.
    """
    lead = _form(source)
    native = (target.reader.form == "gguf" and "gguf" in lead.details) or (
        target.reader.form == "shared_outer" and _is_shared_outer(source)
    )
    if source.form == "stacked" and not native and _without(lead, source, target) != "unknown":
        return [lead]
    how = refit(source, decision, target)
    others(how)
    if how.form == source.form == "fused":
        if not decision.readings or decision.packing.value is None:
            raise AmbiguousAdapterError("The file itself is not settled.")
    elif "fused" in (how.form, source.form):
        return [lead, *(_upstream(source) if target.peft and source.form == "per_expert" else ())]
    plan = plan_conversion(how, fill_missing=True)
    steps = [] if how.form == source.form or native else [lead]
    steps += [*plan.steps, *_layout(how), *_config(how, plan)]
    if any(file.suffix == ".safetensors" and file.name != SAFETENSORS for file in source.tensors.files):
        steps.append(Step("shards"))
    if not steps and {name for item in plan.items for name in item.names} != source.tensors.infos.keys():
        steps.append(Step("names"))
    return steps


def _is_shared_outer(source: AdapterSource) -> bool:
    """Whether the factors are stacks in the small form: of one expert on the side that all share."""
    outer = {"w1": "lora_A", "w3": "lora_A", "w2": "lora_B"}
    stacks = [stack for module in source.modules for stack in module.stacks]
    return source.form == "stacked" and all(
        stack.parameter in outer and len(shape := getattr(stack, outer[stack.parameter]).shape) == 3 and shape[0] == 1
        for stack in stacks
    )


def _form(source: AdapterSource) -> Step:
    """That the experts' LoRA is in the form it has, with what matters of it to some readers."""
    base, paths = source.base, [module.path for module in source.modules]
    if source.form == "stacked" and all(map(GGUF_PATH.fullmatch, paths)):
        return Step("from_stacked", ("gguf",))
    fused = source.form == "fused"
    found = {
        "moved": fused and base is not None and any(base.per_expert_path(path) != path for path in paths),
        "gate_up": not fused and "gate_up" in map(linear_role, _linears(source)),
        "targeted": bool(source.config.raw.get("target_modules")),
    }
    return Step(f"from_{source.form}", tuple(detail for detail, there in found.items() if there))


def _linears(source: AdapterSource) -> set[str]:
    """What the file calls the projections of experts that are not fused."""
    return {slot.linear for module in source.modules for slot in module.experts} | {
        slot.parameter for module in source.modules for slot in module.stacks
    }


def _upstream(source: AdapterSource) -> Iterator[Step]:
    """What PEFT's own conversion of per-expert adapters under transformers 5 gets wrong."""
    if source.config.use_rslora:
        yield Step("upstream_rslora")
    if source.config.alpha_pattern or source.config.rank_pattern:
        yield Step("upstream_patterns")
    if {*map(linear_role, _linears(source))} != {"gate", "up", "down"}:
        yield Step("upstream_roles")


def _layout(how: Refit) -> Iterator[Step]:
    """How the same numbers are laid out, or called, otherwise."""
    source, decision, reader = how.source, how.decision, how.target.reader
    if how.form == "fused":
        if any(slot.unfolded for module in source.modules for slot in module.slots):
            yield Step("unfolded")
        if any(how.served(module.path) != module.path for module in source.modules):
            yield Step("path", (how.served(source.modules[0].path),))
        if decision.orientation.value != how.orientation:
            yield Step("orientation", (how.orientation,))
        if any(r.nesting != parameter_order(path, r.nesting) for path, r in decision.readings.items()):
            yield Step("nesting")
        names = {name for reading in decision.readings.values() for name in reading.nesting}
        if decision.packing.value != "either" and any(decision.packing_of(name) == "grouped" for name in names):
            yield Step("packing")
    elif how.form == source.form:
        if any(how.model.per_expert_path(module.path) != module.path for module in source.modules):
            yield Step("path", (how.model.per_expert_path(source.modules[0].path),))
        roles = {linear: linear_role(linear) for linear in _linears(source)}
        wanted = {linear: how.linear(role) for linear, role in roles.items() if role in ("gate", "up", "down")}
        if wanted != {linear: reader.renames.get(linear, linear) for linear in roles}:
            yield Step("linears", (", ".join(sorted(wanted.values())) or "gate_proj, up_proj",))


def _config(how: Refit, plan: Plan) -> Iterator[Step]:
    """What the reader takes from the file's own config, where that differs from the planned one."""
    source, target, reader = how.source, how.target, how.target.reader
    given, planned = source.given, plan.config
    if target.peft and given.get("peft_type") is None:
        yield Step("peft_type")
    if target.peft and how.form == "fused" and source.base is not None:
        given = as_peft_reads(given, source.base.model_type, target.peft, target.transformers)
    loras = [item for item in plan.items if isinstance(item, Output)]
    keys = _keys(loras, given, reader.everything)
    if reader.scaling == "config":
        if not given.get("rank_pattern") and not given.get("alpha_pattern"):
            keys = [names[:1] for names in keys]  # one speaks for all
        looked_up = [(key, lora.part) for lora, names in zip(loras, keys, strict=True) for key in names]
        if any(lora_rank(given, key) != part.meta.rank for key, part in looked_up):
            yield Step("rank")
        elif any(not isclose(lora_alpha(given, key), part.alpha, rel_tol=1e-9) for key, part in looked_up):
            yield Step("scaling")
    elif not isclose(lora_alpha({"lora_alpha": given.get("lora_alpha")}, "all"), planned["lora_alpha"], rel_tol=1e-9):
        yield Step("scaling", (how.form,))
    if reader.scaling in ("uniform", "rslora"):
        ranks = {part.meta.rank for part in module_parts(source, how.decision, fill_missing=True)}
        if ranks | {slot.numbers.rank for slot in source.linears} != {given.get("r")}:
            yield Step("rank")
    if reader.targets is not None:
        yield from _targets(how, given, [lora.key for lora in loras], reader.targets)
    elif target.peft:
        ours, theirs = reaching(planned), reaching(given)
        pairs = zip(_keys(loras, planned, True), keys, strict=True)
        missed = [found for wanted, found in pairs if ours(wanted[0]) and not theirs(found[0])]
        names = given.get("target_modules")
        refused = isinstance(names, list) and any(any_ending(module.path, names) for module in source.modules)
        if missed or refused:
            yield Step("targets", ("some",) if len(missed) < len(keys) and not refused else ())
    if heeded := [name for name in reader.heeds if (given.get(name) or None) != (planned.get(name) or None)]:
        yield Step("heeded", (", ".join(heeded),))


def _targets(how: Refit, config: Mapping[str, Any], keys: list[str], same: Mapping[str, str]) -> Iterator[Step]:
    """For a reader that wants names: those of the file, and those of the projections it lacks."""
    targets = config.get("target_modules")
    if targets in ("all", "all-linear"):
        return
    names = [target.rpartition(".")[2] for target in targets] if isinstance(targets, list) else []
    given = {same.get(name, name) for name in names}
    there = [how.target.reader.renames.get(name, name) for name in _linears(how.source)]
    for kind, wanted in (("targets", there), ("more_targets", [key.rpartition(".")[2] for key in keys])):
        if not {same.get(name, name) for name in wanted} <= given:
            yield Step(kind)
            return


def _keys(loras: list[Output], config: Mapping[str, Any], as_peft: bool) -> list[tuple[str, ...]]:
    """The names by which a reader looks LoRA up in a config."""
    targets = Targets(config.get("target_parameters") or ()) if as_peft else Targets()
    return [(named_as(targets, lora.path),) if lora.keys == (lora.path,) else lora.keys for lora in loras]
