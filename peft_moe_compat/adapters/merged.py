"""An adapter merged by the installed PEFT, compared with the same adapter unmerged, one experts module at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..layout import ExpertLora, relative, to_flat
from .base_model import load_config
from .decide import decide
from .plan import planned_modules
from .readers import parse_target
from .source import open_adapter
from .stated import Stated
from .verify import Comparison, Verification

__all__ = ["verify_merged"]

_TOKENS, _TOP_K = 64, 2


def verify_merged(
    adapter: str | Path,
    *,
    model: str | Path | Mapping[str, Any] | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    tolerance: float = 1e-5,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compares each experts module's output, adapter unmerged, with that after PEFT's `merge_and_unload`.

    The modules are built one at a time from the base model's config, in float32 with random weights, and run on random
    inputs: what is tested is the installed PEFT with this adapter, not the base model.

    Args:
        adapter: A folder, or a Hub id.
        model: The base model's config: a folder, a `config.json`, a Hub id or a dict.
        written_by, orientation, packing, nesting: As `convert_adapter` takes them.
        tolerance: Largest relative difference of an output that counts as the same.
        progress: Called with (modules done, modules in all).

    Raises:
        AdapterError: The adapter cannot be read, or has no LoRA on the model's experts.
        UnsupportedPeftError: `written_by` names no PEFT release with expert LoRA.
    """
    if model is None:
        raise AdapterError("The base model's config is needed to build its experts: pass --model (model=...).")
    config = load_config(model)
    stated = Stated(config, written_by, orientation, packing, nesting)
    source = open_adapter(adapter, stated)
    decision = decide(source, stated)
    decision.require(str(source.folder))
    experts = _experts_of(config)
    modules = planned_modules(source, decision, parse_target("peft"))
    rows = []
    for done, module in enumerate(modules):
        if module.path not in experts:
            raise AdapterError(
                f"The model has no experts at {module.path!r}; it has {', '.join(sorted(experts)[:3]) or 'none'}. Is "
                "it the adapter's base model?"
            )
        loras: dict[str, ExpertLora] = {}
        for output in module.outputs:
            with source.tensors.reading(output.part.reads) as tensors:
                lora = output.part.load(tensors)
                loras[output.key.rpartition(".")[2]] = ExpertLora(lora.A.clone(), lora.B.clone(), lora.scaling)
        rows.append(_compare(module.path, experts[module.path], loras))
        if progress is not None:
            progress(done + 1, len(modules))
    return Verification(tuple(rows), tolerance)


def _experts_of(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Path -> experts module, on the meta device, of the model a config describes."""
    import transformers

    from ..model.experts import routed_experts

    model_type = str(config.get("model_type"))
    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        raise AdapterError(
            f"transformers {transformers.__version__} knows no model of type {model_type!r}; install one that does."
        ) from None
    try:
        model = _on_meta(config_class, config)
    except Exception as error:  # each class of transformers checks a config in its own way
        raise AdapterError(f"transformers makes no model of this {model_type} config: {error}") from error
    if model is None:
        raise AdapterError(f"transformers {transformers.__version__} has no model class for {model_type!r}.")
    return {path: module for path, module, _ in routed_experts(model)}


def _on_meta(config_class: Any, config: Mapping[str, Any]) -> Any:
    """The model a config describes, without data; None where transformers has no class for it."""
    import transformers

    parsed = config_class.from_dict(dict(config))
    names = [*(config.get("architectures") or ()), "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"]
    for name in names:
        cls = getattr(transformers, name, None)
        mapping = getattr(cls, "_model_mapping", None)
        if cls is None or (mapping is not None and type(parsed) not in mapping):
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls.from_config(parsed) if mapping is not None else cls(parsed)
    return None


def _compare(path: str, on_meta: nn.Module, loras: Mapping[str, ExpertLora]) -> Comparison:
    """One experts module with its LoRA, unmerged and merged."""
    from ..model.experts import dispatching_registry
    from ..patching.activation import is_active

    generator = torch.Generator().manual_seed(0)
    experts: Any = copy.deepcopy(on_meta).to(torch.float32).to_empty(device="cpu").eval()
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.02, generator=generator).requires_grad_(False)
    holder = _wrapped(experts, loras)
    with torch.no_grad():
        if dispatching_registry(type(experts)) is None:
            return _compare_weights(path, holder, experts, loras)
        inputs = _inputs(experts, loras, generator)
        experts.config._experts_implementation = "grouped_mm" if is_active() else "eager"
        unmerged = holder.base_model.model["experts"](*inputs)
        # transformers' grouped implementations refuse widths that are no multiple of 16 bytes.
        experts.config._experts_implementation = "eager"
        merged = holder.merge_and_unload()["experts"](*inputs)
    return _comparison(path, unmerged, merged, "")


def _wrapped(experts: nn.Module, loras: Mapping[str, ExpertLora]) -> Any:
    """The module in a PEFT model with the LoRA on it, laid out as the live wrappers want it."""
    from peft import LoraConfig, get_peft_model

    from ..model.experts import is_transposed
    from ..model.probe import installed_rule
    from ..model.wrappers import live_orientation, wrapper_chain

    ranks = {f"experts.{name}": lora.rank for name, lora in loras.items()}
    alphas = {f"experts.{name}": lora.scaling * lora.rank for name, lora in loras.items()}
    config = LoraConfig(target_modules=[], target_parameters=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know a bare experts module
        holder = get_peft_model(nn.ModuleDict({"experts": experts}), config)
    transposed = bool(is_transposed(experts))
    for wrapper in wrapper_chain(holder.base_model.model["experts"]):
        lora = loras[wrapper.parameter_name]
        flat = to_flat(lora, orientation=live_orientation(wrapper, transposed, installed_rule()))
        for linear, factor in zip((wrapper.lora_A, wrapper.lora_B), flat, strict=True):
            linear["default"].weight.data.copy_(factor)
    return holder


def _inputs(
    experts: nn.Module, loras: Mapping[str, ExpertLora], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random "T H" hidden states, "T k" experts and their weights."""
    down = loras.get("down_proj")
    hidden = down.out_features if down is not None else next(iter(loras.values())).in_features
    count = int(experts.num_experts)  # type: ignore[arg-type]
    scores = torch.rand(_TOKENS, count, generator=generator)
    weights, index = scores.topk(min(_TOP_K, count))
    return torch.randn(_TOKENS, hidden, generator=generator), index, weights / weights.sum(-1, keepdim=True)


def _compare_weights(path: str, holder: Any, experts: nn.Module, loras: Mapping[str, ExpertLora]) -> Comparison:
    """For a class whose forward takes other arguments: the merged weights against the base plus the update."""
    from ..model.experts import is_transposed

    before = {name: getattr(experts, name).clone() for name in loras}
    holder.merge_and_unload()
    expected, found = [], []
    for name, lora in loras.items():
        delta = lora.delta()
        expected.append((delta.transpose(1, 2) if is_transposed(experts) else delta).flatten())
        found.append((getattr(experts, name) - before[name]).flatten())
    return _comparison(path, torch.cat(expected), torch.cat(found), "weights")


def _comparison(path: str, expected: Tensor, found: Tensor, what: str) -> Comparison:
    difference = (found - expected).double()
    distance = relative(difference.norm().item(), expected.double().norm().item())
    return Comparison(path, what or "output", difference.abs().max().item(), distance)
