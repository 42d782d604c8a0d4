"""Models whose experts transformers does not decorate: the fast path, with stock PEFT's losses and gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from support import zoo
from torch import nn

import peft_moe_compat
from peft_moe_compat.families import OWN_FORWARDS, family
from peft_moe_compat.model.wrappers import native_reason

_COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MODELS = {
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "llama4_text": {"intermediate_size_mlp": 48, "attn_temperature_tuning": False},
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 5,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "num_layers": 2,
        "num_hidden_layers": 4,
        **_LATENT,
    },
}


def models():
    """Those that the installed transformers has, with experts in stacks."""
    classes = {found.name for found in zoo.CLASSES}
    return [name for name in _MODELS if set(family(name.removesuffix("_text")).own_forward) & classes]


EACH = pytest.mark.parametrize("of", models())


def model_of(model_type, **lora):
    config = transformers.AutoConfig.for_model(model_type, **_COMMON | _MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=0.1)
    return zoo.peft_model(model.train(), **lora)


@EACH
def test_losses_and_gradients_are_stock_peft_s(of, stock):
    model, ids = model_of(of), zoo.token_ids()
    assert zoo.wrappers(model)
    assert {native_reason(wrapper) for wrapper in zoo.wrappers(model)} == {None}
    rows = [parameter for row in peft_moe_compat.report(model).rows for parameter in row.parameters]
    assert {row.path for row in rows} == {"grouped_mm"}
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), 1e-4)


@EACH
def test_what_else_the_fast_path_has(of):
    """A dropout; and no adapter for each sample, which the forwards have not."""
    model, ids = model_of(of, lora_dropout=0.5), zoo.token_ids()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(peft_moe_compat.LayoutError, match="adapter_names"):
        model.eval()(input_ids=ids, adapter_names=["default"] * len(ids))


@EACH
def test_their_forwards_are_put_back(of, stock):
    model = model_of(of)
    classes = {type(wrapper.get_base_layer()) for wrapper in zoo.wrappers(model)}
    assert {cls.__name__ for cls in classes} <= set(OWN_FORWARDS)
    here = {cls: cls.forward for cls in classes}
    assert all(stock(lambda cls=cls: cls.forward.__module__ == cls.__module__) for cls in classes)
    assert all(stock(lambda cls=cls: cls.forward is not here[cls]) for cls in classes)


def test_a_model_imported_after_activation_takes_it():
    script = """
import sys, peft, peft_moe_compat
from peft_moe_compat.families import OWN_FORWARDS
assert peft_moe_compat.is_active() and not set(m for m, _ in OWN_FORWARDS.values()) & set(sys.modules)
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts as Experts
assert hasattr(Experts.forward, "_peft_moe_compat_takes_lora")
peft_moe_compat.deactivate()
assert not hasattr(Experts.forward, "_peft_moe_compat_takes_lora")
peft_moe_compat.activate()
assert hasattr(Experts.forward, "_peft_moe_compat_takes_lora")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
