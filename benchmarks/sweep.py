"""No shape, rank, token count or routing may be slower than stock PEFT or than the plain path: one layer, swept.

    python benchmarks/sweep.py [--peft DIR] [--json OUT]

Forward + backward ms by CUDA events, medians of 7, of stock PEFT, of this package with set_backend("torch"), and with
its own choice. A row is marked where that choice is more than 5 % slower than either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--peft")
parser.add_argument("--json")
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if args.peft:
    sys.path.insert(0, args.peft)

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peft_moe_compat

QWEN, SMALL, WIDE, MANY = (128, 8, 2048, 768), (8, 2, 1024, 512), (8, 2, 4096, 14336), (512, 10, 2048, 512)
CASES = [(QWEN, T, 16, False) for T in (1, 8, 64, 512, 2048, 8192, 32768, 65536)]
CASES += [(QWEN, 8192, r, False) for r in (4, 10, 32, 64, 128, 256)]
CASES += [(QWEN, T, 16, True) for T in (2048, 8192)]
CASES += [(SMALL, T, 16, False) for T in (16, 512, 8192)] + [(SMALL, 2048, 33, True)]
CASES += [(MANY, T, 16, False) for T in (512, 4096)] + [(WIDE, T, 16, False) for T in (256, 2048)]


def build(shape, rank):
    E, k, H, I = shape
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        block = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config).bfloat16()})
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.02)
        lora = LoraConfig(r=rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        inject_adapter_in_model(lora, block)
    for name, p in block.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return block


def median_ms(step, repeats=7):
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(sorted(times)[repeats // 2], 3)


def main() -> None:
    rows, built = [], (None, None)
    print(f"{'E,k,H,I':20}{'tokens':>7}{'rank':>5}  routing    stock PEFT     torch       own  backend")
    for shape, T, rank, skewed in CASES:
        if built[0] != (shape, rank):
            built = (None, None)
            torch.cuda.empty_cache()
            built = ((shape, rank), build(shape, rank))
        block, (E, k, H, _) = built[1], shape
        hidden = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        logits = torch.rand(T, E, device="cuda")
        if skewed:  # one expert takes every second token
            logits[::2, 3] += 2
        weights, index = torch.topk(logits, k)
        weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
        gradient = torch.randn_like(hidden)

        def step():
            h = hidden.detach().requires_grad_()
            block["experts"](h, index, weights).backward(gradient)
            for p in block.parameters():
                p.grad = None

        row = {"shape": shape, "tokens": T, "rank": rank, "skewed": skewed, "stock PEFT": median_ms(step)}
        with peft_moe_compat.activate():
            with peft_moe_compat.set_backend("torch"):
                row["torch"] = median_ms(step)
            with peft_moe_compat.set_backend("triton"):
                row["own"] = median_ms(step)
        row["slower"] = row["own"] > 1.05 * min(row["torch"], row["stock PEFT"])
        rows.append(row)
        name = ",".join(map(str, shape))
        print(
            f"{name:20}{T:7}{rank:5}  {'skewed' if skewed else 'even':8}{row['stock PEFT']:12.3f}{row['torch']:10.3f}"
            f"{row['own']:10.3f}  {'SLOWER' if row['slower'] else ''}",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
