"""An experts module's LoRA as another reader takes it: which parts, under which names, in which orientation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..errors import AdapterError, AmbiguousAdapterError
from .base_model import BaseModel
from .config_fields import unread
from .decide import Decision
from .orientations import expert_parameter, has_separate_experts, orientations, orientations_after
from .outputs import GGUF_PATH, Output, fused, gguf, per_expert, shared_outer
from .parts import Part, expert_parts
from .reader_target import Target
from .readers import NotTakenError, is_of
from .rewriting import taken_for_experts
from .shapes import parameter_order
from .shaping import alternating, join, part_gate_up, zeros_like
from .source import AdapterSource
from .steps import Step

__all__ = ["Refit", "linears_taken_for_experts", "module_parts", "refit", "require_names", "require_read"]


def module_parts(source: AdapterSource, decision: Decision, fill_missing: bool) -> list[Part]:
    """The experts' LoRA of the whole file, part by part, in the order of the file."""
    parts = source.once(("parts", fill_missing), decision, lambda: _module_parts(source, decision, fill_missing))
    return list(parts)


def _module_parts(source: AdapterSource, decision: Decision, fill_missing: bool) -> list[Part]:
    found: list[Part] = []
    base = source.base
    for module in source.modules:
        parts = expert_parts(module, decision, base.expert_counts if base else (), fill_missing)
        if base is not None and module.form != "fused":  # what is fused was checked by `decide`
            if not base.gated:  # the up projection, as SGLang, Tinker and NeMo Automodel call it
                parts = [replace(part, role="up") if part.role in ("gate", "gate_up") else part for part in parts]
            for part in parts:
                lora = part.meta
                base.require(part.path, part.name, part.role, lora.num_experts, (lora.in_features, lora.out_features))
            if module.form == "per_expert" and base.interleaved:
                # ms-swift has gate, then up; the linears of a list are the base's own, whose rows alternate.
                parts = [part if part.name == "gate_up_projs" else alternating(part) for part in parts]
        found += parts
    return found


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

    def served(self, path: str) -> str:
        """Path of a module as the reader looks for it: a text model's may lie under `language_model` there."""
        base, mounted = self.source.base, self.target.reader.mounted
        if mounted and base is not None and is_of(base, mounted):
            return re.sub(r"^model\.layers\.", "model.language_model.layers.", path)
        return path

    @property
    def rslora(self) -> bool:
        return self.source.config.use_rslora

    @property
    def model(self) -> BaseModel:
        base = self.source.base
        if base is None:
            named = self.source.config.base_model_name
            raise AdapterError(
                f"The base model's config is needed to convert this adapter for {self.target}: pass --model "
                f"{named or 'BASE'} (model=...), a folder, config.json or Hub id."
            )
        return base

    def beside_experts(self, path: str) -> str:
        """Path of a module that is no experts module, in the target."""
        base = self.source.base
        if base is None or self.form == "gguf" or (self.form == "fused" and self.target.peft is None):
            return path
        return base.beside_experts(path, self.form)

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
        place = self._renamed(None, part.path, "down")
        return part.path if place is None else place[0]

    def _renamed(self, transformers: str | None, path: str, role: str) -> tuple[str, str] | None:
        """(path, parameter) that a renamed family gives a role; None for all other families."""
        base = self.source.base
        if base is None and self.source.form != "fused":
            return None
        return expert_parameter(None if base is None else base.model_type, transformers, path, role)

    def outputs(self, group: Mapping[str, Part]) -> tuple[list[Output], list[Step]]:
        """What becomes of a group, and what that takes."""
        parts = self._joined(group) if self.form == "fused" else self._parted(group)
        steps = self._fill(parts) if self.target.reader.complete else []
        steps += [step for part in parts.values() for step in part.steps]
        return (self._nested(parts) if self.form == "fused" else self._apart(parts)), steps

    def _joined(self, group: Mapping[str, Part]) -> dict[str, Part]:
        """With gate and up together."""
        sides = {role: group[role] for role in ("gate", "up") if role in group}
        if not sides or not self.model.gated:
            return dict(group)
        same = len(sides) == 2 and self._same_A(sides)
        whole = join(sides, same, self.model.interleaved, self.rslora)
        return {"gate_up": whole, **{role: part for role, part in group.items() if role not in sides}}

    def _parted(self, group: Mapping[str, Part]) -> dict[str, Part]:
        """With gate and up apart."""
        interleaved, one_lora_A = self.model.interleaved, self.model.model_type in self.target.reader.one_lora_A
        sides = {role: group[role] for role in ("gate", "up") if role in group}
        if "gate_up" in group:
            parts = dict(group)
            whole = parts.pop("gate_up")
            stamped = self.source.stamp.modules.get(whole.path) if self.source.stamp else None
            joined = stamped.joined if stamped and not one_lora_A else None
            gate, up = part_gate_up(whole, interleaved, joined, self.rslora)
            return {"gate": gate, "up": up, **parts}
        if one_lora_A and len(sides) == 2 and not self._same_A(sides):
            whole = join(sides, False, interleaved, self.rslora)
            gate, up = part_gate_up(whole, interleaved, None, self.rslora)
            return {**group, "gate": gate, "up": up}
        return dict(group)

    def _nested(self, parts: Mapping[str, Part]) -> list[Output]:
        """PEFT's flat pairs, innermost wrapper first."""
        by_path: dict[str, dict[str, Part]] = {}
        for part in parts.values():
            path, parameter = self._place(part)
            by_path.setdefault(path, {})[parameter] = part
        outputs = []
        for path, named in by_path.items():
            order = parameter_order(path, named)
            outputs += [
                fused(named[p], self.served(path), p, len(order) - 1 - i, self.orientation) for i, p in enumerate(order)
            ]
        return outputs

    def _place(self, part: Part) -> tuple[str, str]:
        """(path, parameter) of a part in the target."""
        if self.target.transformers and part.role in ("gate_up", "down"):
            place = self._renamed(self.target.transformers, part.path, part.role)
            if place is not None:
                return place
        if self.source.form == "fused":
            return part.path, part.name
        if part.role not in self.model.parameters:
            raise AdapterError(
                f"{self.model.name} has no expert parameter for the {part.role or part.name} LoRA of {part.path!r}."
            )
        return self.model.fused_path(part.path), self.model.parameters[part.role]

    def _apart(self, parts: Mapping[str, Part]) -> list[Output]:
        """gate, up and down on their own, per expert or stacked."""
        outputs = []
        for role, part in parts.items():
            if role not in ("gate", "up", "down"):
                raise AdapterError(f"No per-expert name is known for the LoRA on {part.name} of {part.path!r}.")
            path = self._module_key(part)
            if not path.endswith("experts") and not (self.form == "gguf" and GGUF_PATH.fullmatch(path)):
                raise AdapterError(f"No per-expert name is known for the LoRA of {path!r} in {self.model.model_type}.")
            if self.form == "gguf":
                outputs.append(gguf(part, path))
            else:
                make = shared_outer if self.form == "shared_outer" else per_expert
                outputs.append(make(part, self.model.per_expert_path(path), self.linear(role)))
        return outputs

    def linear(self, role: str) -> str:
        """Name of an expert's linear there; without a gate, "gate" is the up projection too, as SGLang calls it."""
        model, linears = self.model, self.target.reader.linears
        if not model.gated and role in ("gate", "up"):
            return linears["gate"] if linears else model.linear("up")
        return linears[role] if linears else model.linear(role)

    def _fill(self, parts: dict[str, Part]) -> list[Step]:
        """Adds LoRA of zeros for the projections that are not there."""
        apart = ("gate", "up", "down") if self.model.gated else ("up", "down")
        missing = [role for role in (self.model.parameters if self.form == "fused" else apart) if role not in parts]
        if not missing:
            return []
        role, part = next(iter(parts.items()))
        fan_in, fan_out = part.meta.in_features, part.meta.out_features // (2 if role == "gate_up" else 1)
        hidden, intermediate = (fan_out, fan_in) if role == "down" else (fan_in, fan_out)
        sizes = {"gate_up": (hidden, 2 * intermediate), "down": (intermediate, hidden)}
        for absent in missing:
            features = sizes.get(absent, (hidden, intermediate))
            self.model.require(part.path, absent, absent, part.meta.num_experts, features)
            zeros = zeros_like(part, absent, *features)
            parts[absent] = replace(zeros, name=self.model.parameters.get(absent, absent))
        return [Step("filled", (" and ".join(missing), self.target.reader.title))]

    def _same_A(self, sides: Mapping[str, Part]) -> bool:
        with self.source.tensors.reading([name for part in sides.values() for name in part.reads]) as tensors:
            ours, theirs = (part.load(tensors).A for part in sides.values())
            return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and bool((ours == theirs).all())


def refit(source: AdapterSource, decision: Decision, target: Target) -> Refit:
    """How a file is to be changed for a target.

    Raises:
        NotTakenError: The reader takes no LoRA on these experts.
        AdapterError: The base model's config is needed.
        AmbiguousAdapterError: Nothing tells how the target's model stores its experts.
    """
    reader, base = target.reader, source.base
    how = Refit(source, decision, target, reader.form)
    if base is not None and is_of(base, reader.refuses):
        raise NotTakenError("no_experts", f"{reader.title} takes no LoRA on the experts of {base.model_type}.")
    require_read(source, target)
    if reader.form != "gguf":
        require_names(source)
    if target.peft is None:
        return replace(how, form="fused") if reader.fused and is_of(how.model, reader.fused) else how
    if source.form == "none":
        return how  # linears alone, under other names in the config
    if base is not None:
        if has_separate_experts(base.model_type, target.peft, target.transformers):
            return replace(how, form="per_expert")
        possible = orientations(target.peft, target.transformers, base.model_type)
        flag = f"--to peft=={target.peft},transformers==VERSION"
    else:
        written = decision.orientation.value
        # Unfolded factors are linear however the model stores its experts.
        flat = source.form == "fused" and not any(s.unfolded for module in source.modules for s in module.slots)
        fused_source = flat and decision.peft is not None and written is not None
        if fused_source:
            writer = str(decision.peft), decision.transformers
            possible = orientations_after(writer, str(written), (target.peft, target.transformers))
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


def require_read(source: AdapterSource, target: Target) -> None:
    """Raises `NotTakenError` for an adapter that is another one without what its config says."""
    reader = target.reader
    for name, what in () if reader.everything else unread(source.config.raw):
        if name not in reader.reads:
            raise NotTakenError(name, f"The adapter is {what} ({name}), and {target} does not apply that.")


def require_names(source: AdapterSource) -> None:
    """Raises `AdapterError` for an adapter whose names do not say what the model calls its experts."""
    if any(stack.parameter.startswith("ffn_") for module in source.modules for stack in module.stacks):
        raise AdapterError(
            f"{source.folder} has the experts' LoRA under llama.cpp's names, which do not say what the model calls "
            "them. Take the adapter that it was made from."
        )


def linears_taken_for_experts(source: AdapterSource, target: Target) -> list[str]:
    """Linears of an adapter that the target's PEFT would leave without LoRA; none where the base is not known."""
    if target.peft is None or source.base is None:
        return []
    paths = [linear.path for linear in source.linears]
    return taken_for_experts(source.config.raw, paths, source.base.model_type, target.peft, target.transformers)
