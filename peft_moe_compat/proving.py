"""`convert_adapter`, whose output for the installed PEFT is tried on the base model before anybody sees it.

The base model is built from its config without weights, PEFT puts the written adapter_config.json on it, and is given
tensors of the written names and shapes, without data, to load.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .adapters import convert
from .adapters.base_model import BaseModel
from .adapters.bounds import MAX_LAYERS, MAX_NAMES
from .adapters.config_fields import CHANGES, SAYS_NOTHING
from .adapters.files import read_json
from .adapters.names import PREFIX
from .adapters.proof import Proof
from .adapters.reader_target import Target
from .adapters.safetensors_io import TensorInfo
from .adapters.source import CONFIG_NAME
from .adapters.tensors import open_tensors
from .errors import AdapterError
from .releases import installed_versions, known_issues

__all__ = ["FOREIGN", "convert_adapter", "model_without_weights", "prove"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
# What building a model, or putting an adapter on it, raises for a config that does not fit it.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# More layers, experts or labels than any model has: config and model would take longer to build than anybody waits.
_MAX_COUNT, _MAX_MODULES = 100_000, 100_000
# Pairs that load no adapter with experts, whatever its config says.
_BROKEN = {"from_pretrained_loading_info", "from_pretrained_distributed_operation"}
# Fields that say something else than where LoRA is and how large: some need more than a model without weights.
_ASIDE = sorted(
    SAYS_NOTHING
    | CHANGES.keys()
    | {"init_lora_weights", "layers_pattern", "lora_bias", "modules_to_save", "trainable_token_indices", "use_dora"}
)
_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "")


def _with_proof(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @wraps(function)
    def proven(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        kwargs.setdefault("prove", prove)
        return function(*args, **kwargs)

    return proven


convert_adapter = _with_proof(convert.convert_adapter)


def prove(folder: Path, target: Target, base: BaseModel | None) -> Proof | None:
    """Has the installed PEFT take a written folder; None where it is not the reader, or no such model can be built.

    Args:
        folder: With adapter_config.json and the tensors.
        target: What they are for.
        base: The base model, with its config.

    Raises:
        AdapterError: PEFT refuses the config, or tensors would be lost or do not fit.
    """
    installed = installed_versions("peft", "transformers")
    pair = installed["peft"], installed["transformers"]
    if (target.peft, target.transformers) != pair or base is None or not _is_real(base.config):
        return None
    given = read_json(folder / CONFIG_NAME)
    targets = given.get("target_modules")
    if isinstance(targets, list) and len(targets) > MAX_NAMES:
        return None  # PEFT compares every name with every other one
    tensors, refused = open_tensors(folder).infos, {}
    broken = next((issue for issue in known_issues(*pair) if issue.code in _BROKEN), None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in _models(base.config):
            try:
                _put(model, folder, tensors, broken is None)
            except FOREIGN as error:
                refused[name] = " ".join(str(error).split())
            else:
                if broken is not None:
                    return Proof("none", (f"here {broken.symptom}; {broken.remedy}",))
                return Proof("model", (f"PEFT {pair[0]}", f"{name} (transformers {pair[1]})"))
        if not refused:
            return None
        name, why = next(iter(refused.items()))

        def takes(config: Mapping[str, Any]) -> bool:
            model = next(model for there, model in _models(base.config) if there == name)
            with tempfile.TemporaryDirectory() as other:
                Path(other, CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
                try:
                    _put(model, Path(other), tensors, broken is None)
                except FOREIGN:
                    return False
            return True

        field = _in_the_way(given, takes)
    raise AdapterError(
        f"PEFT {pair[0]} would not take what was written into {name} of transformers {pair[1]}, so it was thrown away: "
        f"{why.rstrip('.')}. {_advice(field, pair[0])}"
    )


def _in_the_way(config: Mapping[str, Any], takes: Callable[[Mapping[str, Any]], bool]) -> str | None:
    """The field without which PEFT takes a config, of those that say neither where LoRA is nor how large."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    fields = [name for name in _ASIDE if config.get(name) not in (None, usual.get(name))]
    if not fields or not takes({name: value for name, value in config.items() if name not in fields}):
        return None
    # Where it takes two of them away, the first is said first.
    without = ({name: value for name, value in config.items() if name != field} for field in fields)
    return next((field for field, one in zip(fields, without, strict=True) if takes(one)), fields[0])


def _advice(field: str | None, peft: str) -> str:
    if field is None:
        return f"Is it the adapter's base model? For a model of another class name PEFT alone: --to peft=={peft}."
    if field in SAYS_NOTHING:
        what = "says nothing of a trained adapter: take it out of the adapter's"
    else:
        what = "is what it stumbles over. If the adapter was trained without it, take it out of its"
    return f"{field} {what} {CONFIG_NAME}, and convert again."


def model_without_weights(base: BaseModel) -> tuple[str, Any]:
    """(class, model on the meta device) of the first class that a base model's config may be meant for.

    Raises:
        AdapterError: The installed transformers builds none.
    """
    failed: dict[str, str] = {}
    found = next(_models(base.config, failed), None) if _is_real(base.config) else None
    if failed:  # another class would give other paths
        name, why = next(iter(failed.items()))
        raise AdapterError(f"No model can be built from {base.name}: {name} of transformers fails: {why}")
    if found is None:
        version = installed_versions("transformers")["transformers"]
        raise AdapterError(
            f"No model can be built from {base.name}: transformers {version} has no class for it, or it counts more "
            "than any model has. A config.json as transformers writes it was expected, of a model whose code is in "
            "transformers."
        )
    return found


def _is_real(config: Mapping[str, Any]) -> bool:
    """Whether transformers wrote it, and it counts nothing that no model has so many of."""

    def modest(value: Any, name: str = "") -> bool:
        if isinstance(value, Mapping):
            return all(modest(inner, str(key)) for key, inner in value.items())
        counts = name.startswith(("num_", "n_")) or "layer" in name or "depth" in name
        return not (counts and isinstance(value, int) and value > (MAX_LAYERS if "layers" in name else _MAX_COUNT))

    written = config.get("architectures") or config.get("transformers_version")
    return bool(written) and isinstance(config.get("model_type"), str) and modest(config)


def _models(raw: Mapping[str, Any], failed: dict[str, str] | None = None) -> Iterator[tuple[str, Any]]:
    """(class, model without weights) of every class that the config, or a part of it, may be meant for.

    `failed` is filled with those that it cannot be: class -> why.
    """
    failed = {} if failed is None else failed
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto import modeling_auto

    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        return
    try:
        whole = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(_with_floats(raw))
    except (*FOREIGN, StrictDataclassError) as error:
        failed[str(raw["model_type"])] = " ".join(str(error).split())
        return
    named = raw.get("architectures")
    names = [(whole, name) for name in (named if isinstance(named, list) else ())]
    for config in _parts(whole):
        for kind in _MAPPINGS:
            mapping = getattr(
                modeling_auto, f"MODEL_{'FOR_' if kind else ''}{kind}_MAPPING_NAMES".replace("__", "_"), {}
            )
            found = mapping.get(config.model_type, ())
            names += [(config, name) for name in ((found,) if isinstance(found, str) else found)]
    tried, built = set(), count(1)
    for config, name in names:
        try:
            cls = getattr(transformers, name, None) if isinstance(name, str) else None
        except FOREIGN as error:  # it does not import: a package beside transformers is broken, say
            failed[name] = " ".join(str(error).split())
            continue
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls not in tried:
            tried.add(cls)
            try:
                with torch.device("meta"), _bounded(built):
                    model = cls(config)
            except _TooManyModulesError:
                return
            except FOREIGN as error:
                failed[name] = " ".join(str(error).split())
                continue
            yield name, model


def _with_floats(value: Any) -> Any:
    """What transformers 5 writes into JSON as `{"__float__": "Infinity"}` is the number again."""
    if isinstance(value, Mapping):
        tagged = value.keys() == {"__float__"}
        return float(value["__float__"]) if tagged else {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def _parts(config: Any, depth: int = 3) -> Iterator[Any]:
    """A config and those in it."""
    import transformers

    yield config
    for part in vars(config).values() if depth else ():
        if isinstance(part, transformers.PretrainedConfig):
            yield from _parts(part, depth - 1)


class _TooManyModulesError(RuntimeError):
    pass


@contextmanager
def _bounded(built: Iterator[int]) -> Iterator[None]:
    """Ends the building of models that have more modules than any; `built` counts them."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread = threading.get_ident()

    def counted(*_: Any) -> None:
        if threading.get_ident() == thread and next(built) > _MAX_MODULES:
            raise _TooManyModulesError

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _put(model: Any, folder: Path, tensors: Mapping[str, TensorInfo], loads: bool) -> None:
    """Puts the adapter on a model, and raises unless every tensor of it arrives."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = PeftModel(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    held = {**wrapped.state_dict(), **get_peft_model_state_dict(wrapped, save_embedding_layers=False)}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if lost := [name for name in tensors if name not in shapes]:
        raise ValueError(
            f"{len(lost)} of {len(tensors)} tensors would be lost, such as {lost[0].removeprefix(PREFIX)!r}."
            f"{_elsewhere(lost[0].removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in shapes])}"
        )
    for name, info in tensors.items():
        if info.shape != shapes[name]:
            raise ValueError(f"{name.removeprefix(PREFIX)!r} is {info.shape}, and {shapes[name]} is needed.")
    if not loads:
        return
    given = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    result = set_peft_model_state_dict(wrapped, given, low_cpu_mem_usage=True)
    adapters = {name.replace(".default.", ".") for name in result.missing_keys}
    if lost := [*result.unexpected_keys, *(adapters & tensors.keys())]:
        raise ValueError(f"PEFT would lose {len(lost)} tensors under other names, such as {lost[0]!r}.")


def _elsewhere(lost: str, held: Iterable[str]) -> str:
    """Where a model has the layers of a lost tensor, if in one other place, for a message."""
    layers = re.search(r"(?:^|(?<=\.))(layers|blocks|h)\.[0-9]+\..*", lost)
    if layers is None:
        return ""
    before = {name.removesuffix(layers[0]) for name in held if name.endswith(f".{layers[0]}")}
    if len(before) != 1:
        return ""
    old, new = lost[: layers.end(1)], before.pop() + layers[1]
    return f" This model has these modules under {new!r}: add --rename {old}={new}."
