"""gpt-oss loaded packed, against the same checkpoint dequantised by transformers and trained by stock PEFT."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import mxfp4, zoo
from support.mxfp4 import STACKS
from support.processes import result_of
from transformers import AutoModelForCausalLM, Mxfp4Config, Trainer, TrainingArguments

import peft_moe_compat
from peft_moe_compat.errors import AdapterError, ParallelismError, PeftMoeCompatError
from peft_moe_compat.quantising.mxfp4 import Mxfp4Weight

FLOAT32 = 2e-5
pytestmark = pytest.mark.skipif(not zoo.FUSED, reason="the quantisers of transformers 4 cannot say how to load")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    return mxfp4.publish(tmp_path_factory.mktemp("gpt_oss"))


def load(folder, config, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def packed(folder, **kwargs):
    return load(folder, peft_moe_compat.PackedMxfp4Config(), **kwargs)


def dequantised(folder, dtype):
    """transformers 5.0 to 5.12 dequantise to bfloat16 whatever is asked for, which is exact."""
    return load(folder, Mxfp4Config(dequantize=True), dtype=dtype).to(dtype)


def experts_of(model):
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def test_nothing_is_dequantised_while_loading_and_all_that_is_held_is_what_was_published(published, monkeypatch):
    monkeypatch.delattr(Mxfp4Weight, "forward")
    model, info = packed(published, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    held, file = model.state_dict(), load_file(published / "model.safetensors")
    in_experts = [sum(t.nbytes for name, t in each.items() if ".experts." in name) for each in (held, file)]
    assert in_experts[0] == in_experts[1]
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.uint8)


# VmHWM, not ru_maxrss: that one starts at the parent's own size.
_PEAK = """
import json, sys, torch, transformers, peft_moe_compat
from transformers.models.gpt_oss import modeling_gpt_oss
import transformers.integrations.mxfp4

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

config = peft_moe_compat.PackedMxfp4Config()
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
before = peak()
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config, dtype=torch.bfloat16)
print("RESULT", json.dumps(peak() - before))
"""


def test_the_peak_of_memory_while_loading_is_what_the_file_has(published, tmp_path):
    large = mxfp4.publish(tmp_path, hidden_size=1024, intermediate_size=1024) / "model.safetensors"
    size = large.stat().st_size  # 21 MB; the experts alone are 76 MB in bfloat16
    assert result_of(_PEAK, published, tmp_path) < 1.1 * size + (8 << 20)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_logits_are_those_of_the_dequantised_model(published, dtype, implementation, stock):
    model, plain = packed(published, dtype=dtype), dequantised(published, dtype)
    for ours, theirs in zip(experts_of(model), experts_of(plain), strict=True):
        for name in STACKS:
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == dtype
    for each in (model, plain):
        each.set_experts_implementation(implementation)
    ids = zoo.token_ids()
    expected = stock(plain, ids).logits
    for logits in (stock(model, ids).logits, model(ids).logits):
        assert (logits - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_equal_stock_peft_on_the_dequantised_model(published, checkpointing, tmp_path, stock):
    ids = zoo.token_ids()
    ours = zoo.peft_model(packed(published, dtype=torch.float32).train(), target_modules=["q_proj"])
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(dequantised(published, torch.float32).train(), tmp_path, is_trainable=True)
    for model in (ours, theirs) if checkpointing else ():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = stock(zoo.loss_and_gradients, theirs, ids)
    for _ in range(2):  # nothing accumulates
        zoo.assert_same(zoo.loss_and_gradients(ours, ids), expected, FLOAT32)
    assert sum("lora_" in name for name in expected) == 12


def test_a_training_step_changes_the_lora_and_nothing_that_was_published(published):
    model = zoo.peft_model(packed(published, dtype=torch.bfloat16).train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model(input_ids=(ids := zoo.token_ids()), labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_trainer_takes_the_model(published, tmp_path):
    model = zoo.peft_model(packed(published, dtype=torch.bfloat16).train())
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, gradient_checkpointing=True, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in zoo.token_ids(8)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)


def test_the_config_is_copied_and_pickled_like_any_other():
    config = pickle.loads(pickle.dumps(peft_moe_compat.PackedMxfp4Config()))
    assert type(config) is peft_moe_compat.PackedMxfp4Config
    assert config.to_dict() == peft_moe_compat.PackedMxfp4Config().to_dict()


def test_report_says_what_is_stored_and_that_it_runs_in_the_librarys_forward(published):
    model = zoo.peft_model(packed(published, dtype=torch.bfloat16))
    rows = [p for row in peft_moe_compat.report(model).rows for p in row.parameters]
    assert {(p.name, p.format, p.path) for p in rows} == {(name, "mxfp4", "grouped_mm") for name in STACKS}
    assert [tuple(p.shape) for p in rows] == [(6, 64, 192), (6, 96, 64)] * 2


# Files


ENDINGS = [f"experts.{name}" for name in STACKS]


def test_the_files_of_an_adapter_are_those_that_stock_peft_saves_from_a_plain_model(published, tmp_path, stock):
    """Tensors, bit for bit, and config. No stack is dequantised to put LoRA on it."""
    names = []
    for folder, base, run in (
        (tmp_path / "ours", packed(published, dtype=torch.bfloat16), lambda function, *args: function(*args)),
        (tmp_path / "theirs", dequantised(published, torch.bfloat16), stock),
    ):
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(Mxfp4Weight, "forward")
            config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=ENDINGS)
            model = run(get_peft_model, base, config)
        run(model.save_pretrained, folder)
        names.append([name for name, p in model.named_parameters() if p.requires_grad])
    assert names[0] == names[1]
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [(tmp_path / each / "adapter_config.json").read_text(encoding="utf-8") for each in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_an_adapter_of_a_plain_model_loads_onto_the_packed_one(published, tmp_path, stock):
    ids = zoo.token_ids()
    plain = zoo.peft_model(dequantised(published, torch.float32), target_parameters=ENDINGS)
    plain.save_pretrained(tmp_path)
    expected = stock(plain, ids).logits
    model = PeftModel.from_pretrained(packed(published, dtype=torch.float32), tmp_path)
    assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_module_is_what_it_was_when_peft_refuses_a_config(published):
    model = packed(published, dtype=torch.float32)
    before = [(name, [*module._parameters], [*module._modules]) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="lora_bias"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=ENDINGS, lora_bias=True))
    assert [(name, [*module._parameters], [*module._modules]) for name, module in model.named_modules()] == before


def test_what_is_saved_is_what_was_published_and_loads_again(published, tmp_path):
    model = packed(published, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_published(tmp_path, published)
    again = packed(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def assert_published(folder, published):
    saved, file = ({}, load_file(published / "model.safetensors"))
    for part in folder.glob("*.safetensors"):
        saved |= load_file(part)
    assert saved.keys() == file.keys()
    assert all(torch.equal(saved[name], file[name]) for name in file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == mxfp4.CONFIG


# Elsewhere than in memory


def spread(model_folder, where, offload):
    """The second layer elsewhere than on the CPU."""
    here = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    devices = dict.fromkeys(here, "cpu") | {"model.layers.1": where}
    return packed(model_folder, dtype=torch.float32, device_map=devices, offload_folder=offload)


def test_a_layer_offloaded_to_disk_gives_the_same_logits(published, tmp_path):
    ids = zoo.token_ids()
    expected = packed(published, dtype=torch.float32)(ids).logits
    model = spread(published, "disk", tmp_path / "offloaded")
    assert experts_of(model)[1].parametrizations.down_proj.original.is_meta
    assert torch.equal(model(ids).logits, expected)


def test_an_automatic_device_map_counts_packed_bytes(published):
    model = packed(published, dtype=torch.float32, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# Refused


def test_a_checkpoint_without_mxfp4_is_refused(tmp_path):
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(PeftMoeCompatError, match="this one has none. Load it without the config"):
        packed(tmp_path)


def test_another_model_is_refused(published, tmp_path):
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": mxfp4.CONFIG}), encoding="utf-8")
    with pytest.raises(PeftMoeCompatError, match="Qwen3MoeForCausalLM has no GptOssExperts"):
        packed(tmp_path)


@pytest.mark.parametrize("gone", ["gate_up_proj_blocks", "down_proj_scales", "down_proj_bias"])
def test_a_checkpoint_that_lacks_a_tensor_of_experts_is_refused(gone, tmp_path):
    mxfp4.publish(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(f"1.mlp.experts.{gone}")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(PeftMoeCompatError, match=r"nothing for 1 tensors of experts, model\.layers\.1\.mlp\.experts"):
        packed(tmp_path)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_into_packed_experts_is_refused_before_anything_is_merged(how, published):
    model = zoo.peft_model(packed(published, dtype=torch.float32), target_modules=["q_proj"])
    ids = zoo.token_ids()
    before = model(ids).logits
    with pytest.raises(AdapterError, match=r"\w+_proj is stored as mxfp4.*`peft-moe-compat merge BASE ADAPTER"):
        getattr(model, how)()
    assert torch.equal(model(ids).logits, before)


def test_dequantising_the_loaded_model_is_refused_with_how_to_load_it(published):
    with pytest.raises(PeftMoeCompatError, match=r"Mxfp4Config\(dequantize=True\)"):
        packed(published).dequantize()


def test_a_model_spread_over_ranks_is_refused(published):
    model = packed(published)
    model._device_mesh = object()
    with pytest.raises(ParallelismError, match="tp_plan or distributed_config"):
        model.hf_quantizer.postprocess_model(model)
