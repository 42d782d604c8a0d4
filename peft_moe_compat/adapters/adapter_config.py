"""adapter_config.json, checked and parsed once; `config`, which writes the new one, is the only other reader of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFileError
from .bounds import MAX_EXPRESSIONS, MAX_LAYERS, MAX_NAMES
from .files import show
from .patterns import Expression, Patterns
from .ranks import MAX_ALPHA, is_alpha, is_rank
from .targets import Targets

__all__ = [
    "AUTOMODEL_NAME",
    "CONFIG_NAME",
    "UNSLOTH_DETAIL",
    "UNSLOTH_LAYOUT",
    "AdapterConfig",
    "parse_config",
    "require_few_names",
]

CONFIG_NAME, AUTOMODEL_NAME = "adapter_config.json", "automodel_peft_config.json"

# What PEFT makes an expression of, a name after the other. Source: PEFT 0.21.2, tuners/tuners_utils.py.
_EXPRESSIONS = {"modules_to_save": r"(^|.*\.){}($|\..*)", "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\."}
_COUNTED = ("target_modules", "exclude_modules", "layers_to_transform")
_MAX_CHARACTERS = 100_000  # of all expressions in one field

# Unsloth's markers, at the config's top or under auto_mapping. Source: unsloth_zoo 2026.10.9,
# temporary_patches/moe_utils.py.
UNSLOTH_LAYOUT, UNSLOTH_DETAIL, _UNSLOTH_FINGERPRINT = "lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"

# Fields that PEFT 0.17 dumps with every LoraConfig; it was the last that did not add its own version.
_PEFT_0_17_FIELDS = {"target_parameters", "trainable_token_indices", "use_qalora", "corda_config", "auto_mapping"}
# Those that 0.18 to 0.21.2 dump besides.
_NEWER_FIELDS = {"alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "lora_ga_config", "use_bdlora"}
_NEWER_FIELDS |= {"kasa_config", "monteclora_config", "velora_config"}


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


# Field -> (what PEFT writes there, whether a value is that). None is allowed everywhere.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive whole number", is_rank),
    "lora_alpha": (f"a number below {MAX_ALPHA:g}", is_alpha),
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "target_modules": ("names or a pattern", lambda value: isinstance(value, str) or _names(value)),
    "target_parameters": ("names", _names),
    "rank_pattern": ("an object", lambda value: isinstance(value, dict)),
    "alpha_pattern": ("an object", lambda value: isinstance(value, dict)),
    "auto_mapping": ("an object", lambda value: isinstance(value, dict)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "use_dora": ("true or false", lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says.

    Attributes:
        raw: All of it; rank_pattern and alpha_pattern as `Patterns`.
        base_model_name: Folder or Hub id of the base model; None where there is none.
        target_parameters: As PEFT matches them, by suffix.
        use_rslora, use_dora: Whether scalings are alpha / sqrt(r); whether there are magnitudes.
        rank_pattern, alpha_pattern: Whether there are any.
        init_lora_weights: How the factors began, where that has a name.
        peft_version: The release that says it saved the adapter.
        has_peft_0_17_fields: Whether every field is there that PEFT 0.17 dumps.
        newer_fields: Those that it does not know, and a newer one dumps.
        unsloth_layouts: (parameter, or None for all; word) of every marker of lora_B's packing, not judged yet.
        unsloth_fixed: Whether Unsloth left its older sign, and there is LoRA on parameters.
        unsloth_family: model_type that the module named under auto_mapping is of; None where there is none.
        for_vllm: Whether the experts are targeted as vLLM calls them, a module, and no parameter is.
        pefts_own: Whether it has what only PEFT and Unsloth put in: a version, or a mapping.
    """

    raw: Mapping[str, Any]
    base_model_name: str | None
    target_parameters: Targets
    use_rslora: bool
    use_dora: bool
    rank_pattern: bool
    alpha_pattern: bool
    init_lora_weights: str | None
    peft_version: str | None
    has_peft_0_17_fields: bool
    newer_fields: tuple[str, ...]
    unsloth_layouts: tuple[tuple[str | None, Any], ...]
    unsloth_fixed: bool
    unsloth_family: str | None
    for_vllm: bool
    pefts_own: bool


def parse_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """The config of a LoRA adapter.

    Raises:
        AdapterFileError: A field this package reads holds what PEFT never writes there, or a pattern is none to match.
    """
    for name, (expected, fits) in _FIELDS.items():
        value = raw.get(name)
        if value is not None and not fits(value):
            raise AdapterFileError(
                f"{CONFIG_NAME} has {name} {show(value)}; {expected} was expected. Is it the config of a LoRA adapter?"
            )
    raw = {**raw, **{name: Patterns(raw[name]) for name in ("rank_pattern", "alpha_pattern") if raw.get(name)}}
    _check_expressions(raw)
    named, start, version = raw.get("base_model_name_or_path"), raw.get("init_lora_weights"), raw.get("peft_version")
    targets = Targets(raw.get("target_parameters") or ())
    auto_mapping = raw.get("auto_mapping") or {}
    library = re.match(r"transformers\.models\.(\w+)\.", str(auto_mapping.get("parent_library")))
    return AdapterConfig(
        raw=raw,
        base_model_name=named if isinstance(named, str) and named else None,
        target_parameters=targets,
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        rank_pattern=bool(raw.get("rank_pattern")),
        alpha_pattern=bool(raw.get("alpha_pattern")),
        init_lora_weights=start if isinstance(start, str) else None,
        peft_version=None if version is None else str(version),
        has_peft_0_17_fields=raw.keys() >= _PEFT_0_17_FIELDS,
        newer_fields=tuple(sorted(raw.keys() & _NEWER_FIELDS)),
        unsloth_layouts=(*_layouts(raw), *_layouts(auto_mapping)),
        unsloth_fixed=bool(auto_mapping.get(_UNSLOTH_FINGERPRINT) and targets),
        unsloth_family=library[1] if library else None,
        for_vllm=not targets and _names(raw.get("target_modules")) and "experts" in raw["target_modules"],
        pefts_own=version is not None or bool(auto_mapping),
    )


def _check_expressions(raw: Mapping[str, Any]) -> None:
    """Raises `AdapterFileError` for what PEFT would try forever, or make more layers of than any model has."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(pattern := raw.get(field), str) and pattern != "all-linear":
            Expression(pattern)
    for field, whole in _EXPRESSIONS.items():
        value = raw.get(field)
        listed = value if isinstance(value, list) else [value]
        names = [name for name in listed if isinstance(name, str)]
        if len(names) > MAX_EXPRESSIONS or sum(map(len, names)) > _MAX_CHARACTERS:
            raise AdapterFileError(
                f"{CONFIG_NAME} has {len(names)} names or patterns in {field}; at most {MAX_EXPRESSIONS}, of "
                f"{_MAX_CHARACTERS} characters together, were expected. Is the file damaged?"
            )
        for name in names:
            Expression(whole.format(name))
    pairs = raw.get("layer_replication")
    made = [pair[1] - pair[0] for pair in pairs if _sizes(pair)] if isinstance(pairs, list) else []
    if max(len(made), sum(made)) > MAX_LAYERS:
        raise AdapterFileError(
            f"{CONFIG_NAME} makes {sum(made)} layers by layer_replication; at most {MAX_LAYERS} were expected. Is the "
            "file damaged?"
        )


def _sizes(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(size, int) for size in pair)


def require_few_names(raw: Mapping[str, Any], tensors: int) -> None:
    """Raises `AdapterFileError` for lists of names that are long out of all proportion to so many tensors."""
    for field in _COUNTED:
        count = len(value) if isinstance(value := raw.get(field), list) else 0
        if count > MAX_NAMES + tensors:
            raise AdapterFileError(
                f"{CONFIG_NAME} has {count} entries in {field}, and the file {tensors} tensors; at most {MAX_NAMES} "
                "more than those were expected. Is it the config of this adapter?"
            )


def _layouts(place: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    """(parameter or None, word) of every marker at one place."""
    if UNSLOTH_LAYOUT in place:
        yield None, place[UNSLOTH_LAYOUT]
    detail = place.get(UNSLOTH_DETAIL)
    parameters = detail.get("parameters") if isinstance(detail, dict) else None
    for parameter, entry in (parameters if isinstance(parameters, dict) else {}).items():
        if isinstance(entry, dict):
            yield parameter, entry.get(UNSLOTH_LAYOUT)
