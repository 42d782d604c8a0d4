"""The version detector: PEFT release -> which stored axis of an expert parameter lora_A spans.

Every fact of a PEFT or transformers version; those of a family in one release or another are its row in `families`.
Supporting another PEFT release costs a new `NEWEST_TESTED`, or a row in `RULES` where the layout changed. Imports
neither torch, peft nor transformers.

Stored axes are those of the expert parameter as the module holds it, `(E, d1, d2)`: axis 1 has d1 entries, axis 2 d2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .errors import UnsupportedPeftError

__all__ = [
    "AUTOMODEL_LAYOUTS",
    "FIRST_PEFT_FOR_TRANSFORMERS_5",
    "FIRST_PEFT_THAT_REWRITES",
    "KNOWN_ISSUES",
    "NEWEST_TESTED",
    "NEWEST_TRANSFORMERS",
    "RULES",
    "KnownIssue",
    "LayoutRule",
    "base_release",
    "installed_issue",
    "installed_versions",
    "known_issues",
    "newer_than_tested",
    "parse_releases",
    "parse_version",
    "release_for",
    "stamps_its_version",
    "verified_rule",
]


@dataclass(frozen=True)
class LayoutRule:
    """How a range of PEFT releases lays out lora_A and lora_B of a 3-D parameter `(E, d1, d2)`.

    Attributes:
        since: First PEFT release the rule holds for.
        axis_plain: Stored axis (1 or 2) lora_A's columns span where the experts module has no true `is_transposed`;
            lora_B's rows span the other one.
        axis_transposed: The same where the experts module says `is_transposed=True`.
        reads_swap_flag: Whether `get_delta_weight` obeys the wrapper's `_did_swap_in_out_features`.
    """

    since: Version
    axis_plain: int
    axis_transposed: int
    reads_swap_flag: bool

    def lora_A_axis(self, is_transposed: bool) -> int:
        """Stored axis lora_A's columns span in an adapter this release creates on its own."""
        return self.axis_transposed if is_transposed else self.axis_plain

    def orientation(self, is_transposed: bool) -> str:
        """`"linear"` where lora_A's columns run over the true in-features, `"reversed"` where over the out-features."""
        in_axis = 1 if is_transposed else 2
        return "linear" if self.lora_A_axis(is_transposed) == in_axis else "reversed"

    def agrees_with(self, other: LayoutRule) -> bool:
        """Whether two rules describe the same layout, whatever release they start from."""
        mine = (self.axis_plain, self.axis_transposed, self.reads_swap_flag)
        return mine == (other.axis_plain, other.axis_transposed, other.reads_swap_flag)

    def __str__(self) -> str:
        words = {"linear": "in-features (linear)", "reversed": "out-features (reversed)"}
        plain, transposed = (words[self.orientation(t)] for t in (False, True))
        flag = "" if self.reads_swap_flag else "; wrappers have no flag for swapped dimensions"
        return f"lora_A spans the {plain} of (E, out, in) weights, the {transposed} of (E, in, out) weights{flag}"


# Source: `ParamWrapper.update_layer` and `ParamWrapper.get_delta_weight` in peft/tuners/lora/layer.py of each release.
RULES: tuple[LayoutRule, ...] = (
    LayoutRule(Version("0.17.0"), axis_plain=1, axis_transposed=1, reads_swap_flag=False),
    LayoutRule(Version("0.19.0"), axis_plain=1, axis_transposed=2, reads_swap_flag=True),
    LayoutRule(Version("0.19.1"), axis_plain=2, axis_transposed=1, reads_swap_flag=True),
)
NEWEST_TESTED = Version("0.21.2")
NEWEST_TRANSFORMERS = Version("5.24.0")

# NeMo Automodel's names for a layout, None where it gives none (0.4 to 0.6), and the PEFT release whose rule it means.
# Source: nemo_automodel 0.7, components/moe.
AUTOMODEL_LAYOUTS = {"peft-0.18": "0.18.1", "peft-0.19.1": "0.19.1", None: "0.18.1"}

# The first PEFT release that writes its own version into adapter_config.json.
_FIRST_PEFT_WITH_STAMP = Version("0.18.0")
# The first PEFT release that imports beside transformers 5.
FIRST_PEFT_FOR_TRANSFORMERS_5 = Version("0.18.0")
# The first one that takes names of an expert's linears for fused parameters there, see `families.REWRITTEN`.
FIRST_PEFT_THAT_REWRITES = Version("0.19.0")


@dataclass(frozen=True)
class KnownIssue:
    """A fault of a (PEFT, transformers) pair that this package cannot mend, with the way around it.

    Attributes:
        code: What it is called in code.
        peft, transformers: Where it holds, as far as releases were tested. A range without an upper bound is one whose
            end is not known; an empty one says that the release does not matter.
        symptom, remedy: In words.
        certain: Whether it holds for a pair, see `known_issues`; False where one of the two is newer than any tested.
    """

    code: str
    peft: SpecifierSet
    transformers: SpecifierSet
    symptom: str
    remedy: str
    certain: bool = True


_ANY = SpecifierSet()
KNOWN_ISSUES: tuple[KnownIssue, ...] = (
    KnownIssue(
        "peft_does_not_import",
        SpecifierSet("<0.18"),
        SpecifierSet(">=5"),
        "this PEFT does not import: it needs transformers' HybridCache, which 5.0 removed",
        "install peft>=0.18 or transformers<5",
    ),
    KnownIssue(
        "from_pretrained_loading_info",
        SpecifierSet(">=0.19"),
        SpecifierSet("==5.0.*"),
        "PeftModel.from_pretrained fails on MoE models (convert() got an unexpected keyword argument 'loading_info')",
        "install transformers>=5.5",
    ),
    KnownIssue(
        "from_pretrained_distributed_operation",
        SpecifierSet(">=0.19,<0.20"),
        SpecifierSet(">=5.12.1"),
        "PeftModel.from_pretrained fails on MoE models (unexpected keyword argument 'distributed_operation')",
        "install peft>=0.20",
    ),
    KnownIssue(
        "dbrx_turned",
        _ANY,
        SpecifierSet(">=5,<5.15"),
        "dbrx's experts are multiplied the wrong way round, so that no dbrx runs whose two widths differ",
        "install transformers>=5.15 or <5 for dbrx",
    ),
    KnownIssue(
        "load_adapter_swaps",
        SpecifierSet("<0.19"),
        SpecifierSet(">=5,<5.5"),
        "transformers' model.load_adapter swaps the LoRA dimensions of this PEFT, whose forward then fails",
        "load with PeftModel.from_pretrained, or install peft>=0.19",
    ),
    KnownIssue(
        "load_adapter_fails",
        SpecifierSet("<0.19"),
        SpecifierSet(">=5.5"),
        "transformers' model.load_adapter fails (No module named 'peft.utils.transformers_weight_conversion')",
        "load with PeftModel.from_pretrained, or install peft>=0.19",
    ),
    KnownIssue(
        "peft_too_old_for_transformers",
        SpecifierSet("<0.22"),
        SpecifierSet(">=5.24"),
        "transformers' model.add_adapter, set_adapter and save_pretrained refuse this PEFT: they want 0.22 or newer",
        "use get_peft_model and PeftModel, or install transformers<5.24",
    ),
    KnownIssue(
        "per_expert_dropped",
        SpecifierSet(">=0.18,<0.19"),
        SpecifierSet(">=5"),
        "experts of a per-expert adapter written under transformers 4 are dropped without an error when it is loaded",
        "install peft>=0.20",
    ),
    KnownIssue(
        "second_adapter",
        SpecifierSet("<0.20"),
        _ANY,
        "a second adapter on target_parameters of the same model is refused (0.17.0: reaches one parameter per module)",
        "install peft>=0.20 to train or load several expert adapters",
    ),
    KnownIssue(
        "parametrised_loses_gradient",
        SpecifierSet(">=0.19,<0.21"),
        _ANY,
        "of two adapters on an already parametrised (4-bit) expert parameter, one gets no gradient",
        "keep peft_moe_compat active, whose forward does not, or leave the experts unquantised",
    ),
    KnownIssue(
        "parametrised_accumulates",
        SpecifierSet(">=0.21"),
        _ANY,
        "on an already parametrised (4-bit) expert parameter, PEFT's own forward adds the update again at every call",
        "keep peft_moe_compat active from the first forward on, or leave the experts unquantised",
    ),
    KnownIssue(
        "kbit_widens",
        SpecifierSet(">=0.17"),
        _ANY,
        "prepare_model_for_kbit_training casts fused experts in half precision to float32, twice their bytes",
        "keep peft_moe_compat active, and the experts in its forward; report(model) warns of stacks that are wide",
    ),
)


def parse_version(text: str) -> Version:
    """A version as PEFT writes it, `0.19.0` or `0.19.0.dev0@<hash>`, as a `packaging` version.

    Raises:
        UnsupportedPeftError: `text` is no version number.
    """
    try:
        if len(text) > 200:
            raise InvalidVersion
        return Version(text.partition("@")[0].strip())
    except ValueError:  # packaging's own, and Python's for numbers of thousands of digits
        raise UnsupportedPeftError(
            f"{text[:50]!r} is not a version number; one like '0.21.2' or '0.19.0.dev0@<hash>' was expected. "
            "Give the PEFT release that is installed, or that wrote the adapter."
        ) from None


def parse_releases(text: str) -> tuple[str, str | None]:
    """(PEFT, transformers or None) of `peft==0.18.1` or `peft==0.18.1,transformers==5.0.0`.

    Raises:
        UnsupportedPeftError: Another form, no version number, or a PEFT without `ParamWrapper`.
    """
    given = dict(part.strip().partition("==")[::2] for part in text.split(","))
    if "peft" not in given or not given.keys() <= {"peft", "transformers"}:
        raise UnsupportedPeftError(
            f"{text!r} names no release; one like 'peft==0.18.1' or 'peft==0.18.1,transformers==5.0.0' was expected."
        )
    for version in given.values():
        parse_version(version)
    release_for(given["peft"])
    return given["peft"], given.get("transformers")


def base_release(version: Version) -> Version:
    """A development build counts as the release it leads to."""
    return Version(version.base_version)


def release_for(version: str | Version) -> LayoutRule:
    """The layout rule of a PEFT release, installed here or stamped into an adapter file.

    A release newer than `NEWEST_TESTED` gets the newest rule; whether that is right only `verified_rule` can tell.
    A development build gets the rule of the release it leads to.

    Raises:
        UnsupportedPeftError: Releases before 0.17.0 have no `ParamWrapper`.
    """
    parsed = parse_version(str(version))
    for rule in reversed(RULES):
        if base_release(parsed) >= rule.since:
            return rule
    raise UnsupportedPeftError(
        f"PEFT {parsed} has no ParamWrapper, so it cannot put LoRA on fused expert weights; "
        f"peft>={RULES[0].since} is needed. Install one, for example `pip install peft=={NEWEST_TESTED}`."
    )


def stamps_its_version(peft: str) -> bool:
    """Whether that PEFT release writes `peft_version` into adapter_config.json."""
    return base_release(parse_version(peft)) >= _FIRST_PEFT_WITH_STAMP


def verified_rule(version: str | Version, measured: LayoutRule) -> LayoutRule:
    """The rule for the installed PEFT, checked against what a probe of it measured.

    The table decides and the probe verifies. Only a development build may differ from its row, since it can predate
    the change that its version number promises: there the measured row is taken if the table has it.

    Raises:
        UnsupportedPeftError: The probe contradicts the table.
    """
    parsed = parse_version(str(version))
    rule = release_for(parsed)
    if rule.agrees_with(measured):
        return rule
    if parsed.is_prerelease and (others := [other for other in RULES if other.agrees_with(measured)]):
        return others[0]
    newer = " (newer than any tested release)" if parsed > NEWEST_TESTED else ""
    raise UnsupportedPeftError(
        f"PEFT {parsed}{newer} does not lay out its expert LoRA as expected. Expected: {rule}. Measured: {measured}. "
        "Either its ParamWrapper is patched by another library, or this release needs a newer peft-moe-compat. "
        f"Update peft-moe-compat, or install peft<={NEWEST_TESTED}; until then PEFT's own forward stays in place."
    )


def known_issues(peft: str, transformers: str) -> list[KnownIssue]:
    """The faults of an installed pair, given both version numbers.

    Where one of the two is newer than any tested release, a fault that its newest tested release still had is listed
    with `certain=False`: it may still hold.
    """
    pair = base_release(parse_version(peft)), base_release(parse_version(transformers))
    found = []
    for issue in KNOWN_ISSUES:
        ranges = tuple(zip(pair, (issue.peft, issue.transformers), (NEWEST_TESTED, NEWEST_TRANSFORMERS), strict=True))
        if all(version in known for version, known, _ in ranges):
            # A range with a beginning and no end, of which nobody knows whether it goes on.
            open_end = any(v > newest and {one.operator for one in known} == {">="} for v, known, newest in ranges)
            found.append(replace(issue, certain=not open_end))
    return found


def installed_issue(code: str) -> KnownIssue | None:
    """The fault of that code, if the installed pair has it."""
    return next(
        (issue for issue in known_issues(**installed_versions("peft", "transformers")) if issue.code == code), None
    )


def newer_than_tested(peft: str, transformers: str | None) -> dict[str, str]:
    """Of a pair, what is newer than any release that was tested: its name -> the newest tested release.

    transformers is None for any.
    """
    newest = {"peft": (peft, NEWEST_TESTED), "transformers": (transformers, NEWEST_TRANSFORMERS)}
    return {
        name: str(tested)
        for name, (version, tested) in newest.items()
        if version is not None and base_release(parse_version(version)) > tested
    }


def installed_versions(*names: str) -> dict[str, str]:
    """Distribution name -> installed version, `"not installed"` where there is none. Imports nothing."""
    from importlib import metadata  # here, since it costs a third of the package's import time

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
