"""An experts module's LoRA as another reader takes it: which parts, under which names, in which orientation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import AdapterError, AmbiguousAdapterError
from ..layout import ExpertLora
from ..releases import NEWEST_TESTED
from .base_model import BaseModel
from .decide import Decision
from .names import reaches_parameter
from .orientations import expert_parameter, has_separate_experts, orientations, orientations_after
from .outputs import GGUF_PATH, Output, fused, gguf, per_expert
from .parts import Part, fused_parts, per_expert_parts, stacked_parts
from .readers import NotTakenError, Target
from .shapes import parameter_order
from .shaping import alternating, join, part_gate_up, zeros_like
from .source import AdapterSource
from .stamp import ModuleStamp, Stamp
from .steps import Step

__all__ = ["ModuleOutputs", "Refit", "module_parts", "refit"]


def module_parts(source: AdapterSource, decision: Decision, fill_missing: bool) -> list[Part]:
    """The experts' LoRA of the whole file, part by part, in the order of the file."""
    found: list[Part] = []
    base = source.base
    total = base.num_experts if base is not None else None
    for module in source.modules:
        if module.form == "fused":
            found += fused_parts(module, decision.readings[module.path], decision.packing_of)
            continue
        if module.form == "stacked":
            parts = stacked_parts(module, total)
        else:
            parts = per_expert_parts(module, num_experts=total, fill_missing=fill_missing)
        if base is not None:
            for part in parts:  # what is fused was checked by `decide`
                lora = part.load(source.meta(part.reads))
                base.require(part.path, part.name, part.role, lora.num_experts, (lora.in_features, lora.out_features))
            if not base.gated:  # the up projection, as SGLang calls it
                parts = [replace(part, role="up") if part.role == "gate" else part for part in parts]
            if module.form == "per_expert" and base.interleaved:
                parts = [alternating(part) for part in parts]
        found += parts
    return found


@dataclass(frozen=True)
class ModuleOutputs:
    """One experts module as the target has it: what to write, what it took, and for fused ones the stamp."""

    path: str
    outputs: tuple[Output, ...]
    steps: tuple[Step, ...]
    stamp: ModuleStamp | None = None


@dataclass(frozen=True)
class Refit:
    """How this file is to be changed for this target.

    Attributes:
        source, decision: The file, and what it holds.
        target: The reader.
        form: Of the experts' LoRA there.
        orientation: For fused ones.
    """

    source: AdapterSource
    decision: Decision
    target: Target
    form: str
    orientation: str = "linear"

    @property
    def base(self) -> BaseModel | None:
        return self.source.base

    @property
    def rslora(self) -> bool:
        return self.source.config.use_rslora

    @property
    def model(self) -> BaseModel:
        if self.base is None:
            named = self.source.config.base_model_name
            raise AdapterError(
                f"The base model's config is needed to convert this adapter for {self.target}: pass --model "
                f"{named or 'BASE'} (model=...), a folder, config.json or Hub id."
            )
        return self.base

    def meta(self, part: Part) -> ExpertLora:
        return part.load(self.source.meta(part.reads))

    def groups(self, parts: Iterable[Part]) -> list[dict[str, Part]]:
        """Parts by the module that holds them in the target: role (or name) -> part."""
        found: dict[str, dict[str, Part]] = {}
        for part in parts:
            group = found.setdefault(self._module_key(part), {})
            role = part.role or part.name
            if role in group:
                raise AdapterError(
                    f"{part.path!r} has two {role} LoRA ({group[role].name}, {part.name}); one was expected."
                )
            group[role] = part
        return list(found.values())

    def _module_key(self, part: Part) -> str:
        """What parts of one experts module share: its path, except in renamed families, whose parts lie apart."""
        place = expert_parameter(self.base.model_type, None, part.path, "down") if self.base is not None else None
        return part.path if place is None else place[0]

    def outputs(self, group: Mapping[str, Part]) -> list[ModuleOutputs]:
        if self.form == "fused":
            return self._fused(group)
        return [self._apart(group)]

    def _fused(self, group: Mapping[str, Part]) -> list[ModuleOutputs]:
        parts, joined = dict(group), None
        steps: list[Step] = []
        if {"gate", "up"} & parts.keys() and self.model.gated:
            gate, up = parts.pop("gate", None), parts.pop("up", None)
            lead = gate or up
            assert lead is not None  # noqa: S101
            metas = {role: self.meta(part) for role, part in (("gate", gate), ("up", up)) if part is not None}
            same = gate is not None and up is not None and self._same_A(gate, up)
            whole, joined = join(gate, up, metas, same, self.model.interleaved, self.rslora)
            parts = {"gate_up": whole, **parts}
        if self.target.reader.complete:
            steps += self._fill(parts, ("gate_up", "down"))
        steps += [step for part in parts.values() for step in part.steps]
        by_path: dict[str, list[tuple[str, Part]]] = {}
        for part in parts.values():
            path, parameter = self._place(part)
            by_path.setdefault(path, []).append((parameter, part))
        return [self._nest(path, named, joined, steps) for path, named in by_path.items()]

    def _nest(
        self, path: str, named: list[tuple[str, Part]], joined: tuple[int, int] | None, steps: Sequence[Step]
    ) -> ModuleOutputs:
        by_name = dict(named)
        order = parameter_order(path, by_name)
        outputs, features, counts = [], [], set()
        for index, name in enumerate(order):
            meta = self.meta(by_name[name])
            depth = len(order) - 1 - index
            outputs.append(fused(by_name[name], meta, path, name, depth, self.orientation))
            features.append((meta.in_features, meta.out_features))
            counts.add(meta.num_experts)
        stamp = ModuleStamp(max(counts), order, self.orientation, tuple(features), joined)
        return ModuleOutputs(path, tuple(outputs), tuple(steps), stamp)

    def _place(self, part: Part) -> tuple[str, str]:
        """(path, parameter) of a part in the target."""
        if self.base is not None and self.target.transformers and part.role in ("gate_up", "down"):
            place = expert_parameter(self.base.model_type, self.target.transformers, part.path, part.role)
            if place is not None:
                return place
        if self.source.form == "fused":
            return part.path, part.name
        if part.role not in self.model.parameters:
            raise AdapterError(
                f"{self.model.name} has no expert parameter for the {part.role or part.name} LoRA of {part.path!r}."
            )
        return self.model.fused_path(part.path), self.model.parameters[part.role]

    def _apart(self, group: Mapping[str, Part]) -> ModuleOutputs:
        """gate, up and down on their own, per expert or stacked."""
        parts = dict(group)
        steps: list[Step] = []
        one_lora_A = self.model.model_type in self.target.reader.one_lora_A
        if "gate_up" in parts:
            whole = parts.pop("gate_up")
            stamped = self.source.stamp.modules.get(whole.path) if self.source.stamp else None
            joined = stamped.joined if stamped and not one_lora_A else None
            gate, up = part_gate_up(whole, self.model.interleaved, joined, self.rslora)
            parts = {"gate": gate, "up": up, **parts}
        elif one_lora_A and {"gate", "up"} <= parts.keys() and not self._same_A(parts["gate"], parts["up"]):
            metas = {role: self.meta(parts[role]) for role in ("gate", "up")}
            whole, _ = join(parts["gate"], parts["up"], metas, False, self.model.interleaved, self.rslora)
            gate, up = part_gate_up(whole, self.model.interleaved, None, self.rslora)
            parts = {**parts, "gate": gate, "up": up}
        if self.target.reader.complete:
            steps += self._fill(parts, ("gate", "up", "down") if self.model.gated else ("up", "down"))
        steps += [step for part in parts.values() for step in part.steps]
        outputs = []
        path = ""
        for role, part in parts.items():
            if role not in ("gate", "up", "down"):
                raise AdapterError(f"No per-expert name is known for the LoRA on {part.name} of {part.path!r}.")
            path, meta = self._module_key(part), self.meta(part)
            if not path.endswith("experts") and not (self.form == "gguf" and GGUF_PATH.fullmatch(path)):
                raise AdapterError(f"No per-expert name is known for the LoRA of {path!r} in {self.model.model_type}.")
            if self.form == "gguf":
                outputs.append(gguf(part, meta, path))
            else:
                outputs.append(per_expert(part, meta, self.model.per_expert_path(path), self.linear(role)))
        return ModuleOutputs(path, tuple(outputs), tuple(steps))

    def linear(self, role: str) -> str:
        """Name of an expert's linear there; without a gate, "gate" is the up projection too, as SGLang calls it."""
        model, linears = self.model, self.target.reader.linears
        if not model.gated and role in ("gate", "up"):
            return linears["gate"] if linears else model.linear("up")
        return linears[role] if linears else model.linear(role)

    def _fill(self, parts: dict[str, Part], roles: Sequence[str]) -> list[Step]:
        """Adds LoRA of zeros for the roles a reader asks for."""
        missing = [role for role in roles if role not in parts]
        if not missing:
            return []
        role, part = next(iter(parts.items()))
        meta = self.meta(part)
        out = meta.out_features // 2 if role == "gate_up" else meta.out_features
        hidden, intermediate = (out, meta.in_features) if role == "down" else (meta.in_features, out)
        for absent in missing:
            rows = 2 * intermediate if absent == "gate_up" else intermediate
            fan_in, fan_out = (intermediate, hidden) if absent == "down" else (hidden, rows)
            self.model.require(part.path, absent, absent, meta.num_experts, (fan_in, fan_out))
            zeros = zeros_like(part, absent, fan_in, fan_out)
            parts[absent] = replace(zeros, name=self.model.parameters.get(absent, absent))
        return [Step("filled", (" and ".join(missing), self.target.reader.title))]

    def _same_A(self, gate: Part, up: Part) -> bool:
        with self.source.tensors.reading([*gate.reads, *up.reads]) as tensors:
            ours, theirs = gate.load(tensors).A, up.load(tensors).A
            return ours.dtype == theirs.dtype and torch.equal(ours, theirs)

    def keeps_names(self, done: Sequence[ModuleOutputs]) -> bool:
        """Whether the config's targets stay right: every parameter is called as it was, and was targeted."""
        if self.source.form != "fused" or self.form != "fused":
            return False
        before = {f"{path}.{name}" for path, reading in self.decision.readings.items() for name in reading.nesting}
        after = {output.key for module in done for output in module.outputs}
        return before == after and all(reaches_parameter(self.source.config.target_parameters, key) for key in after)

    def stamp(self, done: Sequence[ModuleOutputs]) -> Stamp | None:
        if self.form != "fused":
            return None
        peft = self.target.peft or str(NEWEST_TESTED)  # vLLM takes what this one writes
        modules = {module.path: module.stamp for module in done if module.stamp is not None}
        return Stamp(peft, self.target.transformers, "rank_major", modules)


def refit(source: AdapterSource, decision: Decision, target: Target) -> Refit:
    """How a file is to be changed for a target.

    Raises:
        NotTakenError: The reader takes no LoRA on these experts.
        AdapterError: The base model's config is needed.
        AmbiguousAdapterError: Nothing tells how the target's model stores its experts.
    """
    reader, base = target.reader, source.base
    how = Refit(source, decision, target, reader.form)
    if base is not None and base.model_type in reader.refuses:
        raise NotTakenError("no_experts", f"{reader.title} takes no LoRA on the experts of {base.model_type}.")
    if reader.form != "gguf" and any(GGUF_PATH.fullmatch(module.path) for module in source.modules):
        raise AdapterError(
            f"{source.folder} has the experts' LoRA under llama.cpp's names, which do not say what the model calls "
            "them. Convert the adapter that it was made from."
        )
    if target.peft is None:
        return replace(how, form="fused") if reader.fused and how.model.model_type in reader.fused else how
    if base is not None:
        if has_separate_experts(base.model_type, target.peft, target.transformers):
            return replace(how, form="per_expert")
        possible = orientations(target.peft, target.transformers, base.model_type)
        flag = f"--to peft=={target.peft},transformers==VERSION"
    else:
        written = decision.orientation.value
        fused_source = source.form == "fused" and decision.peft is not None and written is not None
        if fused_source:
            possible = orientations_after(str(decision.peft), str(written), target.peft)
        else:
            possible = orientations(target.peft, target.transformers, None)
        flag = f"--model {source.config.base_model_name or 'BASE'} (the base model's config.json)"
    if len(possible) > 1:
        raise AmbiguousAdapterError(
            f"{target} reads this adapter in one of two orientations, depending on how the model stores its experts. "
            f"Settle it with {flag}."
        )
    (orientation,) = possible
    return replace(how, orientation=orientation)
