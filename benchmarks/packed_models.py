"""Whole models with packed experts and random weights: what a training step takes, and that it trains.

    python benchmarks/packed_models.py --model qwen3-30b --json OUT
    python benchmarks/packed_models.py --model gpt-oss-20b --batch 1
    python benchmarks/packed_models.py --model gpt-oss-120b --packed-only

LoRA r = 16 on all experts and attention in bfloat16, gradient checkpointing, bitsandbytes' 8-bit AdamW, and a loss
whose logits are made and forgotten `--chunk` tokens at a time, as Liger's and TRL's chunked losses do. Qwen3-30B-A3B in
nf4 with nested scales, gpt-oss in MXFP4. Then the same steps of the same model, its experts dequantised to bfloat16.
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
parser.add_argument("--model", default="qwen3-30b", choices=["qwen3-30b", "gpt-oss-20b", "gpt-oss-120b"])
parser.add_argument("--layers", type=int, help="fewer than the model has")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--chunk", type=int, default=256, help="tokens whose logits there are at a time")
parser.add_argument("--packed-only", action="store_true")
parser.add_argument("--json")
args = parser.parse_args()
os.environ.setdefault("PEFT_MOE_COMPAT", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes
import peft
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import peft_moe_compat
from peft_moe_compat.model.experts import routed_experts
from peft_moe_compat.quantising.mxfp4 import hold_packed
from peft_moe_compat.quantising.packing import Packing, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 201088, "num_experts_per_tok": 4,
}  # fmt: skip
CONFIGS = {
    "qwen3-30b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_hidden_layers": 48, "vocab_size": 151936, "norm_topk_prob": True,
    },
    "gpt-oss-20b": {**GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
}  # fmt: skip


def packed_model() -> nn.Module:
    """Packed stack by stack; nothing is ever held in bfloat16 but one stack."""
    sizes = dict(CONFIGS[args.model])
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    config = transformers.AutoConfig.for_model(**sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for _, module, names in list(routed_experts(model)):
        for name in names:
            if args.model.startswith("gpt-oss"):
                hold_packed(module, name)
            else:
                weight = torch.empty(module.get_parameter(name).shape, dtype=torch.bfloat16, device=DEVICE)
                pack(module, name, weight.normal_(std=0.02), Packing("nf4", double_quant=True))
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    held[name] = filled(name, type(module).__name__, torch.empty_like(tensor, device=DEVICE))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)
    return model.requires_grad_(False)


def filled(name: str, module: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "scales":
        values = tensor.random_(119, 122)
    elif tensor.dtype == torch.uint8:
        values = tensor.random_(0, 256)
    else:
        values = tensor.fill_(1) if "Norm" in module else tensor.normal_(std=0.02)
    return values if name == "scales" else nn.Parameter(values, requires_grad=False)


def with_lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=peft_moe_compat.expert_parameters(model),
    )
    torch.manual_seed(1)
    with torch.device(DEVICE):
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped.train()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.enable_input_require_grads()
    return wrapped


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the next token; logits of some tokens at a time."""
    base = model.get_base_model()
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()

    def part(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(base.lm_head(rows).float(), labels, reduction="sum")

    pieces = zip(hidden.split(args.chunk), targets.split(args.chunk), strict=True)
    return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces) / len(targets)


def trained(model: nn.Module) -> dict:
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(factors, lr=2e-4) if DEVICE == "cuda" else torch.optim.AdamW(factors)
    generator = torch.Generator(DEVICE).manual_seed(2)
    vocab = model.get_base_model().config.vocab_size
    batch = torch.randint(0, min(vocab, 2000), (args.batch, args.length), device=DEVICE, generator=generator)
    losses, times = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    row = {"step_s": round(sorted(times)[len(times) // 2], 3), "losses": [round(loss, 4) for loss in losses]}
    if DEVICE == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return row


def dequantise(model: nn.Module) -> None:
    """The experts, in place, as the weights that their packed form stands for."""
    for _, module, names in list(routed_experts(model)):
        for name in names:
            weight = getattr(module, name).contiguous()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def main() -> None:
    torch.manual_seed(0)
    base = packed_model()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    versions["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result = {"arguments": vars(args), "versions": versions}
    if DEVICE == "cuda":
        result["base_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    print(json.dumps(result), flush=True)
    model = with_lora(base)
    first = peft_moe_compat.report(model).rows[0].parameters[0]
    result["report"] = f"{first.path} {first.format} {first.reason or ''}".strip()
    result["packed"] = trained(model)
    print(args.model, "packed", result["report"], result["packed"], flush=True)
    if not args.packed_only:
        base = model.unload()
        del model
        gc.collect()
        dequantise(base)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        result["bfloat16"] = trained(with_lora(base))
        print(args.model, "bfloat16", result["bfloat16"], flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
