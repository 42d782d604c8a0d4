from __future__ import annotations

import json

from trainers.running import BIN, STEPS, TARGETS, assert_trained_as_stock, make_model, run


def test_axolotl_with_the_plugin(tmp_path, stock):
    base = make_model(tmp_path / "base")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "a b c d", "input": "", "output": f"e f {c}"} for c in "ghijklmn"]))

    # It draws lora_A before it seeds torch, so that two runs differ: both go on from this.
    run([BIN / "peft-moe-compat", "init", base, "fresh", "--rank", "4", "--target-modules", "q_proj"], tmp_path)

    def train(name, **environment):
        folder, config = tmp_path / name, tmp_path / f"{name}.yml"
        options = {
            "base_model": str(base),
            "plugins": ["peft_moe_compat.integrations.axolotl.PeftMoeCompatPlugin"],
            "adapter": "lora",
            "lora_model_dir": str(tmp_path / "fresh"),
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj"],
            "lora_target_parameters": TARGETS,
            "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 1,
            "output_dir": str(folder),
            "sequence_len": 64,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "logging_steps": 1,
            "seed": 1,
            "bf16": False,
            "tf32": False,
            "gradient_checkpointing": False,
            "val_set_size": 0,
            "special_tokens": {"pad_token": "<pad>"},
        }
        config.write_text(json.dumps(options))  # which is YAML too
        command = [BIN / "axolotl", "train", config, "--launcher", "python"]
        return run(command, tmp_path, AXOLOTL_DO_NOT_TRACK="1", **environment), folder

    assert_trained_as_stock(train, base, stock)
