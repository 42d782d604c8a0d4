"""Adapters read as what they are while PEFT or transformers loads them.

PEFT and transformers load a file without asking who wrote it. The functions they look up on the way are wrapped here:
the file is decided (`adapters.decide`) before anything is put into the model, and once its ParamWrappers are live the
expert tensors are handed on in the form those wrappers hold. A file that is right already goes through untouched.

Each function here takes one of theirs and gives what goes in its place (`replacements` lists them). Nothing is kept on
any module; what is being loaded stands in a context variable for the length of the call.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from torch import Tensor

from ..adapters.names import PREFIX
from ..adapters.source import AdapterSource
from ..adapters.tensors import HeldTensors
from ..errors import AdapterError, LayoutError
from ..model.experts import bare
from .arguments import naming
from .arrival import check_fused, check_per_expert
from .context import holding
from .displaced import notice
from .given import STATE_DICT, understand_tensors
from .injecting import check_config, convert_command
from .lost import check_names
from .matching import UnderstoodFile, convert, differences, live_namer, live_wrappers
from .opening import understand
from .resuming import remember_converted
from .targets import convert_config

__all__ = [
    "as_held",
    "convert_names",
    "convert_peft_config",
    "from_pretrained",
    "is_loading",
    "load_adapter",
    "load_peft_weights",
    "load_pretrained_model",
    "load_weights_to_swap",
    "prepare_model",
]

logger = logging.getLogger("peft_moe_compat")


@dataclass(frozen=True)
class _Load:
    """One call that loads an adapter into a model.

    Attributes:
        file: None where there is nothing to say of it.
        names: Of the tensors that upstream was given, once it was.
    """

    model: Any
    model_id: str
    adapter_name: str
    file: UnderstoodFile | AdapterSource | None
    names: list[str] = field(default_factory=list)

    @property
    def source(self) -> AdapterSource | None:
        return self.file.source if isinstance(self.file, UnderstoodFile) else self.file


_loading: ContextVar[_Load | None] = ContextVar("peft_moe_compat_loading", default=None)


@contextmanager
def _load(model: Any, model_id: Any, adapter_name: str, hub: Mapping[str, Any]) -> Iterator[_Load]:
    outer = _loading.get()
    if outer is not None and (outer.model_id, outer.adapter_name) == (str(model_id), adapter_name):
        load = replace(outer, model=model)  # from_pretrained, which has come to its load_adapter
    else:
        load = _Load(model, str(model_id), adapter_name, understand(model, str(model_id), hub))
    with holding(_loading, load):
        yield load


def from_pretrained(stock: Any) -> Any:
    named = naming(getattr(stock, "__func__", stock), "cls", "model", "model_id", "adapter_name")

    @wraps(getattr(stock, "__func__", stock))
    def replacement(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = named((cls, *args), kwargs)
        if "model" not in given or "model_id" not in given:
            return stock.__get__(None, cls)(*args, **kwargs)  # which says what is missing
        with _load(given["model"], given["model_id"], given.get("adapter_name", "default"), kwargs):
            return stock.__get__(None, cls)(*args, **kwargs)

    return classmethod(replacement)


def load_adapter(model_name: str, id_name: str, stock: Any) -> Any:
    """For `load_adapter` of PEFT and transformers and for `hotswap_adapter`.

    Args:
        model_name, id_name: What upstream calls the model and the adapter, which come first, before `adapter_name`.
    """
    named = naming(stock, model_name, id_name, "adapter_name")

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        given = named(args, kwargs)
        config = given.get("load_config")
        model_id = given.get(id_name) or getattr(config, "pretrained_model_name_or_path", None)
        tensors, peft_config = given.get("adapter_state_dict"), given.get("peft_config")
        if model_name in given and tensors and peft_config is not None:
            name, file = given.get("adapter_name") or "default", understand_tensors(given["self"], peft_config, tensors)
            with holding(_loading, None if file is None else _Load(given["self"], STATE_DICT, name, file)):
                result = stock(*args, **kwargs)
            if file is not None:
                check_fused(file, given["self"], name)
            return result
        if model_name not in given or model_id is None:
            return stock(*args, **kwargs)  # which says what is missing
        hub = {**(getattr(config, "download_kwargs", None) or {}), **given, **(given.get("adapter_kwargs") or {})}
        with _load(given[model_name], model_id, given.get("adapter_name") or "default", hub) as load:
            result = stock(*args, **kwargs)
            # What does not fit is left out where the caller says so, and upstream names it.
            said = None if given.get("ignore_mismatched_sizes") else result
            check_names(load.model, load.model_id, load.adapter_name, load.names, said, load.source)
            if isinstance(load.file, AdapterSource):
                check_per_expert(load.file, load.model, load.adapter_name)
            elif load.file is not None:
                check_fused(load.file, load.model, load.adapter_name)
                remember_converted(load.file, load.model, load.adapter_name)
            return result

    return replacement


def load_peft_weights(stock: Any) -> Any:
    upstream = naming(stock, "model_id", "device", "key_mapping")

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        notice()
        weights = stock(*args, **kwargs)
        load, key_mapping = _loading.get(), upstream(args, kwargs).get("key_mapping")
        if load is None:
            return weights
        load.names[:] = weights
        if not isinstance(load.file, UnderstoodFile):
            return weights
        names = {name: _renamed(name, key_mapping) for name in load.file.source.tensors.infos}
        if set(names.values()) != weights.keys():
            raise AdapterError(
                f"PEFT read other tensors from {load.model_id} than its files hold: "
                f"{sorted(set(names.values()) ^ weights.keys())[:4]}. Did the adapter change meanwhile, or does a "
                "key_mapping give two tensors one name?"
            )
        held = _held(load, load.file, lambda: {name: weights[renamed] for name, renamed in names.items()})
        if held is not None:
            weights = {_renamed(name, key_mapping): tensor for name, tensor in held.items()}
        named = live_namer(load.model)
        weights = {named(name): tensor for name, tensor in weights.items()}
        load.names[:] = weights
        return weights

    return replacement


def load_weights_to_swap(stock: Any) -> Any:
    """For `hotswap_adapter`, which somebody may have imported by its name before it was replaced."""
    from peft import PeftConfig

    ours = load_peft_weights(stock)

    @wraps(stock)
    def replacement(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if _loading.get() is None and PeftConfig.from_pretrained(model_id, **kwargs).to_dict().get("target_parameters"):
            raise AdapterError(
                f"{model_id} has LoRA on parameters, and the hotswap_adapter that loads it was imported before "
                "peft_moe_compat was active, so that nobody asks what the file holds. Call "
                "peft.utils.hotswap.hotswap_adapter, or import the function after peft_moe_compat."
            )
        return ours(model_id, *args, **kwargs)

    return replacement


def _renamed(name: str, key_mapping: Mapping[str, str] | None) -> str:
    """What `load_peft_weights` calls a tensor of the file under that `key_mapping`."""
    prefix = next((p for p in (PREFIX, "base_model.") if name.startswith(p)), "")
    inner = name.removeprefix(prefix)
    for pattern, replacement in (key_mapping or {}).items():
        inner, count = re.subn(pattern, replacement, inner)
        if count:
            break
    return prefix + inner


def load_pretrained_model(stock: Any) -> Any:
    @wraps(getattr(stock, "__func__", stock))
    def replacement(cls: Any, *args: Any, **kwargs: Any) -> Any:
        load = _loading.get()
        if load is not None and load.source is not None:
            load.names[:] = kwargs.get("state_dict") or load.source.tensors.infos
        if load is not None and isinstance(load.file, UnderstoodFile):
            tensors, given = load.file.source.tensors, kwargs.get("state_dict")

            def read() -> Mapping[str, Tensor]:
                if given is not None:
                    return given  # type: ignore[no-any-return]
                with tensors.reading(tensors.infos) as found:
                    return dict(found)

            held, named = _held(load, load.file, read), live_namer(load.model)
            if held is not None or any(named(name) != name for name in tensors.infos):
                held = dict(read()) if held is None else held
                kwargs["state_dict"] = {named(name): tensor for name, tensor in held.items()}
                load.names[:] = kwargs["state_dict"]
        return stock.__get__(None, cls)(*args, **kwargs)

    return classmethod(replacement)


def convert_peft_config(stock: Any) -> Any:
    """For `convert_peft_config_for_transformers` of PEFT, which changes a config, and of transformers, which copies."""

    @wraps(stock)
    def replacement(peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        load = _loading.get()
        if load is None or load.source is None:
            return stock(peft_config, *args, **kwargs)
        try:
            return convert_config(lambda config: stock(config, *args, **kwargs), peft_config, load.source)
        except ValueError as error:  # gate without up, which cannot be fused
            raise LayoutError(
                f"PEFT cannot take {load.model_id} as it is: {error} Convert it: {convert_command(load.model_id)}."
            ) from error

    return replacement


def convert_names(stock: Any) -> Any:
    """For `convert_peft_adapter_state_dict_for_transformers` of PEFT, which renames tensors like weights.

    transformers takes laguna's `mlp.shared_experts` for the Hub's `mlp.shared_expert` and one character more (5.12 to
    5.24), and gives back the name with a dot too many.
    """

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return {name.replace("..", "."): tensor for name, tensor in stock(*args, **kwargs).items()}

    return replacement


def prepare_model(stock: Any) -> Any:
    """For `LoraModel._prepare_model`, which is the last that is called before LoRA is put into a model."""

    @wraps(stock)
    def replacement(self: Any, peft_config: Any, model: Any) -> Any:
        notice()
        result = stock(self, peft_config, model)
        load = _loading.get()
        if load is not None and bare(model) is bare(load.model):
            check_config(peft_config, model, load.model_id, load.file)
        return result

    return replacement


def _held(load: _Load, file: UnderstoodFile, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    return as_held(load.model, load.adapter_name, file, read, load.model_id)


def as_held(
    model: Any, adapter_name: str, file: UnderstoodFile, read: Callable[[], Mapping[str, Tensor]], what: str
) -> dict[str, Tensor] | None:
    """The adapter's tensors as the live wrappers hold them, by the file's names; None where they are that already.

    Args:
        model, adapter_name: What has its wrappers by now.
        file: What is loaded.
        read: Gives the tensors as they are in the file, by name.
        what: The file, for the log.

    Raises:
        LayoutError: See `live_wrappers`.
    """
    import peft

    found = [(m, w, differences(m, w, file.decision)) for m, w in live_wrappers(file, model, adapter_name)]
    found = [(module, wrappers, said) for module, wrappers, said in found if said]
    if not found:
        return None
    held = dict(read())
    for module, wrappers, _ in found:
        convert(file, module, wrappers, held)
    config = model.peft_config[adapter_name]
    if hasattr(config, "peft_version"):
        config.peft_version = peft.__version__  # what it is from now on, also when it is saved again
    logger.info(
        "%s: the expert LoRA of %d modules was converted in memory for PEFT %s, since %s. The file is unchanged.",
        what,
        len(found),
        peft.__version__,
        ", and ".join(sorted(set().union(*(said for _, _, said in found)))),
    )
    return held


def is_loading() -> bool:
    """Whether a file is being loaded, whose tensors were seen to before they come to a state dict."""
    load = _loading.get()
    return load is not None and (load.source is None or not isinstance(load.source.tensors, HeldTensors))
