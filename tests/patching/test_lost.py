"""After loading, all LoRA of a file is in the model, on experts or not; else an error says what the two differ in.

The oracle of what loads is stock PEFT on a file that is right already.
"""

from __future__ import annotations

import ast
import re

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from support import zoo
from support.processes import result_of
from support.saved_adapters import FAMILY, HERE, assert_equal, change_file, flipped, rewrite, save

from peft_moe_compat.errors import AdapterError, LayoutError
from peft_moe_compat.patching.opening import written_by

ATTENTION = {"target_modules": ["q_proj", "o_proj"]}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def more(tensors):
    """What a model with one layer more has: the LoRA of all linears in layer 1 in a layer 2 too."""
    return tensors | {n.replace("layers.1.", "layers.2."): t for n, t in tensors.items() if "attn" in n or "mixer" in n}


def pairs(*modules):
    def change(tensors):
        for name in modules:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(32, 2)
        return tensors

    return change


def lora(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def assert_same_lora(model, expected):
    found, wanted = lora(model), lora(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_linears_that_no_target_reaches_are_missed(family, tmp_path):
    _, fresh = save(tmp_path, family, **ATTENTION)
    change_file(tmp_path, lambda tensors: tensors, target_modules=["o_proj"])
    names = {n for n in load_file(tmp_path / "adapter_model.safetensors") if "q_proj" in n or "q_b_proj" in n}
    if not names:  # deepseek_v3 has a q_proj of two parts
        with written_by(HERE):
            PeftModel.from_pretrained(fresh(), tmp_path)
        return
    with (
        written_by(HERE),
        pytest.raises(
            LayoutError, match=rf"^{len(names)} of \d+ LoRA tensors .* targets that reach all of them"
        ) as caught,
    ):
        PeftModel.from_pretrained(fresh(), tmp_path)
    assert all(
        name.removeprefix("base_model.model.").removesuffix(".weight") in str(caught.value)
        for name in sorted(names)[:4]
    )


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_layers_that_the_model_has_not_are_missed(low, tmp_path):
    expected, fresh = save(tmp_path, **ATTENTION)
    assert_same_lora(PeftModel.from_pretrained(fresh(), tmp_path, low_cpu_mem_usage=low), expected)
    change_file(tmp_path, more)
    with pytest.raises(LayoutError, match=r"model\.layers go up to number 2, this \w+'s to 1"):
        PeftModel.from_pretrained(fresh(), tmp_path, low_cpu_mem_usage=low)
    model = zoo.peft_model(fresh(), **ATTENTION)  # as a trainer resumes
    with pytest.raises(LayoutError, match=r"model\.layers go up to number 2"):
        model.load_adapter(tmp_path, "default")


def test_experts_of_layers_that_the_model_has_not_are_missed(tmp_path):
    _, fresh = save(tmp_path)
    change_file(tmp_path, lambda tensors: tensors | renamed("layers.1.", "layers.2.")(tensors))
    with pytest.raises(LayoutError, match=r"^4 of 12 LoRA tensors .* go up to number 2, this \w+'s to 1"):
        PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.extra_proj", "lm_tail", "model.layers.1.mlp.shared.w4"])
def test_modules_that_the_model_has_not_are_missed(name, tmp_path):
    _, fresh = save(tmp_path)
    change_file(tmp_path, pairs(name))
    with pytest.raises(LayoutError, match=rf"^2 of 10 .* has no module '{re.escape(name)}'"):
        PeftModel.from_pretrained(fresh(), tmp_path)


OWN_LOADER_SCRIPT = """
import json, pathlib, tempfile
import peft_moe_compat
from support.saved_adapters import change_file, save
from peft_moe_compat.errors import LayoutError

folder = pathlib.Path(tempfile.mkdtemp())
expected, fresh = save(folder, target_parameters=None, target_modules=["q_proj", "o_proj"])
model = fresh()
model.load_adapter(str(folder))
count = lambda model: sum("lora_" in name for name in model.state_dict())
assert count(model) == count(expected)
change_file(folder, lambda tensors: tensors | {n.replace("layers.1.", "layers.2."): t for n, t in tensors.items()})
try:
    fresh().load_adapter(str(folder))
except LayoutError as error:
    print("RESULT" + json.dumps(str(error)))
"""


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.5") and Version(peft.__version__) < Version("0.19"),
    reason="transformers 5.5 loads by peft.utils.transformers_weight_conversion, which PEFT 0.19 brought",
)
def test_what_transformers_own_loader_drops_is_missed():
    """In a process of its own: transformers 5.0 to 5.12 rewrite PEFT when this is called."""
    assert re.search(r"LoRA tensors .* did not reach the model", result_of(OWN_LOADER_SCRIPT))


def test_what_does_not_fit_may_be_left_out_on_request(tmp_path, stock):
    expected, fresh = save(tmp_path, **ATTENTION)

    def short(tensors):
        name = next(name for name in sorted(tensors) if "o_proj.lora_B" in name)
        return tensors | {name: tensors[name][:-1].contiguous()}

    change_file(tmp_path, short)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(fresh(), tmp_path, ignore_mismatched_sizes=True)
    assert_equal(model, expected)


def dense(**sizes):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("change", [lambda tensors: tensors, more], ids=["whole", "more than the model"])
def test_dense_models_and_their_adapters_are_upstreams_alone(change, tmp_path, stock, monkeypatch):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj"], use_dora=True)
    wrapped = peft.get_peft_model(dense(), config)
    zoo.randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    change_file(tmp_path, change)
    expected = stock(PeftModel.from_pretrained, dense(), tmp_path)
    monkeypatch.setattr("peft_moe_compat.patching.opening.open_adapter", lambda *given: pytest.fail("was opened"))
    assert_same_lora(PeftModel.from_pretrained(dense(), tmp_path), expected)


def test_lora_on_experts_in_a_dense_model_is_missed(tmp_path):
    peft.get_peft_model(dense(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    change_file(tmp_path, pairs("model.layers.0.mlp.experts.3.odd_proj"))
    with pytest.raises((LayoutError, AdapterError), match="expert"):
        PeftModel.from_pretrained(dense(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(target_modules=["q_proj"], lora_bias=True),
        peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, use_rslora=True),
    ],
    ids=["prompts", "ia3", "loha", "dora", "bias", "embedding", "saved", "dropout"],
)
def test_other_adapters_of_moe_models_load_as_without_the_library(config, tmp_path, stock):
    torch.manual_seed(0)
    family = "qwen3_moe" if "qwen3_moe" in zoo.FAMILIES else FAMILY
    base = zoo.tiny_model(family)
    state = base.state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}

    def fresh():
        model = zoo.tiny_model(family)
        model.load_state_dict(state)
        return model

    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    expected = stock(PeftModel.from_pretrained, fresh(), tmp_path).state_dict()
    found = PeftModel.from_pretrained(fresh(), tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found if "lora_" in name)


PREFIXES = ["model.language_model.layers", "backbone.layers", "layers"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("change", [lambda A, B, E: (A, B), flipped], ids=["as it is", "flipped"])
@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family != "nemotron_h"])
def test_another_prefix_is_named_with_the_key_mapping_that_mends_it(family, change, prefix, tmp_path):
    """nemotron_h was `backbone` once, and is renamed by upstream."""
    expected, fresh = save(tmp_path, family, **ATTENTION)
    rewrite(tmp_path, change)
    change_file(tmp_path, renamed(".model.model.layers", f".model.{prefix}"))
    with pytest.raises(LayoutError) as caught:
        PeftModel.from_pretrained(fresh(), tmp_path)
    text = str(caught.value)
    assert f"convert {tmp_path} OUT --to peft --model BASE --rename {prefix}=model.layers`" in text
    mapping = ast.literal_eval(re.search(r"key_mapping=(\{.*?\})", text)[1])
    assert_same_lora(PeftModel.from_pretrained(fresh(), tmp_path, key_mapping=mapping), expected)


@pytest.mark.parametrize("prefix", PREFIXES[:2])
def test_full_names_under_another_prefix_are_refused_before_anything_is_loaded(prefix, tmp_path):
    _, fresh = save(tmp_path)
    base = fresh()
    stacks = [name for name, parameter in base.named_parameters() if parameter.ndim == 3]
    change_file(
        tmp_path,
        renamed(".model.model.layers", f".model.{prefix}"),
        target_parameters=[name.replace("model.layers", prefix) for name in stacks],
    )
    with pytest.raises(AdapterError, match=f"--rename {re.escape(prefix)}=model.layers` renames them") as caught:
        PeftModel.from_pretrained(base, tmp_path)
    assert "key_mapping" not in str(caught.value)  # the targets would still be others
    assert not zoo.wrappers(base)


def test_names_that_upstream_itself_renames_are_no_loss(tmp_path, stock):
    if "nemotron_h" not in zoo.FAMILIES:
        pytest.skip("this transformers has no nemotron_h with fused experts")
    expected, fresh = save(tmp_path, "nemotron_h", **ATTENTION)
    change_file(tmp_path, renamed(".model.model.layers", ".model.backbone.layers"))
    model, error = None, None
    try:
        model = stock(PeftModel.from_pretrained, fresh(), tmp_path)
    except (RuntimeError, TypeError, ValueError) as upstream:
        error = upstream
    if error is None and all(torch.equal(t, lora(expected)[n]) for n, t in lora(model).items()):
        with written_by(HERE):
            assert_same_lora(PeftModel.from_pretrained(fresh(), tmp_path), expected)
        return
    with pytest.raises((LayoutError, *([type(error)] if error else []))):
        PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.parametrize("stamped", [True, False], ids=["stamped", ""])
def test_other_sizes_are_named(stamped, tmp_path):
    save(tmp_path)
    if not stamped:
        rewrite(tmp_path)
    other = {"num_local_experts": 4, "intermediate_size": 20}
    held = r"\(gate_up_proj of 4 experts, 32 in and 40 out; down_proj of 4 experts, 20 in and 32 out\)"
    with pytest.raises(AdapterError, match=rf"6 experts of 32 in- and 48 out.*{held}|lora_A 18 x .*rank 3.*{held}"):
        PeftModel.from_pretrained(zoo.tiny_model(FAMILY, **other), tmp_path)


def test_a_model_without_experts_and_another_family_are_named(tmp_path):
    _, fresh = save(tmp_path)
    path = next(name for name, _ in fresh().named_modules() if name.endswith("layers.0.mlp.experts"))
    with pytest.raises(AdapterError, match=rf"{re.escape(path)}.*this LlamaForCausalLM has no experts at all"):
        PeftModel.from_pretrained(dense(), tmp_path)
    change_file(tmp_path, renamed(f"{path}.", "model.layers.0.feed.experts."))
    with pytest.raises(LayoutError, match=r"^4 of 8 .* has no module 'model\.layers\.0\.feed\.experts'"):
        PeftModel.from_pretrained(fresh(), tmp_path)


def test_packed_experts_are_named_with_what_to_load_instead(tmp_path):
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    save(tmp_path, "gpt_oss")
    model = zoo.tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(AdapterError, match=r"mxfp4 weights cannot be wrapped.*Mxfp4Config\(dequantize=True\)"):
        PeftModel.from_pretrained(model, tmp_path)
