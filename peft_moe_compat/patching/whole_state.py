"""accelerate's own checkpoints: whole models by the names of their tensors, without the config of any adapter.

Saved while the library is active, they say in the safetensors metadata how the experts' LoRA is laid out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

from ..adapters.files import parse_json, show
from ..adapters.names import PREFIX
from ..adapters.orientations import orientations
from ..adapters.safetensors_io import read_header
from ..errors import AdapterError, AmbiguousAdapterError
from ..model.experts import bare
from ..model.wrappers import is_param_wrapper
from .context import holding
from .given import STATE_DICT, carried, carrying, whole
from .matching import chains, model_type_of, orientation_of
from .opening import said_of_files

__all__ = ["get_model_state_dict", "load_accelerator_state", "safe_save_file", "save_state", "set_model_state_dict"]

_MARK = "peft_moe_compat.layout"
_saving: ContextVar[Sequence[Any]] = ContextVar("peft_moe_compat_saving_state", default=())


def save_state(stock: Any) -> Any:
    """For `Accelerator.save_state`, which knows the models; what writes their files does not."""

    @wraps(stock)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        with holding(_saving, self._models):
            return stock(self, *args, **kwargs)

    return replacement


def safe_save_file(stock: Any) -> Any:
    @wraps(stock)
    def replacement(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        for index, model in enumerate(_saving.get()):
            if Path(filename).name == _file(index) and (found := _layout(model)):
                metadata = {**(metadata or {}), _MARK: json.dumps(found)}
        return stock(tensors, filename, metadata=metadata)

    return replacement


def load_accelerator_state(stock: Any) -> Any:
    """For the function of that name, by which `Accelerator.load_state` loads models, then optimizers by position.

    Another layout is refused before anything is loaded; torch would fail once it has loaded the rest of the model, or
    not at all.
    """

    @wraps(stock)
    def replacement(input_dir: Any, models: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for index, model in enumerate(models):
            if any(map(is_param_wrapper, model.modules())):
                file = Path(input_dir, _file(index))
                metadata, infos = read_header(file) if file.is_file() else ({}, [])
                _refuse_another_layout(model, file, {info.name: info.shape for info in infos}, metadata)
        return stock(input_dir, models, *args, **kwargs)

    return replacement


def get_model_state_dict(stock: Any) -> Any:
    """For `_get_model_state_dict`, whose result `save_fsdp_model` pickles, where it is a whole one."""

    @wraps(stock)
    def replacement(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(model, *args, **kwargs)
        name = next((n for n in _factors(model) if whole(found.get(n)) and ".lora_A." in n), None)
        layout = _layout(model) if name else {}
        return carrying(found, str(name), _MARK, json.dumps(layout)) if layout else found

    return replacement


def set_model_state_dict(stock: Any) -> Any:
    """For `_set_model_state_dict`, by which `load_fsdp_model` loads; what has PEFT's names goes to PEFT's function."""

    @wraps(stock)
    def replacement(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not state_dict.keys().isdisjoint(_factors(model)):
            shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if hasattr(tensor, "shape")}
            _refuse_another_layout(model, Path(STATE_DICT), shapes, carried(state_dict, _MARK))
        return stock(model, state_dict, *args, **kwargs)

    return replacement


def _factors(model: Any) -> dict[str, tuple[int, ...]]:
    """Name of every factor of LoRA on parameters, as the model's own state dict has it, -> its shape."""
    return {
        f"{path}.{factor}.{adapter}.weight": tuple(linear.weight.shape)
        for path, wrapper in model.named_modules()
        for factor in (("lora_A", "lora_B") if is_param_wrapper(wrapper) else ())
        for adapter, linear in getattr(wrapper, factor).items()
    }


def _file(index: int) -> str:
    return f"model{f'_{index}' if index else ''}.safetensors"


def _layout(model: Any) -> dict[str, list[str]]:
    """Path of an experts module -> each parameter's name and the orientation of its LoRA, innermost wrapper first."""
    return {
        path.rpartition(PREFIX)[2]: [f"{w.parameter_name} {orientation_of(w)}" for w in reversed(chain)]
        for path, chain in chains(model).items()
        if any(w.num_experts > 1 for w in chain)
    }


def _refuse_another_layout(
    model: Any, file: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> None:
    """Raises where a file's factors of experts are not, or may not be, laid out as the model's.

    Raises:
        AdapterError: They have other shapes, or the file or the caller says that they are laid out otherwise.
        AmbiguousAdapterError: Neither the file nor the caller says it, and shapes are the same both ways.
    """
    for name, held in _factors(model).items():
        if shapes.get(name, held) != held:
            raise _another(file, f"has {name!r} as {shapes[name]}", f"holds {held} there")
    live = _layout(model)
    if _MARK in metadata:
        said: Mapping[str, Any] = parse_json(metadata[_MARK].encode(), f"The entry {_MARK!r} of {file}")
        if said != live:
            path = next((path for path in live if said.get(path) != live[path]), next(iter(said), ""))
            raise _another(file, f"says of {path!r} {show(said.get(path))}", f"holds {live.get(path)}")
    elif all(_square(w) for chain in chains(model).values() for w in chain if w.num_experts > 1) and live:
        _check_said(model, file, live)


def _square(wrapper: Any) -> bool:
    """Whether factors of both orientations have the same shapes."""
    return all(wrapper.lora_A[name].weight.shape[1] == wrapper.lora_B[name].weight.shape[0] for name in wrapper.lora_A)


def _check_said(model: Any, file: Path, live: Mapping[str, Sequence[str]]) -> None:
    import peft
    import transformers

    stated = said_of_files()
    said = {stated.orientation} if stated.orientation else set()
    if not said and (release := stated.releases)[0] is not None:
        said = set(orientations(release[0], release[1], model_type_of(bare(getattr(model, "module", model)))))
    found = {entry.rpartition(" ")[2] for entries in live.values() for entry in entries}
    if len(said) != 1:
        raise AmbiguousAdapterError(
            f"{file} does not say how the experts' LoRA in it is laid out, and its matrices are square, so that "
            f"shapes do not either. If the releases that are installed wrote it, load it in a block `with "
            f'peft_moe_compat.written_by("peft=={peft.__version__},transformers=={transformers.__version__}"):`; name '
            "those that did if others wrote it, and what they laid out otherwise is refused. What this library was "
            "active to save says so itself."
        )
    if said != found:
        raise _another(file, f"is {said.pop()}, as written_by says", f"holds {', '.join(sorted(found))} factors")


def _another(file: Path, theirs: str, ours: str) -> AdapterError:
    import peft

    return AdapterError(
        f"{file} {theirs}; PEFT {peft.__version__} {ours}: another adapter, or a PEFT or transformers of another "
        "layout. What accelerate saves of model and optimizer is not converted. Resume with the releases that wrote "
        "it; or save the adapter there by model.save_pretrained, which PeftModel.from_pretrained converts, and start a "
        "new run."
    )
