"""One experts layer with LoRA on both projections: frozen base, stock PEFT and this library, in one process.

    python benchmarks/one_layer.py --shape 32,4,512,256 --tokens 2048 --rank 16 --dtype float32 --device cpu

Prints, per method: median milliseconds of forward + backward and of the forward alone, and the peak of what the step
allocates above the weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["PEFT_MOE_COMPAT"] = "0"  # activated below, for its own rows only

import peft
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peft_moe_compat


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32,4,512,256", help="experts, top-k, hidden size, intermediate size")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[torch.nn.ModuleDict, tuple[torch.Tensor, ...]]:
    E, k, H, intermediate = (int(n) for n in args.shape.split(","))
    dtype = getattr(torch, args.dtype)
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=intermediate, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    experts = Qwen3MoeExperts(config).to(args.device, dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    hidden = torch.randn(args.tokens, H, device=args.device, dtype=dtype)
    weights, index = torch.topk(torch.randn(args.tokens, E, device=args.device).softmax(-1), k)
    return torch.nn.ModuleDict({"experts": experts}), (hidden, index, weights.to(dtype))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ms(step, args: argparse.Namespace) -> float:
    times = []
    for i in range(args.repeats + 2):
        synchronize(args.device)
        start = time.perf_counter()
        step()
        synchronize(args.device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def peak_mib(step, device: str) -> float:
    """Highest sum of live allocations during one step."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def measure(name: str, block: torch.nn.ModuleDict, inputs: tuple[torch.Tensor, ...], args: argparse.Namespace) -> None:
    hidden, index, weights = inputs
    grad = torch.randn_like(hidden)
    parameters = [p for p in block.parameters() if p.requires_grad]

    def both() -> None:
        h = hidden.detach().requires_grad_()
        block["experts"](h, index, weights).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    def forward() -> None:
        with torch.no_grad():
            block["experts"](hidden, index, weights)

    row = median_ms(both, args), median_ms(forward, args), peak_mib(both, args.device)
    print(f"{name:16} {row[0]:10.1f} {row[1]:10.1f} {row[2]:10.1f}", flush=True)


def main() -> None:
    args = parse()
    versions = f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}"
    where = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
    print(f"{versions}; {where}; shape {args.shape}, {args.tokens} tokens, r {args.rank}, {args.dtype}")
    print(f"{'':16} {'fwd+bwd ms':>10} {'fwd ms':>10} {'peak MiB':>10}")
    block, inputs = build(args)
    measure("frozen base", block, inputs, args)
    config = LoraConfig(r=args.rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    inject_adapter_in_model(config, block)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    measure("stock PEFT", block, inputs, args)
    with peft_moe_compat.activate():
        measure("peft_moe_compat", block, inputs, args)


if __name__ == "__main__":
    main()
