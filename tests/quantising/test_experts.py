"""Experts that bitsandbytes packs while a model loads, or in place: values, files, training, what is refused.

The oracle is a plain model whose stacks bitsandbytes itself has quantised and dequantised, and stock PEFT on it.
"""

from __future__ import annotations

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from support import processes, zoo
from torch import nn

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 is refused: test_refused.py")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: test_refused.py")

from bitsandbytes import functional
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_moe_compat
from peft_moe_compat import BitsAndBytesExpertsConfig, NoExpertParametersError, PeftMoeCompatError, quantize_experts
from peft_moe_compat.quantising import packing

H, I = 128, 128  # no row shorter than a block: bitsandbytes dequantises some of those wrongly with AVX-512
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
FORMATS = {
    "nf4": {"experts": "nf4"},
    "nf4, nested": {"experts": "nf4", "double_quant": True},
    "fp4, blocks of 128": {"experts": "fp4", "blocksize": 128},
    "int8": {"experts": "int8"},
}
LINEARS = {"none": None, "4-bit": {"load_in_4bit": True}, "8-bit": {"load_in_8bit": True}}
PROJECTIONS = ("gate_up_proj", "down_proj")


def tiny(family):
    sizes = {"moe_intermediate_size": I} if family == "qwen3_moe" else {"intermediate_size": I}
    return zoo.tiny_model(family, hidden_size=H, **sizes).to(torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        made[family] = tmp_path_factory.mktemp(family)
        tiny(family).save_pretrained(made[family])
    return made


def load(folder, config=None, dtype=torch.bfloat16):
    given = {} if config is None else {"quantization_config": config}  # a None would hide what was saved
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).train()


def config_of(stored, linears="none"):
    of_linears = None if LINEARS[linears] is None else BitsAndBytesConfig(**LINEARS[linears])
    return BitsAndBytesExpertsConfig(**FORMATS[stored], linears=of_linears)


def stacks_of(model):
    """(module, parameter) of each; of a model that PEFT has wrapped too."""
    found = [(m, name) for n, m in model.named_modules() if n.endswith("experts") for name in PROJECTIONS]
    found = [(m.get_base_layer() if hasattr(m, "get_base_layer") else m, name) for m, name in found]
    assert len(found) == 4
    return found


def rounded(weight, experts, double_quant=False, blocksize=64):
    """What is left of a weight, by bitsandbytes' functions alone."""
    if experts == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).half())
        return functional.int8_vectorwise_dequant(packed, scales).view(weight.shape).to(weight.dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=experts
    )
    return functional.dequantize_4bit(packed, state)


def plain_twin(folder, stored, linears="none", dtype=torch.bfloat16):
    """The model without packed experts, but with their values."""
    config = None if LINEARS[linears] is None else BitsAndBytesConfig(**LINEARS[linears])
    model = load(folder, config, dtype)
    for experts, name in stacks_of(model):
        weight = experts._parameters[name]
        lost = rounded(weight.detach(), **FORMATS[stored])
        assert 0 < (lost - weight).abs().max() < 0.2
        weight.data.copy_(lost)
    return model


def logits(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=zoo.token_ids()).logits


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linears", LINEARS)
def test_loaded_saved_and_loaded_again_it_computes_what_bitsandbytes_kept_of_the_weights(
    family, stored, linears, checkpoints, tmp_path
):
    if family != "qwen3_moe" and linears == "8-bit":
        linears = "none"
    model, plain = (
        load(checkpoints[family], config_of(stored, linears)),
        plain_twin(checkpoints[family], stored, linears),
    )
    assert type(model.model.layers[0].self_attn.q_proj) is type(plain.model.layers[0].self_attn.q_proj)
    assert {p.dtype for m, name in stacks_of(model) for p in m.parametrizations[name].parameters()} == {
        torch.int8 if stored == "int8" else torch.uint8
    }
    expected = logits(plain)
    assert torch.equal(logits(model), expected)
    for generation in range(2):  # transformers by itself cannot save a 4-bit model again that it has loaded
        model.save_pretrained(tmp_path / str(generation))
        model = load(tmp_path / str(generation))
        assert torch.equal(logits(model), expected)
    files = [load_file(tmp_path / name / "model.safetensors") for name in "01"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert sum(t.nbytes for n, t in files[0].items() if "parametrizations" in n) < 0.6 * sum(
        m._parameters[name].nbytes for m, name in stacks_of(plain)
    )


def test_a_process_that_only_imports_the_library_loads_what_was_saved(checkpoints, tmp_path):
    model = load(checkpoints["qwen3_moe"], config_of("nf4, nested", "4-bit"))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes_experts"
    assert stored["linears"]["load_in_4bit"] is True
    script = """
import json, sys
import peft_moe_compat
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
config = model.config.quantization_config.to_dict()
print("RESULT", json.dumps([config["experts"], config["double_quant"], sum(p.nbytes for p in model.parameters())]))
"""
    assert processes.result_of(script, tmp_path) == [
        "nf4",
        True,
        sum(p.nbytes for p in model.parameters()),
    ]


@pytest.mark.parametrize("stored", [name for name in FORMATS if name != "int8"])
@pytest.mark.parametrize("shape", [(5, 64, 64), (3, 7, 11), (1, 2, 64)])
@pytest.mark.parametrize("chunk", [4096, 2**24])
def test_a_4bit_stack_is_left_as_bitsandbytes_own_function_leaves_it(stored, shape, chunk, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", chunk)
    options = FORMATS[stored]
    ours, theirs = nn.Module(), nn.Module()
    for module in (ours, theirs):
        torch.manual_seed(2)
        module.weight = nn.Parameter(torch.randn(shape).bfloat16())
    kept = packing.Packing(options["experts"], options.get("double_quant", False), options.get("blocksize", 64))
    packing.pack(ours, "weight", ours.weight.detach(), kept)
    replace_parameter_4bit(
        theirs, "weight", options.get("double_quant", False), options["experts"], options.get("blocksize", 64)
    )
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert ours.parametrizations.weight[0].quant_state == theirs.parametrizations.weight[0].quant_state
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_an_int8_stack_has_the_rows_and_scales_of_bitsandbytes(chunk, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", chunk)
    weight = torch.randn(3, 4, 32).bfloat16()
    packed, scales, _ = functional.int8_vectorwise_quant(weight.reshape(-1, 32).half())
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    packing.pack(module, "weight", weight, packing.Packing("int8"))
    assert torch.equal(module.parametrizations.weight.original, packed.view(3, 4, 32))
    assert torch.equal(module.parametrizations.weight[0].scales, scales.view(3, 4))


def test_what_becomes_of_linear_layers_is_a_config():
    with pytest.raises(PeftMoeCompatError, match="linears is a dict; a BitsAndBytesConfig"):
        peft_moe_compat.BitsAndBytesExpertsConfig("nf4", linears={"load_in_4bit": True})


def test_int8_refuses_what_float16_cannot_hold():
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((1, 2, 8), 1e5))
    with pytest.raises(PeftMoeCompatError, match="beyond 65504"):
        packing.pack(module, "weight", module.weight.detach(), packing.Packing("int8"))


# In place


@pytest.mark.parametrize("stored", FORMATS)
def test_packing_a_loaded_model_gives_the_same_and_saves_the_same(stored, checkpoints, tmp_path):
    loaded = load(checkpoints["mixtral"], config_of(stored, "4-bit"))
    packed = load(checkpoints["mixtral"], BitsAndBytesConfig(load_in_4bit=True))
    assert quantize_experts(packed, **FORMATS[stored]) is packed
    assert torch.equal(logits(packed), logits(loaded))
    for name, model in (("loaded", loaded), ("packed", packed)):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("loaded", "packed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("loaded", "packed")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_model_that_peft_has_wrapped_is_packed_below(checkpoints):
    model = zoo.peft_model(load(checkpoints["qwen3_moe"]))
    quantize_experts(model, "int8")
    plain = zoo.peft_model(plain_twin(checkpoints["qwen3_moe"], "int8"))
    for ours, theirs in zip(zoo.wrappers(model), zoo.wrappers(plain), strict=True):
        ours.lora_A.load_state_dict(theirs.lora_A.state_dict())
        ours.lora_B.load_state_dict(theirs.lora_B.state_dict())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("stored", FORMATS)
def test_on_the_meta_device_it_has_the_names_and_sizes_of_a_real_one(stored, checkpoints):
    real = quantize_experts(load(checkpoints["gpt_oss"]), **FORMATS[stored])
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(real.config)
    quantize_experts(meta.to(torch.bfloat16), **FORMATS[stored])
    sizes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters() if "experts" in n} for m in (meta, real)]
    assert sizes[0] == sizes[1]
    assert all(p.is_meta for p in meta.parameters())
    assert peft_moe_compat.expert_parameters(meta) == peft_moe_compat.expert_parameters(real)


# Training


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_and_is_saved_as_on_a_plain_model_of_the_same_values(family, stored, checkpoints, stock, tmp_path):
    model = zoo.peft_model(load(checkpoints[family], config_of(stored), torch.float32))
    model.save_pretrained(tmp_path)
    stream = peft_moe_compat.adapter_tensors(model)
    zoo.assert_same(dict(stream), load_file(tmp_path / "adapter_model.safetensors"), 0)
    # The file is one of a plain model: PEFT loads it there, whatever order it nests the wrappers in.
    plain = plain_twin(checkpoints[family], stored, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    ids = zoo.token_ids()
    ours, theirs = zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, plain, ids)
    for found, of in ((ours, model), (theirs, plain)):
        names = {id(p): n for n, p in of.named_parameters()}
        for wrapper in zoo.wrappers(of):
            index = next(i for i, (m, n) in enumerate(stacks_of(of)) if m is wrapper.get_base_layer())
            for part in ("lora_A", "lora_B"):
                old = names[id(getattr(wrapper, part)["default"].weight)]
                found[f"{index}.{wrapper.parameter_name}.{part}"] = found.pop(old)
    assert len(ours) == 10
    zoo.assert_same(ours, theirs, 2e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("where", ["experts", "attention"])
@pytest.mark.parametrize("stored", ["nf4, nested", "int8"])
def test_the_recipe_of_the_page_trains(stored, where, implementation, checkpoints):
    """Hidden states are float32 there, which transformers' own functions cannot multiply with bfloat16 stacks."""
    found, ids, folder = [], zoo.token_ids(), checkpoints["qwen3_moe"]
    for model in (load(folder, config_of(stored, "4-bit")), plain_twin(folder, stored, "4-bit")):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = implementation
        prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        targets = peft_moe_compat.expert_parameters(model) if where == "experts" else None
        lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
        wrapped = get_peft_model(model, lora)
        torch.manual_seed(5)
        zoo.randomise(wrapped)
        found.append(zoo.loss_and_gradients(wrapped, ids))
    packed, unpacked = found
    assert len(packed) == (14 if where == "experts" else 6)
    zoo.assert_same(packed, unpacked, 1e-6)


def test_report_names_what_the_experts_are_packed_to(checkpoints):
    for stored, expected in (("nf4, nested", "bnb nf4"), ("int8", "bnb int8")):
        report = peft_moe_compat.report(zoo.peft_model(load(checkpoints["qwen3_moe"], config_of(stored))))
        assert {(p.format, p.path) for row in report.rows for p in row.parameters} == {(expected, "grouped_mm")}


def test_a_cast_reaches_the_weight_and_not_the_scales(checkpoints):
    model = load(checkpoints["qwen3_moe"], config_of("int8"))
    before = [(getattr(m, n).detach(), m.parametrizations[n][0].scales.clone()) for m, n in stacks_of(model)]
    model.to(torch.float16)
    for (experts, name), (weight, scales) in zip(stacks_of(model), before, strict=True):
        assert torch.equal(experts.parametrizations[name][0].scales, scales)
        assert getattr(experts, name).dtype == torch.float16
        torch.testing.assert_close(getattr(experts, name).float(), weight.float(), rtol=2**-8, atol=0)
    assert stacks_of(copy.deepcopy(model))[0][0].down_proj.dtype == torch.float16


# What loading holds

_PEAK = """
import gc, json, sys, threading, time
import torch
import peft_moe_compat
from transformers import AutoModelForCausalLM

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder, options = sys.argv[1], json.loads(sys.argv[2])
config = peft_moe_compat.BitsAndBytesExpertsConfig(**options) if options else None
# Whatever is imported and made once.
AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.bfloat16, quantization_config=config)
gc.collect()
before, peak, done = held(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
done.set()
thread.join()
print("RESULT", json.dumps([peak - before, sum(t.nbytes for t in model.state_dict().values())]))
"""


def peak_of(folder, options, first):
    # Freed memory goes back at once, as that of a real model's layers does.
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in eager.items():
            patch.setenv(name, value)
        return processes.result_of(_PEAK, folder, json.dumps(options), first)


@pytest.fixture(scope="module")
def large(tmp_path_factory, checkpoints):
    """A checkpoint with its experts one by one, the bytes of a layer of them in bfloat16, and of the whole."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 384, "num_experts": 32, "num_hidden_layers": 24}
    zoo.tiny_model("qwen3_moe", **sizes).to(torch.bfloat16).save_pretrained(folder)
    peak, plain = peak_of(folder, None, checkpoints["qwen3_moe"])
    assert peak > 0.9 * plain, "the measurement sees what is held"
    return folder, 3 * 256 * 384 * 32 * 2, plain


@pytest.mark.parametrize("stored", ["nf4, nested", "int8"])
def test_memory_is_that_of_the_packed_model_and_a_layer(stored, large, checkpoints):
    folder, layer, plain = large
    peak, packed = peak_of(folder, FORMATS[stored], checkpoints["qwen3_moe"])
    scratch = 32 * packing._CHUNK  # whatever the size of the model
    assert peak < 1.1 * packed + 2 * layer + scratch  # twice, since transformers merges single experts into copies
    assert peak < 0.75 * plain


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": "nf8"}, "one of nf4, fp4, int8, but got 'nf8'"),
        ({"blocksize": 48}, "blocksize is 48"),
        ({"experts": "int8", "double_quant": True}, "one scale for each row"),
    ],
)
def test_what_bitsandbytes_cannot_pack_to(options, words):
    with pytest.raises(PeftMoeCompatError, match=words):
        BitsAndBytesExpertsConfig(**options)


def test_a_model_without_fused_experts(tmp_path):
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(NoExpertParametersError, match="BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesExpertsConfig())
    with pytest.raises(NoExpertParametersError, match="not packed already"):
        quantize_experts(model)


def test_experts_that_are_packed_already_and_quantisers_of_others(checkpoints):
    model = quantize_experts(load(checkpoints["mixtral"]))
    with pytest.raises(NoExpertParametersError, match="not packed already"):
        quantize_experts(model, "int8")
    model = load(checkpoints["mixtral"])
    model.hf_quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config())
    with pytest.raises(PeftMoeCompatError, match="was loaded with FineGrainedFP8Config"):
        quantize_experts(model)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": 0}])
def test_a_device_map_that_offloads(device_map, checkpoints):
    with pytest.raises(PeftMoeCompatError, match="cannot be offloaded while they load"):
        AutoModelForCausalLM.from_pretrained(
            checkpoints["qwen3_moe"], quantization_config=BitsAndBytesExpertsConfig(), device_map=device_map
        )


def test_bitsandbytes_has_to_be_there(checkpoints, monkeypatch):
    find = packing.importlib.util.find_spec
    monkeypatch.setattr(
        packing.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(PeftMoeCompatError, match=r"pip install 'bitsandbytes>=0\.49'"):
        load(checkpoints["qwen3_moe"], BitsAndBytesExpertsConfig())
    with pytest.raises(PeftMoeCompatError, match=r"pip install 'bitsandbytes>=0\.49'"):
        quantize_experts(load(checkpoints["qwen3_moe"]))


def test_dequantising_is_refused_by_name(checkpoints):
    with pytest.raises(PeftMoeCompatError, match="without the config"):
        load(checkpoints["qwen3_moe"], config_of("nf4")).dequantize()


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_as_it_was(before, checkpoints, monkeypatch):
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)
    load(checkpoints["qwen3_moe"], config_of("nf4"))
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") in ((before,) if before else (None, ""))
