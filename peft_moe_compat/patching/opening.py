"""Which adapter is about to be loaded, and what it holds, decided before anything is put into the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.nn import ModuleList

from ..adapters.adapter_config import parse_config
from ..adapters.base_model import BaseModel
from ..adapters.conclusions import Settle
from ..adapters.decide import Decision, decide
from ..adapters.files import is_hub_id, read_json
from ..adapters.names import LINEAR_NAMES
from ..adapters.source import CONFIG_NAME, AdapterSource, open_adapter
from ..adapters.stated import Stated
from ..adapters.tensors import BIN, INDEX, SAFETENSORS
from ..errors import AdapterError, AdapterFileError, AmbiguousAdapterError, LayoutError
from ..families import FLAT_CLASSES, PACKED_CLASSES
from ..model.experts import bare, held_parameters
from ..model.weights import unreadable_reason
from .context import holding
from .injecting import convert_command
from .lost import difference
from .matching import UnderstoodFile, counterparts, facts_of, has_experts, live_path

__all__ = ["fitted", "said_of_files", "understand", "written_by"]

logger = logging.getLogger("peft_moe_compat")

_FILES = SAFETENSORS, BIN, INDEX
# What the caller knows of a file.
_said: ContextVar[Stated] = ContextVar("peft_moe_compat_said", default=Stated())  # noqa: B039 (frozen)


@contextmanager
def written_by(
    release: str | None = None,
    *,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
) -> Iterator[None]:
    """Says of the adapters that are loaded in this block what their files cannot: who wrote them, and how.

    A file whose only expert matrices are square fits either way round, and how lora_B is packed never shows. Shapes and
    a stamp of this library come before what is said here, and this before the file's own `peft_version`.

    Args:
        release: `"peft==VERSION"`, or with the transformers release beside it `"peft==VERSION,transformers==VERSION"`.
        orientation: `"linear"` or `"reversed"`: whether lora_A's columns run over the in- or the out-features.
        packing: Of lora_B's columns, `"rank_major"` (every PEFT release) or `"grouped"` (Unsloth before 2026-09).
        nesting: Parameters of an experts module, innermost wrapper first: `("up_proj", "down_proj")`.

    Raises:
        UnsupportedPeftError: `release` names none.
        AdapterError: `orientation` or `packing` is neither of the two.
    """
    with holding(_said, Stated(None, release, orientation, packing, nesting)):
        yield


def said_of_files() -> Stated:
    """What `written_by` says around this."""
    return _said.get()


def understand(model: Any, model_id: str, hub: Mapping[str, Any]) -> UnderstoodFile | AdapterSource | None:
    """The adapter, once it is known what it holds; a per-expert one just opened, whose converting is upstream's.

    None for one without LoRA on experts, or that upstream will not find.

    Raises:
        AdapterError: It does not belong to this model, or is damaged.
        AmbiguousAdapterError: Nothing settles how it is laid out.
        LayoutError: PEFT cannot take it as it is.
    """
    folder = _folder(model_id, hub)
    if folder is None:
        return None
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type", "LORA") != "LORA":
        return None
    if any(type(module).__name__ in FLAT_CLASSES for module in model.modules()):
        return None  # matrices, which every release lays out alike
    facts = facts_of(model, parse_config(config).target_parameters)
    fused = bool(config.get("target_parameters") or facts.stacks)
    if not (fused or has_experts(model)):
        return None
    if not any((folder / name).is_file() for name in (SAFETENSORS, BIN)):
        if not _may_reach_experts(config):
            return None
        raise LayoutError(
            f"{model_id} is in shards ({INDEX}), of which upstream loads none. {convert_command(model_id)} joins them."
        )
    if not (folder / SAFETENSORS).is_file() and not (fused and _may_reach_experts(config)):
        return None  # a `.bin` that is none of ours; any other one is refused, since only its config can be read
    stated = replace(_said.get(), model=facts)
    source = open_adapter(folder, stated)
    if source.form == "stacked":
        raise LayoutError(
            f"{model_id} holds the experts' LoRA as stacks, which PEFT leaves out without a word. Convert it: "
            f"{convert_command(model_id)}."
        )
    if source.modules and "peft_type" not in config:
        raise LayoutError(
            f"The config of {model_id} has no peft_type, without which PEFT reads none. {convert_command(model_id)} "
            "writes one."
        )
    if source.form != "fused":
        return source
    paths = counterparts((module.path for module in source.modules), facts)
    _refuse_packed(model_id, {*paths.values(), *(module.path for module in source.modules)}, model)
    if not paths:
        _refuse_other_names(model_id, source, facts, model)
        return source
    _refuse_other_targets(model_id, source, paths, model)
    source = fitted(source, paths, facts)
    decision = decide(source, stated)
    _require(model_id, decision)
    return UnderstoodFile(source, paths, decision)


def fitted(source: AdapterSource, paths: Mapping[str, str], facts: BaseModel) -> AdapterSource:
    """An adapter's experts modules that the model has, with the model's sizes under the adapter's own paths.

    Args:
        paths: Path of an experts module in the adapter -> in the model.
        facts: Of the model.
    """
    modules = tuple(module for module in source.modules if module.path in paths)
    stacks = {(path, p): size for path, live in paths.items() for (at, p), size in facts.stacks.items() if at == live}
    return replace(source, modules=modules, base=replace(facts, stacks=stacks))


def _may_reach_experts(config: Mapping[str, Any]) -> bool:
    """Whether what a config targets could be experts, in any form. A pattern counts as one that could."""
    targets = config.get("target_modules") or []
    if config.get("target_parameters") or not isinstance(targets, list):
        return True
    parts = {part for target in targets for part in str(target).split(".")}
    return not parts.isdisjoint({*LINEAR_NAMES, "experts"})


def _require(model_id: str, decision: Decision) -> None:
    """Refuses a file that was not decided, with what settles it here and for good."""
    try:
        decision.require(model_id)
    except AmbiguousAdapterError as error:
        opens = [c for c in (decision.orientation, decision.packing, decision.nesting) if not c.decided]
        said = dict.fromkeys(next(filter(None, map(_argument, conclusion.settle)), "") for conclusion in opens)
        call = f"with peft_moe_compat.written_by({', '.join(filter(None, said))}):"
        command = f"peft-moe-compat convert {model_id} OUT --to peft --written-by peft==VERSION"
        raise AmbiguousAdapterError(
            f"{error} In Python that is `{call}` around the call, with what is true of the file; or convert it for "
            f"good: `{command}` (or the flag named above)."
        ) from error


def _argument(settle: Settle) -> str | None:
    """How it is said to `written_by`; None for what that takes no value for."""
    match settle.argument:
        case "written_by":
            return f'"{settle.value}"'
        case "nesting":
            return f"nesting={tuple(settle.value.split(','))}"
        case "packing":
            return f'packing="{settle.value}"'
    return None


def _refuse_other_targets(model_id: str, source: AdapterSource, paths: Mapping[str, str], model: Any) -> None:
    """Raises where the targets are full names, and those of modules that this model has under another prefix."""
    targets = source.config.target_parameters
    for path, live in paths.items():
        names = targets.parameters(path)
        if names and not any(targets.reach(f"{live}.{name}") for name in names):
            raise AdapterError(
                f"The target_parameters of {model_id} reach {path!r}, and not {live!r}. "
                f"{difference(model, model_id, list(paths))}"
            )


def _refuse_packed(model_id: str, paths: Collection[str], model: Any) -> None:
    """Raises where the experts are held as what PEFT can put no LoRA on."""
    for name, module in bare(model).named_modules():
        if type(module).__name__ in PACKED_CLASSES and live_path(name) in paths:
            raise AdapterError(f"{model_id} has LoRA on {live_path(name)!r}: {unreadable_reason(module, '')}.")


def _refuse_other_names(model_id: str, source: AdapterSource, facts: BaseModel, model: Any) -> None:
    """Raises unless the model has at least one of the file's targets: PEFT may load the rest and say nothing."""
    modules = {live_path(name): module for name, module in bare(model).named_modules()}
    if any(held_parameters(modules[module.path]) for module in source.modules if module.path in modules):
        return
    path, stacks = source.modules[0].path, sorted({path for path, _ in facts.stacks})
    lists = [name for name, module in modules.items() if name.endswith("experts") and isinstance(module, ModuleList)]
    if stacks or lists:
        has = f"has others, such as {stacks[0]!r}" if stacks else f"keeps each one as a module, in {lists[0]!r}"
        text = (
            f"{has}. If it is the adapter's base model, another transformers release built it. `peft-moe-compat "
            f"convert {model_id} OUT --model BASE --to per-expert` makes what a release that keeps experts as separate "
            "modules reads (before 5.0), `--to peft` what the others do."
        )
    else:
        text = "has no experts at all."
    named = source.config.base_model_name
    raise AdapterError(
        f"{model_id} has LoRA on the stack of experts {path!r}, and this {facts.name} {text}"
        f"{f' adapter_config.json names the base model {named!r}.' if named else ''}"
    )


def _folder(model_id: str, hub: Mapping[str, Any]) -> Path | None:
    """The folder that upstream is going to read, downloaded if need be; None where upstream will not find one."""
    local = Path(model_id, hub.get("subfolder") or "")
    for name in (CONFIG_NAME, SAFETENSORS):
        if os.path.lexists(local / name) and not (local / name).is_file():  # links that lead nowhere too
            raise AdapterFileError(f"{local / name} is no ordinary file; upstream would wait for it, or fail.")
    if (local / CONFIG_NAME).is_file():
        return local if any((local / name).is_file() for name in _FILES) else None
    if local.exists() or not is_hub_id(model_id):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    client_error: Any = HfHubHTTPError.__bases__[0]
    known = {"subfolder", "revision", "cache_dir", "token", "local_files_only", "repo_type", "proxies"}
    options = {key: value for key, value in hub.items() if key in known and value is not None}
    for name in _FILES:
        try:
            folder = Path(hf_hub_download(model_id, CONFIG_NAME, **options)).parent
            hf_hub_download(model_id, name, **options)
        except (client_error, OSError, ValueError) as error:
            logger.debug("%s: %s could not be had (%s)", model_id, name, error)
        else:
            return folder
    return None  # upstream asks for the same files, and says what is wrong
