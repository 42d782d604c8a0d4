"""What each expert does during a run: the tokens it gets and the size of its update, and a heat map of both.

    python examples/watch_experts.py [heat_map.png]

The picture needs matplotlib. The model is made here; yours comes from a checkpoint.
"""

import importlib.util
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 64}


def picture(readings: list[peft_moe_compat.Reading], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    tokens = [reading.tokens for reading in readings if reading.tokens]
    updates = [reading.updates for reading in readings if reading.parameter == "down_proj"]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, rows, title in zip(axes, (tokens, updates), ("tokens", "norm of down_proj's update"), strict=True):
        image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
        axis.set(title=title, xlabel="expert")
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer")
    figure.savefig(file, dpi=120)


def main() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS))
    targets = peft_moe_compat.expert_parameters(base)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=[], target_parameters=targets))
    watch = peft_moe_compat.ExpertReadings(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        ids = torch.randint(0, 16, (4, 32))  # a quarter of the vocabulary
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    readings = watch.read()  # or watch.numbers(), for a logger
    for reading in readings:
        if reading.tokens:
            print(f"{reading.module}: {sum(n == 0 for n in reading.tokens)} of {len(reading.tokens)} without a token")
    if importlib.util.find_spec("matplotlib") and len(sys.argv) > 1:
        picture(readings, sys.argv[1])


if __name__ == "__main__":
    main()
