"""Every way in which writers spell the LoRA of experts is read as the same updates, and what no rule places is refused.

The names and shapes are those of tests/fixtures/FORMS.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.adapter_files import (
    FAMILIES,
    GPT_OSS,
    PREFIX,
    QWEN,
    Family,
    Spec,
    assert_identical,
    assert_updates,
    attention,
    load,
    lora_config,
    read_adapter,
    read_config,
    save,
    save_fused,
    save_per_expert,
)

from peft_moe_compat import convert_adapter, inspect_adapter, verify_adapters
from peft_moe_compat.errors import AdapterError, AdapterFileError, AmbiguousAdapterError

NEW = "peft==0.21.2,transformers==5.24.0"
OUTER = {"gate": "A", "up": "A", "gate_up": "A", "down": "B"}  # the side that faces the hidden size


def stem(spec, layer, *parts):
    return ".".join([PREFIX + spec.family.fused.format(layer), *map(str, parts)])


def pair(stem, A, B, end=".weight"):
    return {f"{stem}.lora_A{end}": A, f"{stem}.lora_B{end}": B}


def shared_outer(spec, roles):
    """Factors whose outer side is the same for all experts."""
    found = {}
    for (layer, role), (A, B) in spec.factors(roles).items():
        sides = {"A": A, "B": B}
        side = OUTER[role]
        sides[side] = sides[side][:1].expand_as(sides[side]).contiguous()
        found[layer, role] = sides["A"], sides["B"]
    return found


def one(role, side, factor):
    return factor[:1] if OUTER[role] == side else factor


def stacks(names):
    """One stack for each projection, those of the shared sides of one."""

    def tensors(spec, factors):
        found = {}
        for (layer, role), (A, B) in factors.items():
            found |= pair(stem(spec, layer, names[role]), one(role, "A", A), one(role, "B", B))
        return found

    return tensors


def stack_and_matrices(spec, factors):
    """The shared side a stack of one, the other a matrix for each expert."""
    found = {}
    for (layer, role), sides in factors.items():
        for side, factor in zip("AB", sides, strict=True):
            if OUTER[role] == side:
                found[stem(spec, layer, spec.family.linear(role), f"lora_{side}.weight")] = factor[:1]
            else:
                for e, matrix in enumerate(factor):
                    found[stem(spec, layer, e, spec.family.linear(role), f"lora_{side}.weight")] = matrix
    return found


def lists(spec, factors):
    """Lists of linears, as gpt_oss has them in 4 bit."""
    found = {}
    for (layer, role), (A, B) in factors.items():
        for e in range(spec.E):
            found |= pair(stem(spec, layer, f"{role}_proj" + "s", e), A[e], B[e])
    return found


def native(spec, factors):
    """NeMo Automodel's own parameters."""
    found = {}
    for (layer, role), (A, B) in factors.items():
        name = stem(spec, layer, f"lora_{'gate_and_up' if role in ('gate_up', 'up') else role}")
        found |= {f"{name}_A": A.mT, f"{name}_B": B.mT}
    return found


def unfolded(expert_slowest):
    """Stacks under the names of PEFT's flat pairs."""

    def tensors(spec, factors):
        found = {}
        for (layer, role), (A, B) in factors.items():
            depth = [] if role == "down" else ["base_layer"]
            found |= pair(stem(spec, layer, *depth), A, B if expert_slowest else B.permute(1, 2, 0))
        return found

    return tensors


W123 = {"gate": "w1", "up": "w3", "down": "w2"}
PROJ = {role: f"{role}_proj" for role in OUTER}
# Spelling -> (factors, tensors, form).
LINEARS, FUSED = Spec.linear_roles, Spec.fused_roles
FORMS = {
    "Tinker": (shared_outer, LINEARS, stacks(W123), "stacked"),
    "stacks of one": (shared_outer, LINEARS, stacks(PROJ), "stacked"),
    "gate and up in one": (shared_outer, FUSED, stacks(PROJ), "stacked"),
    "Megatron-Bridge": (shared_outer, LINEARS, stack_and_matrices, "per_expert"),
    "lists": (Spec.factors, FUSED, lists, "per_expert"),
    "NeMo Automodel": (Spec.factors, FUSED, native, "stacked"),
    "twinkle": (Spec.factors, FUSED, unfolded(True), "fused"),
    "for vLLM": (Spec.factors, FUSED, unfolded(False), "fused"),
}


def written(folder, spec, form, **config):
    make, roles, tensors, _ = FORMS[form]
    factors = make(spec, roles(spec))
    targets = {"target_parameters": [f"experts.{name}" for name in spec.family.parameters]}
    config = {**lora_config(spec), **(targets if FORMS[form][3] == "fused" else {}), **config}
    return save(folder, tensors(spec, factors) | attention(spec), config), spec.updates(factors)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("to", [NEW, "peft==0.18.1,transformers==5.0.0", "per-expert"])
def test_every_spelling_is_read(tmp_path, family, form, to):
    spec = Spec(family, attention=True)
    source, updates = written(tmp_path / "in", spec, form)
    found = inspect_adapter(source, model=spec.model())
    assert (found.form, found.other_tensors) == (FORMS[form][3], 4)
    assert all(verdict.verdict != "reads" for verdict in found.readers.values())
    done = convert_adapter(source, tmp_path / "out", to=to, model=spec.model())
    assert done.exactness == "bits"
    orientation = "linear" if to == NEW or family == GPT_OSS else "reversed"
    how = {} if to == "per-expert" else {"orientation": orientation, "nesting": family.parameters}
    assert_updates(read_adapter(tmp_path / "out", family, spec.E, **how).experts, updates)
    verified = verify_adapters(source, tmp_path / "out", model=spec.model())
    assert verified.same
    assert len(verified.rows) >= 4


def test_a_projection_that_a_model_has_not_may_be_empty(tmp_path):
    spec = Spec(FAMILIES[2])
    factors = spec.factors(("up", "down"))
    tensors = {}
    for (layer, role), (A, B) in factors.items():
        tensors |= pair(stem(spec, layer, "w1" if role == "up" else "w2"), A, B)
        tensors |= pair(stem(spec, layer, "w3"), torch.empty(0), torch.empty(0))
    source = save(tmp_path / "in", tensors, lora_config(spec))
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", spec.family, 4, orientation="linear", nesting=spec.family.parameters)
    assert_updates(found.experts, spec.updates(factors))
    assert not found.rest


UNKNOWN = {
    "a list of another name": lambda s: pair(stem(s, 0, "gate_up_linears", 0), torch.ones(2, 8), torch.ones(12, 2)),
    "an expert's linear of another name": lambda s: pair(
        stem(s, 0, 3, "linear_fc1"), torch.ones(2, 8), torch.ones(12, 2)
    ),
    "experts in a list of modules": lambda s: pair(stem(s, 0, "expert_3", "wi"), torch.ones(2, 8), torch.ones(12, 2)),
    "parameters of another name": lambda s: {
        stem(s, 0, "lora_gate_and_up_alpha"): torch.ones(4),
        stem(s, 0, "w13_lora_a"): torch.ones(4, 2, 8),
    },
    "an absurd number": lambda s: pair(stem(s, 0, "9" * 400, "up_proj"), torch.ones(2, 8), torch.ones(6, 2)),
    "a number in digits of another script": lambda s: pair(
        stem(s, 0, "\u0663", "up_proj"), torch.ones(2, 8), torch.ones(6, 2)
    ),
    "a number with a zero before it": lambda s: pair(stem(s, 0, "03", "up_proj"), torch.ones(2, 8), torch.ones(6, 2)),
    "a third name beside a pair": lambda s: {
        n.replace("weight", "default.other.weight"): t
        for n, t in pair(stem(s, 1, "gate_up_proj"), torch.ones(4, 2, 8), torch.ones(4, 12, 2)).items()
    },
    **{
        f"{module} by {infix}": lambda s, module=module, infix=infix: {
            name.replace(".lora_", infix): tensor
            for name, tensor in pair(f"{PREFIX}model.{module}", torch.ones(2, 8), torch.ones(6, 2)).items()
        }
        for module, infix in (
            ("shared_layers.0.mlp.experts.0.foo", ".lora_"),
            ("layers.0.shared_block.mlp.experts.gate_up_weight", ".lora_"),
            ("layers.0.mlp.shared_experts.experts.0.foo", ".lora_"),
            ("layers.0.mlp.experts.router.foo", ".lora_"),
            ("layers.0.mlp.experts.0.router", ".lora_"),
            ("layers.0.mlp.experts.shared_gate", ".lora_"),
            ("layers.0.moe.mlp.3.w1", ".lora_"),
            ("layers.0.block_sparse_moe.input_linear", ".lora_"),
            ("layers.0.mlp.switch_mlp.gate_proj", ".lora_"),
            ("layers.0.mlp.experts.0.gate_proj", ".lora"),
            ("layers.0.mlp.experts.0.gate_proj", ".lora."),
        )
    },
    "four dimensions": lambda s: pair(stem(s, 0), torch.ones(1, 4, 2, 8), torch.ones(1, 4, 6, 2)),
}


@pytest.mark.parametrize("beside", ["nothing", "attention", "experts"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_lora_on_experts_that_no_rule_places_is_refused(tmp_path, name, beside):
    spec = Spec(attention=beside != "nothing", layers=(1,))
    tensors = UNKNOWN[name](spec) | attention(spec)
    if beside == "experts":
        for (layer, role), (A, B) in spec.factors(("gate", "up", "down")).items():
            tensors |= pair(stem(spec, layer, PROJ[role]), A, B)
    source = save(tmp_path / "in", tensors, lora_config(spec))
    for call in (
        lambda: inspect_adapter(source, model=spec.model()),
        lambda: convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model()),
        lambda: verify_adapters(source, source, model=spec.model()),
    ):
        with pytest.raises(
            AdapterFileError, match="2 LoRA tensors on experts under names that are not understood"
        ) as error:
            call()
        assert len(str(error.value)) < 1500


def test_what_only_begins_like_a_factor_is_nothing_beside_it(tmp_path):
    """One flipped bit in a name must not make an experts' factor a tensor that is passed on."""
    spec = Spec(layers=(0,))
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    config = read_config(source)
    for place, name in enumerate(("lora_A>weight", "lora_@.weight", "lora_AB", "lora_magnitude_vectors")):
        odd = save(tmp_path / str(place), load(source) | {stem(spec, 0, name): torch.ones(8, 8)}, config)
        with pytest.raises(AdapterFileError, match="not understood"):
            inspect_adapter(odd, model=spec.model())


def test_a_pattern_says_that_an_untargeted_pair_is_of_experts(tmp_path):
    """Its rows are as many as the rank of the rest, so that it would pass for the LoRA of a matrix."""
    spec = Spec(E=2, r=2, ranks={"down": 1}, layers=(0,))
    factors = spec.factors(("down",))
    source = save_fused(tmp_path / "in", spec, factors, peft_version="0.21.2", target_parameters=None)
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    assert read_config(tmp_path / "out")["target_parameters"] == ["model.layers.0.mlp.experts.down_proj"]
    convert_adapter(source, tmp_path / "apart", to="per-expert", model=spec.model())
    assert_updates(read_adapter(tmp_path / "apart", QWEN, spec.E).experts, spec.updates(factors))


@pytest.mark.parametrize("where", [(3, "gate"), ("gate",), ("mlp", "gate")])
def test_an_experts_linear_is_no_router(tmp_path, where):
    spec = Spec(layers=(0,))
    tensors = pair(stem(spec, 0, *where), torch.ones(2, 8), torch.ones(6, 2))
    source = save(tmp_path / "in", tensors, lora_config(spec, target_parameters=["gate.weight"]))
    with pytest.raises(AdapterFileError, match="names that are not understood"):
        convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module"])
@pytest.mark.parametrize("place", ["", "base_model.", PREFIX, f"{PREFIX}model.layers."])
def test_whatever_module_was_wrapped_the_paths_are_the_models(tmp_path, part, place):
    spec = Spec(attention=True)
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors)
    tensors = {f"{place}{part}.{name.removeprefix(place)}": tensor for name, tensor in load(source).items()}
    wrapped = save(tmp_path / "wrapped", tensors, lora_config(spec))
    for name, folder in (("a", source), ("b", wrapped)):
        convert_adapter(folder, tmp_path / name, to=NEW, model=spec.model())
    assert_identical(load(tmp_path / "b"), load(tmp_path / "a"))


def test_what_is_beside_the_experts_is_ordinary(tmp_path):
    """Shared experts, routers, linears whose names only speak of experts; biases and magnitudes of experts' LoRA."""
    spec = Spec(layers=(0,))
    linears = ["mlp.shared_experts.up_proj", "mlp.shared_expert_gate", "mlp.gate", "mlp.pre_expert_proj"]
    linears += ["self_attention.experts.router.layer"]  # jetmoe
    linears += ["block_sparse_moe.shared_mlp.input_linear", "block_sparse_moe.gate", "mlp.experts.shared_expert.w1"]
    tensors = {}
    for name in linears:
        tensors |= pair(f"{PREFIX}model.layers.0.{name}", torch.ones(2, 8), torch.ones(8, 2))
    tensors |= {stem(spec, 0, 1, "up_proj", "lora_magnitude_vector"): torch.ones(6)}
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors, extra=tensors)
    assert inspect_adapter(source, model=spec.model()).other_tensors == 17


def test_a_matrix_beside_a_stack_of_one_is_damaged(tmp_path):
    """Megatron-Bridge gives the experts of packed families one name; the last of them is what is left."""
    spec = Spec(layers=(0,))
    tensors = pair(stem(spec, 0, "gate_up_proj"), torch.ones(1, 2, 8), torch.ones(12, 2))
    source = save(tmp_path / "in", tensors, lora_config(spec))
    with pytest.raises(AdapterFileError, match="expected"):
        inspect_adapter(source, model=spec.model())


def test_a_comparison_of_nothing_is_refused(tmp_path):
    for name in ("one", "other"):
        save(tmp_path / name, {}, lora_config(Spec()))
    with pytest.raises(AdapterError, match="nothing to compare"):
        verify_adapters(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("form", ["twinkle", "for vLLM"])
def test_stacks_under_pefts_names_are_linear_whatever_the_config_claims(tmp_path, form):
    """Of square experts the shapes say nothing, and the release in the config speaks of its flat pairs."""
    spec = Spec(QWEN, H=12, I=6)
    source, updates = written(tmp_path / "in", spec, form, peft_version="0.18.1")
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, updates)


def test_stacks_whose_nesting_is_open_are_looked_at(tmp_path):
    """Without the model nothing tells which parameter is which."""
    spec = Spec(FAMILIES[2])
    source, _ = written(tmp_path / "in", spec, "for vLLM")
    assert {finding.code for finding in inspect_adapter(source).content} == {"not_settled"}


def test_stacks_do_not_say_how_the_model_stores_its_experts(tmp_path):
    """They are linear whoever wrote them, so that without the model nothing tells what a release of PEFT reads."""
    source, _ = written(tmp_path / "in", Spec(QWEN), "twinkle", peft_version="0.21.2")
    with pytest.raises(AmbiguousAdapterError, match="depending on how the model stores"):
        convert_adapter(source, tmp_path / "out", to=NEW)


def test_stacks_of_a_renamed_family_are_found_by_their_targets(tmp_path):
    """granitemoe's experts are two modules with a `weight` each before transformers 5.13."""
    spec = Spec(Family("granitemoe", "num_local_experts", "intermediate_size"))
    factors, tensors, targets = spec.factors(("gate_up", "down")), {}, []
    for (layer, role), (A, B) in factors.items():
        path = f"model.layers.{layer}.block_sparse_moe.{'output' if role == 'down' else 'input'}_linear"
        tensors |= pair(PREFIX + path, A, B)
        targets.append(f"{path}.weight")
    source = save(tmp_path / "in", tensors, lora_config(spec, target_parameters=targets))
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", spec.family, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, spec.updates(factors))


def test_patterns_find_the_linears_of_lists_by_their_names(tmp_path):
    """PEFT calls them `experts.down_projs.2`, not `experts.2.down_projs`."""
    spec = Spec(GPT_OSS, layers=(0,))
    patterns = {"experts.down_projs.2": 6, "gate_up_projs.1": 9}
    source, updates = written(tmp_path / "in", spec, "lists", alpha_pattern=patterns)
    updates[0, "down"][2] *= 2
    for role in ("gate", "up"):
        updates[0, role][1] *= 3
    convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model())
    assert_updates(read_adapter(tmp_path / "out", GPT_OSS, 4).experts, updates)


@pytest.mark.parametrize("r", [2, 4])
def test_square_factors_of_nemo_automodel_lie_as_their_names_say(tmp_path, r):
    """Under moe_rank_scaling the config's rank is another one than theirs, and breaks no tie."""
    spec = Spec(QWEN, H=12, I=6)
    source, updates = written(tmp_path / "in", spec, "NeMo Automodel", r=r)
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, updates)


@pytest.mark.parametrize(
    "config",
    [
        {"num_local_experts": 8},  # rank 8 of r 8, at two experts per token
        {"num_local_experts": 32},  # rank 2
        {"num_local_experts": 12},
        {"num_local_experts": 128},
        {"num_local_experts": 4, "num_experts_per_tok": None},  # rank 16
        {"num_experts_per_tok": 4},
    ],
)
def test_the_rank_of_nemo_automodel_tells_another_base_model(tmp_path, config):
    folder = Path(__file__).parents[1] / "fixtures" / "handmade" / "nemo_automodel_0_7_rank_scaling"
    model = json.loads((folder / "base_config.json").read_text())
    convert_adapter(folder, tmp_path / "out", to=NEW, model=model)
    with pytest.raises(AdapterFileError, match="moe_rank_scaling.*Is it the adapter's base model"):
        convert_adapter(folder, tmp_path / "other", to=NEW, model=model | config)


def test_zero_experts_come_back(tmp_path):
    """longcat_flash has rows for its zero experts in gate_up_proj alone."""
    spec, more = Spec(layers=(0,)), Spec(E=6, layers=(0,))
    factors = {**more.factors(("gate_up",)), **spec.factors(("down",))}
    model = {"model_type": "longcat_flash", "n_routed_experts": 4, "zero_expert_num": 2}
    model |= {"hidden_size": spec.H, "expert_ffn_hidden_size": spec.I}
    source = save_fused(tmp_path / "in", spec, factors, peft_version="0.21.2")
    convert_adapter(source, tmp_path / "each", to="per-expert", model=model)
    convert_adapter(tmp_path / "each", tmp_path / "back", to=NEW, model=model)
    assert_identical(load(tmp_path / "back"), load(source))
    tensors = {name: tensor for name, tensor in load(tmp_path / "each").items() if ".3.down_proj" not in name}
    less = save(tmp_path / "less", tensors, read_config(tmp_path / "each"))
    with pytest.raises(AdapterError, match=r"down_proj has LoRA for 3 of 4 experts"):
        convert_adapter(less, tmp_path / "out", to=NEW, model=model)


def test_of_a_single_expert_nothing_is_known_and_nothing_raises(tmp_path):
    spec = Spec(E=1, layers=(0,))
    tensors = {}
    for (layer, role), (A, B) in spec.factors(("gate", "up")).items():
        tensors |= pair(stem(spec, layer, PROJ[role]), A[0], B[0])
    source = save(tmp_path / "in", tensors, lora_config(spec))
    done = convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    assert str(done.proof).startswith("not known whether it is read: ")


def test_a_router_may_be_a_stack_of_one(tmp_path):
    spec = Spec(layers=(0,))
    factors = spec.factors(("gate_up", "down"))
    router = pair(f"{PREFIX}model.layers.0.mlp.gate", torch.ones(1, 2, 8), torch.ones(1, 4, 2))
    tensors = unfolded(True)(spec, factors) | router
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    source = save(tmp_path / "in", tensors, lora_config(spec, target_parameters=targets))
    convert_adapter(source, tmp_path / "out", to=NEW, model=spec.model())
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, spec.updates(factors))
    assert torch.equal(found.linears["model.layers.0.mlp.gate"], torch.full((4, 8), 2 * spec.alpha / 2).double())
    assert "mlp.gate.weight" in json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_parameters"]
