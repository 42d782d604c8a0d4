"""Live wrapper chains in every state PEFT can bring them into; stock PEFT of the same release is the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import zoo
from torch import nn

import peft_moe_compat
from peft_moe_compat import ExpertLora, LayoutError
from peft_moe_compat.model import probe, wrappers
from peft_moe_compat.model.wrappers import expert_loras, wrapper_chain

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def gated():
    """A gated experts class with both projections, decorated wherever transformers decorates any."""
    pool = zoo.DECORATED or [c for c in zoo.UNDECORATED if "GptOss" in c.name]
    return zoo.build(next(c for c in pool if c.package in ("mixtral", "gpt_oss")))


def inputs(experts):
    index, weights = zoo.routing()
    given = {"hidden_states": torch.randn(zoo.T, zoo.H), "top_k_index": index, "top_k_weights": weights}
    if not zoo.DECORATED:  # transformers before 5.0 reads "T E" weights
        given["top_k_weights"] = torch.zeros(zoo.T, zoo.E).scatter(1, index, weights)
    return given


def stored_delta(lora: ExpertLora, experts):
    return lora.delta().transpose(1, 2) if peft_moe_compat.model.experts.is_transposed(experts) else lora.delta()


def agree(holder, stock):
    """Forward and gradients with the library equal those without, and the canonical factors PEFT's own delta."""
    experts = holder["experts"]
    given = inputs(experts)
    torch.manual_seed(1)
    ours = zoo.gradients(experts, given, {})
    theirs = stock(zoo.gradients, experts, given, {})
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    on = {w: [n for n in w.active_adapters if n in w.lora_A] for w in zoo.wrappers(holder)}
    assert any(on.values())
    for wrapper, names in on.items():
        if names:
            delta = sum(wrapper.get_delta_weight(n) for n in names)
            lora = expert_loras(experts)[wrapper.parameter_name]
            torch.testing.assert_close(stored_delta(lora, wrapper.get_base_layer()), delta, rtol=1e-4, atol=1e-5)
    return ours


def nesting(holder):
    return [w.parameter_name for w in wrapper_chain(holder["experts"])]


def test_either_nesting_order(stock):
    usual = zoo.wrap(gated(), BOTH)
    assert nesting(usual) == ["down_proj", "gate_up_proj"]
    agree(usual, stock)

    # PEFT's parametrization moves an entry of `_parameters`, and with it the nesting of whatever is wrapped next.
    experts = gated()
    once = zoo.wrap(experts, BOTH[:1])
    stock(lambda: once["experts"](*inputs(experts).values()))
    turned = zoo.wrap(experts, BOTH)
    assert nesting(turned) == ["gate_up_proj", "down_proj"]
    agree(turned, stock)


@pytest.mark.parametrize("target", BOTH)
def test_one_projection_only(target, stock):
    holder = zoo.wrap(gated(), [target])
    assert set(expert_loras(holder["experts"])) == {target.rpartition(".")[2]}
    agree(holder, stock)


def test_several_adapters_of_different_ranks_and_scalings(stock):
    holder = zoo.wrap(gated(), BOTH)
    for wrapper in zoo.wrappers(holder):
        zoo.add_adapter(wrapper, "second", r=5)
        zoo.add_adapter(wrapper, "idle", r=2)
    zoo.randomise(holder)
    for wrapper in zoo.wrappers(holder):
        wrapper.set_adapter(["default", "second"])
    agree(holder, stock)
    assert {lora.rank for lora in expert_loras(holder["experts"]).values()} == {zoo.R + 5}
    only = expert_loras(holder["experts"], ["idle"])
    assert {lora.rank for lora in only.values()} == {2}
    with pytest.raises(LayoutError, match=r"No adapter \['nobody'\] on this module; it has"):
        expert_loras(holder["experts"], ["nobody"])


def test_an_adapter_on_one_of_two_wrappers(stock):
    holder = zoo.wrap(gated(), BOTH)
    outer = holder["experts"]
    zoo.add_adapter(outer, "second", r=2)
    zoo.randomise(holder)
    for wrapper in zoo.wrappers(holder):
        wrapper.set_adapter(["second"])
    agree(holder, stock)
    assert list(expert_loras(holder["experts"])) == [outer.parameter_name]


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({"use_rslora": True}, zoo.R, 5 / zoo.R**0.5),
        ({"rank_pattern": {"down_proj": 6}}, 6, 5 / 6),
        ({"alpha_pattern": {"down_proj": 11}}, zoo.R, 11 / zoo.R),
    ],
    ids=["rslora", "rank_pattern", "alpha_pattern"],
)
# PEFT from 0.21 on says that a pattern on a parameter matches no module, and applies it.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_rank_and_scaling_variants(config, rank, scaling, stock):
    holder = zoo.wrap(gated(), BOTH, **config)
    lora = expert_loras(holder["experts"])["down_proj"]
    assert (lora.rank, lora.scaling) == (rank, pytest.approx(scaling))
    agree(holder, stock)


def test_rank_of_one_and_ranks_that_are_no_multiple_of_eight(stock):
    for r in (1, 7, 8, 9):
        agree(zoo.wrap(gated(), BOTH, r=r), stock)


def test_disabled_merged_unmerged_deleted_and_renamed(stock):
    holder = zoo.wrap(gated(), BOTH)
    live = agree(holder, stock)
    chain = zoo.wrappers(holder)
    given = inputs(holder["experts"])

    for wrapper in chain:
        wrapper.enable_adapters(False)
    torch.testing.assert_close(
        holder["experts"](*given.values()), chain[0].get_base_layer()(*given.values()), rtol=0, atol=0
    )
    for wrapper in chain:
        wrapper.enable_adapters(True)
        wrapper.set_adapter(["default"])

    before = holder["experts"](*given.values())
    for wrapper in chain:
        wrapper.merge()
    merged = holder["experts"](*given.values())
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-4)
    for wrapper in chain:
        wrapper.unmerge()
    torch.testing.assert_close(holder["experts"](*given.values()), before, rtol=1e-4, atol=1e-4)

    for wrapper in chain:
        for store in (wrapper.lora_A, wrapper.lora_B, wrapper.r, wrapper.scaling, wrapper.lora_alpha):
            store["other"] = store["default"]
            del store["default"]
        wrapper.set_adapter(["other"])
    renamed = agree(holder, stock)
    assert renamed["output"].shape == live["output"].shape

    for wrapper in chain:
        wrapper.delete_adapter("other")
    assert expert_loras(holder["experts"]) == {}
    torch.testing.assert_close(
        holder["experts"](*given.values()), chain[0].get_base_layer()(*given.values()), rtol=0, atol=0
    )


@pytest.mark.parametrize("flag", [True, False])
def test_a_swap_flag_counts_only_as_far_as_pefts_arithmetic_obeys_it(flag, stock):
    """transformers 5.5 to 5.12 set the flag on releases that never read it. On square weights nothing else differs."""
    experts = zoo.build(next(c for c in zoo.CLASSES if c.package in ("mixtral", "gpt_oss")), zoo.H // 2)
    holder = zoo.wrap(experts, ["experts.gate_up_proj"])
    zoo.wrappers(holder)[0]._did_swap_in_out_features = flag
    agree(holder, stock)


class Lone(nn.Module):
    """One expert parameter of any shape, multiplied in the plainest way."""

    def __init__(self, shape, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x @ self.weight


def test_a_2d_parameter(stock):
    holder = zoo.wrap(Lone((4, 6)), ["experts.weight"])
    (wrapper,) = zoo.wrappers(holder)
    lora = expert_loras(holder["experts"])["weight"]
    assert (lora.num_experts, lora.out_features, lora.in_features) == (1, 4, 6)
    torch.testing.assert_close(lora.delta()[0], wrapper.get_delta_weight("default"))
    x = torch.randn(3, 4)
    assert torch.equal(holder["experts"](x), stock(holder["experts"], x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 5, 5)], ids=["oblong", "square"])
def test_one_expert_is_pefts_2d_arithmetic_or_refused(shape, transposed):
    """PEFT sends E = 1 through Linear.get_delta_weight: B @ A on the stored axes, which need not fit them."""
    holder = zoo.wrap(Lone(shape, transposed), ["experts.weight"])
    (wrapper,) = zoo.wrappers(holder)
    delta = wrapper.get_delta_weight("default")
    if delta.shape != shape[1:]:
        with pytest.raises(LayoutError, match="do not fit"):
            expert_loras(holder["experts"])
    else:
        lora = expert_loras(holder["experts"])["weight"]
        torch.testing.assert_close(stored_delta(lora, wrapper.get_base_layer())[0], delta)


def test_factors_that_cannot_belong_are_refused():
    holder = zoo.wrap(gated(), BOTH[:1])
    (wrapper,) = zoo.wrappers(holder)
    wrapper.r["default"] = 4
    with pytest.raises(LayoutError, match=r"'gate_up_proj'.*r \* E = 4 \* 5 were expected"):
        expert_loras(holder["experts"])
    wrapper.r["default"] = zoo.R
    A = wrapper.lora_A["default"]
    A.weight = nn.Parameter(A.weight[:, :-1])
    with pytest.raises(LayoutError, match="do not fit"):
        expert_loras(holder["experts"])


def test_an_orientation_nobody_declared_is_asked_for():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 6))

    holder = zoo.wrap(Plain(), ["experts.weight"])
    with pytest.raises(LayoutError, match="declare_layout"):
        expert_loras(holder["experts"])
    peft_moe_compat.declare_layout(Plain, is_transposed=True)
    lora = expert_loras(holder["experts"])["weight"]
    assert (lora.in_features, lora.out_features) == (4, 6)
    # One module may differ from its class.
    peft_moe_compat.declare_layout(zoo.wrappers(holder)[0].get_base_layer(), is_transposed=False)
    assert expert_loras(holder["experts"])["weight"].in_features == 6
    with pytest.raises(LayoutError, match="get_base_layer"):
        peft_moe_compat.declare_layout(holder["experts"], is_transposed=False)
    with pytest.raises(LayoutError, match="'False'; True, False or None"):
        peft_moe_compat.declare_layout(Plain, is_transposed="False")
    with pytest.raises(LayoutError, match="got 'Plain'"):
        peft_moe_compat.declare_layout("Plain", is_transposed=False)
    peft_moe_compat.declare_layout(Plain, is_transposed=None)
    assert peft_moe_compat.model.experts.is_transposed(Plain()) is None


def test_a_parameter_wrapped_twice_gets_both_updates():
    """PEFT up to 0.19 nests a second wrapper when get_peft_model runs twice under one adapter name."""
    holder = zoo.wrap(gated(), BOTH)
    inner = holder["experts"]
    outer = copy.deepcopy(inner)
    outer.base_layer = inner
    holder["experts"] = outer
    zoo.randomise(holder)
    experts = inner.get_base_layer()
    both = sum(w.get_delta_weight("default") for w in (outer, inner))
    lora = expert_loras(holder["experts"])["down_proj"]
    torch.testing.assert_close(stored_delta(lora, experts), both, rtol=1e-4, atol=1e-5)
    with pytest.warns(peft_moe_compat.CompatWarning, match="wrapped 1 expert parameters twice"):
        peft_moe_compat.report(nn.ModuleDict({"block": holder}))
    if wrappers.native_reason(outer) is None:
        given = inputs(holder["experts"])
        found = holder["experts"](*given.values())
        with torch.no_grad():
            experts.down_proj += both
            up = inner.base_layer
            experts.gate_up_proj += up.get_delta_weight("default")
        torch.testing.assert_close(found, experts(*given.values()), rtol=1e-4, atol=1e-4)


def test_what_is_no_wrapper_or_no_adapter_is_refused():
    with pytest.raises(LayoutError, match="needs the ParamWrapper"):
        expert_loras(gated())
    holder = zoo.wrap(gated(), BOTH)
    assert set(expert_loras(holder["experts"], "default")) == {"gate_up_proj", "down_proj"}


def test_gradients_reach_the_live_parameters():
    holder = zoo.wrap(gated(), BOTH)
    sum(lora.delta().square().sum() for lora in expert_loras(holder["experts"]).values()).backward()
    for wrapper in zoo.wrappers(holder):
        assert wrapper.lora_A["default"].weight.grad.count_nonzero() > 0
        assert wrapper.lora_B["default"].weight.grad.count_nonzero() > 0


def test_copies_and_pickles_run_on_their_own(stock):
    holder = zoo.wrap(gated(), BOTH)
    given = inputs(holder["experts"])
    expected = holder["experts"](*given.values())
    copied = copy.deepcopy(holder)
    restored = pickle.loads(pickle.dumps(holder))
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.zero_()
    for model in (copied, restored):
        assert torch.equal(model["experts"](*given.values()), expected)
        agree(model, stock)


def test_a_probe_that_fits_nothing_is_refused(monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    genuine = ParamWrapper.get_delta_weight
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", lambda self, name: 2 * genuine(self, name))
    with pytest.raises(peft_moe_compat.UnsupportedPeftError, match="matches no known layout"):
        probe.installed_rule()

    def broken(self, name):
        raise TypeError("another signature")

    monkeypatch.setattr(ParamWrapper, "get_delta_weight", broken)
    with pytest.raises(peft_moe_compat.UnsupportedPeftError, match="could not be probed .TypeError: another signature"):
        probe.installed_rule()
