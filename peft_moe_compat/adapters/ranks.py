"""Rank, alpha and scaling of one LoRA, as adapter_config.json gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeGuard

from ..errors import AdapterFileError
from .files import show
from .patterns import Patterns

__all__ = ["MAX_ALPHA", "Numbers", "is_alpha", "is_rank", "lora_alpha", "lora_numbers", "lora_rank"]

MAX_ALPHA = 1e30  # far above any in use; float32 holds it, and its products with ranks


@dataclass(frozen=True)
class Numbers:
    """Rank and alpha of one LoRA, and whether its scaling is rsLoRA's."""

    rank: int
    alpha: float
    rslora: bool

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


def is_rank(value: Any) -> TypeGuard[int]:
    """Whether a value is one of `r`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_alpha(value: Any) -> TypeGuard[int | float]:
    """Whether a value is one of `lora_alpha`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ALPHA


def lora_rank(config: Mapping[str, Any], key: str) -> int:
    """Rank of the LoRA on `key`, a parameter's or linear's full name: `rank_pattern` as PEFT matches it, else `r`."""
    rank = _pattern(config, "rank_pattern", key, "r")
    if not is_rank(rank):
        raise AdapterFileError(
            f"adapter_config.json gives {key!r} the rank {show(rank)}; a positive whole number was needed."
        )
    return rank


def lora_alpha(config: Mapping[str, Any], key: str) -> float:
    """alpha of the LoRA on `key`: `alpha_pattern` as PEFT matches it, else `lora_alpha`."""
    alpha = _pattern(config, "alpha_pattern", key, "lora_alpha")
    if not is_alpha(alpha):
        raise AdapterFileError(
            f"adapter_config.json gives {key!r} the lora_alpha {show(alpha)}; a number below {MAX_ALPHA:g} was needed."
        )
    return alpha


def lora_numbers(config: Mapping[str, Any], key: str, rank: int | None = None) -> Numbers:
    """Of the LoRA on `key`; `rank` where its tensors show it."""
    rank, alpha = lora_rank(config, key) if rank is None else rank, lora_alpha(config, key)
    if not rank:
        raise AdapterFileError(f"The LoRA on {key!r} is of rank 0. Is the file complete?")
    return Numbers(rank, alpha, bool(config.get("use_rslora")))


def _pattern(config: Mapping[str, Any], patterns: str, key: str, default: str) -> Any:
    """The value of the first pattern that PEFT's `get_pattern_key` matches with `key`, else the default's."""
    if table := config.get(patterns):
        found = (table if isinstance(table, Patterns) else Patterns(table)).find(key)
        if found is not None:
            return table[found]
    if default not in config:
        raise AdapterFileError(f"adapter_config.json lacks {default!r}, which the LoRA on {key!r} needs.")
    return config[default]
