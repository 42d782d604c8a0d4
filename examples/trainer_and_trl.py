"""LoRA on experts inside transformers' Trainer and, where trl is installed, inside its SFTTrainer: nothing to add.

    python examples/trainer_and_trl.py

The model and its tokenizer are made here; yours come from a checkpoint.
"""

import importlib.util
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 16}
TEXTS = ["the router sends the token to two experts", "two experts send the token back"] * 8
WORDS = ["<pad>", "<eos>", *sorted(set(" ".join(TEXTS).split()))]
OPTIONS = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}


def lora_model() -> torch.nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS))
    targets = peft_moe_compat.expert_parameters(base)
    return get_peft_model(base, LoraConfig(r=8, target_modules=[], target_parameters=targets))


def train(trainer: Trainer) -> None:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{type(trainer).__name__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


def main() -> None:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rows = [torch.tensor(tokenizer(text)["input_ids"][:6]) for text in TEXTS]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        train(Trainer(lora_model(), TrainingArguments(folder, **OPTIONS, **QUIET), train_dataset=data))
        if importlib.util.find_spec("trl") is None:
            print("SFTTrainer: trl is not installed")
            return
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        texts = Dataset.from_dict({"text": TEXTS})
        train(SFTTrainer(lora_model(), SFTConfig(folder, **OPTIONS, **QUIET), None, texts, processing_class=tokenizer))


if __name__ == "__main__":
    main()
