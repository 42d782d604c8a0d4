"""`adapter_tensors` and `save_adapter`: tensor for tensor what `convert_adapter` makes of the file of a live model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from support import zoo

import peft_moe_compat
from peft_moe_compat import AdapterError, PeftMoeCompatError, adapter_tensors, convert_adapter, save_adapter

READERS = [
    "peft",
    "peft==0.18.1,transformers==4.57.6",
    "peft==0.18.0,transformers==5.0.0",
    "per-expert",
    "vllm",
    "vllm==0.28",
    "sglang",
    "llama.cpp",
]
FAMILIES = [family for family in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3") if family in zoo.FAMILIES]


def file_of(folder):
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    del metadata["format"]
    return load_file(file), json.loads((folder / "adapter_config.json").read_text()), metadata


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """A model with LoRA on experts and attention, ranks and alphas of their own, and the folder it is saved in."""
    folder = tmp_path_factory.mktemp("saved")
    model = zoo.peft_model(
        zoo.tiny_model(request.param),
        target_modules=["o_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 7},
    )
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("to", READERS)
def test_what_is_handed_over_is_what_is_converted(trained, tmp_path, to):
    model, folder = trained
    try:
        convert_adapter(folder, tmp_path / "converted", to=to, model=zoo.config_of(model))
    except PeftMoeCompatError as error:
        with pytest.raises(type(error)):
            adapter_tensors(model, to)
        return
    expected, config, metadata = file_of(tmp_path / "converted")
    stream = adapter_tensors(model, to)
    assert equal({name: tensor.clone() for name, tensor in stream}, expected)
    assert [(name, shape, dtype) for name, shape, dtype in stream.layout] == [
        (name, tuple(expected[name].shape), expected[name].dtype) for name, _, _ in stream.layout
    ]
    assert stream.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert (json.loads(json.dumps(stream.config)), stream.metadata) == (config, metadata)
    done = save_adapter(model, tmp_path / "saved", to)
    assert (done.target, done.exactness) == (stream.target, stream.exactness)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


def test_every_round_has_the_weights_of_its_moment():
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    stream = adapter_tensors(model, "per-expert")
    before = {name: tensor.clone() for name, tensor in stream}
    with torch.no_grad():
        for wrapper in zoo.wrappers(model):
            wrapper.lora_A["default"].weight.mul_(2)
            wrapper.lora_B["default"].weight.mul_(2)
    for name, tensor in stream:
        assert torch.equal(tensor, 2 * before[name])
        assert not tensor.requires_grad


def test_gradients_stay_on_while_streams_are_gone_through_and_when_one_is_left_half_way():
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    started = iter(adapter_tensors(model))
    next(started)
    assert torch.is_grad_enabled()
    for _ in zip(adapter_tensors(model), adapter_tensors(model), strict=True):
        assert torch.is_grad_enabled()
    del started
    assert torch.is_grad_enabled()


def test_a_dtype_that_cannot_hold_the_weights_is_refused():
    model = zoo.peft_model(zoo.tiny_model(FAMILIES[0]))
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        with pytest.raises(AdapterError, match=f"{dtype} cannot hold .* one of float16, bfloat16, float32, float64"):
            adapter_tensors(model, "peft", dtype=dtype)
    with torch.no_grad():
        zoo.wrappers(model)[0].lora_A["default"].weight[0, 0] = 1e6
    with pytest.raises(AdapterError, match="1 infinite"):
        dict(adapter_tensors(model, "peft", dtype=torch.float16))


def test_a_stream_reads_parameters_that_took_the_place_of_others():
    model, other = (zoo.peft_model(zoo.tiny_model(FAMILIES[0])) for _ in range(2))
    stream = adapter_tensors(model, "per-expert")
    model.load_state_dict(other.state_dict(), assign=True)
    expected = {name: tensor.clone() for name, tensor in adapter_tensors(other, "per-expert")}
    assert equal({name: tensor.clone() for name, tensor in stream}, expected)


@pytest.mark.parametrize("change", ["dtype", "config"])
def test_a_stream_of_an_adapter_that_is_another_now_is_refused(change):
    model = zoo.peft_model(zoo.tiny_model(FAMILIES[0]))
    stream = adapter_tensors(model, "per-expert")
    if change == "dtype":
        model.to(torch.bfloat16)
    else:
        model.peft_config["default"].lora_alpha += 1
    with pytest.raises(AdapterError, match="Make another stream"):
        next(iter(stream))


def test_in_another_dtype():
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    plain = {name: tensor.clone() for name, tensor in adapter_tensors(model, "vllm")}
    stream = adapter_tensors(model, "vllm", dtype=torch.bfloat16)
    assert {dtype for _, _, dtype in stream.layout} == {torch.bfloat16}
    assert (stream.exactness, adapter_tensors(model, "peft").exactness) == ("round-off", "bits")
    assert equal(dict(stream), {name: tensor.bfloat16() for name, tensor in plain.items()})
    assert repr(stream) == f"AdapterStream({len(stream)} tensors for vllm, {stream.exactness})"


def test_of_several_adapters_the_one_that_is_named(tmp_path):
    """A second one made by hand, since most releases refuse it."""
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    with pytest.raises(AdapterError, match=r"no adapter 'other'; it has 'default'"):
        adapter_tensors(model, adapter_name="other")
    model.peft_config["other"] = model.peft_config["default"]
    for wrapper in zoo.wrappers(model):
        zoo.add_adapter(wrapper, "other", 3, scaling=wrapper.scaling["default"])
        torch.nn.init.normal_(wrapper.lora_B["other"].weight)
    found = {name: tensor.clone() for name, tensor in adapter_tensors(model, adapter_name="other")}
    assert len(found) == 2 * len(zoo.wrappers(model))
    wrapper = zoo.wrappers(model)[0]
    assert any(torch.equal(tensor, wrapper.lora_B["other"].weight) for tensor in found.values())


def test_a_model_without_an_adapter_and_a_diverged_one(tmp_path):
    with pytest.raises(AdapterError, match="model.module of DDP"):
        adapter_tensors(zoo.tiny_model("gpt_oss"))
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    with torch.no_grad():
        zoo.wrappers(model)[0].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="1 NaN"):
        list(adapter_tensors(model))
    with pytest.raises(AdapterError, match="1 NaN"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_saved_folder_loads_with_peft(tmp_path):
    model = zoo.peft_model(zoo.tiny_model("gpt_oss"))
    save_adapter(model, tmp_path / "out")
    ids = zoo.token_ids()
    expected = model(ids).logits
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, expected)


TRAINING = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.05, "use_cpu": True}
QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}


def taken_while(make_trainer):
    """What a callback is given after each step, beside the model's own LoRA of that moment, and the trainer."""
    taken = []

    def take(stream, step):
        handed = {name: tensor.clone() for name, tensor in stream}
        taken.append((step, handed, {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}))

    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    with pytest.raises(ValueError, match="1 or more"):
        peft_moe_compat.HandoverCallback(take, "per-expert", every=0)
    trainer = make_trainer(model, [peft_moe_compat.HandoverCallback(take, "per-expert")])
    trainer.train()
    return model, taken


def check_taken(model, taken):
    assert [step for step, _, _ in taken] == [1, 2, 3]
    held = dict(model.named_parameters())
    for _, handed, lora in taken:
        with torch.no_grad():
            for name, value in lora.items():
                held[name].copy_(value)
        assert equal(handed, {name: tensor.clone() for name, tensor in adapter_tensors(model, "per-expert")})
    assert not equal(taken[0][1], taken[1][1])
    assert not equal(taken[1][1], taken[2][1])


def test_trainer_hands_over_after_every_step(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in zoo.token_ids(8)]

    def make(model, callbacks):
        arguments = transformers.TrainingArguments(str(tmp_path), **TRAINING, **QUIET)
        return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)

    check_taken(*taken_while(make))


def test_grpo_hands_over_after_every_step(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is installed beside the newest pair only")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{index}" for index in range(61)]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")

    def reward(completions, **_):
        return [float(len(set(text.split()))) + index for index, text in enumerate(completions)]

    def make(model, callbacks):
        lengths = {"num_generations": 2, "max_completion_length": 4}
        arguments = trl.GRPOConfig(str(tmp_path), **TRAINING, **QUIET, **lengths)
        prompts = Dataset.from_dict({"prompt": ["w5 w6 w7", "w8 w9"] * 8})
        return trl.GRPOTrainer(
            model, reward, arguments, train_dataset=prompts, processing_class=tokenizer, callbacks=callbacks
        )

    check_taken(*taken_while(make))
