"""What `inspect_adapter` says of an adapter, as data. The JSON form has the same names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "SCHEMA_VERSION",
    "Conclusion",
    "Evidence",
    "ExpertsSummary",
    "Finding",
    "Inspection",
    "ProjectionSummary",
    "ReaderVerdict",
    "Settle",
]

SCHEMA_VERSION = 1

# Code -> its sentence; the fields are those of `Evidence.detail`, which may be evidence themselves.
SENTENCES = {
    "said": "said by the caller",
    "not_fused": "the experts' LoRA is not in PEFT's fused form",
    # Who wrote it.
    "stamped": "stamped by peft_moe_compat, PEFT {peft}, transformers {transformers}",
    "peft_version": "peft_version is {version!r} in adapter_config.json",
    "peft_0_17_fields": "adapter_config.json has the fields of PEFT 0.17, and no peft_version, as then",
    "no_version": "adapter_config.json has neither a peft_version nor the fields that PEFT 0.17 writes",
    "newer_fields": "adapter_config.json has no peft_version, and fields that PEFT 0.17 does not know: {names}",
    "newer_release": "nothing is known of releases after PEFT {peft} and transformers {transformers}",
    "automodel_layout": "paramwrapper_layout is {layout!r} in automodel_peft_config.json",
    "automodel_no_layout": "automodel_peft_config.json without paramwrapper_layout",
    "for_vllm": "adapter_config.json targets 'experts' as a module, as SkyRL and prime-rl do for vLLM: '(r E)', linear",
    "rewritten": (
        "adapter_config.json is PEFT's, but targets 'experts' as a module and no parameters: rewritten, and perhaps "
        "its factors exchanged, as ART does"
    ),
    "not_its_own": (
        "its {orientation} orientation is not what {name} writes on its own: saved again by another release, or made "
        "in a process that transformers 5.0 to 5.12 had patched"
    ),
    # What the shapes say.
    "one_shape": "shapes of 1 module",
    "shapes": "shapes of {count} modules",
    "shapes_and_hidden": "{shapes} and hidden size {hidden} of the attention LoRA",
    "stamp": "the stamp of peft_moe_compat",
    "fit_alone": "{what} fit {orientation} alone",
    "fit_both": "{what} fit both orientations",
    # What the writer does for this model.
    "no_writer": "no PEFT release is known to have written the file",
    "writes": "{name} writes {orientation} ones for this model",
    "depends_on_model": "what {name} writes depends on the base model",
    "depends_on_patching": (
        "what {name} writes for {model_type} is changed by the load_adapter() of transformers 5.0 to 5.12"
    ),
    "depends_on_transformers": "what {name} writes for {model_type} depends on the transformers release",
    # Nesting.
    "one_order": "only one parameter order is possible",
    "orientation_open": "it follows from the orientation, which is not settled",
    "which_parameter": "the one LoRA of {path!r} may be that of {options}",
    "which_nesting": "the shapes of {path!r} fit the nestings {options} (innermost first)",
    "swapped": "{what}; modules nested against the order of their parameters: {count}",
    # Packing.
    "peft_packs": "PEFT {peft} packs lora_B's columns as '(r E)', as every release does",
    "automodel_packs": "{name} packs as PEFT {peft} does",
    "unsloth_layout": "lora_B_layout says {said}",
    "unsloth": "auto_mapping has 'unsloth_fixed' and no marker: Unsloth before 2026-09",
    "unsloth_unknown": "{unsloth}, whose packing depends on the family of the base model",
    "unsloth_groups": "{unsloth}, which groups the columns of {family} by expert",
    "unsloth_left": "{unsloth}, which left {family} to PEFT's own forward",
    "packing_unsaid": "nothing in the config says how lora_B is packed",
    "packing_same": "with one expert or rank 1 both packings are the same",
    "packing_unfolded": "the factors are stacks, of which no columns are packed",
    "packing_zero": "every lora_B is zero, the same under both packings",
    "data_against": "but the data speak against it: {data}",
    "data_silent": "lora_B is zero, or of one expert or rank 1: its values show no packing",
    "data": (
        "norms of lora_B's columns differ between experts by {best:.1f} standard deviations of chance read as "
        "{packing}, by {worst:.1f} read as {other} ({matrices} of its matrices)"
    ),
    "data_unclear": "{data}: no clear difference",
    "data_or_ranks": "{data}, but ranks that differ, read as {other}, would explain that too",
}
# Code of a finding -> how grave it is, and its sentence, of the fields of `Finding.detail`.
FINDINGS = {
    "not_finite": ("error", "{nan} NaN and {infinite} infinite entries"),
    "zero_experts": (
        "warning",
        (
            "lora_A of {count} of {of} experts is zero or missing, as training never leaves it, but of experts that no "
            "token reached where a conversion has exchanged lora_A and lora_B: {experts}"
        ),
    ),
    "untrained_experts": (
        "note",
        "lora_B of {count} of {of} experts is zero, as no token reached them, or it was lost: {experts}",
    ),
    "not_trained": ("note", "lora_B is zero: not trained"),
    "zero_half": ("warning", "all rows of the update of {half} are zero"),
    "zero_rows": ("warning", "{count} of {of} rows of the update are zero in every expert"),
    "sparse_experts": (
        "warning",
        "a quarter or more of the update's rows are zero in {count} of {of} experts: {experts}",
    ),
    "zero_columns": ("warning", "{count} of {of} columns of the update are zero in every expert"),
    "lost_ranks": (
        "warning",
        "ranks of lora_A are zero where lora_B has numbers, in {count} of {of} experts: {experts}",
    ),
    "unused_ranks": (
        "warning",
        "ranks of lora_B are zero where lora_A has numbers, in {count} of {of} experts: {experts}",
    ),
    "constant_experts": (
        "warning",
        "lora_A or lora_B of {count} of {of} experts is one number throughout, as training never leaves it: {experts}",
    ),
    "huge": (
        "warning",
        "numbers up to {largest:g}, beside which the weights that they are added to vanish: diverged, or scaled twice",
    ),
    "same_experts": (
        "warning",
        "{count} of {of} experts have the numbers of another one, copied, or of a pair that they share: {experts}",
    ),
    "no_scaling": ("warning", "lora_alpha is 0: whatever the factors hold, the update is zero"),
    "far_experts": (
        "warning",
        "the updates of {count} of {of} experts are far from the median in norm: {experts}, {ratios} times it",
    ),
    "far_layers": ("warning", "the updates of {layers} are far from those of the other layers in norm"),
    "missing_layers": ("warning", "no LoRA on {layers}, between layers that have it"),
    "not_settled": ("note", "looked at without telling experts apart: what the file holds is not settled"),
}
_SHOWN = 12  # experts or layers in a sentence; all of them are in the detail
# When a flag settles something -> how that is said; "otherwise" goes with the flag before it.
_WHEN = {
    "": "{flag}",
    "config": "{flag} (the base model's config.json)",
    "both": "{flag}, or both",
    "unpatched": "{flag} if that was not called before",
    "otherwise": "{flag}",
    "patched": "{flag} if load_adapter() of transformers 5.0 to 5.12 was called before",
}


@dataclass(frozen=True)
class Evidence:
    """Something that speaks for a conclusion, or against it; `str` is the sentence.

    Attributes:
        code: One of `SENTENCES`.
        detail: What the sentence is about.
    """

    code: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return SENTENCES[self.code].format(**self.detail)


@dataclass(frozen=True)
class Settle:
    """Something the caller can say that would settle a conclusion; `str` is the flag of the command line.

    Attributes:
        argument: Of the public functions.
        value: What to pass: a possible answer, or a word in capitals for what is to be filled in; empty for any.
        when: Code for when it settles it.
    """

    argument: str
    value: str = ""
    when: str = ""

    def __str__(self) -> str:
        flag = f"--{self.argument.replace('_', '-')} {self.value}".rstrip()
        return _WHEN[self.when].format(flag=flag)


@dataclass(frozen=True)
class Conclusion:
    """One thing concluded about a file.

    Attributes:
        value: What was concluded; None where the evidence does not settle it.
        confidence: `"certain"` where the file's own shapes, keys or stamp leave nothing else, `"stated"` where the
            caller or the writer's release says so, `"likely"` where the data does, `"none"` where it is undecided.
        evidence: What speaks for the value, and against it.
        settle: Where undecided: what would settle it.
    """

    value: str | None
    confidence: str
    evidence: tuple[Evidence, ...]
    settle: tuple[Settle, ...] = ()

    @property
    def decided(self) -> bool:
        return self.value is not None

    @property
    def why(self) -> str:
        """The evidence in words."""
        return "; ".join(map(str, self.evidence))

    @property
    def remedy(self) -> str:
        """The flags that would settle it, in words."""
        text = ""
        for settle in self.settle:
            joint = "" if not text else ", else " if settle.when == "otherwise" else ", or "
            text += f"{joint}{settle}"
        return text

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "confidence": self.confidence,
            "evidence": [str(reason) for reason in self.evidence],
            "settle": self.remedy,
        }


@dataclass(frozen=True)
class Finding:
    """Something about the numbers of a LoRA that training does not explain, or that says it is not trained.

    Attributes:
        code: One of `FINDINGS`; `str` is its sentence.
        path: Of the module, with `*` for the layer where it is about several.
        projection: Parameter or linear; None where that is undecided.
        detail: What the sentence is about, the numbers of experts or layers among it.
    """

    code: str
    path: str
    projection: str | None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """`"error"`: of no use; `"warning"`: something was lost or is out of line; `"note"`."""
        return FINDINGS[self.code][0]

    def __str__(self) -> str:
        shown = {name: _listed(value) if isinstance(value, list) else value for name, value in self.detail.items()}
        if (layers := self.detail.get("layers")) is not None:
            shown["layers"] = f"layer{'s' * (len(layers) > 1)} {shown['layers']}"
        return FINDINGS[self.code][1].format(**shown)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "level": self.level, "text": str(self)}


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:.12g}" for value in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")


@dataclass(frozen=True)
class ProjectionSummary:
    """One adapted projection of an experts module.

    Attributes:
        name: Parameter or linear, as the file or its config names it; None where that is undecided.
        rank: Of one expert; None where it differs between experts or is undecided.
        scaling: Factor of the update; None likewise.
        in_features, out_features: None where the orientation is undecided.
    """

    name: str | None
    rank: int | None
    scaling: float | None
    in_features: int | None
    out_features: int | None


@dataclass(frozen=True)
class ExpertsSummary:
    """One experts module: its path in the model, the form of its LoRA, and its projections, innermost first."""

    path: str
    form: str
    num_experts: int | None
    projections: tuple[ProjectionSummary, ...]


@dataclass(frozen=True)
class ReaderVerdict:
    """What a reader does with the file as it is.

    Attributes:
        verdict: `"reads"` where a conversion for it would change nothing, in names, tensors, or the config as it takes
            that; else what it is known to do without the change, `"fails"` or `"wrong"` (maybe without an error), or
            `"unknown"`.
        why: What a conversion would change, or what stands in its way.
        in_general: The same for all releases of the reader, where one conversion is right in all of them.
    """

    verdict: str
    why: str
    in_general: ReaderVerdict | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Inspection:
    """What an adapter holds, who wrote it, what its readers would do with it, and how sure all of that is.

    Attributes:
        path: Of the folder.
        files: Names of the files read.
        num_tensors, total_bytes: Of all tensors.
        dtypes: Of the experts' LoRA.
        form: `"fused"`, `"per_expert"`, `"stacked"`, or `"none"` where there is no LoRA on routed experts.
        model_type: Of the base model, where its config was given.
        writer, orientation, packing, nesting: Conclusions. Orientation is `"linear"` or `"reversed"`, packing
            `"rank_major"`, `"grouped"` or `"either"`, nesting the parameters from the innermost wrapper outwards;
            `"not applicable"` for files that are not fused.
        modules: The experts modules, in the order of the file.
        other_tensors, other_bytes: What the file holds besides, all of it carried along unchanged.
        readers: Reader -> what it does with the file.
        transformers: The installed release, beside which PEFT is judged; None where there is none.
        content: What the numbers show; None where they were not read.
        notes: Whatever else is worth knowing.
    """

    path: str
    files: tuple[str, ...]
    num_tensors: int
    total_bytes: int
    dtypes: tuple[str, ...]
    form: str
    model_type: str | None
    writer: Conclusion
    orientation: Conclusion
    packing: Conclusion
    nesting: Conclusion
    modules: tuple[ExpertsSummary, ...]
    other_tensors: int
    other_bytes: int
    readers: dict[str, ReaderVerdict]
    transformers: str | None
    content: tuple[Finding, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def undecided(self) -> tuple[str, ...]:
        """Which of orientation, packing and nesting the evidence does not settle."""
        return tuple(name for name in ("orientation", "packing", "nesting") if not getattr(self, name).decided)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, `undecided`, and `schema_version`, which counts changes of that form."""
        conclusions = {name: getattr(self, name).to_dict() for name in ("writer", "orientation", "packing", "nesting")}
        content = None if self.content is None else [finding.to_dict() for finding in self.content]
        readers = {name: {"verdict": found.verdict, "why": found.why} for name, found in self.readers.items()}
        found = {**asdict(self), **conclusions, "content": content, "undecided": self.undecided, "readers": readers}
        return {"schema_version": SCHEMA_VERSION, **found}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)
