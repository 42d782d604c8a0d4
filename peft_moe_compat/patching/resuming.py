"""Training resumed across layouts: what an optimizer keeps of a factor moves with the factor, or nothing is loaded.

`loading` converts a checkpoint's adapter in memory. Trainer then loads `optimizer.pt` by position, with tensors shaped
and ordered like the file's factors; they go through the same canonical form, once they lie where the optimizer has
them. Positions follow the names, so that the state of a file's tensor lies at the parameter that is nested as deep.
"""

from __future__ import annotations

import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapters.rewriting import rewritten
from ..adapters.slots import ExpertsModule
from ..adapters.source import AdapterSource
from ..adapters.tensors import BIN, SAFETENSORS
from ..errors import AdapterError, CompatWarning, LayoutError
from ..model.experts import bare
from ..model.wrappers import is_param_wrapper
from .arguments import naming
from .matching import (
    UnderstoodFile,
    Wrappers,
    convert,
    differences,
    factor_names,
    live_path,
    live_wrappers,
    model_type_of,
)
from .opening import understand

__all__ = ["forget_converted", "load_optimizer_and_scheduler", "remember_converted", "train"]

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"  # Trainer loads both or neither


@dataclass(frozen=True)
class _Turned:
    """An experts module that a file holds otherwise than the live wrappers do, and why that is known."""

    file: UnderstoodFile
    module: ExpertsModule
    wrappers: Wrappers
    adapter_name: str
    why: frozenset[str]

    def factors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(name in the file, name once converted, live parameter) of what lies at one position of an optimizer."""
        live = sorted(self.wrappers.values(), key=lambda at: -at[0])
        for slot, (depth, wrapper) in zip(self.module.slots, live, strict=True):
            linears = wrapper.lora_A[self.adapter_name], wrapper.lora_B[self.adapter_name]
            for name, held, linear in zip(slot.names, factor_names(self.module, depth), linears, strict=True):
                yield name, held, linear.weight

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.source.tensors.infos[name].shape


def _turned(file: UnderstoodFile, live: list[tuple[ExpertsModule, Wrappers]], adapter_name: str) -> list[_Turned]:
    found = []
    for module, wrappers in live:
        if why := differences(module, wrappers, file.decision):
            named = {name: wrappers[name] for name in file.decision.readings[module.path].nesting}
            found.append(_Turned(file, module, named, adapter_name, frozenset(why)))
    return found


def _of_checkpoint(model: Any, checkpoint: Path) -> list[_Turned]:
    """What of a checkpoint's adapters is converted while Trainer loads them.

    Raises:
        AdapterError: One is refused, or it has every expert's LoRA by itself, and the model's experts are stacks.
    """
    found = []
    for folder, name in _adapters(model, checkpoint):
        file = understand(model, str(folder), {})
        if isinstance(file, UnderstoodFile):
            found += _turned(file, live_wrappers(file, model, name), name)
        elif isinstance(file, AdapterSource) and any(is_param_wrapper(m) and name in m.lora_A for m in model.modules()):
            raise AdapterError(
                f"{folder} has LoRA on every expert by itself, and this model's experts are stacks. The adapter can be "
                f"converted, {_OPTIMIZER} cannot. {_anew(checkpoint)}"
            )
    return found


def _adapters(model: Any, checkpoint: Path) -> list[tuple[Path, str]]:
    """Which folder Trainer loads into which of the model's adapters. Source: Trainer._load_from_checkpoint."""

    def held(folder: Path) -> bool:
        return any((folder / name).is_file() for name in (SAFETENSORS, BIN))

    below = [folder for folder in sorted(checkpoint.iterdir()) if folder.is_dir() and held(folder)]
    found = [(folder, folder.name) for folder in below]
    if held(checkpoint):
        found.append((checkpoint, "default" if below else model.active_adapters[0]))
    return [(folder, name) for folder, name in found if name in model.peft_config]


def _anew(checkpoint: Path) -> str:
    return (
        "Start a new run from the adapter's weights, by PeftModel.from_pretrained(base_model, "
        f"{str(checkpoint)!r}, is_trainable=True) and without resume_from_checkpoint, or resume with the PEFT and "
        "transformers releases that wrote the checkpoint."
    )


def _removed(checkpoint: Path) -> str:
    return (
        f"Remove {checkpoint / _OPTIMIZER} to go on with the converted weights, the step and the order of the data, "
        "but fresh moments and a learning-rate schedule from its start; or resume with the PEFT release that wrote "
        "the checkpoint."
    )


def train(stock: Any) -> Any:
    """For `Trainer.train`, which knows the checkpoint before a model is loaded, wrapped or partitioned."""
    named = naming(stock, "self", "resume_from_checkpoint")

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        from transformers.trainer_utils import get_last_checkpoint

        given = named(args, kwargs)
        trainer, checkpoint = given["self"], given.get("resume_from_checkpoint")
        if checkpoint is True:
            checkpoint = get_last_checkpoint(trainer.args.output_dir)
        if checkpoint and Path(checkpoint).is_dir():
            _refuse_what_stays(trainer, Path(checkpoint))
        return stock(*args, **kwargs)

    return replacement


def _refuse_what_stays(trainer: Any, checkpoint: Path) -> None:
    """Raises where the adapter would be converted and what depends on it could not.

    Raises:
        AdapterError: It names what to remove, or how else to go on.
    """
    from peft import PeftModel

    model = trainer.model
    turned = _of_checkpoint(model, checkpoint) if isinstance(model, PeftModel) else []
    if not turned:
        return
    why = f"{checkpoint} is laid out otherwise than this PEFT holds it: {', and '.join(sorted(turned[0].why))}"
    if lost := _taken_for_experts(model, turned[0]):
        names = sorted({path.rpartition(".")[2] for path in lost})
        raise AdapterError(
            f"{why}. It has LoRA on {len(lost)} linears that this model has none on, {lost[0]} first: PEFT from 0.19 "
            f"on takes {', '.join(names)} in target_modules for experts. Make the model from the checkpoint, by "
            f"PeftModel.from_pretrained(base_model, {str(checkpoint)!r}, is_trainable=True) in place of "
            "get_peft_model, and resume as before."
        )
    engines = {"DeepSpeed": trainer.is_deepspeed_enabled, "FSDP": trainer.is_fsdp_enabled}
    for engine in (name for name, enabled in engines.items() if enabled):
        raise AdapterError(
            f"{why}. {engine} loads weights and optimizer state from files of its own, which are not converted. "
            f"{_anew(checkpoint)}"
        )
    if _has_state(checkpoint) and (problem := _problem(_read(checkpoint / _OPTIMIZER), model, turned)):
        raise AdapterError(
            f"{why}. The adapter can be converted, and {_OPTIMIZER} cannot: {problem}. {_removed(checkpoint)}"
        )


def _taken_for_experts(model: Any, turned: _Turned) -> list[str]:
    """Linears with LoRA in a file that the live model has none on, since PEFT took their names for experts'."""
    import peft
    import transformers

    never = rewritten(model_type_of(bare(model)), peft.__version__, transformers.__version__)
    live = {
        live_path(name) for name, m in bare(model).named_modules() if turned.adapter_name in getattr(m, "lora_A", ())
    }
    paths = [linear.path for linear in turned.file.source.linears]
    return [path for path in paths if path.rpartition(".")[2] in never and path not in live]


def _has_state(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in (_OPTIMIZER, _SCHEDULER))


def _read(file: Path) -> Any:
    """Without the data of its tensors, where the file's format allows."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _elementwise(entry: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether every tensor of a parameter's state is floating-point and of the parameter's shape, scalars aside."""
    for value in entry.values():
        if isinstance(value, Tensor):
            if value.numel() > 1 and not (value.is_floating_point() and tuple(value.shape) == shape):
                return False
        elif not (value is None or isinstance(value, int | float | str)):
            return False
    return True


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state without the dict in which bitsandbytes saves a part of it."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found


def _many(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's state that are no scalars."""
    return {key: value for key, value in entry.items() if isinstance(value, Tensor) and value.numel() > 1}


def _problem(saved: Any, model: Any, turned: list[_Turned]) -> str | None:
    """Why the state in a file cannot be converted; None where nothing is known to stand in the way."""
    if not isinstance(saved, dict) or not saved.keys() >= {"state", "param_groups"}:
        return "it holds no state as torch's optimizers save it"
    factors = [(each.shape(name), parameter) for each in turned for name, _, parameter in each.factors()]
    count = sum(len(group["params"]) for group in saved["param_groups"])
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if all(parameter.requires_grad for _, parameter in factors) and count != trained:
        return f"it is of {count} parameters, and the model trains {trained}"
    entries = [_flat(entry) for entry in saved["state"].values()]
    if not any(map(_many, entries)):
        return None  # nothing of it has an order
    found: Counter[tuple[int, ...]] = Counter()
    for entry in entries:
        for shape in {tuple(tensor.shape) for tensor in _many(entry).values()}:
            found[shape] += _elementwise(entry, shape)
    for shape, count in Counter(shape for shape, _ in factors).items():
        if found[shape] < count:
            keys = sorted({str(key) for entry in entries for key in entry})
            shapes = [next((tuple(tensor.shape) for tensor in _many(entry).values()), ()) for entry in entries]
            plain = all(_elementwise(entry, one) for entry, one in zip(entries, shapes, strict=True))
            why = "of another adapter or layout" if plain else "8-bit and factored states are not converted"
            return (
                f"it would take tensors of the shape {shape}, floating-point and nothing else, for {count} factors, "
                f"and has such for {found[shape]} (it holds {', '.join(keys)}: {why})"
            )
    return None


def load_optimizer_and_scheduler(stock: Any) -> Any:
    """For `Trainer._load_optimizer_and_scheduler`, which comes after the adapter."""

    @wraps(stock)
    def replacement(self: Any, checkpoint: Any) -> Any:
        from peft import PeftModel

        result = stock(self, checkpoint)
        if checkpoint is not None and isinstance(self.model, PeftModel) and _has_state(Path(checkpoint)):
            for each in _of_checkpoint(self.model, Path(checkpoint)):
                _convert_state(each, self.optimizer, Path(checkpoint))
        return result

    return replacement


def _convert_state(turned: _Turned, optimizer: Any, checkpoint: Path) -> None:
    """Turns the state of a module's factors as the factors were turned; it lies by position, as it was saved.

    Raises:
        AdapterError: It is not that of these factors, or they are trained with several settings.
    """
    factors = list(turned.factors())
    state = {name: optimizer.state.get(parameter, {}) for name, _, parameter in factors}
    for name, entry in state.items():
        if not _elementwise(entry, turned.shape(name)) or _many(entry).keys() != _many(state[factors[0][0]]).keys():
            shapes = {key: tuple(tensor.shape) for key, tensor in _many(entry).items()}
            raise AdapterError(
                f"{checkpoint / _OPTIMIZER} has {shapes or 'nothing'} where the state of {name} {turned.shape(name)} "
                f"should be: other parameters are trained now, or in other groups. {_removed(checkpoint)}"
            )
    trained = {id(parameter) for _, _, parameter in factors}
    groups = [group for group in optimizer.param_groups if any(id(p) in trained for p in group["params"])]
    if len({str({key: value for key, value in group.items() if key != "params"}) for group in groups}) > 1:
        raise AdapterError(
            f"lora_A and lora_B of {turned.module.path} are trained with settings of their own (as LoRA+ does), and "
            f"change places as {checkpoint} is converted. {_anew(checkpoint)}"
        )
    for key in _many(state[factors[0][0]]):
        tensors = {name: state[name][key] for name in state}
        convert(turned.file, turned.module, turned.wrappers, tensors)
        for name, held, _ in factors:
            state[name][key] = tensors[held]
    for _, _, parameter in factors:
        _converted.pop(parameter, None)


# Parameter that a load has converted -> (folder, shape in the file), until an optimizer has stepped it.
_converted: Any = WeakTensorKeyDictionary()
_watching: list[Any] = []


def remember_converted(file: UnderstoodFile, model: Any, adapter_name: str) -> None:
    """After a load: has the next optimizer step look whether somebody gave it the state of the file's own layout."""
    found = live_wrappers(file, model, adapter_name)
    turned = _turned(file, found, adapter_name)
    for _, wrapper in (at for _, wrappers in found for at in wrappers.values()):
        for linear in (wrapper.lora_A[adapter_name], wrapper.lora_B[adapter_name]):
            _converted.pop(linear.weight, None)
    for each in turned:
        for name, _, parameter in each.factors():
            _converted[parameter] = (file.source.folder, each.shape(name))
    if turned and not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look_at_state))


def forget_converted() -> None:
    """No step is looked at any more."""
    _converted.clear()
    while _watching:
        _watching.pop().remove()


def _look_at_state(optimizer: Any, *_: Any) -> None:
    """Before a step.

    Raises:
        LayoutError: State of another shape than its parameter: fused optimizers would read past its end.
    """
    if not _converted:
        return
    unsure = None
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in _converted:
            continue
        folder, shape = _converted[parameter]
        entry = optimizer.state.get(parameter, {})
        if any(tensor.ndim > 1 and tensor.shape != parameter.shape for tensor in _many(entry).values()):
            raise LayoutError(
                f"An optimizer's state for a factor {tuple(parameter.shape)} has other shapes: "
                f"{ {key: tuple(tensor.shape) for key, tensor in _many(entry).items()} }. The LoRA of {folder} was "
                "converted in memory; an optimizer.pt beside it is laid out as the file is. "
                "Trainer.train(resume_from_checkpoint=...) converts both; else leave the state out."
            )
        if _many(entry) and (shape == tuple(parameter.shape) or not _elementwise(entry, tuple(parameter.shape))):
            unsure = folder
        del _converted[parameter]
    if unsure is not None:
        warnings.warn(
            f"An optimizer has state for factors of {unsure}, which were converted in memory. If it was loaded from "
            "an optimizer.pt beside that adapter, it is laid out as the file is, and its moments belong to other "
            "entries: Trainer.train(resume_from_checkpoint=...) converts both; else leave the state out.",
            CompatWarning,
            stacklevel=2,
        )
