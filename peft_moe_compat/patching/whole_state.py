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
from .matching import chains, model_type_of, orientation_of
from .opening import said_of_files

__all__ = ["load_accelerator_state", "safe_save_file", "save_state"]

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
                _refuse_another_layout(model, Path(input_dir, _file(index)))
        return stock(input_dir, models, *args, **kwargs)

    return replacement


def _file(index: int) -> str:
    return f"model{f'_{index}' if index else ''}.safetensors"


def _layout(model: Any) -> dict[str, list[str]]:
    """Path of an experts module -> each parameter's name and the orientation of its LoRA, innermost wrapper first."""
    return {
        path.rpartition(PREFIX)[2]: [f"{w.parameter_name} {orientation_of(w)}" for w in reversed(chain)]
        for path, chain in chains(model).items()
        if any(w.num_experts > 1 for w in chain)
    }


def _refuse_another_layout(model: Any, file: Path) -> None:
    """Raises where a file's factors of experts are not, or may not be, laid out as the model's.

    Raises:
        AdapterError: They have other shapes, or the file or the caller says that they are laid out otherwise.
        AmbiguousAdapterError: Neither the file nor the caller says it, and shapes are the same both ways.
    """
    metadata, infos = read_header(file) if file.is_file() else ({}, [])
    _check_shapes(model, file, {info.name: info.shape for info in infos})
    live = _layout(model)
    if _MARK in metadata:
        said: Mapping[str, Any] = parse_json(metadata[_MARK].encode(), f"The entry {_MARK!r} of {file}")
        if said != live:
            path = next((path for path in live if said.get(path) != live[path]), next(iter(said), ""))
            raise _another(file, f"says of {path!r} {show(said.get(path))}", f"holds {live.get(path)}")
    elif all(_square(w) for chain in chains(model).values() for w in chain if w.num_experts > 1) and live:
        _check_said(model, file, live)


def _check_shapes(model: Any, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for path, wrapper in model.named_modules():
        if not is_param_wrapper(wrapper):
            continue
        for factor, linears in (("lora_A", wrapper.lora_A), ("lora_B", wrapper.lora_B)):
            for adapter, linear in linears.items():
                name, held = f"{path}.{factor}.{adapter}.weight", tuple(linear.weight.shape)
                if shapes.get(name, held) != held:
                    raise _another(file, f"has {name!r} as {shapes[name]}", f"holds {held} there")


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
            f"{file.parent} does not say how the experts' LoRA in it is laid out, and its matrices are square, so that "
            f"shapes do not either. If the releases that are installed wrote it, load it in a block `with "
            f'peft_moe_compat.written_by("peft=={peft.__version__},transformers=={transformers.__version__}"):`; name '
            "those that did if others wrote it, and what they laid out otherwise is refused. What this library was "
            f"active to save says so itself, in {file.name}."
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
