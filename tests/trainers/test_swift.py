from __future__ import annotations

import json

import peft
import pytest
from support.saved_adapters import assert_equal, flipped, rewrite, save, written_otherwise

import peft_moe_compat
from trainers.running import BIN, STEPS, TARGETS, assert_trained_as_stock, make_model, run


def test_ms_swift_with_the_external_plugin(tmp_path, stock):
    base = make_model(tmp_path / "base")
    data = tmp_path / "chat.jsonl"
    rows = [[{"role": "user", "content": "a b c"}, {"role": "assistant", "content": f"e f {c}"}] for c in "ghijklmn"]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    plugin = run([BIN / "peft-moe-compat", "plugin", "ms-swift"], tmp_path).strip()

    def train(name, **environment):
        folder = tmp_path / name
        options = f"""
            --model {base} --model_type qwen3_moe --template qwen3 --dataset {data} --external_plugins {plugin}
            --tuner_type lora --target_modules q_proj --lora_rank 4 --lora_alpha 8 --lora_dropout 0
            --target_parameters {" ".join(TARGETS)} --torch_dtype float32 --max_steps {STEPS} --seed 1
            --per_device_train_batch_size 2 --learning_rate 0.01 --lr_scheduler_type constant --warmup_ratio 0
            --logging_steps 1 --save_steps {STEPS} --output_dir {folder} --add_version false --split_dataset_ratio 0
            --gradient_checkpointing false --dataset_num_proc 1 --dataloader_num_workers 0
        """
        command = [BIN / "swift", "sft", *options.split()]
        cache = str(tmp_path / "cache")
        return run(command, tmp_path, USE_HF="1", MODELSCOPE_CACHE=cache, **environment), folder

    assert_trained_as_stock(train, base, stock)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_its_wrapper_around_the_loader_is_lived_with(first, tmp_path):
    peft_moe_compat.deactivate()
    if first == "ours":
        peft_moe_compat.activate()
    import swift.tuners.peft  # wraps `PeftModel.load_adapter`, once

    assert hasattr(peft.PeftModel, "load_adapter_origin")
    peft_moe_compat.activate()
    assert peft_moe_compat.is_active()
    expected, fresh = save(tmp_path)
    rewrite(tmp_path, flipped, peft_version=written_otherwise())
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path, "ref")
    assert_equal(model, expected, "ref")
    model.load_adapter(tmp_path, "second")
    assert_equal(model, expected, "second")
    peft_moe_compat.deactivate()
    assert vars(peft.PeftModel)["load_adapter"].__module__ == swift.tuners.peft.__name__
