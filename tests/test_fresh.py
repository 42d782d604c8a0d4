"""A fresh adapter is what PEFT itself would save, and what it loads."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import zoo
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_moe_compat
from peft_moe_compat import AdapterError, NoExpertParametersError
from peft_moe_compat.cli.main import app
from peft_moe_compat.fresh import write_fresh_adapter


@pytest.fixture(params=zoo.FAMILIES)
def base(request, tmp_path):
    """Folder of a tiny model."""
    folder = tmp_path / "base"
    zoo.tiny_model(request.param).save_pretrained(folder)
    return folder


def read(folder):
    """Its tensors, and its config with lists in order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    ordered = {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}
    return load_file(folder / "adapter_model.safetensors"), ordered


@pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"]])
def test_it_is_what_peft_saves(modules, base, tmp_path):
    before = torch.random.get_rng_state()
    written = write_fresh_adapter(base, tmp_path / "fresh", rank=2, alpha=3, target_modules=modules, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 2, "lora_alpha": 3, "target_modules": modules, "task_type": "CAUSAL_LM"}
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(target_parameters=peft_moe_compat.expert_parameters(model), **options))
    adapted.save_pretrained(tmp_path / "peft")
    (ours, our_config), (theirs, their_config) = read(tmp_path / "fresh"), read(tmp_path / "peft")
    assert our_config == their_config
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()
    assert written.numbers == sum(tensor.numel() for tensor in ours.values())
    assert written.layers == len(ours) / 2


@zoo.needs_registry
def test_a_dropout_is_that_of_its_config(base, tmp_path, stock):
    write_fresh_adapter(base, tmp_path / "fresh", rank=2, dropout=0.25)
    assert read(tmp_path / "fresh")[1]["lora_dropout"] == 0.25

    def load():
        model = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(model, tmp_path / "fresh", is_trainable=True)

    assert {wrapper.lora_dropout["default"].p for wrapper in zoo.wrappers(load())} == {0.25}
    with pytest.raises(ValueError, match="lora_dropout"):
        stock(load)


def test_no_generator_is_seeded_but_the_one_that_is_put_back(tmp_path, monkeypatch):
    """`torch.manual_seed` seeds every device's."""
    seeded = []
    for device in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(device, "manual_seed_all" if device is not torch.mps else "manual_seed", seeded.append)
    zoo.tiny_model(zoo.FAMILIES[0]).save_pretrained(tmp_path / "base")
    seeded.clear()
    write_fresh_adapter(tmp_path / "base", tmp_path / "fresh", rank=2)
    assert not seeded


def test_stock_peft_and_the_guard_load_it_and_nothing_changes(base, tmp_path, stock):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = zoo.token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    write_fresh_adapter(base, tmp_path / "fresh", rank=2)

    def logits():
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "fresh", is_trainable=True
        )
        assert len(zoo.wrappers(adapted)) > 0
        assert any(weight.requires_grad and weight.count_nonzero() for weight in adapted.parameters())
        with torch.no_grad():
            return adapted.eval()(input_ids=ids).logits

    torch.testing.assert_close(logits(), expected)
    torch.testing.assert_close(stock(logits), expected)


def test_one_layer_at_a_time_is_in_memory(base):
    from peft_moe_compat import fresh
    from peft_moe_compat.adapters.base_model import load_base_model
    from peft_moe_compat.proving import model_without_weights

    _, bare = model_without_weights(load_base_model(base))
    targets = peft_moe_compat.expert_parameters(bare)
    wrapped = fresh._adapted(bare, r=2, target_modules=[], target_parameters=targets)
    streamed = fresh._initialised(fresh._layers(wrapped), 0)
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in streamed}) == 2  # of lora_A, and of lora_B
    assert all(weight.is_meta for weight in wrapped.parameters())


def test_what_cannot_be_is_refused(tmp_path):
    base, out = tmp_path / "base", tmp_path / "fresh"
    zoo.tiny_model(zoo.FAMILIES[0]).save_pretrained(base)
    with pytest.raises(AdapterError, match="PEFT refuses this adapter of .*ForCausalLM: .*nonsense"):
        write_fresh_adapter(base, out, rank=2, target_modules=["nonsense"], target_parameters=["nonsense.weight"])
    with pytest.raises(AdapterError, match="PEFT refuses this adapter"):
        write_fresh_adapter(base, out, rank=0)
    with pytest.raises(AdapterError, match=r"dropout is 1.0; a probability"):
        write_fresh_adapter(base, out, rank=2, dropout=1.0)
    with pytest.raises(AdapterError, match="reach more than linear layers"):
        write_fresh_adapter(base, out, rank=2, target_modules=["embed_tokens"])
    assert not out.exists()
    out.mkdir()
    with pytest.raises(AdapterError, match="exists already"):
        write_fresh_adapter(base, out, rank=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_type"}, "No model can be built .* has no class for it"),
        ({"architectures": None, "transformers_version": None}, "No model can be built .* has no class for it"),
        ({"num_hidden_layers": 10**9}, "No model can be built .* counts more"),
        ({"vocab_size": -1}, "No model can be built .*ForCausalLM of transformers fails: .*negative"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(config, message, tmp_path):
    base = tmp_path / "base"
    zoo.tiny_model(zoo.FAMILIES[0]).save_pretrained(base)
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(AdapterError, match=message):
        write_fresh_adapter(base, tmp_path / "fresh", rank=2)


def test_a_model_without_fused_experts_is_told_so(tmp_path):
    base = tmp_path / "base"
    zoo.tiny_model(zoo.FAMILIES[0]).save_pretrained(base)
    file = base / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    file.write_text(json.dumps(config))
    with pytest.raises(NoExpertParametersError, match="LlamaForCausalLM has no routed expert parameter"):
        write_fresh_adapter(base, tmp_path / "fresh", rank=2)


def test_targets_that_reach_nothing_are_named(tmp_path):
    base = tmp_path / "base"
    zoo.tiny_model(zoo.FAMILIES[0]).save_pretrained(base)
    written = write_fresh_adapter(base, tmp_path / "fresh", rank=2, target_modules=["q_proj", "nosuch", "a.v_proj"])
    assert written.unreached == ("nosuch", "a.v_proj")
    command = ["init", str(base), str(tmp_path / "again"), "--rank", "2", "--target-modules", "q_proj,nosuch"]
    assert "nothing in the model is called 'nosuch'" in CliRunner().invoke(app, command).output
