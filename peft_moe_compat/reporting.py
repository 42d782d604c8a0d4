"""What becomes of each of a model's experts: `report(model)`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import StringIO
from shutil import get_terminal_size
from typing import Any

import torch
from torch import nn

from .errors import CompatWarning
from .families import PACKED_CLASSES
from .forward.fused import backend_of
from .model.experts import bare, is_transposed, routed_experts, stored_shape, strip_base_layer
from .model.sharding import exchanges_tokens
from .model.weights import format_of, stored_format, unreadable_reason
from .model.wrappers import active_adapters, dropout_of, is_param_wrapper, native_reason
from .patching.activation import is_active, not_active_reason
from .patching.displaced import displaced_functions, sentence
from .patching.reach import TAKEN_FROM_US, say_once, unreached
from .reasons import Reason, because
from .releases import installed_versions, newer_than_tested

__all__ = ["AdapterRow", "ExpertsRow", "ParameterRow", "Report", "report"]


@dataclass(frozen=True)
class AdapterRow:
    """One adapter on one expert parameter. `gradient`: "yes", "partly" (one of lora_A and lora_B) or "no".

    `dropout` is the probability now: 0 in evaluation.
    """

    name: str
    rank: int
    scaling: float
    active: bool
    gradient: str
    dropout: float = 0.0


@dataclass(frozen=True)
class ParameterRow:
    """One expert parameter: its stored shape, and the path its forward takes.

    `path` is "grouped_mm" (this library), "peft" (PEFT's own forward) or "base" (no adapter at work). `reasons` say
    why; of "grouped_mm", why no faster backend runs. `reason` has them in words.
    `backend`, where `path` is "grouped_mm", is what computes it on the device it is on: "triton", "torch" or "loop".
    `format` is what the weight is quantised to, such as "bnb nf4"; empty for a plain one.
    """

    name: str
    shape: tuple[int, ...]
    wrapped: bool
    path: str
    reasons: tuple[Reason, ...]
    adapters: tuple[AdapterRow, ...] = ()
    backend: str = ""
    format: str = ""

    @property
    def reason(self) -> str:
        return "; ".join(map(str, self.reasons))

    def to_dict(self) -> dict[str, Any]:
        """Of the reasons, the words and the codes."""
        return asdict(self) | {"reason": self.reason, "reasons": [reason.code for reason in self.reasons]}


@dataclass(frozen=True)
class ExpertsRow:
    """One stack of routed experts."""

    module: str
    cls: str
    is_transposed: bool | None
    parameters: tuple[ParameterRow, ...]


@dataclass(frozen=True)
class Report:
    """Which experts of a model run how. `print` it for a table; `rows`, `to_dict()` and `to_json()` for programs.

    `untested` names what of PEFT and transformers is newer than any release that was tested, with the newest that was.
    """

    active: bool
    rows: tuple[ExpertsRow, ...]
    warnings: tuple[str, ...] = field(default=())
    untested: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"parameters": [p.to_dict() for p in row.parameters]} for row in self.rows]
        return asdict(self) | {"rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        if not self.rows:
            return "peft_moe_compat: the model has no routed experts in fused weights."
        table = Table(title=f"peft_moe_compat {'active' if self.active else 'inactive'}")
        for heading in ("experts", "parameter", "stored", "adapters", "path", "backend, reason"):
            table.add_column(heading, overflow="fold", no_wrap=heading in ("experts", "parameter", "path"))
        for modules, parameter in _folded(self.rows):
            adapters = ", ".join(
                f"{a.name} r={a.rank} s={a.scaling:g}{f' p={a.dropout:g}' if a.dropout else ''}"
                f"{'' if a.active else ' (inactive)'}"
                for a in parameter.adapters
            )
            stored = f"{' x '.join(map(str, parameter.shape))} {parameter.format}".strip()
            reason = ": ".join(filter(None, (parameter.backend, parameter.reason)))
            cells = modules, parameter.name, stored, adapters or "-", parameter.path, reason
            table.add_row(*map(escape, cells))
        console = Console(width=max(120, get_terminal_size().columns), file=StringIO(), color_system=None)
        console.print(table)
        for name, tested in self.untested.items():
            console.print(f"note: this {name} is newer than any tested release ({tested})", highlight=False)
        for warning in self.warnings:
            console.print(f"warning: {warning}", highlight=False, markup=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def _folded(rows: Iterable[ExpertsRow]) -> Iterable[tuple[str, ParameterRow]]:
    """Parameters that differ in their layer number alone share one line: ("...layers.{0,1,2}.mlp.experts", row)."""
    groups: dict[tuple[str, ParameterRow], list[str]] = {}
    for row in rows:
        parts = row.module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        number = parts[at] if at is not None else ""
        pattern = ".".join("{}" if i == at else part for i, part in enumerate(parts))
        for parameter in row.parameters:
            groups.setdefault((pattern, parameter), []).append(number)
    for (pattern, parameter), numbers in groups.items():
        yield pattern.replace("{}", _ranges(numbers)), parameter


def _ranges(numbers: list[str]) -> str:
    """["0", "1", "2", "5"] -> "{0-2,5}"; a single number stays as it is."""
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(int(n) for n in numbers)
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _adapter_row(wrapper: Any, name: str) -> AdapterRow:
    weights = [linear[name].weight for linear in (wrapper.lora_A, wrapper.lora_B)]
    trainable = [weight.requires_grad and weight.device.type != "meta" for weight in weights]
    gradient = "yes" if all(trainable) else "partly" if any(trainable) else "no"
    active = name in wrapper.active_adapters and not wrapper.disable_adapters
    return AdapterRow(name, wrapper.r[name], float(wrapper.scaling[name]), active, gradient, dropout_of(wrapper, name))


def _parameter_row(experts: nn.Module, name: str, wrapper: Any | None) -> ParameterRow:
    path, reasons, backend = _path(experts, name, wrapper)
    adapters = () if wrapper is None else tuple(_adapter_row(wrapper, adapter) for adapter in wrapper.lora_A)
    shape, stored = stored_shape(experts, name) or (), stored_format(experts, name)
    return ParameterRow(name, shape, wrapper is not None, path, reasons, adapters, backend, stored)


def _path(experts: nn.Module, name: str, wrapper: Any | None) -> tuple[str, tuple[Reason, ...], str]:
    """Path, reasons and backend, see `ParameterRow`."""
    row = format_of(experts, name)
    if wrapper is None:
        packed = unreadable_reason(experts, name) if type(experts).__name__ in PACKED_CLASSES else None
        return "base", (packed or because("not_wrapped"),), ""
    if wrapper.disable_adapters:
        return "base", (because("disabled"),), ""
    if wrapper.merged:
        return "base", (because("merge_lost" if row else "merged"),), ""
    if not active_adapters(wrapper):
        return "base", (because("none_active"),), ""
    if reason := not_active_reason() or native_reason(wrapper) or unreached(wrapper):
        refused = because("refused_spread") if exchanges_tokens(experts) else None
        return "peft", tuple(filter(None, (reason, refused, row.caveat if row else None))), ""
    drops = [dropout_of(wrapper, adapter) for adapter in active_adapters(wrapper)]
    backend, reason = backend_of(experts, name, len(drops) > 1 and any(drops))
    return "grouped_mm", (reason,) if reason else (), backend


def report(model: nn.Module) -> Report:
    """Which of a model's routed experts are adapted, and the path and reason of each.

    Warns (`CompatWarning`) of what silently trains less than it seems to: expert parameters left unwrapped in a model
    that PEFT has wrapped, a parameter wrapped twice, adapters missing on some parameters, active adapters whose
    lora_A or lora_B gets no gradient while another does, trainable adapters that are offloaded, and frozen stacks that
    are float32 in a model loaded in half precision.

    Args:
        model: The model, wrapped by PEFT or not.

    Returns:
        A `Report`; its `str` is a table.
    """
    wrappers: dict[int, dict[str, Any]] = {}  # id of the experts module -> parameter name -> its wrapper
    twice: list[str] = []
    found_wrappers: list[Any] = [module for module in model.modules() if is_param_wrapper(module)]
    for wrapper in found_wrappers:
        base, parameter = wrapper.get_base_layer(), wrapper.parameter_name
        if wrappers.setdefault(id(base), {}).setdefault(parameter, wrapper) is not wrapper:
            twice.append(f"{type(base).__name__}.{parameter}")
    experts = {id(m): (name, m, names) for name, m, names in routed_experts(model)}
    for name, other in model.named_modules():  # whatever else PEFT put a ParamWrapper around
        if id(other) in wrappers:
            experts.setdefault(id(other), (strip_base_layer(name), other, ()))
    rows = []
    for key, (name, module, names) in experts.items():
        chain = wrappers.get(key, {})
        extra = tuple(sorted(set(chain) - set(names)))
        parameters = tuple(_parameter_row(module, n, chain.get(n)) for n in names + extra)
        rows.append(ExpertsRow(name, type(module).__name__, is_transposed(module), parameters))
    found = list(_complaints(rows)) if any(hasattr(m, "lora_A") for m in model.modules()) else []
    if twice:
        found.append(
            f"PEFT wrapped {len(twice)} expert parameters twice, {twice[0]} among them: get_peft_model ran twice on "
            "the same model. The two updates add up; build the model afresh if that is not what you want."
        )
    lora = [layers[adapter].weight for w in found_wrappers for layers in (w.lora_A, w.lora_B) for adapter in layers]
    offloaded = sum(weight.device.type == "meta" for weight in lora)
    if offloaded and any(weight.requires_grad for weight in lora):
        found.append(
            f"{offloaded} of {len(lora)} LoRA weights of experts are on the meta device: offloaded, so they get no "
            "gradient, or without data. To train, offload the modules called base_layer alone."
        )
    found += _widened(model, experts.values())
    for complaint in found:
        warnings.warn(complaint, CompatWarning, stacklevel=2)
    gone = [reason for row in rows for p in row.parameters for reason in p.reasons if reason.code in TAKEN_FROM_US]
    for reason in dict.fromkeys(gone):
        found.append(f"{gone.count(reason)} expert parameters do not run in peft_moe_compat's forward: {reason}.")
        if say_once(reason):
            warnings.warn(found[-1], CompatWarning, stacklevel=2)
    for reason in displaced_functions():
        found.append(sentence(reason))
        if say_once(reason):
            warnings.warn(found[-1], CompatWarning, stacklevel=2)
    untested = newer_than_tested(**installed_versions("peft", "transformers"))
    return Report(is_active(), tuple(rows), tuple(found), untested)


def _widened(model: nn.Module, experts: Iterable[tuple[str, nn.Module, tuple[str, ...]]]) -> Iterable[str]:
    """Of frozen stacks in float32, where the model's config says that it was loaded in half precision.

    Not of a model that is float32 in whole: `model.float()` is what somebody wanted.
    """
    dtype = str(getattr(getattr(bare(model), "config", None), "dtype", None)).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16") or all(p.dtype == torch.float32 for p in model.parameters()):
        return
    wide = {
        f"{path}.{name}": weight
        for path, module, names in experts
        for name in names
        if (weight := module._parameters.get(name)) is not None
        and weight.dtype == torch.float32
        and not weight.requires_grad
    }
    if wide:
        size = sum(weight.numel() * 4 for weight in wide.values())
        yield (
            f"{len(wide)} frozen stacks of experts are float32 in a model of {dtype}, {next(iter(wide))} among them: "
            f"{size / 2**30:.2f} GiB instead of {size / 2**31:.2f}, and no fused kernels. PEFT's "
            "prepare_model_for_kbit_training widens them where peft_moe_compat is not active or the experts run in "
            f"another forward than its own: activate it before that call, or narrow them: module.to(torch.{dtype})."
        )


def _complaints(rows: Iterable[ExpertsRow]) -> Iterable[str]:
    """Of a model that PEFT has adapted."""
    parameters = [(f"{row.module}.{p.name}", p) for row in rows for p in row.parameters]
    wrapped = [(name, p) for name, p in parameters if p.wrapped]
    bare = [name for name, p in parameters if not p.wrapped]
    if bare:
        yield (
            f"{len(bare)} of {len(parameters)} expert parameters are not adapted, {bare[0]} among them. Unless you "
            "chose so, pass target_parameters=peft_moe_compat.expert_parameters(model), which reaches them all."
        )
    for adapter in sorted({a.name for _, p in wrapped for a in p.adapters}):
        lacking = [name for name, p in wrapped if adapter not in {a.name for a in p.adapters}]
        if lacking:
            yield (
                f"Adapter {adapter!r} is missing on {len(lacking)} of {len(wrapped)} wrapped expert parameters, "
                f"{lacking[0]} among them."
            )
        states = [(name, a) for name, p in wrapped for a in p.adapters if a.name == adapter and a.active]
        native = [
            name for name, p in wrapped if p.path == "peft" and any(a.name == adapter and a.dropout for a in p.adapters)
        ]
        if native:
            yield (
                f"Adapter {adapter!r} has a lora_dropout, which PEFT's own forward does not apply to {native[0]}: mend "
                "what its reason names before training."
            )
        frozen = [name for name, a in states if a.gradient != "yes"]
        if frozen and any(a.gradient != "no" for _, a in states):
            yield (
                f"Adapter {adapter!r} trains only in part: lora_A or lora_B of {len(frozen)} expert parameters gets "
                f"no gradient, {frozen[0]} among them. Call model.set_adapter, or set requires_grad on both."
            )
