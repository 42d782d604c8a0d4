"""What the processor spends on one layer: launches and microseconds, the frozen base's of the same experts beside ours.

    python benchmarks/processor.py [--tokens 1,64,512,2048] [--shape 128,8,2048,768] [--json OUT]

Steps are enqueued without waiting for the device, a few at a time, so that neither the device nor its queue is the
limit; kernels are those that the profiler sees. Then, of this package's step at the last number of tokens: our time in
Python by function, with the built-ins it calls itself, and what is torch's, transformers', PEFT's and triton's, by
cProfile, which makes all of it slower, calls more than what they do.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", default="1,16,64,512,1024,2048")
parser.add_argument("--shape", default="128,8,2048,768", help="E,k,H,I")
parser.add_argument("--json")
args = parser.parse_args()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from peft_moe_compat.cli import bench
from peft_moe_compat.patching import activation as patch

AT_ONCE, REPEATS, PROFILED = 6, 25, 100
LIBRARIES = {
    "peft_moe_compat": "ours",
    "torch": "torch",
    "transformers": "transformers",
    "peft": "PEFT",
    "triton": "triton",
}


def steps(layer: bench._Layer, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward, forward) with nothing beside them."""
    experts, (E, k, H, _) = layer.block["experts"], map(int, args.shape.split(","))
    hidden = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights, index = torch.randn(tokens, E, device="cuda").softmax(-1).topk(k)
    weights, gradient = weights.bfloat16(), torch.randn_like(hidden)
    leaves = [hidden, *(p for p in layer.block.parameters() if p.requires_grad)]

    def both() -> None:
        torch.autograd.grad(experts(hidden, index, weights), leaves, gradient)

    def forward() -> None:
        with torch.no_grad():
            experts(hidden, index, weights)

    return both, forward


def enqueued(step: Callable[[], None]) -> float:
    """Microseconds of the processor, the median of several rounds."""
    times = []
    for _ in range(REPEATS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(AT_ONCE):
            step()
        times.append(1e6 * (time.perf_counter() - start) / AT_ONCE)
    return statistics.median(times[3:])


def waited(step: Callable[[], None]) -> float:
    """Microseconds of steps one after the other, device included, at the same queue."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        step()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / 50


def kernels(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def by_function(step: Callable[[], None]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds of a step, by library and by our function."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(PROFILED):
        step()
    profiler.disable()
    torch.cuda.synchronize()
    libraries, functions = Counter(), Counter()

    def note(code: tuple[str, int, str], seconds: float) -> None:
        parts = [part for part in reversed(Path(code[0]).parts) if part in LIBRARIES]
        libraries[parts[0] if parts else "other"] += 1e6 * seconds / PROFILED
        if parts[:1] == ["peft_moe_compat"]:
            functions[f"{Path(code[0]).name}:{code[2]}"] += 1e6 * seconds / PROFILED

    for code, (_, _, own, _, callers) in pstats.Stats(profiler).stats.items():
        if code[0] != "~":
            note(code, own)
        for caller, (_, _, of_caller, _) in callers.items() if code[0] == "~" else ():
            note(caller, of_caller)
    return libraries, functions


def main() -> None:
    layer = bench._Layer(bench.Settings(bench.Shape(*map(int, args.shape.split(",")))))
    tokens = [int(number) for number in args.tokens.split(",")]
    found = {}
    for method in ("frozen base", "peft_moe_compat"):
        if method == "peft_moe_compat":
            layer.add_lora()
            patch.activate()
        for T in tokens:
            both, forward = steps(layer, T)
            row = [enqueued(both), enqueued(forward), waited(both), waited(forward), kernels(both), kernels(forward)]
            found[method, T] = row
            print(f"{method:16s} {T:5d} tokens: processor {row[0]:6.0f} us forward + backward, {row[1]:6.0f} forward; "
                  f"with the device {row[2]:6.0f}, {row[3]:6.0f}; kernels {row[4]}, {row[5]}", flush=True)  # fmt: skip
    libraries, functions = by_function(both)
    print("\n".join(f"{name:60s} {us:7.1f} us" for name, us in [*libraries.most_common(), *functions.most_common(30)]))
    if args.json:
        rows = {f"{method}, {T}": row for (method, T), row in found.items()}
        Path(args.json).write_text(json.dumps({"rows": rows, "libraries": libraries, "functions": functions}, indent=1))


if __name__ == "__main__":
    main()
