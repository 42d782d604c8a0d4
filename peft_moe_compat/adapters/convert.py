"""An adapter in the form another reader takes: planned from headers alone, then streamed, part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError, LossyConversionError
from .base_model import BaseModel
from .config import evened_config, target_config, without_the_rest
from .decide import Decision, decide
from .files import usable_path
from .names import PREFIX, peft_name
from .outputs import Item, Output, copied, evened, plain
from .parts import plain_parts
from .plan import ModuleOutputs, Refit, module_parts, refit
from .readers import KEEP_THE_BASE, Target, parse_target
from .source import CONFIG_NAME, AdapterSource, open_with_model
from .stamp import Stamp
from .steps import Step, exactness
from .tensors import SAFETENSORS, atomic_folder, check_finite, write_safetensors

__all__ = ["Conversion", "Progress", "convert_adapter", "planned_modules"]

# Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: The new folder.
        target: The reader it is for, as `--to` names it.
        exactness: `"bits"` where every factor is kept bit for bit, `"round-off"` where a scaling was folded into
            lora_B in float32, `"lossy"` where something was left out.
        steps: What was done beyond laying out the same numbers anew; `str()` of one is a sentence.
        decision: What the input was found to hold.
    """

    out: Path
    target: str
    exactness: str
    steps: tuple[Step, ...]
    decision: Decision

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema_version": 1,
            "out": str(self.out),
            "target": self.target,
            "exactness": self.exactness,
            "steps": [str(step) for step in self.steps],
        }


@dataclass
class _Plan:
    items: list[Item]
    config: dict[str, Any]
    stamp: Stamp | None
    steps: tuple[Step, ...]


def convert_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    fill_missing: bool = False,
    allow_lossy: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes an adapter in the form a reader takes. The input stays as it is; `out` appears complete or not at all.

    Tensors are read, turned and written a projection at a time.

    Args:
        adapter: A folder, or a Hub id.
        out: The folder to make. It must not exist.
        to: `peft` (the installed one), `peft==VERSION[,transformers==VERSION]`, `per-expert`, `vllm`, `sglang` or
            `llama.cpp`.
        model: The base model's config: a folder, a `config.json`, a Hub id or a dict. Needed wherever the form of the
            experts' LoRA changes, and where nothing else tells how the model stores its experts.
        written_by: `peft==VERSION[,transformers==VERSION]`, where the file does not say who wrote it.
        orientation: `linear` or `reversed`, where neither shapes nor writer tell.
        packing: `rank_major` or `grouped`, where the file does not show how lora_B is packed.
        nesting: The parameters, innermost wrapper first, where the file does not show it.
        fill_missing: Gives experts without LoRA one of zeros, where the form needs one for each.
        allow_lossy: Leaves out what the reader cannot take, instead of refusing.
        progress: Called with (bytes done, bytes in all) as the work goes on.

    Raises:
        AdapterFileError: The input is damaged, or contradicts itself or the model.
        AmbiguousAdapterError: The evidence does not settle what the input holds.
        LossyConversionError: The reader cannot take all of it, and `allow_lossy` was not given.
        UnsupportedPeftError: `to` or `written_by` names no PEFT release with expert LoRA.
        AdapterError: Anything else that stands in the way; the message says what helps.
    """
    target = parse_target(to)
    source, base = open_with_model(adapter, model)
    decision = decide(
        source, model=base, written_by=written_by, orientation=orientation, packing=packing, nesting=nesting
    )
    if source.form == "none":
        raise AdapterError(f"{source.folder} holds no LoRA on routed experts; there is nothing to convert.")
    decision.require(str(source.folder))
    plan = _plan(source, decision, target, base, fill_missing)
    how_exact = exactness(plan.steps)
    if how_exact == "lossy" and not allow_lossy:
        raise LossyConversionError(
            f"{target} takes this adapter only with {plan.steps[-1]}. Pass --allow-lossy (allow_lossy=True) for that."
        )
    with atomic_folder(usable_path(out), source=source.folder) as folder:
        _write(folder, source, plan, progress)
    return Conversion(Path(out), str(target), how_exact, plan.steps, decision)


def _plan(
    source: AdapterSource, decision: Decision, target: Target, base: BaseModel | None, fill_missing: bool
) -> _Plan:
    how = refit(source, decision, target, base)
    done = _modules(how, source, decision, base, fill_missing)
    outputs = [output for module in done for output in module.outputs]
    linears, rest, dropped = _others(how)
    steps = list(dict.fromkeys(step for module in done for step in module.steps))
    loras = [named for output in outputs if (named := output.item().lora) is not None]
    paths = [output.part.path for output in linears] + _modules_with_lora(source, rest)
    config = target_config(
        source.config, target, how.form, loras, paths, was=source.form, keep_targets=how.keeps_names(done)
    )
    if dropped:
        config = without_the_rest(config)
    outputs += linears
    if target.scaling != "config":
        outputs, rank, alpha, said = evened(outputs, target.scaling)
        config = evened_config(config, rank, alpha)
        steps += said
    items = [*(output.item() for output in outputs), *rest]
    return _Plan(items, config, how.stamp(done), (*steps, *dropped))


def planned_modules(
    source: AdapterSource, decision: Decision, target: Target, base: BaseModel | None
) -> list[ModuleOutputs]:
    """Every experts module as the target has it, nothing read yet; experts without LoRA get one of zeros."""
    return _modules(refit(source, decision, target, base), source, decision, base, True)


def _modules(
    how: Refit, source: AdapterSource, decision: Decision, base: BaseModel | None, fill_missing: bool
) -> list[ModuleOutputs]:
    groups = how.groups(module_parts(source, decision, base, fill_missing))
    return [outputs for group in groups for outputs in how.outputs(group)]


def _others(how: Refit) -> tuple[list[Output], list[Item], list[Step]]:
    """Everything but the experts' LoRA: that of linears, other tensors, and what the reader cannot take of them."""
    source, target, base = how.source, how.target, how.base
    pairs, rest = plain_parts(source)
    linears = [plain(part, part.load(source.meta(part.reads))) for part in pairs]
    start = source.config.get("init_lora_weights")
    if not target.takes_all_peft and isinstance(start, str) and start not in KEEP_THE_BASE:
        raise AdapterError(
            f"The adapter was made with init_lora_weights={start!r}, which changes the base model, and {target} does "
            "not do that again. Have PEFT save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_"
            "conversion=...)."
        )
    for name in rest:
        module = _expert_of(source, name)
        if module is not None and (how.form == "fused" or (base and base.per_expert_path(module) != module)):
            raise AdapterError(
                f"{name!r} belongs to the LoRA of one expert, and {target} has {module!r} in another form or under "
                "another name: DoRA and biases of experts are not moved, and PEFT takes neither on fused ones."
            )
    if target.takes_all_peft or not rest:
        return linears, [copied(name, new_name) for new_name, name in rest.items()], []
    if source.config.get("use_dora"):
        raise AdapterError(f"{target} does not read DoRA, and without its magnitudes the adapter would be another one.")
    shown = ", ".join(list(rest)[:3]) + (", ..." if len(rest) > 3 else "")
    return linears, [], [Step("dropped", (len(rest), shown))]


def _expert_of(source: AdapterSource, name: str) -> str | None:
    """The module of single experts that a tensor with PEFT's name belongs to."""
    paths = [module.path for module in source.keys.modules if module.form != "fused"]
    return next((path for path in paths if name.startswith(f"{PREFIX}{path}.")), None)


def _modules_with_lora(source: AdapterSource, rest: Sequence[Item]) -> list[str]:
    """Paths of modules, linears and experts aside, that have LoRA: embeddings, convolutions."""
    found = []
    for name in (peft_name(item.reads[0], source.keys.prefix) for item in rest):
        path, dot, _ = name.partition(".lora_")
        if dot and _expert_of(source, name) is None:
            found.append(path.removeprefix(PREFIX))
    return list(dict.fromkeys(found))


def _write(folder: Path, source: AdapterSource, plan: _Plan, progress: Progress | None) -> None:
    layout = [
        (name, tuple(tensor.shape), tensor.dtype)
        for item in plan.items
        for name, tensor in item.emit(source.meta(item.reads))
    ]
    total = sum(source.tensors.infos[name].nbytes for item in plan.items for name in item.reads)

    def made() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for item in plan.items:
            with source.tensors.reading(item.reads) as get:
                for name, tensor in get.items():
                    check_finite(name, tensor)
                    done += source.tensors.infos[name].nbytes
                for name, tensor in item.emit(get):
                    yield name, tensor.contiguous()
            if progress is not None:
                progress(done, total)

    metadata = {"format": "pt"} | (plan.stamp.to_metadata() if plan.stamp else {})
    write_safetensors(folder / SAFETENSORS, layout, _ahead(made()), metadata)
    # Fields in order, as PEFT has them; not what is in them, since PEFT takes the first pattern that matches.
    text = json.dumps(dict(sorted(plan.config.items())), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _ahead(made: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, the next one made in another thread while the last one is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, made, None)
        while (tensor := coming.result()) is not None:
            coming = pool.submit(next, made, None)
            yield tensor
