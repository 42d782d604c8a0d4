"""Every experts class of the installed transformers against stock PEFT in float32 and in float64.

The oracles are not ours: PEFT's own `get_delta_weight` and forward around transformers' own grouped forward, and the
same in float64 around the class's eager loop over experts.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from support import zoo

import peft_moe_compat
from peft_moe_compat import families as families_table
from peft_moe_compat.model import experts as families
from peft_moe_compat.model.wrappers import native_reason

FLOAT32, FLOAT64_VS_32 = 2e-5, 1e-4
# 2 * I == H makes gate_up square and I == H down, where a flipped layout fits and only the numbers tell.
SHAPES = {"plain": 12, "square_up": zoo.H // 2, "square_down": zoo.H}


def names(experts, which="all"):
    found = families.projections(experts)
    return [f"experts.{n}" for n in (found if which == "all" else [found[int(which)]])]


@pytest.mark.parametrize("intermediate", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("found", zoo.CLASSES, ids=str)
def test_canonical_factors_rebuild_pefts_own_delta(found, intermediate):
    experts = zoo.build(found, intermediate)
    if "SharedExperts" in found.name:
        # Not routed; its orientation is nobody's business until it is declared.
        peft_moe_compat.declare_layout(experts, is_transposed=False)
    holder = zoo.wrap(experts, names(experts))
    factors = peft_moe_compat.expert_loras(holder["experts"])
    assert set(factors) == set(families.projections(experts))
    for wrapper in zoo.wrappers(holder):
        lora = factors[wrapper.parameter_name]
        stored = lora.delta().transpose(1, 2) if families.is_transposed(experts) else lora.delta()
        torch.testing.assert_close(stored, wrapper.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("found", zoo.UNDECORATED, ids=str)
def test_a_parametrised_module_keeps_its_orientation(found):
    experts = zoo.build(found)
    before = families.is_transposed(experts)
    assert before is not None
    torch.nn.utils.parametrize.register_parametrization(experts, families.projections(experts)[0], torch.nn.Identity())
    assert families.is_transposed(experts) is before


def weights_form(experts, inputs):
    """The routing weights as this class reads them: "T k", or "T E" (some classes of transformers 5.0)."""
    dense = torch.zeros(zoo.T, zoo.E).scatter(1, inputs["top_k_index"], inputs["top_k_weights"])
    reference = experts(*inputs.values())
    for candidate in (inputs["top_k_weights"], dense):
        experts.config._experts_implementation = "eager"
        try:
            eager = experts(inputs["hidden_states"], inputs["top_k_index"], candidate)
        except IndexError:
            continue
        finally:
            experts.config._experts_implementation = "grouped_mm"
        if torch.allclose(eager.view_as(reference), reference, atol=1e-4):
            return candidate
    raise AssertionError("transformers' eager and grouped forwards disagree for both forms of the weights")


@pytest.mark.parametrize("which", ["all", "0", "-1"], ids=["both", "up", "down"])
@zoo.each(zoo.DECORATED)
def test_forward_and_gradients_equal_stock_peft_and_a_float64_loop(found, which, stock):
    experts = zoo.build(found, SHAPES["plain"] if which == "all" else SHAPES["square_up"])
    index, weights = zoo.routing()
    inputs = {"hidden_states": torch.randn(zoo.T, zoo.H), "top_k_index": index, "top_k_weights": weights}
    with torch.no_grad():
        inputs["top_k_weights"] = weights_form(experts, inputs)
        base = experts(*inputs.values())
    holder = zoo.wrap(experts, names(experts, which))
    assert all(native_reason(w) is None for w in zoo.wrappers(holder))

    ours = zoo.gradients(holder["experts"], inputs, {})
    theirs = stock(zoo.gradients, holder["experts"], inputs, {})
    assert (theirs["output"] - base).abs().max() > 0.05, "the adapter does nothing: the test would see nothing"
    zoo.assert_same(ours, theirs, FLOAT32)

    exact = copy.deepcopy(holder["experts"]).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    in_double = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    loop = stock(zoo.gradients, exact, in_double, {})
    loop["output"] = loop["output"].view_as(ours["output"])
    zoo.assert_same(ours, loop, FLOAT64_VS_32)


def undecorated_inputs(experts):
    """What each undecorated class's forward takes, told by its parameter names."""
    index, weights = zoo.routing()
    dense = torch.zeros(zoo.T, zoo.E).scatter(1, index, weights)
    counts = torch.tensor([2, 0, 3, 1, 1])
    # An id past the last: of an expert that gives a token back, or of none, where the class knows one.
    source = inspect.getsource(inspect.unwrap(type(experts).forward))
    if type(experts).__name__ == "LongcatFlashExperts" or "num_classes=self.num_experts + 1" in source:
        index[::3, 1] = zoo.E
    takes = set(inspect.signature(type(experts).forward).parameters) - {"self"}
    known = {
        "inputs": torch.randn(zoo.T, zoo.H),
        "input": torch.randn(zoo.T, zoo.H),
        "expert_size": counts.tolist(),
        "tokens_per_expert": counts,
        "top_k_index": index,
        "router_indices": index,
        "top_k_weights": weights,
        "routing_weights": dense,
    }
    tokens = zoo.E * zoo.T if takes == {"hidden_states"} else zoo.T  # llama4 runs every expert on its own slice
    known["hidden_states"] = torch.randn(tokens, zoo.H)
    return {n: known[n] for n in inspect.signature(type(experts).forward).parameters if n in takes}


@pytest.mark.parametrize("found", zoo.UNDECORATED, ids=str)
def test_undecorated_classes_have_pefts_numbers(found, stock):
    """Exactly, where the class is not among those with a forward of ours."""
    experts = zoo.build(found).eval()
    inputs = undecorated_inputs(experts)
    holder = zoo.wrap(experts, names(experts))
    taken = found.name in families_table.OWN_FORWARDS
    reasons = {native_reason(w) and native_reason(w).code for w in zoo.wrappers(holder)}
    assert reasons == {None if taken else "not_dispatching"}

    def run():
        holder.zero_grad()
        out = holder["experts"](*inputs.values())
        out.square().sum().backward()
        return {"output": out.detach()} | {
            n: p.grad.clone() for n, p in holder.named_parameters() if p.grad is not None
        }

    ours, theirs = run(), stock(run)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 1 + 2 * len(zoo.wrappers(holder))
    if taken:
        leaves = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        others = {name: value for name, value in inputs.items() if name not in leaves}
        zoo.assert_same(
            zoo.gradients(holder["experts"], leaves, others),
            stock(zoo.gradients, holder["experts"], leaves, others),
            FLOAT32,
        )
        zoo.assert_same(ours, theirs, FLOAT32)
        return
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name
        assert expected.count_nonzero() > 0, name


@pytest.mark.parametrize("found", [c for c in zoo.UNDECORATED if c.name in families_table.OWN_FORWARDS], ids=str)
def test_undecorated_classes_are_as_near_to_float64_as_stock_in_bfloat16(found, stock):
    errors = torch.zeros(2)
    for seed in range(8):
        torch.manual_seed(seed)
        experts = zoo.build(found, 16).eval()
        inputs = [
            v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
            for v in undecorated_inputs(experts).values()
        ]
        low = zoo.wrap(experts, names(experts)).bfloat16()["experts"]
        wide = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in inputs]
        with torch.no_grad():
            exact = stock(copy.deepcopy(low).double(), *wide)
            errors += torch.stack([(out.double() - exact).norm() for out in (low(*inputs), stock(low, *inputs))])
    assert errors[0] <= 1.05 * errors[1]
