"""What must hold of every adapter, good or damaged. A case that breaks one is a `ViolationError`."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from fuzz.damages import Damage, Expected
from fuzz.families import FAMILIES, orientation
from fuzz.files import LAST
from fuzz.limits import TooSlowError, bounded, contents
from fuzz.made import Adapter, Case, make, save
from fuzz.oracle import Facts, Meaning, Reading, UnreadableError, metadata, read
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.errors import AmbiguousAdapterError, PeftMoeCompatError

BITS, ROUND_OFF = 1e-12, 2e-6
_RULES = {"sglang": "uniform", "llama.cpp": "alpha"}


class ViolationError(Exception):
    """What does not hold: its kind, and the case it was found with."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def guarded(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, or this package's own error as a value; anything else it raises is a violation."""
    try:
        with bounded():
            return function(*args, **kwargs)
    except PeftMoeCompatError as error:
        if len(str(error)) > 20_000:
            raise ViolationError(f"{what} says too much", f"{len(str(error))} characters") from None
        return error
    except TooSlowError:
        raise ViolationError(f"{what} takes too long", "over 5 s") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ViolationError(f"{what} raises {type(error).__name__}", str(error)[:300]) from error


def target_facts(case: Case, to: str) -> tuple[Facts, str, str]:
    """(how the reader reads, its form, its rule for the scaling)."""
    family = FAMILIES[case.family]
    facts = Facts(family, case.E, case.H, case.I, nesting=family.roles)
    if to.startswith("peft=="):
        peft, transformers = (part.partition("==")[2] for part in to.split(","))
        if family.single_experts(transformers) and (case.model or case.form != "fused"):
            return facts, "single", "config"
        facts = replace(facts, pair=(peft, transformers), orientation=orientation(peft, transformers, family))
        return facts, "fused", "config"
    form = {"llama.cpp": "gguf"}.get(to, "fused" if to == "vllm" and family.takes_fused else "single")
    return facts, form, _RULES.get(to, "config")


def refusable(case: Case, to: str) -> bool:
    """Whether a well-formed adapter of which everything is said may be refused by a reader all the same."""
    family = FAMILIES[case.family]
    if case.form == "gguf":
        return to != "llama.cpp"
    lone = case.form == "fused" and case.E == 1 and (bool(case.only) or family.apart_in is not None)
    return lone or (to == "sglang" and not family.sglang)


def _any_layer(case: Case, name: str) -> str:
    """A module's name without its layer; of a damaged file only its end, as paths may be among what was damaged."""
    return re.sub(r".*\.(?=experts|\w+_linear$)", "", name) if case.damages else re.sub(r"\.[0-9]+\.", ".{}.", name)


def check_names(case: Case, to: str, form: str, reading: Reading) -> None:
    """That experts are called as the reader calls them."""
    family = FAMILIES[case.family]
    if form == "gguf":
        known = {f"ffn_{role}_exps" for role in family.apart_roles}
        good = all(name.rpartition(".")[2] in known for name in reading.names)
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
    if to == "sglang" and set(reading.ranks.values()) != {config["r"]}:
        raise ViolationError("convert writes ranks the reader does not take", f"{to}: {reading.ranks}")


def check_output(case: Case, to: str, out: Path, exactness: str, expected: Meaning) -> None:
    """That a written folder means what the input meant, to the reader it is for."""
    if set(contents(out)) != {"adapter_config.json", "adapter_model.safetensors"}:
        raise ViolationError("convert leaves something behind", str(sorted(contents(out))))
    facts, form, rule = target_facts(case, to)
    facts = replace(facts, targeted=to.startswith("peft=="))
    try:
        reading = Reading(out, facts, rule)
    except (UnreadableError, KeyError, TypeError, ValueError) as error:
        raise ViolationError("convert writes what cannot be read", f"{to}: {error}") from None
    check_names(case, to, form, reading)
    if exactness == "lossy":
        expected = Meaning(expected.experts, expected.linears, {})
    tolerance = BITS if exactness == "bits" else ROUND_OFF
    if case.dtype in ("bfloat16", "float16") and exactness != "bits":
        tolerance = ROUND_OFF
    difference = expected.difference(reading.meaning, tolerance)
    if difference:
        raise ViolationError("convert changes what the file means", f"{to} ({exactness}): {difference}")


def check_verify(case: Case, adapter: Adapter, folder: Path, out: Path, scratch: Path) -> None:
    """That verify says the same of what convert wrote, and not the same once a number in it is changed."""
    said = {**adapter.said, "model": adapter.model}
    found = guarded("verify", verify_adapters, folder, out, **said)
    if isinstance(found, PeftMoeCompatError) or not found.same:
        why = str(found)[:300] if isinstance(found, PeftMoeCompatError) else str(found.rows[:3])
        raise ViolationError("verify does not say the same of a conversion", why)
    json.dumps(found.to_dict(), allow_nan=False)
    changed = scratch / "changed"
    shutil.copytree(out, changed)
    tensors = safetensors.torch.load((out / "adapter_model.safetensors").read_bytes())
    name = next(name for name in tensors if "lora_B" in name and tensors[name].any())
    flat = tensors[name].view(-1)
    where = int(flat.abs().argmax())
    flat[where] = -flat[where]
    file = changed / "adapter_model.safetensors"
    file.write_bytes(safetensors.torch.save(tensors, metadata(out)))
    found = guarded("verify", verify_adapters, folder, changed, **said)
    if not isinstance(found, PeftMoeCompatError) and found.same:
        raise ViolationError("verify is blind to a changed value", name)
    shutil.copy(out / "adapter_model.safetensors", file)
    config = json.loads((changed / "adapter_config.json").read_text())
    config["lora_alpha"] *= 1.5
    config["alpha_pattern"] = {key: value * 1.5 for key, value in (config["alpha_pattern"] or {}).items()}
    (changed / "adapter_config.json").write_text(json.dumps(config))
    found = guarded("verify", verify_adapters, folder, changed, **said)
    if not isinstance(found, PeftMoeCompatError) and found.same:
        raise ViolationError("verify is blind to another alpha", "")


def check_back(case: Case, adapter: Adapter, out: Path, scratch: Path, expected: Meaning) -> None:
    """That what was written converts to PEFT's form and on, still the same."""
    for index, to in enumerate(("peft==0.18.1,transformers==5.0.0", "per-expert")):
        said = {"model": adapter.model, "fill_missing": True}
        done = guarded("convert back", convert_adapter, out, scratch / f"back{index}", to=to, **said)
        if isinstance(done, PeftMoeCompatError):
            raise ViolationError("convert refuses what it wrote", f"{to}: {done}"[:400])
        out = scratch / f"back{index}"
        check_output(case, to, out, "round-off", expected)


def check_refusal(case: Case, to: str, error: PeftMoeCompatError) -> None:
    """That a well-formed adapter is refused only where something is not said, or the reader takes no such thing."""
    if case.damages or refusable(case, to):
        return
    if case.told:
        raise ViolationError("convert refuses a good file", f"{to}: {type(error).__name__}: {error}"[:500])
    if case.model and not isinstance(error, AmbiguousAdapterError):
        raise ViolationError("convert refuses a good file", f"{to}: {type(error).__name__}: {error}"[:500])


def run(case: Case, scratch: Path, tally: Counter[str]) -> None:
    """Makes the file of a case and holds the package to everything above.

    Raises:
        ViolationError: Something does not hold.
    """
    adapter = make(case)
    folder = scratch / "adapter"
    expected = Expected("same")
    damages = [Damage(name, case) for name in case.damages]
    for damage in damages:
        expected = expected.then(*damage.before(adapter))
    save(adapter, folder, case.shards)
    if not case.damages and (difference := adapter.meaning.difference(read(folder, adapter.facts), 1e-9)):
        raise ViolationError("the oracle and the generator disagree", difference)
    for damage in sorted(damages, key=lambda damage: damage.name in LAST):
        expected = expected.then(*damage.after(folder))
    meaning = expected.meaning(adapter, folder)
    before = contents(scratch)
    found = guarded("inspect", inspect_adapter, folder, **adapter.said)
    if not isinstance(found, PeftMoeCompatError):
        json.loads(found.to_json())
    for to in case.to:
        out = scratch / "out"
        how = {"fill_missing": True, "allow_lossy": True}
        done = guarded("convert", convert_adapter, folder, out, to=to, **adapter.said, **how)
        if isinstance(done, PeftMoeCompatError):
            tally[f"refused {type(done).__name__}"] += 1
            if contents(scratch) != before:
                raise ViolationError("a refusal leaves something behind", to)
            check_refusal(case, to, done)
            continue
        tally["converted"] += 1
        if meaning == "refuse":
            raise ViolationError("convert takes a file that means nothing", f"{to}: {expected.why}")
        if isinstance(meaning, Meaning):
            check_output(case, to, out, done.exactness, meaning)
            tally["compared"] += 1
            if not case.damages and done.exactness != "lossy":
                check_verify(case, adapter, folder, out, scratch)
                if to != "llama.cpp" and not (to == "sglang" and case.seed % 2):
                    check_back(case, adapter, out, scratch, meaning)
        for path in scratch.iterdir():
            if path != folder:
                shutil.rmtree(path)
    if contents(scratch) != before:
        raise ViolationError("the input was changed", "")
