"""Times every kernel of the fused path alone, over launch configurations, and checks the whole against float64.

python benchmarks/tune.py [--shapes qwen3-30b,gptoss-20b,mixtral] [--what check,kernels,gemm] [--json OUT]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("PEFT_MOE_COMPAT", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from triton.testing import do_bench

from peft_moe_compat.fused import Activation
from peft_moe_compat.kernels import activation, gemm, gradients, rows
from peft_moe_compat.kernels.common import Config, Factor
from peft_moe_compat.kernels.factors import packed
from peft_moe_compat.kernels.layer import Layer, Loras, Weights, fused_experts
from peft_moe_compat.kernels.routing import route

SHAPES = {
    "qwen3-30b": (128, 8, 2048, 768, 8192, 16),
    "gptoss-20b": (32, 4, 2880, 2880, 8192, 16),
    "mixtral": (8, 2, 4096, 14336, 8192, 16),
}
SHARD, SHARDS, CALLS = 0, 1, 0
RESULTS: dict[str, float | str] = {}


def ms(name: str, function, rep: int = 40) -> float:
    global CALLS
    CALLS += 1
    if CALLS % SHARDS != SHARD:
        return 1.0
    if SHARDS > 1:  # compiles into triton's cache on disk, for a run that measures
        with contextlib.suppress(Exception):
            function()
        return 1.0
    try:
        value = do_bench(function, warmup=8, rep=rep, return_mode="median")
    except Exception as error:  # noqa: BLE001 (a configuration that does not fit the device is a result)
        RESULTS[name] = repr(error)[:150]
        print(f"{name:70} {RESULTS[name]}", flush=True)
        return float("nan")
    RESULTS[name] = round(value, 4)
    print(f"{name:70} {value:8.4f}", flush=True)
    return value


def data(E, k, H, I, T, r, dtype=torch.bfloat16, skew=0.5):
    torch.manual_seed(0)
    device = "cuda"
    hidden = torch.randn(T, H, device=device, dtype=dtype)
    logits = torch.randn(T, E, device=device) + skew * torch.randn(E, device=device)
    weights, index = torch.topk(logits.softmax(-1), k)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    W1 = torch.empty(E, 2 * I, H, device=device, dtype=dtype).normal_(std=0.02)
    W2 = torch.empty(E, H, I, device=device, dtype=dtype).normal_(std=0.02)
    A1, A2 = (torch.randn(E, r, d, device=device) / d**0.5 for d in (H, I))
    B1, B2 = (torch.randn(d, r, E, device=device).mul_(0.02).permute(2, 0, 1) for d in (2 * I, H))
    return hidden, index, weights, W1, W2, [t.requires_grad_() for t in (A1, B1, A2, B2)]


def check(E, k, H, I, T, r, dtype, gated=True, act="silu", skew=0.5):
    """Relative errors of the output and of every gradient against float64, expert by expert."""
    hidden, index, weights, W1, W2, loras = data(E, k, H, I, T, r, dtype, skew)
    if not gated:
        W1, loras[1] = W1[:, :I].contiguous(), loras[1].detach()[:, :I].requires_grad_()
    hidden.requires_grad_(), weights.requires_grad_()
    out = fused_experts(
        Layer(Activation(act, gated), 2.0, 2.0), hidden, index, weights,
        Weights(W1.transpose(1, 2), None, W2.transpose(1, 2), None), Loras(*loras),
    )  # fmt: skip
    with torch.no_grad():  # of few rows, another path
        again = fused_experts(
            Layer(Activation(act, gated), 2.0, 2.0), hidden, index, weights,
            Weights(W1.transpose(1, 2), None, W2.transpose(1, 2), None), Loras(*loras),
        )  # fmt: skip
    print("    without gradients:", ((again - out).norm() / out.norm()).item())
    grad = torch.randn_like(out)
    leaves = [hidden, weights, *loras]
    mine = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "not deterministic"
    x, w, L = hidden.double(), weights.double(), [t.double() for t in loras]
    exact = torch.zeros(T, H, dtype=torch.float64, device="cuda")
    for e in range(E):
        t, j = torch.where(index == e)
        up = x[t] @ (W1[e].double() + 2 * L[1][e] @ L[0][e]).T
        if gated:
            g, u = up.chunk(2, -1)
            h = torch.nn.functional.silu(g) * u
        else:
            h = torch.relu(up) ** 2
        exact = exact.index_add(0, t, w[t, j, None] * (h @ (W2[e].double() + 2 * L[3][e] @ L[2][e]).T))
    theirs = torch.autograd.grad(exact, leaves, grad.double())
    names = ("out", "hidden", "weights", "A1", "B1", "A2", "B2")
    errors = {
        n: f"{((a.double() - b).norm() / b.norm()).item():.1e}"
        for n, a, b in zip(names, (out, *mine), (exact, *theirs), strict=True)
    }
    print(f"check E={E} k={k} H={H} I={I} T={T} r={r} {dtype} gated={gated}: {errors}", flush=True)
    RESULTS[f"check {E},{k},{H},{I},{T},{r},{dtype},{gated}"] = json.dumps(errors)


FORWARDS = {
    32: [(64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3)],
    64: [(32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 8, 2)],
    128: [(32, 8, 3), (64, 8, 2)],
}
BACKWARDS = {
    32: [(64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3)],
    64: [(32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 8, 2), (64, 8, 3), (64, 4, 2)],
    128: [(32, 8, 2), (32, 8, 3)],
}


def kernels(shape: str) -> None:
    E, k, H, I, T, r = SHAPES[shape]
    hidden, index, weights, W1, W2, loras = data(*SHAPES[shape])
    A1, B1, A2, B2 = (t.detach() for t in loras)
    S, dtype = T * k, torch.bfloat16
    where = route(index, E, 64, 128)
    ms(f"{shape} route", lambda: route(index, E, 64, 128))
    ms(f"{shape} torch.sort", lambda: torch.sort(index.reshape(-1)))
    fB1, fB2 = Factor(B1.transpose(1, 2), 2.0), Factor(B2.transpose(1, 2), 2.0)
    pB1, pB2 = packed(fB1, dtype, S), packed(fB2, dtype, S)
    ms(f"{shape} pack B1", lambda: packed(fB1, dtype, S))
    ms(f"{shape} pack B2", lambda: packed(fB2, dtype, S))
    tiles = {64: where}
    best = {}
    for b, w in tiles.items():
        for c in (Config(64, 4, 3), Config(128, 4, 3), Config(128, 4, 4), Config(128, 8, 3)):
            rows.GATHER = c
            best["gather", b, c] = ms(
                f"{shape} gather x,A1 {b} {tuple(c)}", lambda w=w: rows.gather(hidden, w, k, dtype, Factor(A1)), 15
            )
    (_, b, c) = min((v, b, c) for (_, b, c), v in best.items() if v == v)
    rows.GATHER = c
    ms(f"{shape} gather g,B2 packed {b} {tuple(c)}", lambda: rows.gather(hidden, tiles[b], k, dtype, pB2))
    ms(f"{shape} gather g,B2 strided {b} {tuple(c)}", lambda: rows.gather(hidden, tiles[b], k, dtype, fB2))
    ms(f"{shape} gather alone {b} {tuple(c)}", lambda: rows.gather(hidden, tiles[b], k, dtype, None))
    x, low, _ = rows.gather(hidden, where, k, dtype, Factor(A1))
    up = torch.randn(S, 2 * I, device="cuda", dtype=dtype)
    dh = torch.randn(S, I, device="cuda", dtype=dtype)
    act = Activation("silu", True)
    tiles = {b: route(index, E, b, 128) for b in (32, 64, 128)}
    for b, w in tiles.items():
        activation.PROGRAM_ROWS = b
        for c in [Config(*x) for x in FORWARDS[b]]:
            activation.FORWARD = c
            ms(f"{shape} activate {b} {tuple(c)}", lambda w=w: activation.activate(up, act, w, Factor(A2)), 15)
        ms(f"{shape} activate alone {b} {tuple(c)}", lambda w=w: activation.activate(up, act, w, None), 15)
        for c in [Config(*x) for x in BACKWARDS[b]]:
            activation.BACKWARD = c
            ms(
                f"{shape} backward {b} {tuple(c)}",
                lambda w=w: activation.activate_backward(up, dh, act, w, weights, pB1, None),
                15,
            )
    up.normal_()
    dh.normal_()
    tiles = {b: route(index, E, b, 128) for b in (64, 128)}
    for b, w in tiles.items():
        for c in (Config(64, 4, 3), Config(128, 4, 3)):
            gradients.GRADIENT = c
            ms(
                f"{shape} dA1 gathered {b} {tuple(c)}",
                lambda w=w: gradients.factor_gradient(low, hidden, w, Factor(A1), gather_k=k),
                10,
            )
            ms(f"{shape} dB1 {b} {tuple(c)}", lambda w=w: gradients.factor_gradient(low, up, w, fB1), 10)
            ms(f"{shape} dA2 {b} {tuple(c)}", lambda w=w: gradients.factor_gradient(low, dh, w, Factor(A2)), 10)
            ms(
                f"{shape} dB2 gathered {b} {tuple(c)}",
                lambda w=w: gradients.factor_gradient(low, hidden, w, fB2, gather_k=k, weights=weights),
                10,
            )
    gradients.GRADIENT = Config(128, 4, 3)
    dense = torch.empty(E, 2 * I, r, device="cuda").transpose(1, 2)
    ms(f"{shape} dB1 into dense strides", lambda: gradients.factor_gradient(low, up, where, Factor(dense)))
    ms(f"{shape} combine weighted", lambda: rows.combine(x, where, weights, k, dtype))
    ms(f"{shape} combine", lambda: rows.combine(x, where, None, k, dtype))


PRODUCTS = {  # name: (config, BLOCK_K, programs per SM, group, row tile)
    "256/8w/4s": (Config(256, 8, 4), 64, 1, 8, 128),
    "256/8w/3s": (Config(256, 8, 3), 64, 1, 8, 128),
    "256/8w/4s g16": (Config(256, 8, 4), 64, 1, 16, 128),
    "128/4w/3s x2": (Config(128, 4, 3), 64, 2, 8, 128),
}


def products(shape: str) -> None:
    E, k, H, I, T, r = SHAPES[shape]
    hidden, index, weights, W1, W2, loras = data(*SHAPES[shape])
    A1, B1, A2, B2 = (t.detach() for t in loras)
    S, dtype = T * k, torch.bfloat16
    where = route(index, E, 64, 128)
    pB1, pB2 = (packed(Factor(B.transpose(1, 2), 2.0), dtype, S) for B in (B1, B2))
    x = rows.gather(hidden, where, k, dtype, None)[0]
    up, h = torch.randn(S, 2 * I, device="cuda", dtype=dtype), torch.randn(S, I, device="cuda", dtype=dtype)
    low = torch.randn(S, 16, device="cuda", dtype=dtype)
    cases = {
        "up": (x, W1.transpose(1, 2), pB1), "down": (h, W2.transpose(1, 2), pB2),
        "dh": (x, W2, Factor(A2)), "dx": (up, W1, Factor(A1)),
    }  # fmt: skip
    for name, (a, W, factor) in cases.items():
        flops = 2 * S * W.shape[1] * W.shape[2] / 1e9
        gemm.TILED = False
        base = ms(f"{shape} {name} F.grouped_mm", lambda: gemm.grouped_linear(a, W, where, None, None))
        ms(f"{shape} {name} F.grouped_mm + update", lambda: gemm.grouped_linear(a, W, where, low, factor))
        gemm.TILED = True
        expected = gemm._add_to(torch.nn.functional.grouped_mm(a, W, offs=where.offs), where, low, factor, None)
        print(f"    {flops / base:.0f} TFLOP/s", flush=True)
        for label, (config, block_k, per_sm, group, block) in PRODUCTS.items():
            gemm.PRODUCT, gemm.BLOCK_K, gemm.PER_SM, gemm.GROUP_TILES = config, block_k, per_sm, group
            gemm._programs.cache_clear()
            there = route(index, E, 64, block)
            found = ms(
                f"{shape} {name} tiled {label}", lambda there=there: gemm.grouped_linear(a, W, there, low, factor), 25
            )
            if found == found and SHARDS == 1:
                y = gemm.grouped_linear(a, W, there, low, factor)
                error = (y - expected).abs().max().item()
                print(f"    {flops / found:.0f} TFLOP/s, max difference {error:.1e}", flush=True)


def trace(shape: str) -> None:
    """Where the GPU's time goes in a forward and backward of the layer."""
    E, k, H, I, T, r = SHAPES[shape]
    hidden, index, weights, W1, W2, loras = data(*SHAPES[shape])
    grad = torch.randn_like(hidden)

    def step():
        out = fused_experts(
            Layer(Activation("silu", True), 2.0, 2.0), hidden.detach().requires_grad_(), index, weights,
            Weights(W1.transpose(1, 2), None, W2.transpose(1, 2), None), Loras(*loras),
        )  # fmt: skip
        out.backward(grad)

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    total = 0.0
    for event in sorted(profile.key_averages(), key=lambda e: -e.device_time_total):
        total += event.device_time_total
        each = event.device_time_total / event.count
        print(f"trace {shape} {event.key[:60]:60} {event.count / 10:5.1f} x {each:9.1f} us")
    print(f"trace {shape} sum {total / 1e4:.3f} ms", flush=True)
    RESULTS[f"trace {shape}"] = total / 1e4


def host() -> None:
    """What the processor spends on a forward and a backward, with next to nothing for the GPU to do."""
    import cProfile
    import pstats
    import time

    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import peft_moe_compat

    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    block = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config).to("cuda", torch.bfloat16)})
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02).requires_grad_(False)
    hidden = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16)
    weights, index = torch.topk(torch.rand(1024, 8, device="cuda"), 2)
    weights = weights.to(torch.bfloat16)

    def timed(name, function):
        for _ in range(20):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            function()
        spent = (time.perf_counter() - start) / 100
        torch.cuda.synchronize()
        print(f"host {name:40} {spent * 1e6:8.0f} us", flush=True)
        RESULTS[f"host {name}"] = spent

    def both():
        h = hidden.detach().requires_grad_()
        block["experts"](h, index, weights).backward(hidden)

    def forward():
        with torch.no_grad():
            block["experts"](hidden, index, weights)

    timed("frozen base, forward", forward)
    timed("frozen base, both", both)
    lora = LoraConfig(r=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    inject_adapter_in_model(lora, block)
    with peft_moe_compat.activate():
        for backend in ("torch", "triton"):
            with peft_moe_compat.set_backend(backend):
                timed(f"{backend}, forward", forward)
                timed(f"{backend}, both", both)
        with cProfile.Profile() as profile:
            for _ in range(100):
                forward()
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
        where = route(index, 8, 64, 128)
        from peft_moe_compat.kernels import layer

        kept, layer.fused_experts = layer.fused_experts, lambda layer, hidden, *rest: hidden
        timed("wrappers alone", forward)
        layer.fused_experts = kept
        timed("route", lambda: route(index, 8, 64, 128))
        timed("gather", lambda: rows.gather(hidden, where, 2, torch.bfloat16, None))
        timed("combine", lambda: rows.combine(hidden.repeat(2, 1), where, weights, 2, torch.bfloat16))
        x = hidden.repeat(2, 1)
        W = block["experts"].get_base_layer().gate_up_proj.transpose(1, 2)
        timed("product", lambda: gemm.grouped_linear(x, W, where, None, None))
        timed("torch.empty", lambda: torch.empty(5, device="cuda"))


def small() -> None:
    """A forward, and both, of few tokens at Qwen3-30B's sizes: what the wall clock says."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import peft_moe_compat

    config = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    for implementation in ("grouped_mm", "batched_mm"):
        config._experts_implementation = implementation
        with torch.device("cuda"):
            block = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config).bfloat16()})
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.02).requires_grad_(False)
        measure_small(block, implementation, "base")
        if implementation == "batched_mm":
            continue
        lora = LoraConfig(r=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        inject_adapter_in_model(lora, block)
        for name, p in block.named_parameters():
            p.requires_grad_("lora_" in name)
        measure_small(block, implementation, "stock PEFT")
        with peft_moe_compat.activate():
            for backend in ("torch", "triton"):
                with peft_moe_compat.set_backend(backend):
                    measure_small(block, implementation, backend)


def measure_small(block, implementation, name):
    import time

    times = []
    for T in (1, 4, 16, 64, 256, 1024, 2048):
        hidden = torch.randn(T, 2048, device="cuda", dtype=torch.bfloat16)
        weights, index = torch.topk(torch.rand(T, 128, device="cuda"), 8)
        weights = weights.to(torch.bfloat16)
        if implementation == "batched_mm" and T > 64:
            continue

        def forward(hidden=hidden, index=index, weights=weights):
            with torch.no_grad():
                block["experts"](hidden, index, weights)

        def both(hidden=hidden, index=index, weights=weights):
            h = hidden.detach().requires_grad_()
            block["experts"](h, index, weights).backward(hidden)

        for function in (forward, both):
            for _ in range(5):
                function()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                function()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 20 * 1e3)
            RESULTS[f"small {implementation} {name} T={T} {function.__name__}"] = times[-1]
        times.append(float("nan"))
    print(f"small {implementation:11}{name:11}", " ".join(f"{t:6.2f}" if t == t else " |" for t in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--what", default="check,kernels,gemm")
    parser.add_argument("--json")
    parser.add_argument("--shard", default="0/1", help="i/n: compile every n-th configuration and measure nothing")
    args = parser.parse_args()
    global SHARD, SHARDS
    SHARD, SHARDS = (int(n) for n in args.shard.split("/"))
    what = args.what.split(",")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if "host" in what:
        host()
    if "small" in what:
        small()
    if "check" in what:
        for arguments in (
            (8, 2, 256, 128, 300, 16, torch.bfloat16), (16, 4, 512, 256, 4096, 16, torch.bfloat16),
            (16, 4, 512, 192, 2000, 5, torch.float16), (8, 2, 256, 128, 1, 16, torch.bfloat16),
            (8, 2, 512, 256, 700, 130, torch.bfloat16), (8, 2, 256, 128, 300, 8, torch.float32),
            (8, 2, 256, 128, 3000, 24, torch.bfloat16, False, "relu2"), (8, 2, 512, 256, 3000, 256, torch.bfloat16),
            (64, 4, 512, 256, 5000, 16, torch.bfloat16),
        ):  # fmt: skip
            try:
                check(*arguments)
            except Exception as error:  # noqa: BLE001
                print("check failed", arguments, repr(error)[:600], flush=True)
    for shape in args.shapes.split(","):
        if "gemm" in what:
            products(shape)
        if "trace" in what:
            trace(shape)
        if "kernels" in what:
            kernels(shape)
        torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
