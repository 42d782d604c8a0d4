"""Training steps of a model with random weights on several GPUs of one host: FSDP2, expert parallelism, or both.

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --engine fsdp2|ep|ep-fsdp2 --method frozen|stock|ours
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --engine ep-fsdp2 --method ours --tiny        (gloo, on CPU)
    torchrun --nproc-per-node 4 benchmarks/two_gpus.py --engine ep-fsdp2 --ep-size 2 --tp-size 2 --method ours

Sizes of Qwen3-30B-A3B, or of GLM-4.5-Air (106B). LoRA r = 16 on the experts ("frozen": on attention alone, its
gradients averaged as Trainer does), gradient checkpointing, 4 x 2048 tokens a rank, AdamW. Prints the loss of each
step, the median time of a step and the peak memory of rank 0; with --trace, what one step more spends in
communication, how much of that nothing overlaps, and its bytes. "ep-fsdp2" is transformers' own, 5.24. Stock PEFT
cannot run where experts are spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", choices=["fsdp2", "ep", "ep-fsdp2"], required=True)
parser.add_argument("--method", choices=["frozen", "stock", "ours"], required=True)
parser.add_argument("--attention", action="store_true", help="LoRA on attention beside that on experts")
parser.add_argument("--model", choices=["qwen3-30b", "glm-4.5-air"], default="qwen3-30b")
parser.add_argument("--ep-size", type=int, help="of ep-fsdp2; by default all ranks")
parser.add_argument("--tp-size", type=int, default=1, help="of ep-fsdp2; FSDP2 has the rest of the ranks")
parser.add_argument("--ep-implementation", default="all_to_all")
parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--trace", action="store_true")
parser.add_argument("--layers", type=int, help="by default as many as the model has")
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
SIZES: dict[str, Any] = {
    "qwen3-30b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_hidden_layers": 48, "vocab_size": 151936, "norm_topk_prob": True,
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "head_dim": 128, "num_attention_heads": 96, "num_key_value_heads": 8,
        "num_hidden_layers": 46, "vocab_size": 151552, "intermediate_size": 10944, "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
}[args.model]  # fmt: skip
if args.tiny:
    SIZES |= {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128,
    }  # fmt: skip
    SIZES["num_experts" if "num_experts" in SIZES else "n_routed_experts"] = 8
SIZES["num_hidden_layers"] = args.layers or SIZES["num_hidden_layers"]


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
    frozen = args.method == "frozen"
    targets = [] if frozen else peft_moe_compat.expert_parameters(model)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"] if frozen or args.attention else []
    where = {"target_modules": linears, "target_parameters": targets}
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=args.dropout, **where))


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


def by_transformers(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """Expert parallelism and FSDP2 at once, as `from_pretrained` shards a model that has no checkpoint."""
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size()
    model = transformers.AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={},
        dtype=torch.bfloat16,
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(
            fsdp_size=size // args.tp_size,
            tp_size=args.tp_size,
            ep_size=args.ep_size or size,
            ep_implementation=args.ep_implementation,
        ),
    )
    fill(model)
    return with_lora(model)


def plain_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those that no engine averages: of LoRA that stays plain beside a sharded model."""
    return [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p.grad, "to_local")]


def average(gradients: list[torch.Tensor]) -> None:
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(averaged)


def traced(step: Callable[[], object]) -> dict[str, object]:
    """Of one step on this rank: ms in kernels of communication, and of these ms beside no other kernel; calls, MiB."""
    with torch.profiler.profile() as profile:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    spans = {
        who: merged([(e["ts"], e["ts"] + e["dur"]) for e in kernels if e["name"].startswith("nccl") == (who == "nccl")])
        for who in ("nccl", "other")
    }
    total = {who: sum(end - start for start, end in found) for who, found in spans.items()}
    both = sum(end - start for start, end in merged(spans["nccl"] + spans["other"]))
    calls: dict[str, list[float]] = {}
    for event in events:
        said = event.get("args", {})
        if event.get("cat") == "kernel" and "Collective name" in said:
            found = calls.setdefault(said["Collective name"], [0, 0, 0])
            found[0] += 1
            found[1] += max(said["In msg nelems"], said["Out msg nelems"]) * BYTES.get(said["dtype"], 4) / 2**20
            found[2] += event["dur"] / 1e3
    return {
        "communication ms": round(total["nccl"] / 1e3, 2),
        "of these alone ms": round((both - total["other"]) / 1e3, 2),
        "other kernels ms": round(total["other"] / 1e3, 2),
        "calls, MiB, ms": {name: [round(value, 2) for value in found] for name, found in calls.items()},
        "longest kernels ms": longest(kernels),
    }


BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Long": 8, "Int": 4, "Byte": 1}


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def longest(kernels: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The fifteen kernels that took most: calls and ms."""
    found: dict[str, list[float]] = {}
    for event in kernels:
        row = found.setdefault(event["name"][:90], [0, 0.0])
        row[0] += 1
        row[1] = round(row[1] + event["dur"] / 1e3, 3)
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:15])


def main() -> None:
    dist.init_process_group("gloo" if args.tiny else "nccl")
    rank = dist.get_rank()
    if not args.tiny:
        torch.cuda.set_device(rank)
    if args.method == "ours":
        peft_moe_compat.activate()
    config = transformers.AutoConfig.for_model(**SIZES)
    config._experts_implementation = "grouped_mm"
    model = {"fsdp2": by_fsdp2, "ep": by_expert_parallelism, "ep-fsdp2": by_transformers}[args.engine](config)
    whole_batches = args.engine != "ep"
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    # One group for each mesh, which one fused step cannot span.
    by_mesh: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": found} for found in by_mesh.values()], lr=1e-4)
    # The ranks of one tensor-parallel group see the same batch.
    torch.manual_seed(rank // args.tp_size if whole_batches else 0)
    ids = torch.randint(0, SIZES["vocab_size"], (args.batch, 32 if args.tiny else 2048), device=DEVICE)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if whole_batches and (plain := plain_gradients(model)):
            average(plain)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses, times = [], []
    for _ in range(args.steps):
        dist.barrier()
        start = time.perf_counter()
        losses.append(round(step(), 5))
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    found = {
        "model": args.model,
        "engine": args.engine,
        "ep_size": args.ep_size,
        "tp_size": args.tp_size,
        "method": args.method,
        "dropout": args.dropout,
        "attention": args.attention or args.method == "frozen",
        "layers": SIZES["num_hidden_layers"],
        "tokens a rank": ids.numel(),
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "losses": losses,
        "step s": round(statistics.median(times[1:]), 4),
        "steps s": [round(taken, 4) for taken in times],
        "peak GiB": peak and round(peak, 2),
        "trained million": round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 2),
        "paths": sorted({p.path for row in peft_moe_compat.report(model).rows for p in row.parameters}),
    }
    if args.trace:
        found["trace"] = traced(step)
    if rank == 0:
        print(found, flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
