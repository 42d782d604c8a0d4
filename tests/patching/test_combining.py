"""`add_weighted_adapter` on experts: the update of the new adapter against the sum of the others'."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import zoo

import peft_moe_compat
from peft_moe_compat.releases import installed_versions, known_issues

VERSIONS = installed_versions("peft", "transformers")
pytestmark = pytest.mark.skipif(
    "second_adapter" in {issue.code for issue in known_issues(**VERSIONS)},
    reason="PEFT before 0.20 takes one adapter on parameters",
)
FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)


def two_adapters(family, ranks=(3, 5), **config):
    model = zoo.peft_model(zoo.tiny_model(family), adapter_name="one", r=ranks[0], **config).eval()
    targets = peft_moe_compat.expert_parameters(model)
    model.add_adapter("two", LoraConfig(r=ranks[1], target_modules=[], target_parameters=targets, **config))
    zoo.randomise(model)
    return model


def deltas(wrapper, *names):
    return [wrapper.get_delta_weight(name).detach() for name in names]


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@FAMILIES
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("how", "options"), [("cat", {}), ("svd", {"svd_rank": 8}), ("svd", {"svd_rank": 40})], ids=str
)
def test_the_sum_is_exact(family, how, options, rslora):
    """The rank of a sum is at most 3 + 5."""
    model = two_adapters(family, use_rslora=rslora)
    model.add_weighted_adapter(["one", "two"], [0.7, -1.5], "sum", combination_type=how, **options)
    for wrapper in zoo.wrappers(model):
        one, two, found = deltas(wrapper, "one", "two", "sum")
        assert_near(found, 0.7 * one - 1.5 * two)


@pytest.mark.parametrize("order", [["attention", "stacks", "both"], ["stacks", "attention"], ["attention", "stacks"]])
@pytest.mark.parametrize(
    ("how", "options"), [("cat", {}), ("svd", {"svd_rank": 9}), ("linear", {}), ("ties_svd", {"density": 1.0})], ids=str
)
def test_adapters_of_other_targets_are_all_in_the_sum(order, how, options, tmp_path):
    """The oracle is the sum of the updates, and PEFT's own choice of linear layers: those of all adapters."""
    base = zoo.tiny_model("qwen3_moe" if zoo.FUSED else zoo.FAMILIES[0])
    parameters = peft_moe_compat.expert_parameters(base)
    linear, none = {"target_modules": ["q_proj"]}, {"target_modules": []}
    targets = {
        "attention": linear,
        "stacks": none | {"target_parameters": parameters},
        "both": linear | {"target_parameters": parameters},
    }
    configs = {name: LoraConfig(r=3, lora_alpha=3, **targets[name]) for name in order}
    model = get_peft_model(base, configs[order[0]], adapter_name=order[0]).eval()
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    zoo.randomise(model)
    weights = [0.7, -1.5, 0.4][: len(order)]
    before = {name: model.peft_config[name].to_dict() for name in order}
    model.add_weighted_adapter(order, weights, "sum", combination_type=how, **options)
    layers = [*zoo.wrappers(model), *(m for n, m in model.named_modules() if n.endswith("q_proj"))]
    for layer in layers:
        held = {name: weight for name, weight in zip(order, weights, strict=True) if name in layer.lora_A}
        if how in ("cat", "svd"):
            expected = sum(weight * layer.get_delta_weight(name).detach() for name, weight in held.items())
            assert_near(layer.get_delta_weight("sum").detach(), expected)
        assert layer.lora_B["sum"].weight.count_nonzero()
    assert {name: model.peft_config[name].to_dict() for name in order} == before
    assert sorted(model.peft_config["sum"].target_parameters) == sorted(parameters)
    assert model.peft_config["sum"].target_modules == {"q_proj"}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    ids = zoo.token_ids()
    model.set_adapter("sum")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "sum").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_one_alone_is_scaled():
    model = two_adapters(zoo.FAMILIES[0])
    model.add_weighted_adapter(["two"], [-0.5], "scaled", combination_type="cat")
    for wrapper in zoo.wrappers(model):
        two, half = deltas(wrapper, "two", "scaled")
        assert_near(half, -0.5 * two)


@pytest.mark.parametrize("how", ["linear", "magnitude_prune"])
def test_sums_of_factors_are_peft_s(how):
    """Of factors, so that products of one's lora_A and another's lora_B are in it: as for PEFT's Linear."""
    model = two_adapters(zoo.FAMILIES[0], (3, 3))
    options = {} if how == "linear" else {"density": 1.0}
    model.add_weighted_adapter(["one", "two"], [0.7, 1.5], "sum", combination_type=how, **options)
    for wrapper in zoo.wrappers(model):
        for held in (wrapper.lora_A, wrapper.lora_B):
            expected = sum((scaling * weight) ** 0.5 * held[name].weight for name, weight, scaling in weighted(wrapper))
            assert_near(held["sum"].weight, expected)


def weighted(wrapper):
    return [(name, weight, wrapper.scaling[name]) for name, weight in (("one", 0.7), ("two", 1.5))]


def test_a_truncated_svd_is_the_nearest_of_its_rank_for_every_expert():
    model = two_adapters(zoo.FAMILIES[0])
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=2)
    for wrapper in zoo.wrappers(model):
        one, two, found = deltas(wrapper, "one", "two", "sum")
        U, S, V = torch.linalg.svd(one + two, full_matrices=False)
        assert_near(found, U[..., :2] * S[:, None, :2] @ V[:, :2])


def test_without_the_library_peft_refuses(stock):
    model = two_adapters(zoo.FAMILIES[0])
    with pytest.raises(ValueError, match="nn.Parameter"):
        stock(model.add_weighted_adapter, ["one", "two"], [1.0, 1.0], "sum")
    assert model.peft_config["one"].target_parameters
