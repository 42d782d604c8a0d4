"""Every committed fixture: what `inspect` says of it, and what is left of it after a conversion for each reader.

What is right comes from truth.json and truth.safetensors, which the writing releases made; how a release reads a file
comes from the fixtures that it wrote itself.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.adapter_files import (
    GPT_OSS,
    LAYER,
    MIXTRAL,
    NEMOTRON,
    PREFIX,
    QWEN,
    ROLES,
    Contents,
    Family,
    Key,
    apart,
    assert_identical,
    assert_updates,
    load,
    read_adapter,
    read_config,
)
from support.verdicts import targets_of_verdicts, unchanged
from torch import Tensor

from peft_moe_compat.adapters.adapter_config import parse_config
from peft_moe_compat.adapters.conclusions import Inspection
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.stamp import STAMP_KEY
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, LossyConversionError

ROOT = Path(__file__).parent.parent / "fixtures"
CASES = sorted(file.parent.relative_to(ROOT).as_posix() for file in ROOT.rglob("truth.json"))
FAMILIES = {family.model_type: family for family in (QWEN, GPT_OSS, NEMOTRON, MIXTRAL)}
# Each PEFT layout, beside transformers on both sides of its own changes.
PEFT_TARGETS = (
    ("0.18.1", "5.0.0"),
    ("0.19.0", "5.5.4"),
    ("0.21.2", "5.23.0"),
    ("0.21.2", "4.57.6"),
)
READERS = ("per-expert", "vllm", "sglang", "llama.cpp")
# Written by the newest pair, by an old one, and by hand: these go to every reader. The rest take turns.
THOROUGH = ("peft/peft0212-tf5230/", "peft/peft0181-tf5230/", "handmade/")
# Files with nothing that tells them from what the release in their stamp writes: no trace of the real packing.
WITHOUT_A_TRACE = {"handmade/few_steps_grouped"}


@cache
def truth(case: str) -> dict[str, Any]:
    return json.loads((ROOT / case / "truth.json").read_text())


def model_type(case: str) -> str:
    return truth(case)["model_type"].removesuffix("_text")


def family(case: str) -> Family:
    return FAMILIES.get(model_type(case), Family(model_type(case)))


@cache
def true_updates(case: str) -> dict[Key, Tensor]:
    """(layer, role) -> "E out in", gate and up apart."""
    found: dict[Key, Any] = {}
    tensors = safetensors.torch.load_file(ROOT / case / "truth.safetensors")
    for name in truth(case)["parameters"]:
        stem, _, last = name.rpartition(".")
        role = ROLES.get(last) or ROLES[".".join(name.split(".")[-2:])]
        key = int(LAYER.search(name)[1]), role
        if truth(case)["kind"] == "per_expert":
            found.setdefault(key, {})[int(stem.rpartition(".")[2])] = tensors[name].double()
        else:
            found[key] = tensors[name].double()
    E = truth(case)["E"]
    for key, update in found.items():
        if isinstance(update, dict):
            zero = torch.zeros_like(next(iter(update.values())))
            found[key] = torch.stack([update.get(e, zero) for e in range(E)])
    return apart(found, family(case))


def tolerance(case: str) -> float:
    """The truth went through the dtype of the base."""
    return 2**-7 if truth(case)["dtype"] == "bfloat16" else 3e-6


@cache
def stored(model: str, transformers: str) -> dict[str, Any] | None:
    """How that transformers release holds the experts of a family, measured when a fixture was written."""
    for case in CASES:
        said = truth(case)
        if case.startswith("peft/") and (model_type(case), said["transformers"]) == (model, transformers):
            return said
    return None


def orientation_in(said: dict[str, Any], peft: str) -> str:
    """What a release on its own makes of an experts module, by the table in FACTS section 2, in plain words."""
    release = tuple(map(int, peft.split(".")))
    transposed = bool(said["is_transposed_attribute"])
    if release < (0, 19, 0):
        axis = 1
    elif release < (0, 19, 1):
        axis = 2 if transposed else 1
    else:
        axis = 1 if transposed else 2
    return "linear" if axis == (1 if said["stored_transposed"] else 2) else "reversed"


def flags(found: Inspection, case: str) -> dict[str, Any]:
    """What a user who knows the truth would pass to settle what is open."""
    said = truth(case)
    settled: dict[str, Any] = {}
    if case in WITHOUT_A_TRACE or not found.packing.decided:
        settled["packing"] = said["packing"]
    if not found.orientation.decided:
        settled["orientation"] = said["orientation"]
    if not found.nesting.decided:
        settled["nesting"] = said["nesting"]
    return settled


def inspected(case: str, **more: Any) -> Inspection:
    return inspect_adapter(ROOT / case, model=ROOT / case / "base_config.json", **more)


def test_the_fixtures_are_those_of_the_manifest():
    manifest = json.loads((ROOT / "peft" / "MANIFEST.json").read_text())
    listed = [f"peft/{env}/{case}" for env, found in manifest["environments"].items() for case in found["cases"]]
    assert sorted(listed) == [case for case in CASES if case.startswith("peft/")]
    assert len(listed) > 200
    assert sum(case.startswith("handmade/") for case in CASES) >= 40


def test_only_a_config_of_0_17_is_taken_for_one_without_the_version():
    """Of those that PEFT 0.17.0 to 0.21.2 wrote."""
    found = set()
    for case in (case for case in CASES if case.startswith("peft/")):
        config = json.loads((ROOT / case / "adapter_config.json").read_text())
        parsed = parse_config({name: value for name, value in config.items() if name != "peft_version"})
        release = truth(case)["peft"]
        found.add(release)
        assert (parsed.has_peft_0_17_fields and not parsed.newer_fields) == release.startswith("0.17."), case
    assert len(found) > 4


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_the_truth_or_nothing(case):
    found, said = inspected(case), truth(case)
    assert found.form == said["kind"]
    assert found.model_type == model_type(case)
    if found.writer.decided and case.startswith("peft/"):
        assert found.writer.value.startswith("PEFT 0.17" if said["peft"].startswith("0.17") else f"PEFT {said['peft']}")
    if said["kind"] != "fused":
        assert found.orientation.value == found.packing.value == found.nesting.value == "not applicable"
        return
    expected = {"orientation": said["orientation"], "nesting": ",".join(said["nesting"])}
    for name, value in expected.items():
        conclusion = getattr(found, name)
        assert conclusion.value in (value, None), (name, conclusion)
        assert conclusion.decided or conclusion.remedy.startswith("--"), conclusion
    packing = found.packing
    if case in WITHOUT_A_TRACE:
        assert packing.confidence == "stated"
    elif said["packing"] == "mixed":
        assert packing.value == "grouped | rank_major"
    else:
        assert packing.value in (said["packing"], "either", None), packing
    assert found.undecided == tuple(n for n in ("orientation", "packing", "nesting") if not getattr(found, n).decided)
    if not found.undecided:
        seen = [f"{module.path}.{projection.name}" for module in found.modules for projection in module.projections]
        assert sorted(seen) == sorted(said["parameters"])
        for module in found.modules:
            assert module.num_experts == said["E"]
            for projection in module.projections:
                entry = said["parameters"][f"{module.path}.{projection.name}"]
                sizes = {projection.in_features, projection.out_features}
                assert sizes == set(entry["stored_shape"][1:])
                assert (projection.rank, projection.scaling) == (entry["rank"], pytest.approx(entry["scaling"]))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(THOROUGH)])
def test_reads_is_said_exactly_where_a_conversion_changes_nothing(case, tmp_path):
    source, model = ROOT / case, ROOT / case / "base_config.json"
    how = flags(inspected(case), case)
    found = inspected(case, **how)
    for shown, to in targets_of_verdicts(found.readers).items():
        same = unchanged(source, tmp_path / shown, to, model, how)
        assert (found.readers[shown].verdict == "reads") is same, (shown, found.readers[shown])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("peft/")])
def test_what_is_left_open_is_open_for_a_reason(case):
    """Only square matrices, whose shapes say nothing, may leave the orientation or the nesting open."""
    found, said = inspected(case), truth(case)
    square = [entry for entry in said["parameters"].values() if len(set(entry.get("stored_shape", [0, 0, 1])[1:])) == 1]
    if "orientation" in found.undecided:
        shapes = {tuple(entry["stored_shape"][1:]) for entry in said["parameters"].values()}
        assert square or {shape[::-1] for shape in shapes} == shapes
        by_release = f"--written-by peft=={said['peft']}"
        assert found.orientation.remedy.startswith(by_release)
        assert (
            "_tf_patched" in case
            or inspected(
                case, written_by=f"peft=={said['peft']},transformers=={said['transformers']}"
            ).orientation.value
            == said["orientation"]
        )
    if "nesting" in found.undecided and "orientation" not in found.undecided:
        assert square
        assert found.nesting.remedy.startswith("--nesting ")
    assert "packing" not in found.undecided
    settled = inspected(case, **flags(found, case))
    assert settled.undecided == ()


@pytest.mark.parametrize("case", [case for case in CASES if "square" in case or "patched" in case])
def test_saying_only_the_truth_never_makes_it_wrong(case):
    """Without the model's config, less is known, and nothing wrong is said either."""
    said = truth(case)
    found = inspect_adapter(ROOT / case)
    assert found.orientation.value in (said["orientation"], None)
    assert found.nesting.value in (",".join(said["nesting"]), None)


def targets_of(case: str) -> list[str]:
    peft = [f"peft=={p},transformers=={t}" for p, t in PEFT_TARGETS if stored_as_fused(case, t)]
    every = [*peft, *READERS]
    if case.startswith(THOROUGH):
        return every
    turn = CASES.index(case)
    return [every[turn % len(every)]]


def stored_as_fused(case: str, transformers: str) -> bool:
    said = stored(model_type(case), transformers)
    return said is not None and said["kind"] == "fused"


def reader_family(case: str, to: str) -> tuple[Family, dict[str, Any]]:
    """How the reader takes it: arguments for `read_adapter`."""
    whose = family(case)
    if to.startswith("peft"):
        peft, transformers = (part.partition("==")[2] for part in to.split(","))
        said = stored(model_type(case), transformers)
        return whose, {"orientation": orientation_in(said, peft), "said": said}
    if to == "vllm" and model_type(case) in ("gpt_oss", "qwen3_vl_moe"):
        return whose, {"orientation": "linear", "said": stored(model_type(case), "5.23.0")}
    return whose, {"alpha_only": to == "llama.cpp"}


def read_output(folder: Path, case: str, to: str) -> Contents:
    whose, how = reader_family(case, to)
    said = how.pop("said", None)
    if said is not None:
        how["nesting"] = nesting_in(folder, said, whose)
    contents = read_adapter(folder, whose, truth(case)["E"], **how)
    if to == "sglang" and not whose.gated:  # it calls the up projection of experts without a gate gate_proj
        contents.experts = {(i, {"gate": "up"}.get(role, role)): u for (i, role), u in contents.experts.items()}
    return contents


def nesting_in(folder: Path, said: dict[str, Any], whose: Family) -> list[str]:
    """The parameters that PEFT wraps, in the order in which the module has them, innermost first."""
    if any(name.endswith("weight") for name in said["parameters"]):
        return ["weight"]
    wrapped = {target.rpartition(".")[2] for target in read_config(folder)["target_parameters"]}
    return [name for name in whose.parameters if name in wrapped]


REFUSED = {
    # jetmoe's modules have no per-expert names in any release.
    ("jetmoe", "per-expert"): "No per-expert name",
    ("jetmoe", "vllm"): "No per-expert name",
    ("jetmoe", "sglang"): "No per-expert name",
    ("jetmoe", "llama.cpp"): "No per-expert name",
}


@pytest.mark.parametrize(("case", "to"), [(case, to) for case in CASES for to in targets_of(case)])
def test_a_conversion_keeps_every_update(case, to, tmp_path):
    source, model, out = ROOT / case, ROOT / case / "base_config.json", tmp_path / "out"
    how = flags(inspected(case), case)
    before = {file: file.read_bytes() for file in source.iterdir()}

    def convert(**more: Any) -> Any:
        return convert_adapter(source, out, to=to, model=model, **how, **more)

    if (refusal := REFUSED.get((model_type(case), to))) is not None:
        with pytest.raises(AdapterError, match=refusal):
            convert(allow_lossy=True)
        assert not out.exists()
        return
    lossy = "modules_to_save" in case and to in ("vllm", "sglang", "llama.cpp")
    if lossy:
        with pytest.raises(LossyConversionError, match="--allow-lossy"):
            convert()
        assert not out.exists()
    done = convert(allow_lossy=lossy)
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    assert (done.exactness == "lossy") is lossy
    found = read_output(out, case, to)
    assert_updates(found.experts, true_updates(case), tolerance(case))
    if to.startswith("peft") and truth(case)["kind"] == "fused":
        assert done.exactness == "bits"
        assert set(found.experts) == set(true_updates(case))
    original = load(source)
    rest = {name: tensor for name, tensor in original.items() if ".lora_" not in name}
    assert_identical(found.rest, {} if lossy else rest)
    if to not in ("sglang", "llama.cpp"):
        linears = {PREFIX + n.removeprefix(PREFIX): t for n, t in original.items() if ".self_attn." in n}
        assert_identical({n: t for n, t in load(out).items() if ".self_attn." in n}, linears)
    check_config(out, to)
    if to in ("sglang", "llama.cpp") or not lossy:
        rows = verify_adapters(source, out, model=model, **how).rows
        assert rows
        assert all(row.relative_difference <= 1e-6 for row in rows if ".lora_" in row.name or row.projection), rows


RENAMED = ("granitemoe", "aria", "jetmoe")
UNTRAINABLE = ("peft/peft0180-tf500/gpt_oss_tf_patched",)
OF_PEFT = [case for case in CASES if case.startswith("peft/") and truth(case)["kind"] == "fused"]


@pytest.mark.parametrize("case", [c for c in OF_PEFT if c not in UNTRAINABLE and not model_type(c).startswith(RENAMED)])
def test_without_the_models_config_a_conversion_is_right_or_refused(case, tmp_path):
    """What stores experts one way may store them the other way beside the release that shall read them.

    Left out: families that transformers renamed, whose new names the config alone gives away; and what PEFT 0.18 makes
    in processes that transformers 5.0 has patched, whose forward fails, so that nobody trains it.
    """
    said = truth(case)
    how = {} if said["packing"] == "mixed" else {name: said[name] for name in ("orientation", "packing", "nesting")}
    for to in [
        f"peft=={peft},transformers=={beside}" for peft, beside in PEFT_TARGETS if stored_as_fused(case, beside)
    ]:
        out = tmp_path / to
        try:
            convert_adapter(ROOT / case, out, to=to, **how)
        except AdapterError:
            assert not out.exists()
        else:
            assert_updates(read_output(out, case, to).experts, true_updates(case), tolerance(case))


def check_config(out: Path, to: str) -> None:
    config = read_config(out)
    with safetensors.safe_open(out / "adapter_model.safetensors", "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    fused = any(".lora_A" in name for name in names) and (STAMP_KEY in metadata)
    assert metadata["format"] == "pt"
    if to.startswith("peft"):
        assert fused
        assert config["target_parameters"]
        assert config["peft_version"] == to.split(",")[0].partition("==")[2]
    elif not fused:
        assert not config["target_parameters"]
        linears = {n.split(".lora_")[0].rpartition(".")[2] for n in names if ".lora_" in n}
        reached = {target.rpartition(".")[2] for target in config["target_modules"]}
        assert linears <= reached
    if to in ("sglang", "llama.cpp"):
        assert config["alpha_pattern"] == {}
        assert config["rank_pattern"] == {} or to == "llama.cpp"
        assert config["use_rslora"] is False


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("peft/peft0190-tf554/") or "tf_patched" in c])
def test_a_conversion_refuses_what_inspect_leaves_open(case, tmp_path):
    found = inspected(case)
    model = ROOT / case / "base_config.json"
    if not found.undecided:
        convert_adapter(ROOT / case, tmp_path / "out", to="peft==0.18.1,transformers==5.5.4", model=model)
        return
    with pytest.raises(AmbiguousAdapterError) as caught:
        convert_adapter(ROOT / case, tmp_path / "out", to="peft==0.18.1,transformers==5.5.4", model=model)
    for name in found.undecided:
        assert getattr(found, name).remedy in str(caught.value)
    assert list(tmp_path.iterdir()) == []
