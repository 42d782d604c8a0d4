"""This library beside what else makes training fast: Liger's kernels, attention, torch.compile, continuous batching.

    python benchmarks/composition.py [--what train,batching,watch,names,dbrx] [--rows plain,liger] [--json OUT]

`train`: five steps of Qwen3-30B-A3B's sizes with fewer layers and random bfloat16 weights, LoRA r = 16 on experts and
attention, 4 x 2048 tokens, AdamW, with gradient checkpointing and without. Each row has a fresh model of the same
numbers. `batching`: transformers' `generate_batch` on prompts of different lengths beside `generate`, in bfloat16, and
whether their tokens are equal in float32. `watch`: what `ParamWrapper.__call__` costs the processor while the library
is active. `names`: a training step with `adapter_names`, two and four adapters in a batch, in a pass for each or one
for all. `dbrx`: one layer of DBRX's sizes, whose experts lie below each other in matrices, beside its frozen base,
and how far its output and gradient are from those of merged matrices. `--device cpu` makes everything tiny, to see
that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--what", default="train,batching,watch,names,dbrx")
parser.add_argument("--rows", help="of `train`, with commas; by default all")
parser.add_argument("--checkpointing", default="on,off")
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--device", default="cuda")
parser.add_argument("--json")
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"  # activated below, for its own rows only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from torch import nn
from transformers.models.qwen3_moe import modeling_qwen3_moe

import peft_moe_compat
from peft_moe_compat.patching import handed_down

ON_CPU = args.device == "cpu"
BATCH, LENGTH, STEPS = (2, 16, 5) if ON_CPU else (4, 2048, 5)
DTYPE = torch.float32 if ON_CPU else torch.bfloat16  # which triton's interpreter cannot multiply
SIZES = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936, "norm_topk_prob": True,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "norm_topk_prob": True,
}  # fmt: skip
RESULTS: dict[str, dict[str, object]] = {}


@dataclass(frozen=True)
class Way:
    """How a model is trained."""

    ours: bool = True
    attention: str = "sdpa"
    liger: bool = False  # fused linear cross entropy, RMSNorm and rope: liger_kernel_config={"swiglu": False}
    compiled: bool = False  # each decoder layer
    dropout: float = 0.0
    on_attention: bool = True  # that dropout


WAYS = {
    "plain": Way(),
    "liger": Way(liger=True),
    "dropout 0.05": Way(dropout=0.05),
    "dropout 0.05 on experts alone": Way(dropout=0.05, on_attention=False),
    "eager attention": Way(attention="eager"),
    "flash attention": Way(attention="flash_attention_2"),
    "compiled": Way(compiled=True),
    "liger + compiled": Way(liger=True, compiled=True),
    "stock PEFT": Way(ours=False),
    "stock PEFT + liger": Way(ours=False, liger=True),
}
NEEDS = {"liger": "liger_kernel", "flash attention": "flash_attn"}


def say(row: str, **values: object) -> None:
    """Prints, and writes at once, so that a run that is cut off has what it has measured."""
    RESULTS.setdefault(row, {}).update(values)
    print(row, values, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(RESULTS, indent=1))


def base_model(layers: int, attention: str, dtype: torch.dtype) -> nn.Module:
    sizes = TINY if ON_CPU else SIZES
    config = transformers.AutoConfig.for_model("qwen3_moe", num_hidden_layers=layers, **sizes)
    config._attn_implementation, config._experts_implementation = attention, "grouped_mm"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model = model.to_empty(device=args.device)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        nn.init.ones_(p) if "norm" in name else nn.init.normal_(p, std=0.02)
        p.requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(args.device)
    return model


def with_lora(model: nn.Module, dropout: float = 0.0, on_attention: bool = True) -> nn.Module:
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=peft_moe_compat.expert_parameters(model),
    )
    torch.manual_seed(1)
    with torch.device(args.device):
        wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    for name, layers in wrapped.named_modules():
        if name.endswith("lora_dropout") and "self_attn" in name and not on_attention:
            layers["default"] = nn.Identity()
    return wrapped


@contextmanager
def prepared(way: Way) -> Iterator[nn.Module]:
    """A model with LoRA, as that way has it; what Liger replaces for the whole process is put back."""
    genuine = dict(vars(modeling_qwen3_moe))
    with peft_moe_compat.activate() if way.ours else nothing():
        model = with_lora(base_model(args.layers, way.attention, DTYPE), way.dropout, way.on_attention)
        try:
            if way.liger:
                from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

                # As Trainer's `use_liger_kernel` does it, on the model below PEFT's.
                apply_liger_kernel_to_qwen3_moe(model=model.get_base_model(), swiglu=False)
            if way.compiled:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                for layer in model.get_base_model().model.layers:
                    layer.compile()
            yield model
        finally:
            vars(modeling_qwen3_moe).update(genuine)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def train(model: nn.Module, row: str, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=not ON_CPU)
    torch.manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH), device=args.device)
    losses, times = [], []
    for step in range(STEPS):
        if step == 1 and not ON_CPU:  # the first compiles, and plans
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        times.append(time.perf_counter() - start)
    figures: dict[str, object] = {"step_ms": round(1e3 * statistics.median(times[1:]), 1), "losses": losses}
    if not ON_CPU:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    say(row, **figures, first_step_s=round(times[0], 1))


def trained() -> None:
    for name in args.rows.split(",") if args.rows else WAYS:
        way = WAYS[name]
        missing = [module for part, module in NEEDS.items() if part in name and find_spec(module) is None]
        for mode in args.checkpointing.split(","):
            row = f"{name}, checkpointing {mode}"
            if missing:
                say(row, note=f"{missing[0]} is not installed")
                continue
            try:
                with prepared(way) as model:
                    train(model, row, mode == "on")
                    if way.compiled:
                        counted = torch._dynamo.utils.counters
                        breaks = sum(counted["graph_break"].values())
                        say(row, graphs=counted["stats"]["unique_graphs"], breaks=breaks)
            except Exception as error:  # noqa: BLE001 (a way to run that fails is a result)
                say(row, note=f"{type(error).__name__}: {error}"[:400])
            model = None
            gc.collect()
            if not ON_CPU:
                torch.cuda.empty_cache()


def generated(model: nn.Module, prompts: list[list[int]], tokens: int, **batching: object) -> tuple[list, float]:
    """(new tokens of each prompt, seconds from the first of them on) of `generate_batch` with options of its own.

    Without any, those of `generate`.
    """
    # As it is, `generate_batch` would look for flash-attention on the Hub.
    model.set_attn_implementation("paged|sdpa" if batching else "sdpa")
    config = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    if batching:
        options = transformers.ContinuousBatchingConfig(**batching)
        found = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=options, record_timestamps=True
        ).values()
        if failed := [one.error for one in found if one.error]:
            raise RuntimeError(failed[0])
        times = [one.timestamps for one in found]
        return [list(one.generated_tokens) for one in found], max(t[-1] for t in times) - min(t[0] for t in times)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=args.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=args.device)
    ends = []
    for config.max_new_tokens in (1, tokens):
        start = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        ends.append(time.perf_counter() - start)
    return out, ends[1] - ends[0]


@torch.no_grad()
def batched() -> None:
    """`num_blocks` and `max_batch_tokens` are given, or it takes what memory there is for its cache."""
    cache = {"block_size": 32, "num_blocks": 256, "max_batch_tokens": 64 if ON_CPU else 2048}
    ways = {"generate": {}, "generate_batch": cache, "generate_batch, CUDA graphs": cache | {"use_cuda_graph": True}}
    count, tokens = (3, 6) if ON_CPU else (16, 48)
    for dtype, layers in ((torch.float32, 2), (torch.bfloat16, args.layers)):
        model = with_lora(base_model(layers, "sdpa", dtype)).eval()
        torch.manual_seed(3)
        lengths = torch.randint(4, 12 if ON_CPU else 200, (count,)).tolist()
        prompts = [torch.randint(1, model.config.vocab_size, (length,)).tolist() for length in lengths]
        expected = None
        for ours in (False, True):
            with peft_moe_compat.activate() if ours else nothing():
                for name, batching in ways.items():
                    row = f"{name}, {str(dtype)[6:]}, {'peft_moe_compat' if ours else 'stock PEFT'}"
                    try:
                        generated(model, prompts, 2, **batching)
                        found, seconds = generated(model, prompts, tokens, **batching)
                    except Exception as error:  # noqa: BLE001 (a way to run that fails is a result)
                        say(row, note=f"{type(error).__name__}: {error}"[:400])
                        continue
                    expected = found if expected is None else expected
                    pairs = [pair for one in zip(found, expected, strict=True) for pair in zip(*one, strict=True)]
                    same = sum(a == b for a, b in pairs) / len(pairs)
                    rate = count * (tokens - 1) / seconds
                    say(row, tokens_s=round(rate, 1), same_as_stock_generate=round(same, 4))


def named() -> None:
    """Without the optimiser; the largest possible and an impossible number of tokens that make a pass worth it."""
    lengths = (4, 8) if ON_CPU else (256, 1024, 2048, 4096)
    for adapters in (2, 4):
        with peft_moe_compat.activate():
            model = with_lora(base_model(min(args.layers, 4), "sdpa", DTYPE)).train()
            names = ["default", *(f"other {i}" for i in range(1, adapters))]
            with torch.device(args.device):
                for name in names[1:]:
                    model.add_adapter(name, model.peft_config["default"])
            model.base_model.set_adapter(names)
            for length in lengths:
                ids = torch.randint(0, model.config.vocab_size, (4, length), device=args.device)
                of_sample, times = [names[i % adapters] for i in range(4)], {}
                for way, tokens in (("one after the other", 0), ("in one pass", 2**62)):
                    handed_down._TOKENS_OF_A_PASS = tokens
                    found = []
                    for _ in range(6):
                        start = time.perf_counter()
                        loss = model(input_ids=ids, adapter_names=of_sample, labels=ids, use_cache=False).loss
                        loss.backward()
                        model.zero_grad()
                        loss.item()
                        if not ON_CPU:
                            torch.cuda.synchronize()
                        found.append(time.perf_counter() - start)
                    times[f"{way}, ms"] = round(1e3 * statistics.median(found[2:]), 1)
                say(f"{adapters} adapters, 4 x {length} tokens", **times)


def dbrx() -> None:
    """Stock PEFT's forward cannot run these: what is expected is transformers' own of the updated matrices."""
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    E, k, H, I, tokens = (4, 2, 32, 16, 16) if ON_CPU else (16, 4, 6144, 10752, 8192)  # noqa: E741
    config = transformers.DbrxConfig(
        d_model=H, attn_config={}, ffn_config={"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": k}
    ).ffn_config
    config.hidden_size = H
    with torch.device(args.device):
        torch.manual_seed(0)
        experts = DbrxExperts(config).to(DTYPE)
        for p in experts.parameters():
            nn.init.normal_(p, std=0.02).requires_grad_(False)
        x = torch.randn(1, tokens, H, dtype=DTYPE)
        weights, index = torch.randn(tokens, E).softmax(-1).topk(k)
        along, weights = torch.randn_like(x), weights.to(DTYPE)

    def outcome(few: int | None = None) -> tuple[torch.Tensor, ...]:
        """The output and the gradients, first that of the hidden states."""
        h = x[:, :few].clone().requires_grad_()
        out = block["ffn"](h, index[:few], weights[:few])
        leaves = [h, *(p for p in block.parameters() if p.requires_grad)]
        return out.detach(), *torch.autograd.grad(out, leaves, along[:, :few])

    def figures(row: str) -> None:
        times = []
        for step in range(9):
            if step == 2 and not ON_CPU:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = outcome()
            if not ON_CPU:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            del found
        peak = {} if ON_CPU else {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        say(row, ms=round(1e3 * statistics.median(times[2:]), 2), **peak)

    block = nn.ModuleDict({"ffn": experts})
    figures("dbrx, frozen base")
    targets = ["ffn.mlp.w1", "ffn.mlp.v1", "ffn.mlp.w2"]
    with peft_moe_compat.activate(), torch.device(args.device):
        peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=[], target_parameters=targets), block)
        for name, p in block.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.01)
        figures("dbrx, peft_moe_compat")
        few = 64
        found = outcome(few)[:2]
        with torch.no_grad():
            for wrapper in [m for m in block.modules() if hasattr(m, "parameter_name")]:
                weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
                weight.data = weight.data + wrapper.get_delta_weight("default").to(weight.dtype)
                wrapper.enable_adapters(False)
        merged = outcome(few)[:2]
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, merged, strict=True)]
        say("dbrx, peft_moe_compat", off_merged=[round(error, 5) for error in errors])


class Through(nn.Module):
    """An experts module that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 8, 8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def watched() -> None:
    """Microseconds of a call of a wrapper whose adapter is disabled: the way to its forward is most of it."""
    x = torch.zeros(1, 8)

    def cost(call: Callable[[nn.Module, torch.Tensor], object], wrapper: nn.Module, calls: int = 20_000) -> float:
        rounds = []
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(calls):
                call(wrapper, x)
            rounds.append((time.perf_counter() - start) / calls)
        return round(1e6 * min(rounds), 3)

    block = nn.ModuleDict({"experts": Through()})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"]), block)
    wrapper, kind = block["experts"], type(block["experts"])
    wrapper.enable_adapters(False)
    say("call, library off", us=cost(kind.__call__, wrapper))
    with peft_moe_compat.activate():
        say("call, library on", us=cost(kind.__call__, wrapper))
        say("call, library on, without its watch", us=cost(nn.Module.__call__, wrapper))
        ours = kind.forward
        kind.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        try:
            say("call, library on, a foreign forward on top", us=cost(kind.__call__, wrapper))
            say("the same without the watch", us=cost(nn.Module.__call__, wrapper))
        finally:
            kind.forward = ours


def main() -> None:
    what = args.what.split(",")
    card = "cpu" if ON_CPU else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    say("machine", device=card, layers=args.layers, tokens=f"{BATCH} x {LENGTH}", **versions)
    functions = {"train": trained, "batching": batched, "watch": watched, "names": named, "dbrx": dbrx}
    for name, function in functions.items():
        if name in what:
            function()


if __name__ == "__main__":
    main()
