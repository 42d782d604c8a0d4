"""What must hold of every adapter, good or damaged. A case that breaks one is a `ViolationError`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch

from fuzz.cases import Case
from fuzz.commands import check_commands
from fuzz.damages import Damage, Expected
from fuzz.files import LAST
from fuzz.guarded import guarded
from fuzz.limits import contents
from fuzz.loading import check_loading
from fuzz.made import Adapter, make, save
from fuzz.oracle import Meaning, metadata
from fuzz.reading import read
from fuzz.takes import ViolationError, check_output, refusable, unknowable
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.errors import AmbiguousAdapterError, PeftMoeCompatError


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
    if case.damages or refusable(case, to) or (case.renamed and case.patterns):  # expressions are not all renamed
        return
    if case.told and case.model:
        raise ViolationError("convert refuses a good file", f"{to}: {type(error).__name__}: {error}"[:500])
    if case.model and not isinstance(error, AmbiguousAdapterError):
        raise ViolationError("convert refuses a good file", f"{to}: {type(error).__name__}: {error}"[:500])


def _there(tally: Counter[str], package: str) -> bool:
    """Whether a package is installed; counted where it is not."""
    there = find_spec(package) is not None
    tally[f"without {package}"] += not there
    return there


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
    if case.also == "commands" and _there(tally, "typer"):
        check_commands(case, adapter, folder, scratch, meaning, tally)
        return
    if case.also == "loading" and _there(tally, "peft"):
        check_loading(case, adapter.said, folder, meaning, tally)
        return
    before = contents(scratch)
    found = guarded("inspect", inspect_adapter, folder, **adapter.said)
    if not isinstance(found, PeftMoeCompatError):
        json.loads(found.to_json())
    for to in case.to:
        out = scratch / "out"
        how = {"fill_missing": True, "allow_lossy": True, "rename": adapter.rename}
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
        if isinstance(meaning, Meaning) and not unknowable(case, to):
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
