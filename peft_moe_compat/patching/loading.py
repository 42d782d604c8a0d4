"""Adapters read as what they are while PEFT or transformers loads them, and stamped while they are saved.

PEFT and transformers load a file without asking who wrote it. The functions they look up on the way are wrapped here:
the file is decided (`adapters.decide`) before anything is put into the model, and once its ParamWrappers are live the
expert tensors are handed on in the form those wrappers hold. A file that is right already goes through untouched.

`patch` puts in place what `replacements` lists. Nothing is kept on any module; what is being loaded or saved stands in
a context variable for the length of the call.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..adapters.names import PREFIX, unwrapped
from ..adapters.source import AdapterSource
from ..errors import AdapterError
from ..model import sharding as parallel
from ..model.wrappers import is_param_wrapper
from .arrival import check_fused, check_per_expert
from .hotswap import hotswap_adapter_from_state_dict
from .matching import (
    UnderstoodFile,
    bare,
    convert,
    differences,
    facts_of,
    live_namer,
    live_path,
    live_wrappers,
    stamp_of,
)
from .opening import understand, written_by

__all__ = ["Replacement", "facts_of", "replacements", "stamp_of", "written_by"]

logger = logging.getLogger("peft_moe_compat")


class Replacement(NamedTuple):
    """A function that is replaced while the library is active.

    Attributes:
        owner: The class or module that holds it.
        name: The attribute.
        home: How the name of the module it was written in begins; any other is somebody else's patch.
        make: What was there, as it stands in the owner's `__dict__` -> what goes there instead.
    """

    owner: Any
    name: str
    home: str
    make: Callable[[Any], Any]


def replacements() -> list[Replacement]:
    """What reading and stamping replace: the same names in every release of PEFT and transformers."""
    import peft.utils.hotswap
    import transformers.modeling_utils
    from transformers.integrations.peft import PeftAdapterMixin

    peft_model, hotswap, modeling = peft.peft_model, peft.utils.hotswap, transformers.modeling_utils
    PeftModel, PreTrainedModel = peft.PeftModel, transformers.PreTrainedModel
    return [
        Replacement(PeftModel, "from_pretrained", "peft.", _from_pretrained),
        Replacement(PeftModel, "load_adapter", "peft.", _load_adapter),
        Replacement(PeftAdapterMixin, "load_adapter", "transformers.", _load_adapter),
        Replacement(hotswap, "hotswap_adapter", "peft.", _load_adapter),
        Replacement(hotswap, "hotswap_adapter_from_state_dict", "peft.", hotswap_adapter_from_state_dict),
        # Where each of these takes the tensors from: PEFT, transformers before 5.0, hot-swapping, transformers 5.
        Replacement(peft_model, "load_peft_weights", "peft.", _load_peft_weights),
        Replacement(peft, "load_peft_weights", "peft.", _load_peft_weights),
        Replacement(hotswap, "load_peft_weights", "peft.", _load_weights_to_swap),
        Replacement(PreTrainedModel, "_load_pretrained_model", "transformers.", _load_pretrained_model),
        Replacement(PeftModel, "save_pretrained", "peft.", _save_pretrained),
        Replacement(PreTrainedModel, "save_pretrained", "transformers.", _save_pretrained),
        Replacement(peft_model, "safe_save_file", "safetensors.", _safe_save_file),
        Replacement(modeling, "safe_save_file", "safetensors.", _safe_save_file),
        *_for_parallelism(),
    ]


def _for_parallelism() -> list[Replacement]:
    """What is replaced of the making of an adapter.

    For ZeRO-3, where PEFT reads the shape in a method of its own (0.19 on); for expert parallelism, where transformers
    keeps its shares of the experts as DTensors (5.17 on).
    """
    import peft.tuners.lora.model as lora_model
    from peft.tuners.lora.layer import ParamWrapper

    found = []
    if "_get_in_out_features" in vars(ParamWrapper):
        found.append(Replacement(ParamWrapper, "_get_in_out_features", "peft.", parallel.get_in_out_features))
    if not getattr(lora_model, "is_transformers_dtensor_tp", False):
        return found
    return [
        *found,
        Replacement(ParamWrapper, "update_layer", "peft.", parallel.update_layer),
        Replacement(lora_model, "get_tp_plan_and_mesh", "peft.", parallel.get_tp_plan_and_mesh),
    ]


@dataclass(frozen=True)
class _Load:
    """One call that loads an adapter into a model. `file` is None where the guard has nothing to say of it."""

    model: Any
    model_id: str
    adapter_name: str
    file: UnderstoodFile | AdapterSource | None


_loading: ContextVar[_Load | None] = ContextVar("peft_moe_compat_loading", default=None)


@contextmanager
def _load(model: Any, model_id: Any, adapter_name: str, hub: Mapping[str, Any]) -> Iterator[_Load]:
    outer = _loading.get()
    if outer is not None and (outer.model_id, outer.adapter_name) == (str(model_id), adapter_name):
        load = replace(outer, model=model)  # from_pretrained, which has come to its load_adapter
    else:
        load = _Load(model, str(model_id), adapter_name, understand(model, str(model_id), hub))
    token = _loading.set(load)
    try:
        yield load
    finally:
        _loading.reset(token)


def _from_pretrained(stock: Any) -> Any:
    @wraps(stock.__func__)
    def from_pretrained(
        cls: Any, model: Any, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        with _load(model, model_id, adapter_name, kwargs):
            return stock.__get__(None, cls)(model, model_id, adapter_name, *args, **kwargs)

    return classmethod(from_pretrained)


def _load_adapter(stock: Any) -> Any:
    """For `load_adapter` of PEFT and transformers and for `hotswap_adapter`: model, adapter and its name come first."""
    signature = inspect.signature(stock)
    model_name, id_name = list(signature.parameters)[:2]

    @wraps(stock)
    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        config = given.get("load_config")
        model_id = given.get(id_name) or getattr(config, "pretrained_model_name_or_path", None)
        if model_id is None or given.get("adapter_state_dict") is not None:
            return stock(*args, **kwargs)  # tensors without a file: nobody can tell who wrote them
        hub = {**(getattr(config, "download_kwargs", None) or {}), **given, **(given.get("adapter_kwargs") or {})}
        with _load(given[model_name], model_id, given.get("adapter_name") or "default", hub) as load:
            result = stock(*args, **kwargs)
            if isinstance(load.file, AdapterSource):
                check_per_expert(load.file, load.model, load.adapter_name)
            elif load.file is not None:
                check_fused(load.file, load.model, load.adapter_name)
            return result

    return load_adapter


def _load_peft_weights(stock: Any) -> Any:
    @wraps(stock)
    def load_peft_weights(model_id: Any, device: Any = None, key_mapping: Any = None, **kwargs: Any) -> Any:
        weights = stock(model_id, device=device, key_mapping=key_mapping, **kwargs)
        load = _loading.get()
        if load is None or not isinstance(load.file, UnderstoodFile):
            return weights
        names = {name: _renamed(name, key_mapping) for name in load.file.source.tensors}
        if set(names.values()) != weights.keys():
            raise AdapterError(
                f"PEFT read other tensors from {load.model_id} than its files hold: "
                f"{sorted(set(names.values()) ^ weights.keys())[:4]}. Did the adapter change meanwhile, or does a "
                "key_mapping give two tensors one name?"
            )
        held = _as_held(load, load.file, lambda: {name: weights[renamed] for name, renamed in names.items()})
        if held is not None:
            weights = {_renamed(name, key_mapping): tensor for name, tensor in held.items()}
        named = live_namer(load.model)
        return {named(name): tensor for name, tensor in weights.items()}

    return load_peft_weights


def _load_weights_to_swap(stock: Any) -> Any:
    """For `hotswap_adapter`, which somebody may have imported by its name before it was replaced."""
    from peft import PeftConfig

    ours = _load_peft_weights(stock)

    @wraps(stock)
    def load_peft_weights(model_id: Any, device: Any = None, **kwargs: Any) -> Any:
        if _loading.get() is None and PeftConfig.from_pretrained(model_id, **kwargs).to_dict().get("target_parameters"):
            raise AdapterError(
                f"{model_id} has LoRA on parameters, and the hotswap_adapter that loads it was imported before "
                "peft_moe_compat was active, so that nobody asks what the file holds. Call "
                "peft.utils.hotswap.hotswap_adapter, or import the function after peft_moe_compat."
            )
        return ours(model_id, device, **kwargs)

    return load_peft_weights


def _renamed(name: str, key_mapping: Mapping[str, str] | None) -> str:
    """What `load_peft_weights` calls a tensor of the file under that `key_mapping`."""
    prefix = next((p for p in (PREFIX, "base_model.") if name.startswith(p)), "")
    inner = name.removeprefix(prefix)
    for pattern, replacement in (key_mapping or {}).items():
        inner, count = re.subn(pattern, replacement, inner)
        if count:
            break
    return prefix + inner


def _load_pretrained_model(stock: Any) -> Any:
    @wraps(stock.__func__)
    def load_pretrained_model(cls: Any, *args: Any, **kwargs: Any) -> Any:
        load = _loading.get()
        if load is not None and isinstance(load.file, UnderstoodFile):
            tensors, given = load.file.source.tensors, kwargs.get("state_dict")

            def read() -> Mapping[str, Tensor]:
                if given is not None:
                    return given  # type: ignore[no-any-return]
                with tensors.reading(tensors) as found:
                    return dict(found)

            held, named = _as_held(load, load.file, read), live_namer(load.model)
            if held is not None or any(named(name) != name for name in tensors):
                held = dict(read()) if held is None else held
                kwargs["state_dict"] = {named(name): tensor for name, tensor in held.items()}
        return stock.__get__(None, cls)(*args, **kwargs)

    return classmethod(load_pretrained_model)


def _as_held(load: _Load, file: UnderstoodFile, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The adapter's tensors as the live wrappers hold them, by the file's names; None where they are that already.

    Args:
        load: Into a model that has its wrappers by now.
        file: What is loaded.
        read: Gives the tensors as they are in the file, by name.

    Raises:
        LayoutError: See `live_wrappers`.
    """
    import peft

    found = [(m, w, differences(m, w, file.decision)) for m, w in live_wrappers(file, load.model, load.adapter_name)]
    found = [(module, wrappers, said) for module, wrappers, said in found if said]
    if not found:
        return None
    held = dict(read())
    for module, wrappers, _ in found:
        convert(file, module, wrappers, held)
    config = load.model.peft_config[load.adapter_name]
    if hasattr(config, "peft_version"):
        config.peft_version = peft.__version__  # what it is from now on, also when it is saved again
    logger.info(
        "%s: the expert LoRA of %d modules was converted in memory for PEFT %s, since %s. The file is unchanged.",
        load.model_id,
        len(found),
        peft.__version__,
        ", and ".join(sorted(set().union(*(said for _, _, said in found)))),
    )
    return held


# The model that is being saved.
_saving: ContextVar[Any] = ContextVar("peft_moe_compat_saving", default=None)


def _save_pretrained(stock: Any) -> Any:
    @wraps(stock)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _saving.set(self)
        try:
            return stock(self, *args, **kwargs)
        finally:
            _saving.reset(token)

    return save_pretrained


def _safe_save_file(stock: Any) -> Any:
    """Whichever process writes an adapter file writes the stamp into it, at once."""

    @wraps(stock)
    def safe_save_file(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        model = _saving.get()
        if model is not None and Path(filename).name.startswith("adapter_model"):
            if not tensors and any(map(is_param_wrapper, model.modules())):
                raise AdapterError(
                    f"There is nothing to save in {filename}: PEFT found none of the model's LoRA by the names it "
                    "expects (torch's checkpoint_wrapper gives modules others), or was given an empty state_dict, as "
                    "all ranks but the first have of FSDP's full one."
                )
            if lost := _lost(model, tensors, Path(filename)):
                raise AdapterError(
                    f"PEFT found no LoRA of {len(lost)} expert parameters to save in {filename}, by the names it "
                    f"expects, {lost[0]} first: torch's checkpoint_wrapper (accelerate's FSDP activation_checkpointing "
                    "too) gives modules other names. Use model.gradient_checkpointing_enable() instead, which does not."
                )
            parallel.refuse_partitioned(tensors)
            stamp = stamp_of(model, tensors)
            if stamp is not None:
                metadata = {**(metadata or {}), **stamp.to_metadata()}
        return stock(tensors, filename, metadata=metadata)

    return safe_save_file


def _lost(model: Any, tensors: Mapping[str, Tensor], file: Path) -> list[str]:
    """The wrapped expert parameters whose LoRA should be in a file of the model's, and is not."""
    adapters = model.peft_config
    if hasattr(model, "get_base_model"):  # PEFT gives each adapter a folder of its name, but for "default"
        name = file.parent.name if file.parent.name in adapters else "default"
    else:
        name = model.active_adapters()[0]
    found = {unwrapped(tensor.removeprefix(PREFIX)) for tensor in tensors}
    return [
        f"{live_path(path)}.{wrapper.parameter_name}"
        for path, wrapper in bare(model).named_modules()
        if is_param_wrapper(wrapper)
        and name in wrapper.lora_A
        and "_checkpoint_wrapped_module" in path  # else whoever saves has chosen
        and f"{unwrapped(path)}.lora_A.weight" not in found
    ]
