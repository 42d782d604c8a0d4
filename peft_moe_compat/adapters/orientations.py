"""How each release of transformers stores a family's experts, and what orientation a PEFT release's adapters then have.

Imports neither of them: for adapter files, whose base model and writer need not be there.
"""

from __future__ import annotations

from packaging.version import Version

from ..families import StoredTransposed, family
from ..releases import FIRST_PEFT_FOR_TRANSFORMERS_5, LayoutRule, base_release, parse_version, release_for

__all__ = ["expert_parameter", "has_separate_experts", "orientations", "orientations_after"]


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
    rule = release_for(peft)
    if patched and rule.reads_swap_flag and _may_be_patched(transformers):
        swapped = LayoutRule(rule.since, 2, 2, reads_swap_flag=True)
        found = orientations(peft, transformers, model_type)
        return found | {_orientation_of(swapped, *kind) for kind in _kinds(peft, transformers, model_type)}
    return frozenset(_orientation_of(rule, *kind) for kind in _kinds(peft, transformers, model_type))


def _may_be_patched(transformers: str | None) -> bool:
    return transformers is None or parse_version("5.0.0") <= base_release(parse_version(transformers)) < parse_version(
        "5.13.0"
    )


def _kinds(peft: str, transformers: str | None, model_type: str | None) -> set[tuple[bool, bool]]:
    """(stored as "E in out", declared so) in all ways that are possible."""
    if model_type is None:
        return {(False, False), (True, True), (True, False)}
    stored = family(model_type).transposed
    if stored is None:
        return {(False, False)}
    return {stored.at(version) for version in _transformers_beside(parse_version(peft), transformers, stored)}


def orientations_after(written_by: str, orientation: str, read_by: str) -> frozenset[str]:
    """What an adapter's orientation can be under another PEFT release, where the base model is unknown.

    The orientation it has under the release that wrote it tells how its experts may be stored.
    """
    writer, reader = release_for(written_by), release_for(read_by)
    kinds = {
        (transposed, declared)
        for transposed, declared in ((False, False), (True, False), (True, True))
        if _orientation_of(writer, transposed, declared) == orientation
    }
    # A module that does not declare what it is may do so under a later transformers; one that does keeps doing so.
    later = {(transposed, True) for transposed, declared in kinds if transposed and not declared}
    return frozenset(_orientation_of(reader, *kind) for kind in kinds | later)


def _orientation_of(rule: LayoutRule, stored_transposed: bool, declared: bool) -> str:
    return "linear" if rule.lora_A_axis(declared) == (1 if stored_transposed else 2) else "reversed"


def has_separate_experts(model_type: str, peft: str, transformers: str | None) -> bool:
    """Whether a pair holds the experts of a family as one linear per projection, as transformers 4 does most.

    Without a transformers release, the newest that works beside the PEFT is meant.
    """
    if transformers is not None:
        old = base_release(parse_version(transformers)) < parse_version("5.0.0")
    else:
        old = base_release(parse_version(peft)) < FIRST_PEFT_FOR_TRANSFORMERS_5
    return old and not family(model_type).fused_in_4


def expert_parameter(model_type: str, transformers: str | None, path: str, role: str) -> tuple[str, str] | None:
    """(module path, parameter) of an experts projection under a transformers release, for a family that was renamed.

    Args:
        model_type: Of the base model, without `_text`.
        transformers: The release; None for the newest form.
        path: Of the module under any release.
        role: `"gate_up"` or `"down"`.

    Returns:
        None for a family that never was.
    """
    renamed = family(model_type).renamed
    if renamed is None:
        return None
    for end in (*renamed.apart.values(), renamed.together):
        if path == end or path.endswith(f".{end}"):
            stem = path.removesuffix(end)
            break
    else:
        return None
    if transformers is None or base_release(parse_version(transformers)) >= renamed.since:
        return stem + renamed.together, {"gate_up": "gate_up_proj", "down": "down_proj"}[role]
    return stem + renamed.apart[role], "weight"


def _transformers_beside(peft: Version, transformers: str | None, stored: StoredTransposed) -> list[Version]:
    """One transformers release for each way the family is stored that is possible beside this PEFT."""
    if transformers is not None:
        return [base_release(parse_version(transformers))]
    oldest = Version("4.57")
    if base_release(peft) < FIRST_PEFT_FOR_TRANSFORMERS_5:
        return [oldest]
    return [oldest, *(version for version in (stored.until, stored.declared) if version is not None)]
