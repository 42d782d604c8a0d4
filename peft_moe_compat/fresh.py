"""A fresh adapter for a model whose weights nobody has loaded: what PEFT would save before the first step.

PEFT itself puts the LoRA on a model without weights, and initialises one layer after the other while they are written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters.base_model import load_base_model
from .adapters.files import atomic_folder
from .adapters.names import LINEAR_NAMES, PREFIX
from .adapters.safetensors_io import write_safetensors
from .adapters.targets import any_ending
from .adapters.tensors import SAFETENSORS
from .errors import AdapterError
from .model.targets import expert_parameters
from .model.wrappers import is_param_wrapper, wrapper_chain
from .patching.saving import metadata_of, write_config
from .proving import FOREIGN, model_without_weights

__all__ = ["FreshAdapter", "write_fresh_adapter"]

_NAME = "default"
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class FreshAdapter:
    """What was written.

    Attributes:
        folder: Where.
        model: The class of the base model.
        layers: How many linears and expert parameters have LoRA.
        numbers: How many are to be trained.
        unreached: The targets that nothing in the model is called by.
    """

    folder: Path
    model: str
    layers: int
    numbers: int
    unreached: tuple[str, ...] = ()


def write_fresh_adapter(
    model: str | Path,
    out: str | Path,
    *,
    rank: int,
    alpha: float | None = None,
    target_parameters: Sequence[str] | None = None,
    target_modules: str | Sequence[str] = (),
    dropout: float = 0.0,
    seed: int = 0,
) -> FreshAdapter:
    """Writes an adapter that changes nothing yet: lora_A as PEFT initialises it, lora_B zero, in float32.

    The bytes are those of `get_peft_model(...).save_pretrained(out)` after `torch.manual_seed(seed)`, a stamp aside.
    In memory is one layer at a time, and of the base model its config.

    Args:
        model: The base model: a folder with `config.json`, that file, or a Hub id.
        out: The folder to be made.
        rank: PEFT's `r`.
        alpha: PEFT's `lora_alpha`; twice the rank by default.
        target_parameters: PEFT's; by default every routed expert weight.
        target_modules: PEFT's: linear layers beside them; none by default.
        dropout: PEFT's `lora_dropout`, which PEFT applies to experts only where this library is active.
        seed: Of torch's generator of the CPU, which is left as it was.

    Raises:
        AdapterError: No such config, no such targets, no probability, or `out` exists.
        NoExpertParametersError: The model has no routed experts in fused weights.
    """
    if not 0 <= dropout < 1:
        raise AdapterError(f"dropout is {dropout}; a probability below 1 was expected.")
    base = load_base_model(model)
    name, bare = model_without_weights(base)
    wrapped = _adapted(
        bare,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        target_parameters=expert_parameters(bare) if target_parameters is None else list(target_parameters),
        task_type="CAUSAL_LM" if bare.can_generate() else None,
    )
    layers = _layers(wrapped)
    named = [] if isinstance(target_modules, str) else list(target_modules)
    # PEFT takes names of experts' linears for the fused experts, and out of its list.
    held = wrapped.peft_config[_NAME].target_modules or ()
    named = [name for name in named if name in held or name.rpartition(".")[2] not in LINEAR_NAMES]
    unreached = _unreached([*named, *(target_parameters or ())], layers)
    weights = {key: weight for path, layer in layers.items() for key, weight in _weights(path, layer)}
    config = wrapped.peft_config[_NAME]
    config.base_model_name_or_path, config.lora_dropout = str(model), dropout
    metadata = metadata_of(wrapped, {key: tuple(weight.shape) for key, weight in weights.items()}, config.to_dict())
    with atomic_folder(Path(out), source=Path(model)) as folder:
        write_config(wrapped, _NAME, str(folder))
        plan = [(key, tuple(weight.shape), weight.dtype) for key, weight in weights.items()]
        write_safetensors(folder / SAFETENSORS, plan, _initialised(layers, seed), {"format": "pt"} | metadata)
    numbers = sum(weight.numel() for weight in weights.values())
    return FreshAdapter(Path(out), name, len(layers), numbers, unreached)


def _adapted(bare: Any, **options: Any) -> Any:
    """The model with LoRA by PEFT, without data."""
    from peft import LoraConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers whose type PEFT does not know, as all experts are
            return get_peft_model(bare, LoraConfig(**options), adapter_name=_NAME, low_cpu_mem_usage=True)
    except FOREIGN as error:
        raise AdapterError(
            f"PEFT refuses this adapter of {type(bare).__name__}: {' '.join(str(error).split())}"
        ) from error


def _layers(wrapped: Any) -> dict[str, Any]:
    """Path -> each layer with LoRA, in the order in which PEFT makes them: linears, then experts, innermost first.

    Raises:
        AdapterError: A target is no linear layer and no parameter.
    """
    linears, experts = {}, {}
    for path, module in wrapped.named_modules():
        if is_param_wrapper(module):
            if not path.endswith(".base_layer"):
                chain = [(path + ".base_layer" * depth, wrapper) for depth, wrapper in enumerate(wrapper_chain(module))]
                experts.update(reversed(chain))
        elif _NAME in getattr(module, "lora_A", ()):
            linears[path] = module
    layers = linears | experts
    held = {key.replace(f".{_NAME}.", ".") for key, weight in wrapped.named_parameters() if weight.requires_grad}
    if other := held - {key for path, layer in layers.items() for key, _ in _weights(path, layer)}:
        raise AdapterError(
            f"{min(other).removeprefix(PREFIX)} is trained too: the targets reach more than linear layers and expert "
            "parameters. Name those alone; what else is to be trained is an option of the trainer."
        )
    return layers


def _unreached(names: Sequence[str], layers: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of linears or parameters that no layer with LoRA bears."""
    keys = [
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}" if is_param_wrapper(layer) else path
        for path, layer in layers.items()
    ]
    return tuple(name for name in names if not any(any_ending(key, (name,)) for key in keys))


def _weights(path: str, layer: Any) -> list[tuple[str, Tensor]]:
    """(name in the file, weight) of lora_A and of lora_B."""
    return [(f"{path}.{part}.weight", getattr(layer, part)[_NAME].weight) for part in _PARTS]


def _initialised(layers: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of one layer after the other, as PEFT makes and initialises it, and without data again afterwards."""
    import torch

    # One piece of memory for all: what is freed in between, malloc does not give back.
    sizes = [max(getattr(layer, part)[_NAME].weight.numel() for layer in layers.values()) for part in _PARTS]
    pieces = [torch.empty(size) for size in sizes]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: the fork brings no other back
        for path, layer in layers.items():
            factors = [getattr(layer, part)[_NAME] for part in _PARTS]
            for linear, piece in zip(factors, pieces, strict=True):
                shape = linear.weight.shape
                linear.weight = torch.nn.Parameter(piece[: shape.numel()].view(shape))
                linear.reset_parameters()  # as its constructor does
            layer.reset_lora_parameters(_NAME, True)
            yield from _weights(path, layer)
            for linear in factors:
                linear.to("meta")
