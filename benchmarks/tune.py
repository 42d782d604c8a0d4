"""Times every kernel of the fused path alone, over launch configurations. Needs a CUDA GPU.

    python benchmarks/tune.py [--shapes qwen3-30b,gptoss-20b,mixtral] [--what kernels,products,trace,start] [--json OUT]

kernels   those bound by memory, over tile sizes, warps and stages, beside the time of their bytes at the rate of a copy
products  the grouped products, torch's and the tiled one, in TFLOP/s over real rows
trace     where the GPU's time goes in a forward and backward of the layer
start     when the GPU reaches each part of a step that starts with an idle GPU: what the processor costs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import unittest.mock
from pathlib import Path

os.environ.setdefault("PEFT_MOE_COMPAT", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import grouped_mm
from triton.testing import do_bench

from peft_moe_compat import layout
from peft_moe_compat.forward.kernels import activation, gemm, gradients, layer, rows
from peft_moe_compat.forward.kernels.common import Config
from peft_moe_compat.forward.kernels.factors import packed
from peft_moe_compat.forward.kernels.interface import Nonlinearity
from peft_moe_compat.forward.kernels.routing import route

SHAPES = {  # E, k, H, I, tokens, rank
    "qwen3-30b": (128, 8, 2048, 768, 8192, 16),
    "gptoss-20b": (32, 4, 2880, 2880, 8192, 16),
    "mixtral": (8, 2, 4096, 14336, 8192, 16),
}
SILU = Nonlinearity("silu", True)
BFLOAT16 = torch.bfloat16
ACTIVATIONS = [(64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 8, 3)]
GATHERS = [(64, 4, 4), (128, 4, 4), (128, 8, 3), (256, 8, 3)]
GRADIENTS = [(64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3)]
PRODUCTS = [((256, 8, 4), 1, 8, True), ((256, 8, 3), 1, 8, True), ((256, 8, 4), 1, 16, True), ((128, 4, 3), 2, 8, True)]
PRODUCTS += [((128, 8, 3), 1, 8, False)]  # that of cards without a copy engine
RESULTS: dict[str, float | str] = {}


def ms(name: str, function, setting: tuple[object, str, tuple] | None = None) -> float:
    """Median of a call, printed and kept; with `setting` the configuration is put there for it."""
    if setting is not None:
        module, attribute, config = setting
        kept = getattr(module, attribute)
        setattr(module, attribute, Config(*config))
        name = f"{name} {config}"
    try:
        value = do_bench(function, warmup=8, rep=30, return_mode="median")
    except Exception as error:  # noqa: BLE001 (a configuration that does not fit the device is a result)
        value, RESULTS[name] = float("nan"), repr(error)[:150]
    else:
        RESULTS[name] = round(value, 4)
    if setting is not None:
        setattr(module, attribute, kept)
    print(f"{name:66} {RESULTS[name]}", flush=True)
    return value


class Case:
    """One layer's tensors, LoRA as PEFT packs it."""

    def __init__(self, shape: str) -> None:
        self.E, self.k, self.H, self.I, self.T, r = SHAPES[shape]
        E, H, I = self.E, self.H, self.I
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.hidden = torch.randn(self.T, H, dtype=BFLOAT16)
            logits = torch.randn(self.T, E) + 0.5 * torch.randn(E)
            weights, self.index = torch.topk(logits.softmax(-1), self.k)
            self.weights = (weights / weights.sum(-1, keepdim=True)).to(BFLOAT16)
            up, down = (torch.empty(E, o, i, dtype=BFLOAT16).normal_(std=0.02) for o, i in ((2 * I, H), (H, I)))
            pairs = [(torch.randn(E * r, i) / i**0.5, torch.randn(o, r * E) * 0.02) for o, i in ((2 * I, H), (H, I))]
        self.leaves = [t.requires_grad_() for pair in pairs for t in pair]
        flat = [layout.flat(A, B, E, orientation="linear", scaling=2.0) for A, B in pairs]
        self.up, self.down = (
            layer.Projection.of(W.transpose(1, 2), None, lora).ready(self.T * self.k)
            for W, lora in zip((up, down), flat, strict=True)
        )
        self.S = self.T * self.k
        self.where = route(self.index, E, 64, 128)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return layer.fused_experts(SILU, hidden, self.index, self.weights, self.up, lambda: self.down)


@torch.no_grad()
def kernels(shape: str, case: Case) -> None:
    S, H, I, k, where = case.S, case.H, case.I, case.k, case.where
    up, dh, low = (torch.randn(S, d, device="cuda", dtype=BFLOAT16) for d in (2 * I, I, 16))
    rate = 2 * up.nbytes / ms(f"{shape} copy", up.clone)
    ms(f"{shape} route", lambda: route(case.index, case.E, 64, 128))
    for name, projection in (("lora_B up", case.up), ("lora_B down", case.down)):
        ms(f"{shape} pack {name}", lambda p=projection: packed(p.B, p.weight, S))
    print(f"the bytes of gather and combine: {2 * S * H / rate:.4f}")
    for c in GATHERS:
        ms(f"{shape} gather", lambda: rows.gather(case.hidden, where, k, BFLOAT16, case.up.A), (rows, "GATHER", c))
    x = rows.gather(case.hidden, where, k, BFLOAT16, None)[0]
    ms(f"{shape} combine", lambda: rows.combine(x, where, case.weights, k, BFLOAT16))
    print(f"the bytes of activate: {6 * S * I / rate:.4f}, of its backward: {12 * S * I / rate:.4f}")
    for c in ACTIVATIONS:
        function = lambda: activation.activate(up, SILU, where, case.down.A)  # noqa: E731
        ms(f"{shape} activate", function, (activation, "FORWARD", c))
    for c in ACTIVATIONS:
        arguments = up, dh, SILU, where, case.weights, case.up.packed, None
        function = lambda arguments=arguments: activation.activate_backward(*arguments)  # noqa: E731
        ms(f"{shape} activate_backward", function, (activation, "BACKWARD", c))
        up.normal_()
        dh.normal_()
    wanted = {
        "d lora_A up, gathered": (case.hidden, case.up.A, {"gather_k": k}),
        "d lora_B up": (up, case.up.B, {}),
        "d lora_A down": (dh, case.down.A, {}),
        "d lora_B down, gathered": (case.hidden, case.down.B, {"gather_k": k, "weights": case.weights}),
    }
    for name, (of, factor, options) in wanted.items():
        for c in GRADIENTS:
            function = lambda a=(low, of, where, factor), o=options: gradients.factor_gradient(*a, **o)  # noqa: E731
            ms(f"{shape} {name}", function, (gradients, "GRADIENT", c))


@torch.no_grad()
def products(shape: str, case: Case) -> None:
    S, where = case.S, case.where
    x, up, h, low = (torch.randn(S, d, device="cuda", dtype=BFLOAT16) for d in (case.H, 2 * case.I, case.I, 16))
    cases = {
        "up": (x, case.up.weight, case.up.packed),
        "down": (h, case.down.weight, case.down.packed),
        "dh": (x, case.down.weight.transpose(1, 2), case.down.A),
        "dx": (up, case.up.weight.transpose(1, 2), case.up.A),
    }
    for name, (a, weight, factor) in cases.items():
        flops = 2 * S * weight.shape[1] * weight.shape[2] / 1e9
        base = ms(f"{shape} {name} torch's grouped_mm", lambda a=a, w=weight: grouped_mm(a, w, offs=where.offs))
        print(f"    {flops / base:.0f} TFLOP/s")
        for config, gemm.PER_SM, gemm.GROUP_TILES, described in PRODUCTS:
            for known in (gemm.programs_of, gemm._tiling, gemm._product_of):
                known.cache_clear()
            gemm.TILINGS[90] = gemm.Tiling(Config(*config), 64, described)
            function = lambda a=a, w=weight, f=factor: gemm.grouped_linear(a, w, where, low, f)  # noqa: E731
            label = f"{shape} {name} x{gemm.PER_SM} g{gemm.GROUP_TILES} {config} {'tma' if described else 'addresses'}"
            print(f"    {flops / ms(label, function):.0f} TFLOP/s")


def trace(shape: str, case: Case) -> None:
    grad = torch.randn_like(case.hidden)

    def step() -> None:
        case.forward(case.hidden.detach().requires_grad_()).backward(grad)
        for leaf in case.leaves:
            leaf.grad = None

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


def start(shape: str, case: Case) -> None:
    """Through transformers' module and PEFT's wrappers, as a user's step goes."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import peft_moe_compat

    E, k, H, I, _, r = SHAPES[shape]
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        block = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config).to(BFLOAT16)})
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02).requires_grad_(False)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=r, target_modules=[], target_parameters=targets), block)
    for name, p in block.named_parameters():
        p.requires_grad_("lora_" in name)
    reached: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        reached.append((name, event))

    def marked(function):
        def call(*args, **kwargs):
            mark(function.__name__)
            return function(*args, **kwargs)

        return call

    parts = {name: marked(getattr(layer, name)) for name in ("route", "linear")}
    with peft_moe_compat.activate(), unittest.mock.patch.multiple(layer, **parts):
        for _ in range(8):
            torch.cuda.synchronize()
            reached.clear()
            mark("start")
            out = block["experts"](case.hidden.detach().requires_grad_(), case.index, case.weights)
            mark("forward done")
            out.backward(case.hidden)
            mark("backward done")
    torch.cuda.synchronize()
    for name, event in reached:
        print(f"start {shape} {name:16} {reached[0][1].elapsed_time(event) * 1e3:8.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--what", default="kernels,products,trace,start")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    measures = {"kernels": kernels, "products": products, "trace": trace, "start": start}
    for shape in args.shapes.split(","):
        case = Case(shape)
        for what in args.what.split(","):
            measures[what](shape, case)
        del case
        torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps(RESULTS, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
