"""Paths of modules called otherwise: those of a multimodal class against those of its text part, or of a trainer's own.

An adapter is opened as if its tensors had the new paths; whatever in its config speaks of the old ones is rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import AdapterError

__all__ = ["parse_renames", "renamed", "renamed_config"]

_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def parse_renames(given: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """OLD -> NEW, from a mapping or from texts `OLD=NEW`.

    Raises:
        AdapterError: One is no such text, or a part of a path is empty.
    """
    pairs = given.items() if isinstance(given, Mapping) else [text.partition("=")[::2] for text in given]
    found = {str(old): str(new) for old, new in pairs}
    for old, new in found.items():
        if not all(re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", path) for path in (old, new)):
            raise AdapterError(
                f"rename is {old!r} to {new!r}; parts of module paths were expected, as in "
                "`--rename model.layers=model.language_model.layers`."
            )
    return found


def renamed(path: str, renames: Mapping[str, str]) -> str:
    """The path with each OLD as NEW, once, where it stands between dots."""
    for old, new in renames.items():
        path = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", path, count=1)
    return path


def renamed_config(raw: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """adapter_config.json with the paths in its names and patterns renamed; expressions too, where they spell them."""

    def text(value: str) -> str:
        for old, new in renames.items():
            value = value.replace(re.escape(old), re.escape(new)) if re.escape(old) != old else value
        return renamed(value, renames)

    found = dict(raw)
    for field in _NAMES:
        value = raw.get(field)
        if isinstance(value, list):
            found[field] = [text(name) if isinstance(name, str) else name for name in value]
        elif isinstance(value, str):
            found[field] = text(value)
    for field in _PATTERNS:
        if isinstance(raw.get(field), dict):
            found[field] = {text(pattern): value for pattern, value in raw[field].items()}
    return found
