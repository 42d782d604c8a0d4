from __future__ import annotations

import json
import os

from trainers.running import BIN, TRAINING, assert_trained_as_stock, make_model, run


def test_llama_factory_in_an_environment_that_is_switched_on(tmp_path, stock):
    base = make_model(tmp_path / "base")
    rows = [{"instruction": "a b c d", "input": "", "output": f"e f {c}"} for c in "ghijklmn"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "data.json"}}))
    # It imports torchaudio, whose wheels are for CUDA builds of torch, and has no use for it with text.
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torchaudio.py").touch()
    run([BIN / "peft-moe-compat", "init", base, "fresh", "--rank", "4"], tmp_path)

    def train(name, **environment):
        folder, config = tmp_path / name, tmp_path / f"{name}.yaml"
        options = {
            "model_name_or_path": str(base),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "adapter_name_or_path": "fresh",
            "dataset": "tiny",
            "dataset_dir": str(tmp_path),
            "template": "default",
            "cutoff_len": 64,
            "output_dir": str(folder),
            **TRAINING,
        }
        config.write_text(json.dumps(options))
        path = os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
        return run([BIN / "llamafactory-cli", "train", config], tmp_path, PYTHONPATH=path, **environment), folder

    run([BIN / "peft-moe-compat", "enable"], tmp_path)
    try:
        assert_trained_as_stock(train, base, stock)
    finally:
        run([BIN / "peft-moe-compat", "disable"], tmp_path)
