"""Any form -> any form -> back, on adapters whose factors are known."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.adapter_files import (
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    PREFIX,
    QWEN,
    Family,
    Spec,
    assert_identical,
    assert_updates,
    load,
    lora_config,
    pattern_value,
    read_adapter,
    read_config,
    save,
    save_fused,
    save_per_expert,
    save_stacked,
)

from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.merge import merge_adapter
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.errors import AdapterError, AdapterFileError, LossyConversionError

FIXTURES = Path(__file__).parent.parent / "fixtures"

NEW, OLD = "peft==0.21.2,transformers==5.23.0", "peft==0.18.1,transformers==5.0.0"
TARGETS = (NEW, OLD, "peft==0.19.0,transformers==5.5.4", "per-expert", "vllm", "llama.cpp")

specs = st.builds(
    Spec,
    family=st.sampled_from(FAMILIES),
    E=st.integers(2, 4),
    H=st.sampled_from([4, 6, 8]),
    I=st.sampled_from([3, 4, 6, 8]),
    r=st.integers(1, 3),
    alpha=st.sampled_from([1, 3, 16]),
    layers=st.sampled_from([(0,), (0, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rslora=st.booleans(),
    attention=st.booleans(),
    ranks=st.sampled_from([{}, {"down": 5}]),
    alphas=st.sampled_from([{}, {"down": 5}]),
    seed=st.integers(0, 99),
)


@settings(max_examples=60, deadline=None)
@given(
    spec=specs,
    orientation=st.sampled_from(["linear", "reversed"]),
    packing=st.sampled_from(["rank_major", "grouped"]),
    swapped=st.booleans(),
    through=st.sampled_from(TARGETS[:4]),
)
def test_fused_through_another_form_and_back_is_bit_identical(spec, orientation, packing, swapped, through):
    factors = spec.factors(spec.fused_roles())
    nesting = spec.family.parameters[::-1] if swapped else spec.family.parameters
    said = {"orientation": orientation, "packing": packing, "nesting": list(nesting), "model": spec.model()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_fused(folder / "in", spec, factors, orientation=orientation, packing=packing, nesting=nesting)
        done = convert_adapter(source, folder / "mid", to=through, **said)
        assert done.exactness == "bits"
        assert verify_adapters(source, folder / "mid", **said).worst <= 1e-12
        convert_adapter(folder / "mid", folder / "back", to=NEW, model=spec.model())
        back = read_adapter(folder / "back", spec.family, spec.E, orientation="linear", nesting=spec.family.parameters)
        direct = save_fused(folder / "direct", spec, factors, orientation="linear")
        assert_identical(load(folder / "back"), load(direct))
        assert_updates(back.experts, spec.updates(factors), 1e-12)


@settings(max_examples=40, deadline=None)
@given(spec=specs, through=st.sampled_from(TARGETS[:4]))
def test_per_expert_joined_and_parted_again_is_bit_identical(spec, through):
    factors = spec.factors(spec.linear_roles())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_per_expert(folder / "in", spec, factors)
        done = convert_adapter(source, folder / "mid", to=through, model=spec.model())
        assert done.exactness == "bits"
        convert_adapter(folder / "mid", folder / "back", to="per-expert", model=spec.model())
        assert_identical(load(folder / "back"), load(source))
        back = read_adapter(folder / "back", spec.family, spec.E)
        assert_updates(back.experts, spec.updates(factors), 1e-12)


@settings(max_examples=30, deadline=None)
@given(spec=specs, to=st.sampled_from(["per-expert", "llama.cpp", "sglang"]))
def test_stacked_to_apart_keeps_the_updates(spec, to):
    factors = spec.factors(spec.fused_roles())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_stacked(folder / "in", spec, factors)
        convert_adapter(source, folder / "out", to=to, model=spec.model())
        found = read_adapter(folder / "out", spec.family, spec.E, alpha_only=to == "llama.cpp").experts
        if to == "sglang" and not spec.family.gated:
            found = {(i, {"gate": "up"}.get(role, role)): update for (i, role), update in found.items()}
        assert_updates(found, spec.updates(factors), 1e-6)
        config = read_config(folder / "out")
        if to == "sglang":
            assert config["rank_pattern"] == {} == config["alpha_pattern"]


@pytest.mark.parametrize("family", [QWEN, GPT_OSS])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("more", [{}, {"ranks": {"up": 3}}, {"alphas": {"up": 7}}])
def test_gate_and_up_joined(tmp_path, family, rslora, same, more):
    spec = Spec(family=family, rslora=rslora, **more)
    factors = spec.factors(("gate", "up", "down"))
    same = same and not spec.ranks
    if same:
        for layer in spec.layers:
            factors[layer, "up"] = factors[layer, "gate"][0], factors[layer, "up"][1]
    source = save_per_expert(tmp_path / "in", spec, factors)
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", family, 4, orientation="linear", nesting=family.parameters)
    assert_updates(found.experts, spec.updates(factors))
    shared = same and not more
    assert found.factors[0, "gate_up"][0].shape[1] == (2 if shared else spec.rank("gate") + spec.rank("up"))
    if shared:
        assert torch.equal(found.factors[0, "gate_up"][0], factors[0, "gate"][0])


@pytest.mark.parametrize("low", ["gate", "up"])
@pytest.mark.parametrize("same", [True, False])
def test_gate_and_up_of_two_precisions_are_joined_in_the_higher(tmp_path, low, same):
    spec = Spec()
    factors = spec.factors(("gate", "up"))
    for layer in spec.layers:
        A, B = factors[layer, low]
        A = factors[layer, "up" if low == "gate" else "gate"][0] if same else A.bfloat16()
        factors[layer, low] = A, B.bfloat16()
    source = save_per_expert(tmp_path / "in", spec, factors)
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=("gate_up_proj",))
    assert_updates(found.experts, spec.updates(factors))
    assert found.factors[0, "gate_up"][0].shape[1] == (2 if same else 4)


@pytest.mark.parametrize("through", [None, NEW])
def test_gate_and_up_of_gpt_oss_share_a_lora_a_in_sglang(tmp_path, through):
    """Where theirs differ, its kernel mixes them up."""
    spec = Spec(GPT_OSS)
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors)
    if through:
        source = convert_adapter(source, tmp_path / "through", to=through, model=spec.model()).out
    convert_adapter(source, tmp_path / "out", to="sglang", model=spec.model())
    tensors = load(tmp_path / "out")
    gates = [name for name in tensors if "gate_proj.lora_A" in name]
    assert gates
    assert all(torch.equal(tensors[name], tensors[name.replace("gate_proj", "up_proj")]) for name in gates)
    assert_updates(read_adapter(tmp_path / "out", GPT_OSS, 4).experts, spec.updates(factors))


def test_llama_cpps_names_are_for_llama_cpp_alone(tmp_path):
    spec = Spec()
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")))
    once = convert_adapter(source, tmp_path / "once", to="llama.cpp", model=spec.model()).out
    twice = convert_adapter(once, tmp_path / "twice", to="llama.cpp", model=spec.model()).out
    assert_identical(load(twice), load(once))
    for to in (NEW, "per-expert", "vllm", "sglang"):
        with pytest.raises(AdapterError, match="under llama.cpp's names"):
            convert_adapter(once, tmp_path / "out", to=to, model=spec.model())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(spec.model()))
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(AdapterError, match="under llama.cpp's names"):
        merge_adapter(tmp_path / "base", once, tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "known"),
    [
        ("peft==0.22.0,transformers==5.23.0", "PEFT 0.21.2 beside transformers 5.24.0"),
        ("peft==0.21.2,transformers==6.0", "PEFT 0.21.2 beside transformers 5.24.0"),
        ("vllm==0.99", "vLLM 0.33"),
    ],
)
def test_nothing_is_promised_of_releases_that_nobody_knows(tmp_path, to, known):
    spec = Spec()
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    done = convert_adapter(source, tmp_path / "out", to=to, model=spec.model())
    assert done.proof.by == "none"
    assert f"nothing is known of {to}, and what was written is for {known}" in str(done.proof)
    if to.startswith("peft"):
        found = inspect_adapter(done.out, model=spec.model()).writer
        assert found.confidence == "stated"
        assert found.why.endswith("nothing is known of releases after PEFT 0.21.2 and transformers 5.24.0")


def test_what_is_written_for_llama_cpp_is_read_again(tmp_path):
    """Where hidden and intermediate size are the same, the ranks alone tell "E r in" from "E in r"."""
    spec = Spec(H=8, I=8, ranks={"down": 4}, attention=True)
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    done = convert_adapter(source, tmp_path / "out", to="llama.cpp", model=spec.model())
    assert verify_adapters(source, done.out, model=spec.model()).same


@pytest.mark.parametrize("role", ["gate", "up"])
def test_a_missing_branch_stays_zero(tmp_path, role):
    spec = Spec()
    factors = spec.factors((role, "down"))
    source = save_per_expert(tmp_path / "in", spec, factors)
    convert_adapter(source, tmp_path / "out", to=OLD, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="reversed", nesting=QWEN.parameters)
    assert_updates(found.experts, spec.updates(factors))


def test_missing_experts_are_an_error_or_zeros_on_request(tmp_path):
    spec = Spec()
    factors = spec.factors(("gate", "up", "down"))
    skip = [(3, role) for role in ("gate", "up", "down")]
    source = save_per_expert(tmp_path / "in", spec, factors, skip=skip)
    with pytest.raises(AdapterError, match=r"3 of 4 experts .* --fill-missing"):
        convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    assert not (tmp_path / "out").exists()
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model(), fill_missing=True)
    expected = spec.updates(factors)
    for update in expected.values():
        update[3] = 0
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, expected)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize("family", [QWEN, GPT_OSS])
@pytest.mark.parametrize("index", [0, 1])
def test_readers_that_want_every_projection_get_zeros(tmp_path, to, family, index):
    spec = Spec(family=family, I=8)
    factors = spec.factors(spec.fused_roles()[index : index + 1])
    source = save_fused(tmp_path / "in", spec, factors, packing="rank_major")
    convert_adapter(source, tmp_path / "out", to=to, model=spec.model(), orientation="linear", packing="rank_major")
    found = read_adapter(tmp_path / "out", family, 4, orientation="linear", nesting=family.parameters).experts
    assert {role for _, role in found} == {"gate", "up", "down"}
    assert_updates(found, spec.updates(factors))


@pytest.mark.parametrize("rslora", [False, True])
def test_sglang_gets_one_rank_and_one_alpha(tmp_path, rslora):
    spec = Spec(rslora=rslora, ranks={"down": 4}, alphas={"down": 5}, attention=True)
    factors = spec.factors(("gate_up", "down"))
    source = save_fused(tmp_path / "in", spec, factors)
    how = {"model": spec.model(), "packing": "rank_major"}
    done = convert_adapter(source, tmp_path / "out", to="sglang", **how)
    assert done.exactness == "round-off"
    assert {step.kind for step in done.steps} == {"folded", "padded"}
    assert done.to_dict()["steps"] == [str(step) for step in done.steps]
    assert "6 of 8 LoRA padded with zeros to 4" in " ".join(done.to_dict()["steps"])
    config, tensors = read_config(tmp_path / "out"), load(tmp_path / "out")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {config["r"]} == {4}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    found = read_adapter(tmp_path / "out", QWEN, 4)
    assert_updates(found.experts, spec.updates(factors))
    before = read_adapter(source, QWEN, 4, orientation="linear", nesting=QWEN.parameters).linears
    for path, update in before.items():
        torch.testing.assert_close(found.linears[path], update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("to", ["vllm", "sglang", "llama.cpp", "per-expert", NEW])
def test_dora_and_modules_to_save(tmp_path, to):
    spec = Spec(attention=True)
    factors = spec.factors(("gate_up", "down"))
    saved = {"base_model.model.lm_head.weight": torch.randn(16, 8)}
    magnitude = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": torch.ones(8) for i in (0, 1)
    }
    how = {"to": to, "model": spec.model(), "packing": "rank_major"}
    dora = save_fused(tmp_path / "dora", spec, factors, extra=magnitude, use_dora=True)
    whole = save_fused(tmp_path / "whole", spec, factors, extra=saved, modules_to_save=["lm_head"])
    if to in ("per-expert", NEW):
        for source, extra in ((whole, saved), (dora, magnitude)):
            if to == NEW and source == dora:
                with pytest.raises(AdapterError, match="use_dora, which PEFT takes on no parameter"):
                    convert_adapter(source, tmp_path / "out", **how)
                break
            convert_adapter(source, tmp_path / f"{source.name}-out", **how)
            out = load(tmp_path / f"{source.name}-out")
            assert_identical({name: out[name] for name in extra}, extra)
        return
    with pytest.raises(AdapterError, match="does not read DoRA"):
        convert_adapter(dora, tmp_path / "out", **how, allow_lossy=True)
    with pytest.raises(LossyConversionError, match="lm_head.*--allow-lossy"):
        convert_adapter(whole, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    assert convert_adapter(whole, tmp_path / "out", **how, allow_lossy=True).exactness == "lossy"
    assert not any("lm_head" in name for name in load(tmp_path / "out"))
    assert read_config(tmp_path / "out")["modules_to_save"] is None


@pytest.mark.parametrize("to", [NEW, "per-expert", "sglang", "llama.cpp"])
@pytest.mark.parametrize("alphas", [{"gate": 0}, {"up": 0}, {"gate": 0, "up": 0}, {"gate": 0, "up": 0, "down": 0}])
def test_an_alpha_of_zero_changes_nothing_and_breaks_nothing(tmp_path, to, alphas):
    spec = Spec(alphas=alphas)
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors)
    convert_adapter(source, tmp_path / "out", to=to, model=spec.model())
    how = {"orientation": "linear", "nesting": QWEN.parameters} if to == NEW else {"alpha_only": to == "llama.cpp"}
    assert_updates(read_adapter(tmp_path / "out", QWEN, 4, **how).experts, spec.updates(factors))


def test_experts_that_were_renamed_are_known_by_their_path_where_the_model_is_not(tmp_path):
    old = FIXTURES / "peft/peft0200-tf5121/granitemoe"
    convert_adapter(old, tmp_path / "new", to="peft==0.21.2,transformers==5.23.0", orientation="linear")
    targets = read_config(tmp_path / "new")["target_parameters"]
    assert {".".join(target.split(".")[-3:]) for target in targets} == {
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
    }


@pytest.mark.parametrize("case", ["granitemoe", "aria"])
def test_experts_that_were_renamed_get_the_names_of_the_release_asked_for(tmp_path, case):
    """Two modules with a `weight` each in older releases of transformers, one with two parameters in newer ones."""
    old = FIXTURES / "peft/peft0181-tf4576" / case
    model = old / "base_config.json"
    convert_adapter(old, tmp_path / "new", to="peft==0.21.2,transformers==5.23.0", model=model)
    assert {name.rpartition("experts")[2] for name in load(tmp_path / "new")} == {
        ".base_layer.lora_A.weight",
        ".base_layer.lora_B.weight",
        ".lora_A.weight",
        ".lora_B.weight",
    }
    targets = read_config(tmp_path / "new")["target_parameters"]
    assert {target.rpartition(".")[2] for target in targets} == {"gate_up_proj", "down_proj"}
    convert_adapter(tmp_path / "new", tmp_path / "back", to="peft==0.18.1,transformers==4.57.6", model=model)
    assert_identical(load(tmp_path / "back"), load(old))


@pytest.mark.parametrize("patterns", [{".*_proj": 6}, {"experts.down_proj": 12, ".*_proj": 6}])
def test_patterns_that_overlap_keep_their_order(tmp_path, patterns):
    """PEFT takes the first one that matches."""
    fused = len(patterns) > 1
    roles = ("gate_up", "down") if fused else ("gate", "up", "down")
    spec = Spec(alphas={**dict.fromkeys(roles, 6), "down": next(iter(patterns.values()))})
    factors = spec.factors(roles)
    source = (save_fused if fused else save_per_expert)(tmp_path / "in", spec, factors, alpha_pattern=patterns)
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model(), packing="rank_major")
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, spec.updates(factors))


@pytest.mark.parametrize("to", ["per-expert", "vllm", "peft==0.17.1,transformers==4.57.6", NEW])
@pytest.mark.parametrize("expert", [0, 3])
def test_numbers_of_a_single_expert_count_once(tmp_path, expert, to):
    """Its rank is padded and its scaling folded: no pattern of the input may give it another one afterwards."""
    spec = Spec()
    factors = spec.factors(("gate", "up", "down"))
    tensors = load(save_per_expert(tmp_path / "all", spec, factors))
    for name in [name for name in tensors if f"experts.{expert}.up_proj" in name]:
        tensors[name] = tensors[name][:1].contiguous() if ".lora_A" in name else tensors[name][:, :1].contiguous()
    for layer in spec.layers:
        A, B = factors[layer, "up"]
        A[expert, 1:], B[expert, :, 1:] = 0, 0
        B[expert] *= 24 / 1 / spec.scaling("up")
    one = rf"{expert}\.up_proj"
    source = save(tmp_path / "in", tensors, lora_config(spec, rank_pattern={one: 1}, alpha_pattern={one: 24}))
    convert_adapter(source, tmp_path / "out", to=to, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, spec.updates(factors))
    config = read_config(tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items() if to != NEW else ():
        key = name.removeprefix(PREFIX).partition(".lora_")[0]
        assert ".lora_B" in name or pattern_value(config, "rank_pattern", "r", key) == len(tensor)


ALPHAS = [
    {"experts.3.up_proj": 32},
    {"experts.3.up_proj": 32, "up_proj": 6},
    {r"experts\.[0-9]+\.down_proj": 6, "layers.1.mlp.experts.2.up_proj": 32, "q_proj": 16},
    {"experts.1.down_proj": 3, r"layers\.0\..*": 16, "layers.0.mlp.experts.0.gate_proj": 1},
    {"(.*_proj)": 3, "k_proj": 1, "experts.1.up_proj": 1},
]


@pytest.mark.parametrize("to", ["per-expert", "peft==0.17.1,transformers==4.57.6", NEW])
@pytest.mark.parametrize("patterns", ALPHAS)
def test_patterns_mean_the_same_once_pefts_save_pretrained_has_sorted_them(tmp_path, patterns, to):
    """PEFT takes the first that matches, and writes its config with `json.dumps(..., sort_keys=True)`."""
    spec = Spec(attention=True)
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors, alpha_pattern=patterns)
    expected = read_adapter(source, QWEN, 4)
    convert_adapter(source, tmp_path / "out", to=to, model=spec.model())
    config = read_config(tmp_path / "out")
    again = save(tmp_path / "again", load(tmp_path / "out"), json.loads(json.dumps(config, sort_keys=True)))
    for folder in (tmp_path / "out", again):
        found = read_adapter(folder, QWEN, 4, orientation="linear", nesting=QWEN.parameters)
        assert_updates(found.experts, expected.experts)
        assert_updates(found.linears, expected.linears)


@pytest.mark.parametrize("alpha", [1e-25, 1e25])
@pytest.mark.parametrize("case", ["an expert's", "a projection's"])
def test_a_scaling_that_float32_cannot_hold_is_refused(tmp_path, case, alpha):
    spec = Spec()
    factors = spec.factors(("gate", "up", "down"))
    pattern = r"1\.up_proj" if case == "an expert's" else "up_proj"
    source = save_per_expert(tmp_path / "in", spec, factors, alpha_pattern={pattern: alpha})
    with pytest.raises(AdapterError, match=r"differ by a factor of \S+; at most 1e\+12 can be folded"):
        convert_adapter(source, tmp_path / "out", to="sglang", model=spec.model())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["an expert's", "a projection's"])
def test_numbers_that_a_scaling_takes_beyond_float32_are_refused(tmp_path, case):
    spec = Spec()
    factors = {key: (A, B * (1e38 / B.abs().max())) for key, (A, B) in spec.factors(("gate", "up", "down")).items()}
    pattern = r"1\.up_proj" if case == "an expert's" else "up_proj"
    source = save_per_expert(tmp_path / "in", spec, factors, alpha_pattern={pattern: 10 * spec.alpha})
    with pytest.raises(AdapterError, match=r"times \S+, by which two scalings .* beyond torch.float32"):
        convert_adapter(source, tmp_path / "out", to="sglang", model=spec.model())
    assert not (tmp_path / "out").exists()


def test_a_layer_without_one_of_the_targets_is_not_targeted_there(tmp_path):
    """PEFT would wrap it twice, and call what the file has otherwise."""
    spec = Spec()
    factors = spec.factors(("gate_up", "down"))
    source = save_fused(tmp_path / "in", spec, {key: pair for key, pair in factors.items() if key != (1, "gate_up")})
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model(), packing="rank_major")
    stem = "model.layers.{}.mlp.experts.{}"
    keys = [stem.format(0, "down_proj"), stem.format(0, "gate_up_proj"), stem.format(1, "down_proj")]
    assert read_config(tmp_path / "out")["target_parameters"] == keys


@pytest.mark.parametrize("to", ["per-expert", "llama.cpp", "sglang"])
def test_lora_on_a_router_keeps_its_target_and_its_scaling(tmp_path, to):
    spec = Spec()
    factors, gate = spec.factors(("gate_up", "down")), "model.layers.0.mlp.gate"
    extra = {f"{PREFIX}{gate}.lora_A.weight": torch.randn(2, 8), f"{PREFIX}{gate}.lora_B.weight": torch.randn(4, 2)}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    source = save_fused(
        tmp_path / "in", spec, factors, extra=extra, target_parameters=targets, alpha_pattern={"gate.weight": 12}
    )
    convert_adapter(source, tmp_path / "out", to=to, model=spec.model(), packing="rank_major")
    tensors, config = load(tmp_path / "out"), read_config(tmp_path / "out")
    scaling = 6.0 if to == "per-expert" else config["lora_alpha"] / 2
    B, A = (tensors[f"{PREFIX}{gate}.lora_{letter}.weight"] for letter in "BA")
    expected = 6.0 * extra[f"{PREFIX}{gate}.lora_B.weight"] @ extra[f"{PREFIX}{gate}.lora_A.weight"]
    torch.testing.assert_close(scaling * B @ A, expected)
    assert config["target_parameters"] == ["mlp.gate.weight"]
    assert not any("gate" in name.split(".") for name in config["target_modules"])
    assert to != "per-expert" or config["alpha_pattern"]["gate.weight"] == 12


def test_numbers_of_a_router_are_found_by_module_and_by_parameter(tmp_path):
    """vLLM from 0.32 on goes by the module's name, PEFT and this library by that of the parameter that is targeted."""
    spec, gate = Spec(GPT_OSS), "model.layers.0.mlp.router"
    extra = {f"{PREFIX}{gate}.lora_A.weight": torch.randn(1, 8), f"{PREFIX}{gate}.lora_B.weight": torch.randn(4, 1)}
    patterns = {"rank_pattern": {"mlp.router": 1}, "alpha_pattern": {"mlp.router": 8}}
    source = save_per_expert(
        tmp_path / "in", spec, spec.factors(("gate", "up", "down")), extra=extra, target_modules=["router"], **patterns
    )
    convert_adapter(source, tmp_path / "out", to="vllm==0.33", model=spec.model())
    config = read_config(tmp_path / "out")
    for key in (gate, f"{gate}.weight"):
        assert pattern_value(config, "rank_pattern", "r", key) == 1
        assert pattern_value(config, "alpha_pattern", "lora_alpha", key) == 8
    assert verify_adapters(source, tmp_path / "out", model=spec.model()).same


@pytest.mark.parametrize("layers", [0, [0]])
def test_what_narrowed_the_linears_alone_does_not_narrow_the_experts(tmp_path, layers):
    spec = Spec(attention=True)
    narrowing = {"layers_to_transform": layers, "exclude_modules": ".*experts.*"}
    embedding = {f"{PREFIX}model.embed_tokens.lora_embedding_{letter}": torch.randn(2, 8) for letter in "AB"}
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), extra=embedding, **narrowing)
    convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model(), packing="rank_major")
    config = read_config(tmp_path / "out")
    assert (config["layers_to_transform"], config["exclude_modules"]) == (None, None)
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in spec.layers]
    embeddings = ["model.embed_tokens"]
    assert set(config["target_modules"]) == {"gate_proj", "up_proj", "down_proj", *attention, *embeddings}


def test_dora_of_single_experts_is_not_lost_in_fused_ones(tmp_path):
    spec = Spec()
    extra = {f"{PREFIX}{QWEN.apart.format(0)}.0.gate_proj.lora_magnitude_vector": torch.ones(6)}
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")), extra=extra, use_dora=True)
    with pytest.raises(AdapterError, match="belongs to the LoRA of one expert"):
        convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())


def test_dora_of_experts_that_are_renamed_is_not_left_behind(tmp_path):
    spec = Spec(MIXTRAL)
    extra = {f"{PREFIX}{MIXTRAL.fused.format(0)}.0.w1.lora_magnitude_vector": torch.ones(6)}
    moved = Family(**{**vars(MIXTRAL), "apart": MIXTRAL.fused})
    source = save_per_expert(
        tmp_path / "in", Spec(moved), spec.factors(("gate", "up", "down")), extra=extra, use_dora=True
    )
    with pytest.raises(AdapterError, match="belongs to the LoRA of one expert"):
        convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model())


@pytest.mark.parametrize("to", ["vllm", "sglang", "llama.cpp", NEW])
def test_a_base_that_the_initialisation_changes_is_for_linears_in_peft_alone(tmp_path, to):
    spec = Spec()
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), init_lora_weights="pissa_niter_4")
    how = {"to": to, "model": spec.model(), "packing": "rank_major"}
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        convert_adapter(source, tmp_path / "out", **how)


@pytest.mark.parametrize("change", ["no prefix", "adapter's name"])
def test_a_file_comes_out_under_one_set_of_names(tmp_path, change):
    spec = Spec(attention=True)
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")))
    tensors, config = load(source), read_config(source)
    named = {
        name.removeprefix(PREFIX) if change == "no prefix" else name.replace(".weight", ".default.weight"): tensor
        for name, tensor in tensors.items()
    }
    other = save(tmp_path / "other", named, config)
    for folder in (source, other):
        convert_adapter(folder, tmp_path / f"{folder.name}-out", to=NEW, model=spec.model(), packing="rank_major")
    assert_identical(load(tmp_path / "other-out"), load(tmp_path / "in-out"))
    assert verify_adapters(other, tmp_path / "in-out", model=spec.model(), packing="rank_major").same
    twice = save(tmp_path / "twice", {**tensors, **{n: t for n, t in named.items() if "q_proj" in n}}, config)
    with pytest.raises(AdapterFileError, match="the same tensor under two names"):
        convert_adapter(twice, tmp_path / "out", to=NEW, model=spec.model(), packing="rank_major")


@pytest.mark.parametrize("form", ["per-expert", "stacked", "stamped"])
def test_another_base_model_is_refused(tmp_path, form):
    spec, other = Spec(), Spec(H=16)
    factors = spec.factors(("gate", "up", "down") if form == "per-expert" else ("gate_up", "down"))
    save_as = {"per-expert": save_per_expert, "stacked": save_stacked, "stamped": save_fused}[form]
    source = save_as(tmp_path / "in", spec, factors)
    if form == "stamped":
        how = {"to": NEW, "model": spec.model(), "packing": "rank_major"}
        source = convert_adapter(source, tmp_path / "stamped", **how).out
    for model in (other.model(), Spec(E=8).model()):
        with pytest.raises(AdapterError, match="base model|of 8 experts"):
            convert_adapter(source, tmp_path / "out", to=OLD, model=model)


def test_factors_in_float8(tmp_path):
    spec = Spec(dtype=torch.float8_e4m3fn, E=4)
    factors = spec.factors(("gate_up", "down"))
    source = save_fused(tmp_path / "in", spec, factors, peft_version="0.18.1")
    out = convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model()).out
    assert {tensor.dtype for tensor in load(out).values()} == {torch.float8_e4m3fn}
    assert verify_adapters(source, out, model=spec.model()).same
