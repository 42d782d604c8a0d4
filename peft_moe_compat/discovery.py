"""What a model's experts are called, and what becomes of each: `expert_parameters(model)` and `report(model)`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from . import families
from .errors import CompatWarning, NoExpertParametersError
from .patch import is_active
from .wrappers import native_reason, wrapper_chain

__all__ = ["AdapterRow", "ExpertsRow", "ParameterRow", "Report", "expert_parameters", "report"]


def _bare(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel: the names PEFT matches are relative to it."""
    bare: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return bare


def expert_parameters(
    model: nn.Module,
    projections: Collection[str] | None = None,
    layers: Collection[int] | None = None,
) -> list[str]:
    """Names for `LoraConfig(target_parameters=...)` that reach every routed expert weight and nothing else.

    PEFT wraps a parameter whose full name is, or ends in "." plus, a target. The names returned are the shortest such
    endings, from two components on, that no other parameter of the model shares; so shared experts, dense layers,
    routers and biases stay out. Pass `target_modules=[]` beside them if nothing else should be adapted: left at None,
    some PEFT releases add attention layers of their own choice.

    Args:
        model: The model, wrapped by PEFT or not.
        projections: Only these, for example `["down_proj"]`. By default all.
        layers: Only decoder layers of these indices, the first number in a module's name. By default all.

    Raises:
        NoExpertParametersError: The model has no such parameter; the message lists what was found instead.
    """
    model = _bare(model)
    wanted: dict[str, tuple[str, ...]] = {}  # full name -> its components
    seen: set[str] = set()
    for name, module, names in families.routed_experts(model):
        _refuse_unrunnable(name, module)
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        seen.update(names)
        if layers is not None and layer not in layers:
            continue
        for parameter in names:
            if projections is None or parameter in projections:
                full = f"{name}.{parameter}"
                wanted[full] = tuple(full.split("."))
    if not wanted:
        raise NoExpertParametersError(_nothing_found(model, seen, projections, layers))
    parametrised = {n for n, m, names in families.routed_experts(model) if getattr(m, "parametrizations", None)}
    others = [tuple(name.split(".")) for name in _all_parameter_names(model) if name not in wanted]
    targets: dict[str, None] = {}
    for full, parts in wanted.items():
        # PEFT finds an already parametrised weight by its full name only.
        exact = full.rpartition(".")[0] in parametrised
        for length in range(len(parts) if exact else 2, len(parts) + 1):
            ending = parts[-length:]
            if ending[0].isdigit() and length < len(parts):
                continue  # "layers.3.mlp..." reads better than "3.mlp..."
            if length == len(parts) or not any(other[-length:] == ending for other in others):
                targets[".".join(ending)] = None
                break
    return list(targets)


def _refuse_unrunnable(name: str, module: nn.Module) -> None:
    if type(module).__name__ in families.FLAT_CLASSES:
        raise NoExpertParametersError(
            f"{name} ({type(module).__name__}) keeps its experts as flat 2-D weights that the block around it reads "
            "itself. PEFT can wrap them, but the forward then fails ('ParamWrapper' object has no attribute ...) in "
            "every release. Target the attention layers of this model instead."
        )


def _all_parameter_names(model: nn.Module) -> Iterable[str]:
    for name, _ in model.named_parameters():
        yield families.strip_base_layer(name)


def _nothing_found(
    model: nn.Module, seen: set[str], projections: Collection[str] | None, layers: Collection[int] | None
) -> str:
    chosen = f" for projections={projections}, layers={layers}" if seen else ""
    message = f"{type(model).__name__} has no routed expert parameter{chosen}."
    if seen:
        return f"{message} Its experts have the projections {sorted(seen)}."
    for name, module in model.named_modules():
        if name.endswith("experts") and isinstance(module, nn.ModuleList) and len(module):
            return (
                f"{message} Its experts are separate modules ({name} is a list of {type(module[0]).__name__}), as in "
                "transformers before 5.0: target their linear layers with target_modules, or install transformers>=5."
            )
    stacks = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if p.ndim == 3]
    if not stacks:
        return f"{message} It has no 3-D parameter at all, so it is not a Mixture-of-Experts model with fused experts."
    return (
        f"{message} 3-D parameters found: {', '.join(stacks[:5])}. If one of these is an expert stack, name its class "
        "with peft_moe_compat.declare_layout."
    )


@dataclass(frozen=True)
class AdapterRow:
    """One adapter on one expert parameter. `gradient`: "yes", "partly" (one of lora_A and lora_B) or "no"."""

    name: str
    rank: int
    scaling: float
    active: bool
    gradient: str


@dataclass(frozen=True)
class ParameterRow:
    """One expert parameter: its stored shape, and the path its forward takes.

    `path` is "grouped_mm" (this library), "peft" (PEFT's own forward, for `reason`) or "base" (not wrapped).
    """

    name: str
    shape: tuple[int, ...]
    wrapped: bool
    path: str
    reason: str
    adapters: tuple[AdapterRow, ...] = ()


@dataclass(frozen=True)
class ExpertsRow:
    """One stack of routed experts."""

    module: str
    cls: str
    is_transposed: bool | None
    parameters: tuple[ParameterRow, ...]


@dataclass(frozen=True)
class Report:
    """Which experts of a model run how. `print` it for a table; `rows`, `to_dict()` and `to_json()` for programs."""

    active: bool
    rows: tuple[ExpertsRow, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"peft_moe_compat {'active' if self.active else 'inactive'}")
        for heading in ("experts", "parameter", "stored (E, d1, d2)", "adapters", "path", "reason"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "experts")
        for modules, parameter in _folded(self.rows):
            adapters = ", ".join(
                f"{a.name} r={a.rank} s={a.scaling:g}{'' if a.active else ' (inactive)'}" for a in parameter.adapters
            )
            shape = " x ".join(map(str, parameter.shape))
            table.add_row(modules, parameter.name, shape, adapters or "-", parameter.path, parameter.reason)
        console = Console(width=150, record=True, file=open_null())
        console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", style=None, highlight=False, markup=False)
        return console.export_text().rstrip()


def open_null() -> Any:
    """A sink for rich, which records what it prints."""
    import io

    return io.StringIO()


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
    trainable = [linear[name].weight.requires_grad for linear in (wrapper.lora_A, wrapper.lora_B)]
    gradient = "yes" if all(trainable) else "partly" if any(trainable) else "no"
    active = name in wrapper.active_adapters and not wrapper.disable_adapters
    return AdapterRow(name, wrapper.r[name], float(wrapper.scaling[name]), active, gradient)


def _parameter_row(experts: nn.Module, name: str, wrapper: Any | None) -> ParameterRow:
    shape = families.stored_shape(experts, name) or ()
    if wrapper is None:
        return ParameterRow(name, shape, False, "base", "not wrapped by PEFT")
    adapters = tuple(_adapter_row(wrapper, adapter) for adapter in wrapper.lora_A)
    if wrapper.disable_adapters or wrapper.merged:
        reason = "adapters are disabled" if wrapper.disable_adapters else "adapters are merged into the weight"
        return ParameterRow(name, shape, True, "base", reason, adapters)
    reason = native_reason(wrapper) or ("" if is_active() else "peft_moe_compat is not active")
    return ParameterRow(name, shape, True, "peft" if reason else "grouped_mm", reason, adapters)


def report(model: nn.Module) -> Report:
    """Which of a model's routed experts are adapted, and the path and reason of each.

    Warns (`CompatWarning`) of what silently trains less than it seems to: expert parameters left unwrapped beside
    wrapped ones, adapters missing on some of them, and active adapters whose lora_A or lora_B gets no gradient while
    another does.

    Args:
        model: The model, wrapped by PEFT or not.

    Returns:
        A `Report`; its `str` is a table.
    """
    wrappers: dict[int, dict[str, Any]] = {}  # id of the experts module -> parameter name -> its wrapper
    for module in model.modules():
        for wrapper in wrapper_chain(module):
            wrappers.setdefault(id(wrapper.get_base_layer()), {})[wrapper.parameter_name] = wrapper
    rows = []
    for name, experts, names in families.routed_experts(model):
        chain = wrappers.get(id(experts), {})
        extra = tuple(sorted(set(chain) - set(names)))
        parameters = tuple(_parameter_row(experts, n, chain.get(n)) for n in names + extra)
        rows.append(ExpertsRow(name, type(experts).__name__, families.is_transposed(experts), parameters))
    found = tuple(_complaints(rows))
    for complaint in found:
        warnings.warn(complaint, CompatWarning, stacklevel=2)
    return Report(is_active(), tuple(rows), found)


def _complaints(rows: Iterable[ExpertsRow]) -> Iterable[str]:
    parameters = [(f"{row.module}.{p.name}", p) for row in rows for p in row.parameters]
    wrapped = [(name, p) for name, p in parameters if p.wrapped]
    if not wrapped:
        return
    bare = [name for name, p in parameters if not p.wrapped]
    if bare:
        yield (
            f"{len(bare)} of {len(parameters)} expert parameters are not adapted, {bare[0]} among them. Pass "
            "target_parameters=peft_moe_compat.expert_parameters(model) to reach them all."
        )
    adapters = sorted({a.name for _, p in wrapped for a in p.adapters})
    for adapter in adapters:
        lacking = [name for name, p in wrapped if adapter not in {a.name for a in p.adapters}]
        if lacking:
            yield (
                f"Adapter {adapter!r} is missing on {len(lacking)} of {len(wrapped)} wrapped expert parameters, "
                f"{lacking[0]} among them."
            )
        states = [(name, a) for name, p in wrapped for a in p.adapters if a.name == adapter and a.active]
        frozen = [name for name, a in states if a.gradient != "yes"]
        if frozen and any(a.gradient != "no" for _, a in states):
            yield (
                f"Adapter {adapter!r} trains only in part: lora_A or lora_B of {len(frozen)} expert parameters gets "
                f"no gradient, {frozen[0]} among them. Call model.set_adapter, or set requires_grad on both."
            )
