r"""LoRA on quantised experts: stock PEFT and this library, one experts layer and a small model, on one GPU.

    python benchmarks/quantised.py --json OUT
    python benchmarks/quantised.py --device cpu --shapes 8,2,64,32 --tokens 64 --decode "" --check-tokens 32 \
        --block 32 --model 64,32

For every format: the errors against a float64 loop over the dequantised weights, relative to the norm of the output, of
the adapter's effect and of the gradients (hidden states, and the worst of lora_A and lora_B); median milliseconds of
forward + backward, and how many times the unquantised layer's beside it; the highest memory above the weights;
microseconds of a forward of few tokens, replayed as a CUDA graph with a cold L2. A case that fails prints its error.

bitsandbytes and torchao are used where they can be imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ["PEFT_MOE_COMPAT"] = "0"  # activated below, for its own rows only

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM

import peft_moe_compat
from peft_moe_compat.cli.layers import held_mib
from peft_moe_compat.quantising.int8 import Int8Weight
from peft_moe_compat.quantising.mxfp4 import hold_packed

PROJECTIONS = ("gate_up_proj", "down_proj")
DTYPE = torch.bfloat16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shapes",
        default="128,8,2048,768;32,4,2880,2880;8,2,4096,14336",
        help="experts, top-k, hidden size, intermediate size; several between semicolons, the last two multiples of 32",
    )
    parser.add_argument("--formats", help="names, between commas; all by default")
    parser.add_argument("--who", default="ours,stock")
    parser.add_argument("--decode", default="1,16,64", help="tokens of a forward alone")
    parser.add_argument("--model", default="1024,512", help="hidden and intermediate size of the small model, if any")
    parser.add_argument("--tokens", default="8192,2048")
    parser.add_argument("--check-tokens", type=int, default=256, help="of the errors; 0: none")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--block", type=int, default=128, help="of the FP8 scales")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=140, help="seconds after which no further case starts")
    return parser.parse_args()


ARGS = parse()
START = time.monotonic()
ROWS: list[dict] = []


def sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


# Formats: each quantises one experts module in place, or returns the module to use instead of it.


def bnb4(quant_type: str, nested: bool = False):
    def quantise(experts: nn.Module) -> nn.Module:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for name in PROJECTIONS:
            replace_parameter_4bit(experts, name, nested, quant_type)
        return experts

    return quantise


def bnb8(experts: nn.Module) -> nn.Module:
    from bitsandbytes.functional import int8_vectorwise_quant

    for name in PROJECTIONS:
        weight = experts._parameters[name].detach()
        packed, scales, _ = int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).half())
        setattr(experts, name, nn.Parameter(packed.view(weight.shape), requires_grad=False))
        held = Int8Weight(scales.view(weight.shape[:2]), weight.shape, weight.dtype)
        nn.utils.parametrize.register_parametrization(experts, name, held, unsafe=True)
    return experts


def mxfp4(experts: nn.Module) -> nn.Module:
    """Random blocks and exponents in the place of gpt-oss's stacks, as they are published."""
    for name in PROJECTIONS:
        hold_packed(experts, name)
        held = experts.parametrizations[name]
        held.original.random_(0, 256)
        held[0].scales.random_(119, 123)
    return experts


def torchao(config: str):
    def quantise(experts: nn.Module) -> nn.Module:
        import torchao.quantization as ao

        configs = {name: getattr(ao, config)() for name in PROJECTIONS}
        ao.quantize_(experts, ao.FqnToConfig(configs), filter_fn=None)
        return experts

    return quantise


def fp8(experts: nn.Module) -> nn.Module:
    block = (ARGS.block, ARGS.block)
    decorated = finegrained_fp8.use_experts_implementation(
        experts_class=finegrained_fp8.FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    with torch.device("meta"):
        module = decorated(config=experts.config, block_size=block)

    class Quantiser:
        quantization_config = FineGrainedFP8Config(weight_block_size=block)

    convert = finegrained_fp8.Fp8Quantize(Quantiser).convert
    for name in PROJECTIONS:
        weight = experts._parameters[name].detach()
        _, rows, columns = weight.shape
        # transformers makes scales for blocks that end past the weight, but quantises whole ones alone.
        padded = nn.functional.pad(weight, (0, -columns % ARGS.block, 0, -rows % ARGS.block))
        for key, value in convert({name: padded}).items():
            held = value[:, :rows, :columns].contiguous() if key == name else value
            module._parameters[key] = nn.Parameter(held, requires_grad=False)
    return module


def dequantised_mxfp4(experts: nn.Module) -> nn.Module:
    """The same, dequantised as `Mxfp4Config(dequantize=True)` does on loading."""
    mxfp4(experts)
    for name in PROJECTIONS:
        weight = getattr(experts, name)
        nn.utils.parametrize.remove_parametrizations(experts, name, leave_parametrized=False)
        experts._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return experts


FORMATS = {
    "bf16": lambda experts: experts,
    "bnb nf4": bnb4("nf4"),
    "bnb nf4, nested": bnb4("nf4", True),
    "bnb fp4": bnb4("fp4"),
    "bnb int8": bnb8,
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "fp8 (fine-grained)": fp8,
}
GPT_OSS_FORMATS = {"bf16 gpt-oss": dequantised_mxfp4, "mxfp4": mxfp4}


def dequantised(experts: nn.Module, name: str) -> torch.Tensor:
    """In float64, by the format's own means; FP8 block by block, since transformers' own takes whole ones alone."""
    if isinstance(experts, finegrained_fp8.FP8Experts):
        weight, scale = experts._parameters[name], experts._parameters[f"{name}_scale_inv"]
        for dim in (1, 2):
            scale = scale.repeat_interleave(ARGS.block, dim).narrow(dim, 0, weight.shape[dim])
        return (weight.float() * scale).double()
    weight = getattr(experts, name).detach()
    # Every tensor has a dequantize; only subclasses mean something by it.
    return (weight if type(weight) in (torch.Tensor, nn.Parameter) else weight.dequantize()).double()


# One layer


def qwen_experts(shape: list[int]) -> tuple[nn.Module, int]:
    E, k, H, inner = shape
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=inner, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device(ARGS.device):
        experts = Qwen3MoeExperts(config).to(DTYPE)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    return experts, k


def gpt_oss_experts(shape: list[int]) -> tuple[nn.Module, int]:
    E, k, H, inner = shape
    config = GptOssConfig(hidden_size=H, intermediate_size=inner, num_local_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device(ARGS.device):
        experts = GptOssExperts(config).to(DTYPE)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    return experts, k


def wrapped(experts: nn.Module) -> nn.ModuleDict:
    """The layer with float32 LoRA on both projections, as `get_peft_model` casts it."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    block = nn.ModuleDict({"experts": experts})
    config = LoraConfig(r=ARGS.rank, target_modules=[], target_parameters=[f"experts.{n}" for n in PROJECTIONS])
    inject_adapter_in_model(config, block)
    cast_adapter_dtype(block, "default")
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return block


def inputs(tokens: int, H: int, E: int, k: int) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(tokens, H, device=ARGS.device, dtype=DTYPE)
    weights, index = torch.topk(torch.randn(tokens, E, device=ARGS.device).softmax(-1), k)
    return hidden, index, (weights / weights.sum(-1, keepdim=True)).to(DTYPE)


def loop(experts, stacks, loras, hidden, index, weights):
    """Expert by expert in float64. Weights and factors as "E out in", "E r in", "E out r"."""
    out = torch.zeros_like(hidden)
    for e in range(experts.num_experts):
        token, slot = (index == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        x = hidden[token]
        for name in PROJECTIONS:
            y = x @ stacks[name][e].T
            if loras:
                A, B, scaling = loras[name]
                y = y + scaling * (x @ A[e].T) @ B[e].T
            if experts.has_bias:
                y = y + getattr(experts, f"{name}_bias")[e].double()
            x = experts._apply_gate(y) if name == "gate_up_proj" else y
        out = out.index_add(0, token, x * weights[token, slot, None])
    return out


def errors(block: nn.ModuleDict, run, H: int, k: int) -> dict[str, float]:
    """Of one forward and backward against the float64 loop."""
    wrapper = block["experts"]
    experts = wrapper.get_base_layer()
    hidden, index, weights = inputs(ARGS.check_tokens, H, experts.num_experts, k)
    stacks = {}
    for name in PROJECTIONS:
        stack = dequantised(experts, name)
        stacks[name] = stack.transpose(1, 2) if experts.is_transposed else stack
    flat = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters() if "lora_" in n}
    loras, chain, path = {}, wrapper, "experts"
    while hasattr(chain, "parameter_name"):  # by parameter: parametrised weights nest in another order
        A, B = (flat[f"{path}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
        E, r = experts.num_experts, ARGS.rank
        pair = A.view(E, r, -1), B.view(B.shape[0], r, E).permute(2, 0, 1), chain.scaling["default"]
        loras[chain.parameter_name] = pair
        chain, path = chain.base_layer, f"{path}.base_layer"
    x = hidden.double().requires_grad_()
    exact = loop(experts, stacks, loras, x, index, weights.double())
    with torch.no_grad():
        bare = loop(experts, stacks, None, x, index, weights.double())
    grad = torch.randn_like(hidden)
    exact.backward(grad.double())

    h = hidden.clone().requires_grad_()
    block.zero_grad()
    ours = run(h, index, weights)
    ours.backward(grad)

    def relative(found, right):
        return ((found.double() - right).norm() / right.norm()).item()

    missing = [n for n, p in block.named_parameters() if p.requires_grad and p.grad is None]
    result = {
        "output": relative(ours, exact.detach()),
        "effect": ((ours.double() - exact).norm() / (exact - bare).norm()).item(),
        "dx": relative(h.grad, x.grad),
    }
    present = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    result["lora"] = max((relative(g, flat[n].grad) for n, g in present.items()), default=float("nan"))
    if missing:
        result["without_gradient"] = len(missing)
    block.zero_grad()
    return result


def synchronize() -> None:
    if ARGS.device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(step, unquantised=None) -> dict[str, float]:
    """Median milliseconds and, on a GPU, the peak above what was allocated before, in GiB.

    With `unquantised`, that step's milliseconds too, in turns with the other's: a card that has worked is slower.
    """
    steps = [step] if unquantised is None else [step, unquantised]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(ARGS.repeats + 2):
        for each, found in zip(steps, times, strict=True):
            synchronize()
            start = time.perf_counter()
            each()
            synchronize()
            if i >= 2:
                found.append(time.perf_counter() - start)
    ms, *others = (1000 * statistics.median(found) for found in times)
    result = {"ms": ms}
    for plain in others:
        result |= {"bf16_ms": plain, "times_bf16": ms / plain}
    if ARGS.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize()
        result["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result


def training_step(block: nn.ModuleDict, tokens: int, H: int, k: int):
    experts = block["experts"].get_base_layer()
    torch.manual_seed(tokens)  # the same routing for all
    hidden, index, weights = inputs(tokens, H, experts.num_experts, k)
    grad = torch.randn_like(hidden)
    parameters = [p for p in block.parameters() if p.requires_grad]

    def step() -> None:
        h = hidden.detach().requires_grad_()
        block["experts"](h, index, weights).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    return step


def decodes(block: nn.ModuleDict, tokens: int, H: int, k: int) -> float:
    """Median microseconds of a forward without gradients, as a CUDA graph, L2 emptied before each."""
    experts = block["experts"].get_base_layer()
    inputs_ = inputs(tokens, H, experts.num_experts, k)
    times, graph, filler = [], torch.cuda.CUDAGraph(), torch.empty(2**28, dtype=torch.uint8, device=ARGS.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            block["experts"](*inputs_)
        with torch.cuda.graph(graph):
            block["experts"](*inputs_)
    for _ in range(15):
        filler.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


UNQUANTISED: dict[tuple, nn.ModuleDict] = {}  # (class, who) -> the layer of the shape at hand
DECODED: dict[tuple, float] = {}  # (class, who, shape, tokens) -> microseconds of the unquantised layer


def layer_case(stored: str, who: str, make, quantise, shape: list[int]) -> None:
    H = shape[2]
    torch.manual_seed(0)
    experts, k = make(shape)
    experts = quantise(experts)
    row = {"case": "layer", "format": stored, "who": who, "shape": shape, "weights_gib": held_mib(experts) / 1024}
    block = wrapped(experts)
    row["report"] = peft_moe_compat_report(block) if who == "ours" else ""
    if ARGS.check_tokens:
        row["errors"] = errors(block, block["experts"], H, k)
    add(row)
    plain = UNQUANTISED.get((make, who))
    for tokens in sizes(ARGS.tokens):
        row = {"case": "layer", "format": stored, "who": who, "tokens": tokens, "shape": shape}
        beside = None if plain is None else training_step(plain, tokens, H, k)
        add(row | measure(training_step(block, tokens, H, k), beside))
    for tokens in sizes(ARGS.decode) if ARGS.decode else ():
        us, key = decodes(block, tokens, H, k), (make, who, *shape, tokens)
        row = {"case": "decode", "format": stored, "who": who, "tokens": tokens, "shape": shape, "us": us}
        if stored.startswith("bf16"):
            DECODED[key] = us
        add(row | ({"times_bf16": us / DECODED[key]} if key in DECODED else {}))
    if stored.startswith("bf16"):
        UNQUANTISED[make, who] = block


def add(row: dict) -> None:
    ROWS.append(row)
    show(row)


def peft_moe_compat_report(model: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = peft_moe_compat.report(model).rows[0].parameters[0]
    return f"{row.path} {row.format} {row.reason}".strip()


# A small model


def model_case(stored: str, who: str, quantise) -> None:
    """Three steps on the same batch without an update: their losses must agree. Activation checkpointing on."""
    H, inner = sizes(ARGS.model)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=H,
        moe_intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(8, H // 8),
        num_experts=32 if H > 256 else 8,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
    )
    with torch.device(ARGS.device):
        model = Qwen3MoeForCausalLM(config).to(DTYPE).train()
    for layer in model.model.layers:
        layer.mlp.experts = quantise(layer.mlp.experts)
    targets = peft_moe_compat.expert_parameters(model)
    model = get_peft_model(model, LoraConfig(r=ARGS.rank, target_modules=[], target_parameters=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 8192, (4, 512 if H > 256 else 16), device=ARGS.device)
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        model.zero_grad()

    row = {"case": "model", "format": stored, "who": who, "weights_gib": held_mib(model) / 1024} | measure(step)
    row["first_loss"], row["spread"] = losses[0], max(losses) - min(losses)
    ROWS.append(row)
    show(row)


def show(row: dict) -> None:
    cells = []
    for key, value in row.items():
        if key in ("case", "format", "who"):
            continue
        if key == "errors":
            cells.append(
                "errors "
                + " ".join(f"{k}={v:.2e}" if k != "without_gradient" else f"{k}={v}" for k, v in value.items())
            )
        elif value not in ("", None):
            cells.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    print(f"{row['case']:6} {row['format']:20} {row['who']:6} {'  '.join(cells)}", flush=True)


def guarded(case: str, stored: str, who: str, function, *arguments) -> None:
    if time.monotonic() - START > ARGS.budget:
        row = {"case": case, "format": stored, "who": who, "error": "not run: the time is used up"}
        ROWS.append(row)
        show(row)
        return
    try:
        if who == "ours":
            with peft_moe_compat.activate():
                function(*arguments)
        else:
            function(*arguments)
    except Exception as error:  # noqa: BLE001 (whatever one case trips over must not keep the others from running)
        row = {"case": case, "format": stored, "who": who, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        ROWS.append(row)
        show(row)
    gc.collect()
    if ARGS.device.startswith("cuda"):
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    for name in ("bitsandbytes", "torchao", "triton"):
        try:
            found[name] = __import__(name).__version__
        except Exception as error:  # noqa: BLE001 (an absent or broken package is a finding here)
            found[name] = f"{type(error).__name__}: {str(error)[:120]}"
    found["device"] = torch.cuda.get_device_name() if ARGS.device.startswith("cuda") else "cpu"
    return found


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)  # PEFT's, once a forward, on parametrised weights
    found = versions()
    print(json.dumps(found), flush=True)
    wanted = ARGS.formats.split(",") if ARGS.formats else [*FORMATS, *GPT_OSS_FORMATS]
    for shape in map(sizes, ARGS.shapes.split(";")):
        UNQUANTISED.clear()
        for make, formats in ((qwen_experts, FORMATS), (gpt_oss_experts, GPT_OSS_FORMATS)):
            for stored, quantise in formats.items():
                for who in ARGS.who.split(",") if stored in wanted else ():
                    guarded("layer", stored, who, layer_case, stored, who, make, quantise, shape)
    UNQUANTISED.clear()
    for stored, quantise in FORMATS.items() if ARGS.model else ():
        for who in ARGS.who.split(",") if stored in wanted else ():
            guarded("model", stored, who, model_case, stored, who, quantise)
    if ARGS.json:
        result = {"versions": found, "arguments": vars(ARGS), "rows": ROWS}
        Path(ARGS.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{time.monotonic() - START:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
