"""LoRA on the experts of a Qwen3-MoE: fine-tune, save, and load into a fresh copy, which then says the same.

    python examples/finetune_and_reload.py [FOLDER]

The model is tiny and its weights are random, so that this runs anywhere within seconds.
"""

import copy
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 128}


def main(folder: str) -> None:
    torch.manual_seed(0)
    # Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS))
    untouched = copy.deepcopy(base)

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],  # or [] for the experts alone
        target_parameters=peft_moe_compat.expert_parameters(base),
    )
    model = get_peft_model(base, config)
    print(peft_moe_compat.report(model))  # each expert parameter: the fast forward, or PEFT's own and why

    tokens = torch.randint(128, (8, 32))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]

    model.save_pretrained(folder)  # PEFT's own file, with a stamp of its layout
    loaded = PeftModel.from_pretrained(untouched, folder)
    with torch.no_grad():
        difference = (loaded(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max().item()
    print(f"largest difference of the logits after loading: {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
