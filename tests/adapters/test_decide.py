"""What is concluded from contradictory, missing or ambiguous evidence: no guess, but the flag that settles it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.adapter_files import GPT_OSS, NEMOTRON, QWEN, Family, Spec, load, read_config, save, save_fused

from peft_moe_compat.adapters.conclusions import Settle
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.stamp import STAMP_KEY, ModuleStamp, Stamp
from peft_moe_compat.errors import AdapterError, AdapterFileError, AmbiguousAdapterError, UnsupportedPeftError

SQUARE = Spec(I=8)
TO = "peft==0.21.2,transformers==5.23.0"


def square_down(folder, family=QWEN, orientation="linear", **config):
    spec = Spec(family=family, I=8)
    return save_fused(folder / "in", spec, spec.factors(("down",)), orientation=orientation, **config), spec.model()


def test_a_square_file_without_a_writer_is_refused_and_each_flag_settles_it(tmp_path):
    source, model = square_down(tmp_path)
    found = inspect_adapter(source, model=model, packing="rank_major")
    release = Settle("written_by", "peft==VERSION")
    assert found.orientation.settle == (release,)
    without_model = inspect_adapter(source, packing="rank_major").orientation
    assert without_model.settle == (Settle("model", "BASE"), replace(release, when="both"))
    with pytest.raises(AmbiguousAdapterError, match="--written-by peft==VERSION.* And its packing .*--packing"):
        convert_adapter(source, tmp_path / "out", to=TO, model=model)
    for release, value in (("0.18.1", "reversed"), ("0.21.2", "linear")):
        said = inspect_adapter(source, model=model, written_by=f"peft=={release}")
        assert (said.orientation.value, said.packing.value) == (value, "rank_major")
    for value in ("linear", "reversed"):
        assert inspect_adapter(source, model=model, orientation=value).orientation.value == value


@pytest.mark.parametrize(
    ("peft", "value"),
    [("0.18.0", "reversed"), ("0.19.1", "linear"), ("0.19.0.dev0@abc", "reversed"), ("0.21.2", "linear")],
)
def test_the_version_in_the_file_speaks_for_a_square_one(tmp_path, peft, value):
    source, model = square_down(tmp_path, peft_version=peft)
    found = inspect_adapter(source, model=model).orientation
    if peft.startswith("0.19.0"):
        # load_adapter() of transformers 5.0 to 5.12 turns what this release writes.
        assert found.value is None
        assert [settle.argument for settle in found.settle] == ["written_by", "orientation"]
        return
    assert (found.value, found.confidence) == (value, "stated")


@pytest.mark.parametrize("newer", ["kasa_config", "use_bdlora", "alora_invocation_tokens", None])
def test_fields_newer_than_0_17_speak_against_it(tmp_path, newer):
    old = ("target_parameters", "trainable_token_indices", "use_qalora", "corda_config", "auto_mapping")
    fields = {**dict.fromkeys(old), "target_parameters": ["mlp.experts.down_proj"]} | ({newer: None} if newer else {})
    source, model = square_down(tmp_path, **fields)
    found = inspect_adapter(source, model=model, packing="rank_major")
    assert (found.writer.value, found.orientation.value) == ((None, None) if newer else ("PEFT 0.17", "reversed"))
    if newer:
        assert found.writer.why.endswith(f"fields that PEFT 0.17 does not know: {newer}")
        with pytest.raises(AmbiguousAdapterError, match="--written-by peft==VERSION"):
            convert_adapter(source, tmp_path / "out", to=TO, model=model, packing="rank_major")


LLAMA4 = Family("llama4_text", "num_local_experts", "intermediate_size")
FOR_VLLM = {"target_modules": ["experts", "q_proj"], "target_parameters": None}


@pytest.mark.parametrize("family", [QWEN, GPT_OSS, LLAMA4])  # what PEFT writes for the last is reversed
def test_a_config_for_vllm_says_how_it_packs_and_turns(tmp_path, family):
    """SkyRL's and prime-rl's: no version, `experts` among the modules, and no parameters."""
    source, model = square_down(tmp_path, family, **FOR_VLLM)
    found = inspect_adapter(source, model=model)
    assert (found.orientation.value, found.packing.value, found.undecided) == ("linear", "rank_major", ())


@pytest.mark.parametrize(("family", "role"), [(QWEN, "gate_up"), (NEMOTRON, "up"), (NEMOTRON, "down")])
def test_one_pair_of_a_config_for_vllm_is_that_of_no_parameter_until_somebody_says(tmp_path, family, role):
    """Nothing but sizes names it: all three look alike without a model, up and down in square experts."""
    spec = Spec(family=family, I=8)
    source = save_fused(tmp_path / "in", spec, spec.factors((role,)), **FOR_VLLM)
    with pytest.raises(AmbiguousAdapterError, match=r"gate_up_proj, up_proj.*--model BASE"):
        convert_adapter(source, tmp_path / "out", to="per-expert")
    model, name = spec.model(), f"{role}_proj"
    if family is NEMOTRON:
        assert inspect_adapter(source, model=model).nesting.settle == (Settle("nesting", "up_proj"),)
        assert inspect_adapter(source, model=model, nesting=[name]).nesting.value == name
    else:
        assert inspect_adapter(source, model=model).nesting.value == name


def test_without_a_model_a_config_for_vllm_is_not_converted_to_what_depends_on_it(tmp_path):
    """llama4's would be reversed there, all others' linear."""
    spec = Spec(I=6)
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), **FOR_VLLM)
    with pytest.raises(AmbiguousAdapterError, match="--model"):
        convert_adapter(source, tmp_path / "out", to=TO)


@pytest.mark.parametrize("role", ["gate_up", "down"])
def test_one_matrix_where_the_model_has_experts_is_not_an_ordinary_linear(tmp_path, role):
    """Of 4 experts of rank 2, once the rank says 8."""
    spec = Spec(E=4, r=2)
    source = save_fused(tmp_path / "in", spec, spec.factors((role,)), peft_version="0.21.2", r=8)
    with pytest.raises(AdapterFileError, match="LoRA of one expert; .* has more"):
        inspect_adapter(source, model=spec.model())
    one = {**spec.model(), "num_experts": 1}
    assert inspect_adapter(source, model=one).form == "none"


@pytest.mark.parametrize("own", [{"peft_version": "0.18.1"}, {"auto_mapping": {"unsloth_fixed": True}}])
def test_a_config_of_pefts_rewritten_for_vllm_says_nothing(tmp_path, own):
    """ART takes target_parameters out and exchanges the factors: neither orientation nor packing are PEFT's."""
    source, model = square_down(tmp_path, **FOR_VLLM, **own)
    found = inspect_adapter(source, model=model)
    assert {"orientation", "packing"} <= set(found.undecided)
    assert "rewritten" in found.writer.why
    assert inspect_adapter(source, model=model, written_by="peft==0.21.2").undecided == ()


def test_what_the_caller_says_wins_over_the_version_in_the_file(tmp_path):
    source, model = square_down(tmp_path, peft_version="0.21.2")
    assert inspect_adapter(source, model=model, written_by="peft==0.18.1").orientation.value == "reversed"


def test_naming_the_release_settles_a_square_file_of_unsloth_too(tmp_path):
    source, model = square_down(tmp_path, peft_version="0.19.0", lora_B_layout="grouped_by_expert")
    assert inspect_adapter(source, model=model).orientation.value is None
    found = inspect_adapter(source, model=model, written_by="peft==0.19.0")
    assert (found.orientation.value, found.packing.value) == ("reversed", "grouped")


def test_the_flag_for_gpt_oss_names_transformers_and_what_it_cannot_know(tmp_path):
    source, model = square_down(tmp_path, GPT_OSS, peft_version="0.21.2")
    release, orientation = inspect_adapter(source, model=model).orientation.settle
    assert release == Settle("written_by", "peft==0.21.2,transformers==VERSION")
    assert orientation.argument == "orientation"
    for beside, value in (("4.57.6", "reversed"), ("5.23.0", "linear")):
        found = inspect_adapter(source, model=model, written_by=f"peft==0.21.2,transformers=={beside}")
        assert found.orientation.value == value


@pytest.mark.parametrize("orientation", ["linear", "reversed"])
def test_the_hidden_size_of_attention_orients_where_there_is_only_one(tmp_path, orientation):
    spec = Spec(attention=True)
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up",)), orientation=orientation)
    tensors, config = load(source), read_config(source)
    attention = "base_model.model.{}.0.self_attn.q_proj.lora_A.weight"
    found = {
        name: inspect_adapter(save(tmp_path / name, tensors | more, config)).orientation
        for name, more in {
            "one": {},
            "one and a tower's": {attention.format("visual.blocks"): torch.ones(2, 20)},
            "two": {attention.format("model.layers"): torch.ones(2, 2 * spec.I)},
        }.items()
    }
    assert {name: conclusion.value for name, conclusion in found.items()} == {
        "one": orientation,
        "one and a tower's": orientation,
        "two": None,
    }
    assert found["one"].confidence == "likely"


def test_a_square_pair_without_a_gate_needs_the_nesting(tmp_path):
    spec = Spec(family=NEMOTRON, I=8)
    source = save_fused(tmp_path / "in", spec, spec.factors(("up", "down")), peft_version="0.21.2")
    found = inspect_adapter(source, model=spec.model())
    assert found.undecided == ("nesting",)
    assert found.nesting.settle == (Settle("nesting", "up_proj,down_proj"),)
    for nesting in (["up_proj", "down_proj"], ["down_proj", "up_proj"]):
        assert inspect_adapter(source, model=spec.model(), nesting=nesting).nesting.value == ",".join(nesting)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"orientation": "reversed"}, "fit linear alone"),
        ({"orientation": "sideways"}, "one of linear, reversed"),
        ({"packing": "loose"}, "one of rank_major, grouped"),
        ({"nesting": ["up_proj", "down_proj"]}, "was expected for"),
    ],
)
def test_impossible_answers_are_refused(tmp_path, said, message):
    spec = Spec()
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    with pytest.raises(AdapterError, match=message):
        inspect_adapter(source, model=spec.model(), **said)


def test_a_release_without_expert_lora_is_no_writer(tmp_path):
    source, model = square_down(tmp_path)
    with pytest.raises(UnsupportedPeftError):
        inspect_adapter(source, model=model, written_by="peft==0.16.0")


@pytest.mark.parametrize("change", [{"E": 2}, {"H": 10}, {"I": 5}])
def test_another_model_is_refused(tmp_path, change):
    spec = Spec()
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    with pytest.raises(AdapterFileError, match="another num_experts or rank, or for another model"):
        inspect_adapter(source, model=Spec(**change).model())


def test_layers_that_disagree_are_refused(tmp_path):
    spec = Spec()
    factors = spec.factors(("gate_up", "down"))
    one = save_fused(tmp_path / "one", spec, {k: f for k, f in factors.items() if k[0] == 0})
    two = save_fused(tmp_path / "two", spec, {k: f for k, f in factors.items() if k[0] == 1}, orientation="reversed")
    both = save(tmp_path / "in", load(one) | load(two), read_config(one))
    with pytest.raises(AdapterFileError, match="layers of .* disagree"):
        inspect_adapter(both, model=spec.model())


def test_contradictory_markers_are_refused(tmp_path):
    spec = Spec()
    source = save_fused(
        tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2",
        lora_B_layout="rank_major", auto_mapping={"lora_B_layout": "grouped_by_expert"},
    )  # fmt: skip
    with pytest.raises(AdapterFileError, match="contradict each other"):
        inspect_adapter(source)


def stamped(tmp_path):
    source, model = square_down(tmp_path, orientation="reversed", peft_version="0.18.1")
    out = tmp_path / "out"
    convert_adapter(source, out, to=TO, model=model)
    return out, model, source


def test_a_stamp_settles_a_square_file_without_the_model(tmp_path):
    out, _, source = stamped(tmp_path)
    found = inspect_adapter(out)
    assert (found.undecided, found.orientation.value, found.orientation.confidence) == ((), "linear", "certain")
    assert inspect_adapter(source).orientation.value is None


@pytest.mark.parametrize("change", ["sizes", "path", "orientation", "text"])
def test_a_stamp_that_does_not_describe_the_file_is_refused(tmp_path, change):
    out, model, _ = stamped(tmp_path)
    raw = (out / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stamp = json.loads(header["__metadata__"][STAMP_KEY])
    (path, entry), *_ = stamp["modules"].items()
    if change == "sizes":
        entry["features"][0][0] += 1
    elif change == "path":
        stamp["modules"]["elsewhere.experts"] = stamp["modules"].pop(path)
    elif change == "orientation":
        entry["orientation"] = "sideways"
    text = "{" if change == "text" else json.dumps(stamp)
    edited = save(tmp_path / "edited", load(out), read_config(out), {STAMP_KEY: text})
    with pytest.raises(AdapterFileError, match="stamp|metadata entry"):
        inspect_adapter(edited, model=model)


@pytest.mark.parametrize("count", [4, 5, 6])
def test_a_stamp_counts_the_experts_of_one_of_the_parameters(tmp_path, count):
    """longcat_flash has rows for its zero experts in gate_up_proj alone."""
    spec, more = Spec(layers=(0,)), Spec(E=6, layers=(0,))
    factors = {**more.factors(("gate_up",)), **spec.factors(("down",))}
    path, features = QWEN.fused.format(0), ((8, 12), (6, 8))
    stamp = Stamp("0.21.2", "5.24.0", "rank_major", {path: ModuleStamp(count, QWEN.parameters, "linear", features)})
    plain = save_fused(tmp_path / "plain", spec, factors)
    source = save(tmp_path / "in", load(plain), read_config(plain), stamp.to_metadata())
    if count == 5:
        with pytest.raises(AdapterFileError, match="says 5 experts"):
            inspect_adapter(source)
    else:
        assert inspect_adapter(source).orientation.confidence == "certain"


def test_a_target_that_depends_on_what_is_not_known_is_refused(tmp_path):
    source, model = square_down(tmp_path, GPT_OSS, peft_version="0.21.2")
    with pytest.raises(AmbiguousAdapterError, match=r"--to peft==0\.21\.2,transformers==VERSION"):
        convert_adapter(source, tmp_path / "out", to="peft==0.21.2", model=model, orientation="linear")


def test_square_factors_of_both_readings_differ(tmp_path):
    """The two readings of a square file are different adapters: what is refused here would have been wrong."""
    source, model = square_down(tmp_path, peft_version="0.21.2")
    outs = []
    for value in ("linear", "reversed"):
        convert_adapter(source, tmp_path / value, to="per-expert", model=model, orientation=value)
        outs.append(load(tmp_path / value))
    assert outs[0].keys() == outs[1].keys()
    assert not all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])
