"""dbrx, whose experts lie below each other in matrices: stock PEFT wraps them, and its forward cannot run.

What is expected is transformers' own forward of the weights plus PEFT's own update of them.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from support import zoo
from torch import nn
from torch.func import functional_call
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU, DbrxExperts

import peft_moe_compat
from peft_moe_compat import AdapterError, NoExpertParametersError
from peft_moe_compat.model.wrappers import native_reason
from peft_moe_compat.releases import installed_issue

E, TOP_K, H, INTERMEDIATE = 5, 2, 16, 12
NAMES = ["mlp.w1", "mlp.v1", "mlp.w2"]
TURNED = "x.matmul(expert_w1)" in inspect.getsource(DbrxExpertGLU.forward)
rightly = pytest.mark.skipif(TURNED, reason="transformers 5.0 to 5.14 multiplies dbrx's experts the wrong way round")


def experts_of(dtype=torch.float32):
    sizes = {"hidden_size": H, "ffn_hidden_size": INTERMEDIATE, "moe_num_experts": E, "ffn_act_fn": {"name": "silu"}}
    takes = inspect.signature(DbrxExperts.__init__).parameters
    experts = DbrxExperts(**({"config": SimpleNamespace(**sizes)} if "config" in takes else sizes))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def wrapped_experts(targets=NAMES, dtype=torch.float32, **lora):
    experts = experts_of(dtype)
    holder = nn.ModuleDict({"ffn": experts})
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets, **lora), holder)
    zoo.randomise(holder)
    return holder["ffn"]


def routed(dtype=torch.float32, length=4):
    """Hidden states, and what else the class's forward takes, by position."""
    index, weights = zoo.routing(E, 2 * length, TOP_K)
    x = torch.randn(2, length, H, dtype=dtype)
    by_name = {"top_k_index": index, "top_experts": index, "weights": weights}
    by_name |= dict.fromkeys(("top_k_weights", "top_weights"), weights.to(dtype))
    return x, [by_name[name] for name in list(inspect.signature(DbrxExperts.forward).parameters)[2:]]


def outcome(run, experts, x, others):
    """Output, and the gradients of the hidden states and of the LoRA."""
    experts.zero_grad()
    x = x.detach().requires_grad_()
    out = run(x, *others)
    (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad} | found


def expected(experts, x, others, adapters=("default",)):
    """Of transformers' forward, with the weights that PEFT's updates make; computed in float64."""
    plain, weights = experts_of(torch.float64), {}
    for wrapper in zoo.wrappers(experts):
        weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name).detach().double()
        weights[f"mlp.{wrapper.parameter_name}"] = sum((wrapper.get_delta_weight(a) for a in adapters), weight)
    mlp = zoo.wrappers(experts)[0].get_base_layer()
    for name in ("w1", "v1", "w2"):
        weights.setdefault(f"mlp.{name}", getattr(mlp, name).detach().double())

    def run(x, *rest):
        rest = [t.double() if t.is_floating_point() else t for t in rest]
        return functional_call(plain, weights, (x.double(), *rest))

    return outcome(run, experts, x, others)


def test_where_transformers_computes_it_wrongly_it_is_refused():
    assert bool(installed_issue("dbrx_turned")) == TURNED
    with pytest.raises(NoExpertParametersError, match="wrong way round") if TURNED else nullcontext():
        assert peft_moe_compat.expert_parameters(nn.ModuleDict({"experts": experts_of()})) == NAMES


@rightly
@pytest.mark.parametrize("targets", [NAMES, ["mlp.w1"], ["mlp.v1", "mlp.w2"], ["mlp.w2"]], ids=str)
def test_output_and_gradients_are_of_pefts_update(targets):
    experts = wrapped_experts(targets)
    assert {native_reason(wrapper) for wrapper in zoo.wrappers(experts)} == {None}
    x, others = routed()
    zoo.assert_same(outcome(experts, experts, x, others), expected(experts, x, others), 1e-5)


@rightly
def test_several_adapters_add_up():
    experts = wrapped_experts()
    for wrapper in zoo.wrappers(experts):
        zoo.add_adapter(wrapper, "other", 2)
        wrapper.set_adapter(["default", "other"])
    zoo.randomise(experts)
    x, others = routed()
    theirs = expected(experts, x, others, ("default", "other"))
    zoo.assert_same(outcome(experts, experts, x, others), theirs, 1e-5)


@rightly
def test_without_lora_at_work_it_is_the_base():
    experts = wrapped_experts()
    x, others = routed()
    mlp = zoo.wrappers(experts)[0].get_base_layer()
    weights = {f"mlp.{name}": getattr(mlp, name) for name in ("w1", "v1", "w2")}
    base = functional_call(experts_of(), weights, (x, *others))
    updated = experts(x, *others)
    assert (updated - base).abs().max() > 0.1
    for wrapper in zoo.wrappers(experts):
        wrapper.enable_adapters(False)
    torch.testing.assert_close(experts(x, *others), base, rtol=1e-5, atol=1e-5)
    for wrapper in zoo.wrappers(experts):
        wrapper.enable_adapters(True)
        wrapper.merge()
    torch.testing.assert_close(experts(x, *others), updated, rtol=1e-4, atol=1e-4)


@rightly
def test_in_bfloat16_the_error_is_that_of_the_updated_weights():
    experts = wrapped_experts(dtype=torch.bfloat16)
    x, others = routed(torch.bfloat16, length=200)
    exact = expected(experts, x, others)["output"]
    ours = experts(x, *others).double()
    for wrapper in zoo.wrappers(experts):
        wrapper.merge()
    weights = {f"mlp.{n}": getattr(zoo.wrappers(experts)[0].get_base_layer(), n) for n in ("w1", "v1", "w2")}
    rounded = functional_call(experts_of(torch.bfloat16), weights, (x, *others)).double()
    assert (ours - exact).norm() <= 1.05 * (rounded - exact).norm()


@rightly
def test_a_dropout_is_that_of_its_seed():
    experts = wrapped_experts(lora_dropout=0.5).train()
    x, others = routed()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(experts(x, *others))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def tiny_model():
    ffn = {"ffn_hidden_size": 32, "moe_num_experts": E, "moe_top_k": TOP_K, "ffn_act_fn": {"name": "silu"}}
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=61, pad_token_id=0, ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "wte" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@rightly
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model_trains_reloads_and_merges(checkpointing, tmp_path, stock):
    targets = peft_moe_compat.expert_parameters(tiny_model())
    assert targets == NAMES
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=[], target_parameters=targets)).train()
    zoo.randomise(model, std=0.05)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    rows = [p for row in peft_moe_compat.report(model).rows for p in row.parameters]
    assert {p.path for p in rows} == {"grouped_mm"}
    ids = zoo.token_ids()
    gradients = zoo.loss_and_gradients(model, ids)
    assert all(gradient.any() for gradient in gradients.values())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        for load in (lambda function: function(), stock):
            loaded = load(lambda: PeftModel.from_pretrained(tiny_model(), tmp_path).eval())
            torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=0, atol=0)
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(stock(merged, input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="nothing to inspect or convert"):
        peft_moe_compat.inspect_adapter(tmp_path)
