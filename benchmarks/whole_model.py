"""A whole Qwen3-30B-A3B with random weights: training steps, and unmerged decoding, eager and compiled.

    python benchmarks/whole_model.py [--peft DIR] [--what train,decode,compiled] [--layers 48] [--json OUT]

LoRA r = 16 on the experts, with `train` and `regional` on the attention too. DIR holds another PEFT than the installed
one. `train` takes steps of 4 x 2048 tokens with gradient checkpointing and AdamW, `regional` with each decoder layer
compiled as well; `decode` times single tokens after a short prompt; `compiled` does so under
torch.compile(mode="reduce-overhead", fullgraph=True) with a static cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--peft")
parser.add_argument("--what", default="train,decode,compiled")
parser.add_argument("--layers", type=int, default=48)
parser.add_argument("--json")
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"  # activated below, for its own rows only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if args.peft:
    sys.path.insert(0, args.peft)

import peft
import torch
import transformers

import peft_moe_compat

RESULTS: dict[str, dict[str, float | str]] = {}


def say(row: str, **values: float | str) -> None:
    RESULTS.setdefault(row, {}).update(values)
    print(row, values, flush=True)


def base_model(layers: int) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=layers, vocab_size=151936, norm_topk_prob=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cuda")
    for name, p in model.named_parameters():
        torch.nn.init.ones_(p) if "norm" in name else torch.nn.init.normal_(p, std=0.02)
        p.requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    return model


def with_lora(model: torch.nn.Module, attention: bool) -> torch.nn.Module:
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if attention else [],
        target_parameters=peft_moe_compat.expert_parameters(model),
    )
    with torch.device("cuda"):
        wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return wrapped


def train(model: torch.nn.Module, row: str, steps: int = 3) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, 151936, (4, 2048), device="cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    say(
        row,
        step_s=round(sorted(times)[steps // 2], 3),
        held_gib=round(held / 2**30, 2),
        peak_gib=round(peak / 2**30, 2),
    )
    model.gradient_checkpointing_disable()
    optimizer.state.clear()
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def decode(model: torch.nn.Module, row: str, batch: int = 1, tokens: int = 40, compiled: bool = False) -> None:
    """Milliseconds of a step after a prompt of 32 tokens; several tokens at once stand for a speculative step."""
    model.eval()
    forward = model.forward
    config = model.config
    cache = transformers.StaticCache(config=config, max_cache_len=128)
    ids = torch.randint(0, 151936, (batch, 32), device="cuda")
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    if compiled:
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    position = torch.full((batch, 1), 32, device="cuda")
    one = ids[:, :1].contiguous()
    times = []
    for i in range(tokens + 10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward(input_ids=one, past_key_values=cache, use_cache=True, position_ids=position)
        torch.cuda.synchronize()
        if i >= 10:
            times.append(time.perf_counter() - start)
    name = f"{'compiled ' if compiled else ''}batch {batch} ms"
    say(row, **{name: round(1e3 * sorted(times)[len(times) // 2], 2)})


def attempt(function, model: torch.nn.Module, row: str, **options: object) -> None:
    try:
        function(model, row, **options)
    except Exception as error:  # noqa: BLE001 (a way to run that fails is a result)
        say(row, **{f"{function.__name__} {options}": repr(error)[:300]})


def set_implementation(model: torch.nn.Module, name: str) -> None:
    model.config._experts_implementation = name


def decoding(model: torch.nn.Module, row: str, what: list[str]) -> None:
    if "decode" in what:
        for batch in (1, 16):
            attempt(decode, model, row, batch=batch)
    if "compiled" in what:
        for batch in (1, 16):
            torch._dynamo.reset()
            attempt(decode, model, row, batch=batch, compiled=True)
        torch._dynamo.reset()


def main() -> None:
    what = args.what.split(",")
    print(
        torch.__version__,
        "peft",
        peft.__version__,
        "transformers",
        transformers.__version__,
        torch.cuda.get_device_name(),
    )
    model = base_model(args.layers)
    for implementation in ("grouped_mm", "batched_mm"):
        set_implementation(model, implementation)
        decoding(model, f"base, {implementation}", what)
    set_implementation(model, "grouped_mm")
    model = with_lora(model, attention="train" in what or "regional" in what)
    if "train" in what:
        attempt(train, model, "stock PEFT")
    if "decode" in what:
        attempt(decode, model, "stock PEFT")
    with peft_moe_compat.activate():
        with peft_moe_compat.set_backend("triton"):
            if "train" in what:
                attempt(train, model, "peft_moe_compat")
            decoding(model, "peft_moe_compat", what)
            if "regional" in what:
                attempt(train, model, "peft_moe_compat, eager")
                for layer in model.get_base_model().model.layers:
                    layer.compile(fullgraph=True)
                attempt(train, model, "peft_moe_compat, layers compiled")
        with peft_moe_compat.set_backend("torch"):
            what = [part for part in what if part not in ("compiled", "regional")]
            if "train" in what:
                attempt(train, model, "peft_moe_compat, torch")
            decoding(model, "peft_moe_compat, torch", what)
    if "decode" in what:  # once more: what the processor bounds drifts
        model = model.unload()
        for implementation in ("grouped_mm", "batched_mm"):
            set_implementation(model, implementation)
            decoding(model, f"base, {implementation}, again", ["decode"])
    if args.json:
        Path(args.json).write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
