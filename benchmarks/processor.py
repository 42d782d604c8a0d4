"""What the processor spends on one layer: launches and microseconds, the frozen base's of the same experts beside ours.

    python benchmarks/processor.py [--tokens 1,64,512,2048] [--shape 128,8,2048,768] [--graphs] [--json OUT]

Steps are enqueued without waiting for the device, a few at a time, so that neither the device nor its queue is the
limit; kernels are those that the profiler sees. Then, of this package's step at the last number of tokens: our time in
Python by function, with the built-ins it calls itself, and what is torch's, transformers', PEFT's and triton's, by
cProfile, which makes all of it slower, calls more than what they do.

`--graphs`: also what a layer captured for its shapes would reach: the forward and the backward as a CUDA graph each,
with the copies of what goes in (`torch.cuda.make_graphed_callables`), and both as one graph, which is the device alone.
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
parser.add_argument("--graphs", action="store_true")
parser.add_argument("--json")
args = parser.parse_args()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
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


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, ids of experts, their weights, and a gradient of the output."""
    E, k, H, _ = map(int, args.shape.split(","))
    hidden = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights, index = torch.randn(tokens, E, device="cuda").softmax(-1).topk(k)
    return hidden, index, weights.bfloat16(), torch.randn_like(hidden)


def steps(
    layer: bench._Layer, tokens: int, experts: nn.Module | None = None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward, forward) with nothing beside them."""
    experts = experts or layer.block["experts"]
    hidden, index, weights, gradient = routed(tokens)
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


def alone(step: Callable[[], None]) -> float:
    """Microseconds of a step that starts with an idle device and is waited for."""
    times = []
    for _ in range(REPEATS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[3:])


class Whole(nn.Module):
    """Experts whose forward may be replaced by a captured one."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(hidden, index, weights)


def captured(layer: bench._Layer, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward as a graph each, both as one graph)."""
    both, _ = steps(layer, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    whole = Whole(layer.block["experts"])
    hidden, index, weights, _ = routed(tokens)
    torch.cuda.make_graphed_callables(whole, (hidden, index, weights))
    apart, _ = steps(layer, tokens, whole)
    return apart, graph.replay


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


def graphs(layer: bench._Layer, T: int, both: Callable[[], None], method: str, found: dict) -> None:
    """Adds to `found` what a step takes that is waited for, and what it takes captured."""
    try:
        apart, whole = captured(layer, T)
        row = [alone(both), alone(apart), enqueued(apart), alone(whole), waited(whole)]
        found[f"{method}, graphs", T] = row
        print(f"{method:16s} {T:5d} tokens, waited for: {row[0]:6.0f} us; a graph each {row[1]:6.0f} us, processor "
              f"{row[2]:6.0f}; one graph {row[3]:6.0f} us, one after the other {row[4]:6.0f}", flush=True)  # fmt: skip
    except RuntimeError as error:  # what cannot be captured is a result
        torch.cuda.synchronize()
        print(f"{method:16s} {T:5d} tokens: not captured: {str(error).splitlines()[0]}", flush=True)


def save(found: dict, **profiled: Counter[str]) -> None:
    if args.json:
        rows = {f"{method}, {T}": row for (method, T), row in found.items()}
        Path(args.json).write_text(json.dumps({"rows": rows, **profiled}, indent=1))


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
            if args.graphs:
                graphs(layer, T, both, method, found)
            save(found)
    libraries, functions = by_function(both)
    save(found, libraries=libraries, functions=functions)
    print("\n".join(f"{name:60s} {us:7.1f} us" for name, us in [*libraries.most_common(), *functions.most_common(30)]))


if __name__ == "__main__":
    main()
