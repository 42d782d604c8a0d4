"""The whole of a conversion, planned from headers: what to write, the config, the stamp, and the steps it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError
from .config import evened_config, target_config, without_the_rest
from .names import PREFIX, peft_name
from .outputs import Item, Output, copied, evened, plain
from .parts import plain_part
from .readers import KEEP_THE_BASE, NotTakenError
from .refit import ModuleOutputs, Refit, module_parts
from .source import AdapterSource
from .stamp import Stamp
from .steps import Step

__all__ = ["Plan", "others", "plan_conversion"]


@dataclass(frozen=True)
class Plan:
    """What to write for a reader.

    Attributes:
        items: Everything, in the order of the file.
        config: adapter_config.json.
        stamp: For the metadata, of fused experts.
        steps: What it takes beyond laying out the same numbers anew.
    """

    items: tuple[Item, ...]
    config: dict[str, Any]
    stamp: Stamp | None
    steps: tuple[Step, ...]


def plan_conversion(how: Refit, fill_missing: bool) -> Plan:
    """Plans a conversion. Of the tensors' data only gate's and up's lora_A are read, where the two are to be joined.

    Raises:
        AdapterFileError: The file does not fit the model.
        NotTakenError: The reader takes no such adapter.
        AdapterError: The model's config is needed, or experts are missing.
    """
    source, target = how.source, how.target
    done = _modules(how, fill_missing)
    outputs = [output for module in done for output in module.outputs]
    linears, rest, dropped = others(how)
    steps = list(dict.fromkeys(step for module in done for step in module.steps))
    loras = [named for output in outputs if (named := output.item().lora) is not None]
    paths = [output.part.path for output in linears] + _modules_with_lora(source, rest)
    config = target_config(
        source.config, target, how.form, loras, paths, was=source.form, keep_targets=how.keeps_names(done)
    )
    if not target.reader.everything:
        config = without_the_rest(config)
    outputs += linears
    if target.reader.scaling != "config":
        outputs, rank, alpha, said = evened(outputs, target.reader.scaling)
        config = evened_config(config, rank, alpha)
        steps += said
    items = (*(output.item() for output in outputs), *rest)
    return Plan(items, config, how.stamp(done), (*steps, *dropped))


def _modules(how: Refit, fill_missing: bool) -> list[ModuleOutputs]:
    groups = how.groups(module_parts(how.source, how.decision, fill_missing))
    return [outputs for group in groups for outputs in how.outputs(group)]


def others(how: Refit) -> tuple[list[Output], list[Item], list[Step]]:
    """Everything but the experts' LoRA: that of linears, other tensors, and what the reader cannot take of them."""
    source, target, base = how.source, how.target, how.base
    rest = source.rest
    linears = [plain(part, part.load(source.meta(part.reads))) for part in map(plain_part, source.linears)]
    start = source.config.init_lora_weights
    if not target.reader.everything and start is not None and start not in KEEP_THE_BASE:
        raise NotTakenError(
            "initialised",
            f"The adapter was made with init_lora_weights={start!r}, which changes the base model, and {target} does "
            "not do that again. Have PEFT save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_"
            "conversion=...).",
        )
    for name in rest:
        module = _expert_of(source, name)
        if module is not None and (how.form == "fused" or (base and base.per_expert_path(module) != module)):
            raise AdapterError(
                f"{name!r} belongs to the LoRA of one expert, and {target} has {module!r} in another form or under "
                "another name: DoRA and biases of experts are not moved, and PEFT takes neither on fused ones."
            )
    if target.reader.everything or not rest:
        return linears, [copied(name, new_name) for new_name, name in rest.items()], []
    if source.config.use_dora:
        raise NotTakenError(
            "dora",
            f"{target.reader.title} does not read DoRA, and without its magnitudes the adapter would be another one.",
        )
    shown = ", ".join(list(rest)[:3]) + (", ..." if len(rest) > 3 else "")
    return linears, [], [Step("dropped", (len(rest), shown))]


def _expert_of(source: AdapterSource, name: str) -> str | None:
    """The module of single experts that a tensor with PEFT's name belongs to."""
    paths = [module.path for module in source.modules if module.form != "fused"]
    return next((path for path in paths if name.startswith(f"{PREFIX}{path}.")), None)


def _modules_with_lora(source: AdapterSource, rest: Sequence[Item]) -> list[str]:
    """Paths of modules, linears and experts aside, that have LoRA: embeddings, convolutions."""
    found = []
    for name in (peft_name(item.reads[0], source.prefix) for item in rest):
        path, dot, _ = name.partition(".lora_")
        if dot and _expert_of(source, name) is None:
            found.append(path.removeprefix(PREFIX))
    return list(dict.fromkeys(found))
