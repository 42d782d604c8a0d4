"""Training steps of Qwen3-30B-A3B with random weights on several GPUs of one host: FSDP2 or expert parallelism.

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --engine fsdp2|ep --method stock|ours [--json OUT]
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --engine fsdp2 --method ours --tiny        (gloo, on CPU)

LoRA r = 16 on the experts, gradient checkpointing, 4 x 2048 tokens a rank, AdamW. Prints the loss of each step, the
median time of a step and the peak memory of rank 0. Stock PEFT cannot run under expert parallelism.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", choices=["fsdp2", "ep"], required=True)
parser.add_argument("--method", choices=["stock", "ours"], required=True)
parser.add_argument("--layers", type=int, default=48)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--json")
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"  # activated below, for its own rows only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

import peft_moe_compat

DEVICE = "cpu" if args.tiny else "cuda"
SIZES = (
    {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
     "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128}
    if args.tiny else
    {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
     "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": args.layers, "vocab_size": 151936}
)  # fmt: skip


def fill(model: torch.nn.Module) -> None:
    """Random weights, the same for every method, drawn shard by shard."""
    generator = torch.Generator(DEVICE).manual_seed(dist.get_rank())
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            if "norm" in name:
                local.fill_(1.0)
            else:
                local.normal_(0.0, 0.01 if "lora_B" in name else 0.02, generator=generator)


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    targets = peft_moe_compat.expert_parameters(model)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=targets))


def by_fsdp2(config: transformers.PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model = with_lora(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=DEVICE)
    base = model.get_base_model().model
    base.rotary_emb = type(base.rotary_emb)(config).to(DEVICE)
    fill(model)
    return model


def by_expert_parallelism(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """Through a checkpoint, since transformers spreads experts while it loads one."""
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        with torch.device(DEVICE):
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder[0])
    dist.barrier()
    size = dist.get_world_size()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder[0],
        dtype=torch.bfloat16,
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(tp_size=size, ep_size=size),
    )
    return with_lora(model)


def main() -> None:
    dist.init_process_group("gloo" if args.tiny else "nccl")
    rank = dist.get_rank()
    if not args.tiny:
        torch.cuda.set_device(rank)
    if args.method == "ours":
        peft_moe_compat.activate()
    config = transformers.AutoConfig.for_model("qwen3_moe", norm_topk_prob=True, **SIZES)
    config._experts_implementation = "grouped_mm"
    model = {"fsdp2": by_fsdp2, "ep": by_expert_parallelism}[args.engine](config)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    # The ranks of one expert-parallel group see the same batch.
    torch.manual_seed(rank if args.engine == "fsdp2" else 0)
    ids = torch.randint(0, SIZES["vocab_size"], (4, 32 if args.tiny else 2048), device=DEVICE)
    losses, times = [], []
    for _ in range(args.steps):
        dist.barrier()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    found = {
        "engine": args.engine,
        "method": args.method,
        "ranks": dist.get_world_size(),
        "losses": losses,
        "step s": round(statistics.median(times[1:]), 4),
        "peak GiB": peak and round(peak, 2),
    }
    if rank == 0:
        print(found, flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
