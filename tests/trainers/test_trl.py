from __future__ import annotations

import json
import os
import sys

from support.switched_on import switch_on

from trainers.running import TARGETS, TRAINING, assert_trained_as_stock, make_model, run


def test_trl_s_command_in_an_environment_that_is_switched_on(tmp_path, stock, monkeypatch):
    """Switched on in a folder of its own, since the environment is that of the other tests too."""
    base, site, data = make_model(tmp_path / "base"), tmp_path / "site", tmp_path / "data"
    data.mkdir()
    (data / "train.json").write_text(json.dumps([{"text": f"a b c d e f {c}"} for c in "ghijklmn"]))
    switch_on(site, monkeypatch)

    def train(name, **environment):
        folder, config = tmp_path / name, tmp_path / f"{name}.yaml"
        options = {
            "model_name_or_path": str(base),
            "dataset_name": str(data),
            "use_peft": True,
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,  # stock PEFT refuses TRL's default
            "lora_target_modules": ["q_proj", "v_proj"],  # of one alone TRL makes a pattern, which matches nothing
            "lora_target_parameters": TARGETS,
            "output_dir": str(folder),
            "use_cpu": True,
            **TRAINING,
        }
        config.write_text(json.dumps(options))  # which is YAML too
        path = os.pathsep.join([str(site), *sys.path])
        command = [sys.executable, "-c", "from trl.cli import main; main()", "sft", "--config", config]
        return run(command, tmp_path, PYTHONPATH=path, **environment), folder

    assert_trained_as_stock(train, base, stock)
