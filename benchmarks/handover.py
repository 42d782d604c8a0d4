"""A live adapter handed over to a server, against saving and converting it, and against merging.

    python benchmarks/handover.py [--layers 48] [--ranks 32,16,64] [--scratch /dev/shm] [--budget 80] [--json OUT]

The experts of Qwen3-30B-A3B (48 layers of 128, hidden size 2048, intermediate size 768) with random weights, and LoRA
on all of them, both in bfloat16, on one GPU. For every reader `adapter_tensors` is gone through, a tensor at a time, at
each rank. At the first rank besides:

- what TRL does: `merge_adapter`, every parameter looked at, `unmerge_adapter`, and what that leaves of the weights;
- copies: `base + delta`, a parameter at a time;
- `save_pretrained` into SCRATCH, then `convert_adapter` from there; and `save_adapter`.

Memory is the peak above what model and adapter take. What does not fit into BUDGET seconds is not run, and said.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--layers", type=int, default=48)
parser.add_argument("--sizes", default="128,2048,768", help="experts, hidden size, intermediate size")
parser.add_argument("--ranks", default="32,16,64")
parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
parser.add_argument("--budget", type=float, default=80)
parser.add_argument("--json", type=Path)
args = parser.parse_args()
START = time.monotonic()
os.environ["PEFT_MOE_COMPAT"] = "0"  # merging and saving are stock PEFT's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from torch import nn

import peft_moe_compat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READERS = ["vllm", "sglang", "peft", "peft==0.18.1,transformers==5.0.0", "per-expert", "llama.cpp"]
EXPERTS, HIDDEN, INTERMEDIATE = map(int, args.sizes.split(","))
FOLDER = args.scratch / f"handover-benchmark-{os.getpid()}"
ROWS: list[dict] = []


def base_model() -> nn.Module:
    """All of it but the experts is as small as it gets."""
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=2,
        head_dim=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=args.layers, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=DEVICE).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=peft_moe_compat.expert_parameters(model),
    )
    with torch.device(DEVICE):
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02 if "lora_A" in name else 0.002)
    return wrapped


def wrappers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "parameter_name")]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measured(what: str, rank: int, step: Callable[[], dict | None], repeats: int = 1, **row: object) -> None:
    """The median of the repeats after a first round, where there are several, and the peak of all."""
    row = {"what": what, "rank": rank, **row}
    if time.monotonic() - START > args.budget:
        show(row | {"error": "not run: the time is used up"})
        return
    before, times, found = 0, [], {}
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(repeats + (repeats > 1)):
            synchronize()
            start = time.perf_counter()
            found = step() or {}
            synchronize()
            times.append(time.perf_counter() - start)
    except (peft_moe_compat.PeftMoeCompatError, RuntimeError, OSError) as error:
        show(row | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
        return
    row["s"] = statistics.median(times[1:] or times)
    if repeats > 1:
        row["first_s"] = times[0]
    if DEVICE == "cuda":
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    show(row | found)


def show(row: dict) -> None:
    ROWS.append(row)
    cells = [f"{row['what']:18} r={row['rank']:<3} {row.get('to', ''):34}"]
    for key, value in row.items():
        if key not in ("what", "rank", "to"):
            cells.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    print("  ".join(cells), flush=True)


def hand_over(model: nn.Module, rank: int) -> None:
    for to in READERS:
        streams = []

        def plan() -> None:
            streams[:] = [peft_moe_compat.adapter_tensors(model, to)]

        def go_through() -> dict:
            count = sum(1 for _ in streams[0])
            return {"tensors": count, "gib": streams[0].nbytes / 2**30}

        measured("planned", rank, plan, to=to)
        if streams:
            measured("handed over", rank, go_through, 3, to=to)


def merge(model: nn.Module, rank: int) -> None:
    last = wrappers(model)[-1]
    weight = getattr(last.get_base_layer(), last.parameter_name)
    before = weight.detach().clone()

    def merged() -> dict:
        model.merge_adapter()
        seen = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
        model.unmerge_adapter()
        return {"parameters": seen}

    def copied() -> None:
        for wrapper in wrappers(model):
            base = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
            base + wrapper.get_delta_weight("default")

    with torch.no_grad():
        measured("copies", rank, copied, 2)
        measured("merged, unmerged", rank, merged)
        drift = ((weight - before).float().norm() / before.float().norm()).item()
        changed = (weight != before).float().mean().item()
    show({"what": "weights after it", "rank": rank, "changed": changed, "relative_change": drift})


def written(model: nn.Module, rank: int) -> None:
    saved, config = FOLDER / "saved", model.get_base_model().config.to_dict()
    FOLDER.mkdir()
    try:
        measured("save_pretrained", rank, lambda: model.save_pretrained(saved))
        for to in READERS:
            out = FOLDER / "out"
            measured(
                "convert_adapter",
                rank,
                lambda: {"exactness": peft_moe_compat.convert_adapter(saved, out, to=to, model=config).exactness},
                to=to,
            )
            shutil.rmtree(out, ignore_errors=True)
            measured(
                "save_adapter",
                rank,
                lambda: {"proven_by": peft_moe_compat.save_adapter(model, out, to).proof.by},
                to=to,
            )
            shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(FOLDER)


def main() -> None:
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    versions["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(json.dumps(versions), flush=True)
    base = base_model()
    ranks = [int(rank) for rank in args.ranks.split(",")]
    for rank in [*ranks[1:], ranks[0]]:  # the one that all else is measured at comes last
        model = with_lora(base, rank)
        adapter = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name) / 2**30
        print(f"adapter of {adapter:.3f} GiB, rank {rank}", flush=True)
        hand_over(model, rank)
        if rank == ranks[0]:
            merge(model, rank)
            written(model, rank)
        base = model.unload()
        del model
    if args.json:
        result = {"versions": versions, "arguments": {k: str(v) for k, v in vars(args).items()}, "rows": ROWS}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{time.monotonic() - START:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
