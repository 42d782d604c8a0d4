"""How each release of transformers stores a family's experts, and what orientation a PEFT release's adapters then have.

Imports neither of them: for adapter files, whose base model and writer need not be there.
"""

from __future__ import annotations

from packaging.version import Version

from ..families import FAMILIES, family
from ..releases import FIRST_PEFT_FOR_TRANSFORMERS_5, LayoutRule, base_release, parse_version, release_for

__all__ = ["expert_parameter", "has_separate_experts", "orientations", "orientations_after"]

_KINDS = {(False, False), (True, True), (True, False)}  # of modules: (stored as "E in out", declared so)


def orientations(
    peft: str, transformers: str | None, model_type: str | None, *, patched: bool = False
) -> frozenset[str]:
    """The orientations that adapters of a PEFT release can have, as far as the rest of the pair is known.

    What `ParamWrapper` does depends on whether the experts module declares `is_transposed`, and what that means for
    the file on whether it does so truthfully; both depend on the family and on the release of transformers.

    Args:
        peft: The release that wrote the adapter, or shall read it.
        transformers: The release beside it; None where it is unknown.
        model_type: Of the base model, as its config says, without `_text`; None where it is unknown.
        patched: Whether to count in processes that transformers 5.0 to 5.12 have patched: after `model.load_adapter()`
            the dimensions of every wrapper whose PEFT has not swapped them are (`ParamWrapper.update_layer`).

    Raises:
        UnsupportedPeftError: The release has no `ParamWrapper`, or is no version number.
    """
    rules = [release_for(peft)]
    beside = None if transformers is None else _release(transformers)
    if patched:
        rules += _patched(rules[0], transformers)
    kinds = _KINDS if model_type is None else _kinds_of(model_type, _release(peft), beside)
    return frozenset(_orientation_of(rule, *kind) for rule in rules for kind in kinds)


def _patched(rule: LayoutRule, transformers: str | None) -> list[LayoutRule]:
    """The rule as transformers 5.0 to 5.12 change it in `load_adapter`, if they do."""
    beside = None if transformers is None else _release(transformers)
    if rule.reads_swap_flag and (beside is None or Version("5.0") <= beside < Version("5.13")):
        return [LayoutRule(rule.since, 2, 2, reads_swap_flag=True)]
    return []


def _release(version: str) -> Version:
    return base_release(parse_version(version))


def _kinds_of(model_type: str, peft: Version, transformers: Version | None) -> set[tuple[bool, bool]]:
    """Those of `_KINDS` that a family is of beside this PEFT."""
    stored = family(model_type).transposed
    if stored is None:
        return {(False, False)}
    if transformers is not None:
        return {stored.at(transformers)}
    later = () if peft < FIRST_PEFT_FOR_TRANSFORMERS_5 else (stored.until, stored.declared)
    return {stored.at(version) for version in (Version("4.57"), *later) if version is not None}


def orientations_after(
    written_by: tuple[str, str | None], orientation: str, read_by: tuple[str, str | None]
) -> frozenset[str]:
    """What an adapter's orientation can be under another PEFT release, where the base model is unknown.

    The orientation it has under the release that wrote it, patched by transformers or not, tells how its experts may be
    stored.

    Args:
        written_by, read_by: PEFT, and the transformers release beside it or None.
        orientation: In the file.
    """
    writer, reader = release_for(written_by[0]), release_for(read_by[0])
    rules = [writer, *_patched(writer, written_by[1])]
    before, after = (None if release is None else _release(release) for release in (written_by[1], read_by[1]))
    found = set()
    for model_type in ("", *FAMILIES):
        kinds = _kinds_of(model_type, _release(written_by[0]), before)
        # Not what the release makes of most models: of another family, or not its work at all, which tells nothing.
        if orientation == writer.orientation(is_transposed=False):
            kinds = {kind for kind in kinds if any(_orientation_of(rule, *kind) == orientation for rule in rules)}
        if kinds and after is not None:
            kinds = _kinds_of(model_type, _release(read_by[0]), after)
        found |= {_orientation_of(reader, *kind) for kind in kinds}
    return frozenset(found)


def _orientation_of(rule: LayoutRule, stored_transposed: bool, declared: bool) -> str:
    return "linear" if rule.lora_A_axis(declared) == (1 if stored_transposed else 2) else "reversed"


def has_separate_experts(model_type: str, peft: str, transformers: str | None) -> bool:
    """Whether a pair holds the experts of a family as one linear per projection, as transformers 4 does most.

    Without a transformers release, the newest that works beside the PEFT is meant.
    """
    if transformers is not None:
        old = _release(transformers) < Version("5.0")
    else:
        old = _release(peft) < FIRST_PEFT_FOR_TRANSFORMERS_5
    return old and not family(model_type).fused_in_4


def expert_parameter(model_type: str | None, transformers: str | None, path: str, role: str) -> tuple[str, str] | None:
    """(module path, parameter) of an experts projection under a transformers release, for a family that was renamed.

    Args:
        model_type: Of the base model, without `_text`; None where it is unknown. Then the path tells, but for
            `mlp.experts`, which others call theirs too.
        transformers: The release; None for the newest form.
        path: Of the module under any release.
        role: `"gate_up"` or `"down"`.

    Returns:
        None for a family that never was.
    """
    rows = FAMILIES.values() if model_type is None else [family(model_type)]
    ends = {
        end: row.renamed
        for row in rows
        if row.renamed is not None
        for end in (*row.renamed.apart.values(), row.renamed.together)
        if model_type is not None or end != "mlp.experts"
    }
    end = next((end for end in ends if path == end or path.endswith(f".{end}")), None)
    if end is None:
        return None
    stem, renamed = path.removesuffix(end), ends[end]
    if transformers is None or _release(transformers) >= renamed.since:
        return stem + renamed.together, {"gate_up": "gate_up_proj", "down": "down_proj"}[role]
    return stem + renamed.apart[role], "weight"
