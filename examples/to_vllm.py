"""An adapter on the experts of a Qwen3-MoE, written the way vLLM reads it.

    python examples/to_vllm.py [FOLDER]

The same by hand: `peft-moe-compat convert ADAPTER OUT --to vllm --model BASE`. Then

    vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules mine=OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 128}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS))
    base.config.save_pretrained(folder / "base")
    targets = peft_moe_compat.expert_parameters(base)
    config = LoraConfig(r=8, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    adapter, out, about = str(folder / "adapter"), str(folder / "for-vllm"), str(folder / "base")

    before = peft_moe_compat.inspect_adapter(adapter, model=about).readers["vLLM >= 0.33"]
    print(f"as PEFT wrote it, vLLM: {before.verdict}; {before.why}")

    done = peft_moe_compat.convert_adapter(adapter, out, to="vllm", model=about)
    print(f"{done.out}, {done.exactness}:")
    for step in done.steps:
        print(f"  {step}")
    after = peft_moe_compat.inspect_adapter(out, model=about).readers["vLLM >= 0.33"]
    print(f"converted, vLLM: {after.verdict}; {after.why}")
    assert (before.verdict, after.verdict) == ("fails", "reads")

    same = peft_moe_compat.verify_adapters(adapter, out, model=about)
    print(f"largest relative difference of an expert's update: {same.worst:.1e}")
    assert same.same
    with safe_open(folder / "for-vllm" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    print(f"{len(names)} tensors, such as {next(name for name in names if '.experts.7.' in name)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
