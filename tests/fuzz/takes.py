"""What each reader takes, and that what was written for it is that. A case that breaks it is a `ViolationError`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fuzz.cases import FUSED, Case
from fuzz.families import FAMILIES, orientation
from fuzz.limits import contents
from fuzz.oracle import Facts, Meaning, UnreadableError
from fuzz.reading import Reading

BITS, ROUND_OFF = 1e-12, 2e-6
# How readers scale; a file for all releases of vLLM has to be right by the rule of each of them.
_RULES = {
    "sglang": ("uniform",),
    "shared-outer": ("uniform",),
    "llama.cpp": ("alpha",),
    "vllm": ("uniform", "rslora", "config"),
    "vllm==0.28": ("uniform", "rslora"),  # the one for single experts, the other for fused ones
    "vllm==0.29.1": ("uniform", "rslora"),
    "vllm==0.30": ("rslora",),
}


class ViolationError(Exception):
    """What does not hold: its kind, and the case it was found with."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def target_facts(case: Case, to: str) -> tuple[Facts, str]:
    """(how the reader reads, its form)."""
    family = FAMILIES[case.family]
    facts = Facts(family, case.E, case.H, case.I, nesting=family.roles)
    if to.startswith("peft=="):
        peft, transformers = (part.partition("==")[2] for part in to.split(","))
        if family.single_experts(transformers) and (case.model or case.form not in FUSED):
            return facts, "single"
        facts = replace(facts, pair=(peft, transformers), orientation=orientation(peft, transformers, family))
        return facts, "fused"
    forms = {"llama.cpp": "gguf", "shared-outer": "outer"}
    return facts, forms.get(to, "fused" if to.startswith("vllm") and family.takes_fused else "single")


def refusable(case: Case, to: str) -> bool:
    """Whether a well-formed adapter of which everything is said may be refused by a reader all the same."""
    family = FAMILIES[case.family]
    if case.form == "gguf":
        return to != "llama.cpp"
    shared = case.form in ("outer", "outer_single", "shared") and not case.patterns
    if to == "shared-outer" and not shared:
        return True
    lone = case.form == "fused" and case.E == 1 and (bool(case.only) or family.apart_in is not None)
    return lone or (to in ("sglang", "shared-outer") and not family.sglang)


def unknowable(case: Case, to: str) -> bool:
    """Whether the file says a writer that has not written it so, which only the model's config would show."""
    return case.turned and not case.model and to.startswith("peft==")


def _any_layer(case: Case, name: str) -> str:
    """A module's name without its layer; of a damaged file only its end, as paths may be among what was damaged."""
    return re.sub(r".*\.\w*(?=experts|_linear$)", "", name) if case.damages else re.sub(r"\.[0-9]+\.", ".{}.", name)


def check_names(case: Case, to: str, form: str, reading: Reading) -> None:
    """That experts are called as the reader calls them."""
    family = FAMILIES[case.family]
    if form == "gguf":
        known = {f"ffn_{role}_exps" for role in family.apart_roles}
        good = {name.rpartition(".")[2] for name in reading.names} <= known
    elif form == "outer":
        known = ("experts.w1.lora_A", "experts.w3.lora_A", "experts.w2.lora_B")
        of_all = [t for name, t in reading.tensors.items() if name.removesuffix(".weight").endswith(known)]
        good = all(tensor.shape[0] == 1 for tensor in of_all)
        good &= {name.rpartition(".")[2] for name in reading.names} <= {"w1", "w2", "w3"}
    elif form == "single":
        linears = {family.linear(role) for role in family.apart_roles}
        if to == "sglang":
            linears = {"gate_proj", "up_proj", "down_proj"} if family.gated else {"gate_proj", "down_proj"}
        known = {f"{family.apart_path()}.{linear}" for linear in linears}
        good = {_any_layer(case, name) for name in reading.names} <= {_any_layer(case, name) for name in known}
    else:
        known = {family.place(role, reading.facts.pair[1])[0] for role in family.roles}
        good = {_any_layer(case, name) for name in reading.names} <= {_any_layer(case, name) for name in known}
    if not good:
        raise ViolationError("convert writes names the reader does not know", f"{to}: {sorted(reading.names)[:4]}")
    config = reading.config
    if config.get("peft_type") != "LORA" or type(config.get("r")) is not int:
        raise ViolationError("convert writes a config that is none", f"{to}: {config}")
    if _RULES.get(to, ("",))[0] in ("uniform", "rslora") and set(reading.ranks.values()) != {config["r"]}:
        raise ViolationError("convert writes ranks the reader does not take", f"{to}: {reading.ranks}")


def check_output(case: Case, to: str, out: Path, exactness: str, expected: Meaning) -> None:
    """That a written folder means what the input meant, to the reader it is for."""
    if set(contents(out)) != {"adapter_config.json", "adapter_model.safetensors"}:
        raise ViolationError("convert leaves something behind", str(sorted(contents(out))))
    facts, form = target_facts(case, to)
    facts = replace(facts, targeted=to.startswith("peft=="))
    if exactness == "lossy":
        expected = Meaning(expected.experts, expected.linears, {})
    tolerance = BITS if exactness == "bits" else ROUND_OFF
    if case.dtype in ("bfloat16", "float16") and exactness != "bits":
        tolerance = ROUND_OFF
    for rule in _RULES.get(to, ("config",)):
        try:
            reading = Reading(out, facts, rule)
        except (UnreadableError, KeyError, TypeError, ValueError) as error:
            raise ViolationError("convert writes what cannot be read", f"{to}: {error}") from None
        check_names(case, to, form, reading)
        difference = expected.difference(reading.meaning, tolerance)
        if difference:
            raise ViolationError("convert changes what the file means", f"{to} ({exactness}, {rule}): {difference}")
