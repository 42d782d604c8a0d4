"""No shape, rank, token count or routing may be slower than stock PEFT or than the plain path: one layer, swept.

    python benchmarks/sweep.py [--peft DIR] [--json OUT]
    python benchmarks/sweep.py --format nf4,mxfp4

Forward + backward ms by CUDA events, medians of 7, of stock PEFT, of this package with set_backend("torch"), and with
its own choice. A row is marked where that choice is more than 5 % slower than either. Of formats, as `bench` has them,
stock PEFT trains none: there it is the plain path alone, which dequantises whole stacks.
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
parser.add_argument("--format", help="of packed experts; several between commas")
parser.add_argument("--shape", help="of the rows to run, as E,k,H,I; all by default")
parser.add_argument("--repeats", type=int, default=7, help="0 compiles the kernels alone")
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if args.peft:
    sys.path.insert(0, args.peft)

import torch
from peft import LoraConfig, inject_adapter_in_model

import peft_moe_compat
from peft_moe_compat.cli.layers import Shape, make_experts

QWEN, SMALL, WIDE, MANY = (128, 8, 2048, 768), (8, 2, 1024, 512), (8, 2, 4096, 14336), (512, 10, 2048, 512)
CASES = [(QWEN, T, 16, False) for T in (1, 8, 64, 512, 2048, 8192, 32768, 65536)]
CASES += [(QWEN, 8192, r, False) for r in (4, 10, 32, 64, 128, 256)]
CASES += [(QWEN, T, 16, True) for T in (2048, 8192)]
CASES += [(SMALL, T, 16, False) for T in (16, 512, 8192)] + [(SMALL, 2048, 33, True)]
CASES += [(MANY, T, 16, False) for T in (512, 4096)] + [(WIDE, T, 16, False) for T in (256, 2048)]
PACKED_CASES = [(QWEN, T, 16, False) for T in (1, 8, 64, 512, 2048, 8192)]
PACKED_CASES += [(QWEN, 8192, 128, False), (QWEN, 2048, 16, True), (SMALL, 16, 16, False), (SMALL, 2048, 33, True)]
PACKED_CASES += [(MANY, T, 16, False) for T in (512, 4096)] + [(WIDE, T, 16, False) for T in (16, 256, 2048)]


def build(shape, rank, stored):
    with torch.device("cuda"):
        experts = make_experts(Shape(*shape), torch.bfloat16, "cuda", stored, packed=bool(stored))
        block = torch.nn.ModuleDict({"experts": experts})
        lora = LoraConfig(r=rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        inject_adapter_in_model(lora, block)
    for name, p in block.named_parameters():
        p.requires_grad_("lora_" in name)
        if stored and "lora_" in name:  # float8 as PEFT makes it of such a base
            p.data = p.data.bfloat16()
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return block


def median_ms(step):
    for _ in range(3):
        step()
    times = []
    for _ in range(args.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(sorted(times)[args.repeats // 2], 3) if times else 0.0


def main() -> None:
    rows, built = [], (None, None)
    print(torch.cuda.get_device_name())
    print(f"{'E,k,H,I':20}{'stored':>15}{'tokens':>7}{'rank':>5}  routing    stock PEFT     torch       own  backend")
    kinds = [("", CASES)] if args.format is None else [(stored, PACKED_CASES) for stored in args.format.split(",")]
    for stored, (shape, T, rank, skewed) in [(stored, case) for stored, cases in kinds for case in cases]:
        name = ",".join(map(str, shape))
        if args.shape not in (None, name):
            continue
        if built[0] != (stored, shape, rank):
            built = (None, None)
            torch.cuda.empty_cache()
            built = ((stored, shape, rank), build(shape, rank, stored))
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

        row = {"shape": shape, "format": stored or "bfloat16", "tokens": T, "rank": rank, "skewed": skewed}
        if not stored:
            row["stock PEFT"] = median_ms(step)
        with peft_moe_compat.activate():
            with peft_moe_compat.set_backend("torch"):
                row["torch"] = median_ms(step)
            with peft_moe_compat.set_backend("triton"):
                row["own"] = median_ms(step)
        row["slower"] = row["own"] > 1.05 * min(row["torch"], row.get("stock PEFT", row["torch"]))
        rows.append(row)
        stock = f"{row['stock PEFT']:12.3f}" if "stock PEFT" in row else " " * 12
        print(
            f"{name:20}{row['format']:>15}{T:7}{rank:5}  {'skewed' if skewed else 'even':8}{stock}{row['torch']:10.3f}"
            f"{row['own']:10.3f}  {'SLOWER' if row['slower'] else ''}",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
