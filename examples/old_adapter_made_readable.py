"""An adapter of PEFT 0.18, which today's PEFT cannot load: what it is, loaded as that, and turned into today's form.

    python examples/old_adapter_made_readable.py [FOLDER]

The old adapter is made here, by converting one of today's; yours you have.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 128}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS))
    untouched = copy.deepcopy(base)
    targets = peft_moe_compat.expert_parameters(base)
    config = LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "today")
    base.config.save_pretrained(folder / "base")  # of the base model, nothing but its config.json is ever read
    about = str(folder / "base")
    peft_moe_compat.convert_adapter(str(folder / "today"), str(folder / "old"), to="peft==0.18.1", model=about)

    found = peft_moe_compat.inspect_adapter(str(folder / "old"), model=about)
    print(f"written by {found.writer.value}, lora_A {found.orientation.value}, lora_B {found.packing.value}")
    for reader, verdict in found.readers.items():
        print(f"  {reader}: {verdict.verdict}; {verdict.why}")

    # In a program: while peft_moe_compat is active, PEFT loads a file as what it is. Nothing else to do.
    loaded = PeftModel.from_pretrained(untouched, str(folder / "old"))
    tokens = torch.randint(128, (2, 32))
    with torch.no_grad():
        difference = (loaded(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max().item()
    print(f"largest difference of the logits, loaded from the old file: {difference:.1e}")
    assert difference < 1e-4

    # For good, and for whoever has no peft_moe_compat: `peft-moe-compat convert old new --model base` does the same.
    done = peft_moe_compat.convert_adapter(str(folder / "old"), str(folder / "new"), to="peft", model=about)
    same = peft_moe_compat.verify_adapters(str(folder / "old"), str(folder / "new"), model=about)
    print(f"converted for {done.target} ({done.exactness}); largest difference of an update: {same.worst:.1e}")
    assert same.same


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
