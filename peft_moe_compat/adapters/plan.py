"""The whole of a conversion, planned from headers: what to write, the config, the stamp, and the steps it takes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import AdapterError
from ..releases import NEWEST_TESTED
from .bounds import MAX_TENSORS
from .config import number, target_config
from .names import PREFIX
from .outputs import Copied, Output, evened, plain
from .parts import plain_part
from .readers import KEEP_THE_BASE, NotTakenError
from .refit import Refit, module_parts
from .source import AdapterSource
from .stamp import ModuleStamp, Stamp, numbers_of
from .steps import Step, exactness

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

    items: tuple[Output | Copied, ...]
    config: dict[str, Any]
    stamp: Stamp | None
    steps: tuple[Step, ...]

    @property
    def exactness(self) -> str:
        """`"bits"`, `"round-off"` or `"lossy"`; see `Conversion`."""
        return exactness(self.steps)

    @property
    def metadata(self) -> dict[str, str]:
        """What this library writes into the file's metadata; empty where there is nothing to say."""
        return {} if self.stamp is None else self.stamp.to_metadata()


def plan_conversion(how: Refit, fill_missing: bool) -> Plan:
    """Plans a conversion. Of the tensors' data only gate's and up's lora_A are read, where the two are to be joined.

    Raises:
        AdapterFileError: The file does not fit the model.
        NotTakenError: The reader takes no such adapter.
        AdapterError: The model's config is needed, or experts are missing.
    """
    source, reader = how.source, how.target.reader
    experts: list[Output] = []
    steps: list[Step] = []
    for group in how.groups(module_parts(source, how.decision, fill_missing)):
        made, took = how.outputs(group)
        experts += made
        steps += took
    count = 2 * sum(output.part.meta.num_experts if how.form == "per_expert" else 1 for output in experts)
    if count > MAX_TENSORS:
        raise AdapterError(
            f"{source.folder} would become {count} tensors; at most {MAX_TENSORS} were expected. Is it the config "
            "of this model, and the file undamaged?"
        )
    linears, rest, dropped = others(how)
    scaling = reader.scaling
    # What an expert's own pattern says was folded already, and must not be read a second time.
    if scaling == "config" and not reader.everything and any(step.kind == "experts_folded" for step in steps):
        scaling = "uniform"
    config, said = target_config(how, experts, linears, _modules_with_lora(source, rest), scaling)
    outputs = experts + linears
    steps = list(dict.fromkeys(steps)) + said
    if scaling != "config":
        rslora = how.rslora and scaling == "rslora"
        outputs, rank, alpha, said = evened(outputs, scaling, rslora)
        config |= {"lora_alpha": number(alpha), "use_rslora": rslora}
        if scaling != "alpha":
            config["r"] = rank
        steps += said
    return Plan((*outputs, *rest), config, _stamp(how, experts, config), (*steps, *dropped))


def _stamp(how: Refit, experts: Sequence[Output], config: Mapping[str, Any]) -> Stamp | None:
    if how.form != "fused":
        return None
    modules, by_path = {}, dict[str, list[Output]]()
    for output in experts:
        by_path.setdefault(output.path, []).append(output)
    for path, outputs in by_path.items():
        loras = [output.part.meta for output in outputs]
        modules[path] = ModuleStamp(
            max(lora.num_experts for lora in loras),
            tuple(output.key.removeprefix(f"{path}.") for output in outputs),
            how.orientation,
            tuple((lora.in_features, lora.out_features) for lora in loras),
            next((output.part.joined for output in outputs if output.part.joined), None),
        )
    peft = how.target.peft or str(NEWEST_TESTED)  # vLLM takes what this one writes
    return Stamp(peft, how.target.transformers, "rank_major", modules, numbers_of(config))


def others(how: Refit) -> tuple[list[Output], list[Copied], list[Step]]:
    """Everything but the experts' LoRA: that of linears, other tensors, and what the reader cannot take of them."""
    source, target, base = how.source, how.target, how.source.base
    rest = source.rest
    slots = source.linears
    made = source.once("linears", slots, lambda: [plain(plain_part(slot), slot.path) for slot in slots])
    paths = (how.served(how.beside_experts(linear.path)) for linear in made)
    linears = [o if o.path == path else plain(o.part, path) for o, path in zip(made, paths, strict=True)]
    start = source.config.init_lora_weights
    fuses = how.form == "fused" and source.form != "none"
    if (fuses or not target.reader.everything) and start is not None and start not in KEEP_THE_BASE:
        raise NotTakenError(
            "initialised",
            f"The adapter was made with init_lora_weights={start!r}, which changes the base model, and {target} does "
            f"not do that again{' for fused experts' * fuses}. Have PEFT save it as plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...).",
        )
    single = _single_experts(source)
    for name in rest:
        module = _expert_of(single, name)
        if module is not None and (how.form == "fused" or (base and base.per_expert_path(module) != module)):
            raise AdapterError(
                f"{name!r} belongs to the LoRA of one expert, and {target} has {module!r} in another form or under "
                "another name: DoRA and biases of experts are not moved, and PEFT takes neither on fused ones."
            )
    if target.reader.everything or not rest:
        return linears, [Copied(name, new_name) for new_name, name in rest.items()], []
    if source.config.use_dora:
        raise NotTakenError(
            "dora",
            f"{target.reader.title} does not read DoRA, and without its magnitudes the adapter would be another one.",
        )
    shown = ", ".join(list(rest)[:3]) + (", ..." if len(rest) > 3 else "")
    return linears, [], [Step("dropped", (len(rest), shown))]


def _single_experts(source: AdapterSource) -> set[str]:
    return {module.path for module in source.modules if module.form != "fused"}


def _expert_of(single: Container[str], name: str) -> str | None:
    """The module of single experts that a tensor with PEFT's name belongs to."""
    parts = name.removeprefix(PREFIX).split(".")
    return next((path for path in map(".".join, accumulate([part] for part in parts)) if path in single), None)


def _modules_with_lora(source: AdapterSource, rest: Sequence[Copied]) -> list[str]:
    """Paths of modules, linears and experts aside, that have LoRA: embeddings, convolutions."""
    single = _single_experts(source)
    names = [copied.new_name for copied in rest if _expert_of(single, copied.new_name) is None]
    return list(dict.fromkeys(name.partition(".lora_")[0].removeprefix(PREFIX) for name in names if ".lora_" in name))
