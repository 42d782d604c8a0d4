"""Runs a trainer as its users do, from its command line, with this library and with stock PEFT, and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from support import zoo
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BIN = Path(sys.executable).parent
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
STEPS = 3
# transformers' TrainingArguments, for the trainers that take them by these names.
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": STEPS,
    "seed": 1,
    "report_to": "none",
    "bf16": False,
}


def make_model(folder: Path) -> Path:
    """A tiny Qwen3-MoE with a tokenizer whose words are letters."""
    words = ["<pad>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    zoo.tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """What a command printed. Offline, without a GPU, on one thread."""
    calm = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | calm | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [float(entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def assert_trained_as_stock(train, base: Path, stock) -> None:
    """Losses and adapter equal stock PEFT's, the experts ran in this library's forward, and the adapter reloads.

    Args:
        train: (name of an output folder, variables of the environment) -> what the trainer printed, and that folder.
        base: Of the model.
        stock: Runs a function without the library.
    """
    said, ours = train("ours", PEFT_MOE_COMPAT_REPORT="1")
    unsaid, theirs = train("theirs", PEFT_MOE_COMPAT="0")
    assert "peft_moe_compat active" in said
    rows = [line for line in said.splitlines() if "mlp.experts" in line and "│" in line]
    assert len(rows) >= 2
    assert all("grouped_mm" in row for row in rows)
    assert "peft_moe_compat active" not in unsaid
    assert len(losses(ours)) == STEPS
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(theirs)), rtol=0, atol=1e-4)
    file = ours / f"checkpoint-{STEPS}"
    trained, expected = (load_file(f / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for f in (ours, theirs))
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)
    assert any("experts" in name and "lora_B" in name and tensor.any() for name, tensor in trained.items())
    for load in (lambda function: function(), stock):
        fresh = AutoModelForCausalLM.from_pretrained(base)
        model = load(lambda fresh=fresh: PeftModel.from_pretrained(fresh, file))
        torch.testing.assert_close(get_peft_model_state_dict(model), trained, rtol=0, atol=0)
