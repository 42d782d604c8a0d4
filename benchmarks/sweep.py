"""No shape, rank, token count or routing may be slower than stock PEFT, than the plain path, or than it was: one layer.

    python benchmarks/sweep.py [--peft DIR] [--json OUT]
    python benchmarks/sweep.py --format nf4,mxfp4
    python benchmarks/sweep.py --against CHECKOUT

Forward + backward ms by CUDA events, medians of 7, of stock PEFT, of this package with set_backend("torch"), and with
its own choice. A row is marked where that choice is more than 5 % slower than either. Of formats, as `bench` has them,
stock PEFT trains none: there it is the plain path alone, which dequantises whole stacks. With --against, the choice of
another checkout of this package instead: each in PROCESSES of its own, measured in turns, and the time is the median of
a process's medians in the fastest of them. Steps of less than SHORT ms wait for the processor, by which processes of
the same code were seen to differ by a quarter for seconds or as long as they lived: they take more turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--peft")
parser.add_argument("--json")
parser.add_argument("--format", help="of packed experts; several between commas")
parser.add_argument("--shape", help="of the rows to run, as E,k,H,I; all by default")
parser.add_argument("--repeats", type=int, default=7, help="0 compiles the kernels alone")
parser.add_argument("--against", help="another checkout of this package, in place of stock PEFT and torch")
parser.add_argument("--package", default=str(Path(__file__).resolve().parent.parent), help=argparse.SUPPRESS)
args = parser.parse_args()
os.environ["PEFT_MOE_COMPAT"] = "0"
sys.path.insert(0, args.package)
if args.peft:
    sys.path.insert(0, args.peft)

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peft_moe_compat

if not Path(peft_moe_compat.__file__).is_relative_to(Path(args.package).resolve()):
    raise SystemExit(f"{args.package} is no checkout: {peft_moe_compat.__file__} was imported.")

PROCESSES, ROUNDS, SHORT, ROUNDS_OF_SHORT = 3, 3, 3.0, 24
QWEN, SMALL, WIDE, MANY = (128, 8, 2048, 768), (8, 2, 1024, 512), (8, 2, 4096, 14336), (512, 10, 2048, 512)
CASES = [(QWEN, T, 16, False) for T in (1, 8, 64, 512, 2048, 8192, 32768, 65536)]
CASES += [(QWEN, 8192, r, False) for r in (4, 10, 32, 64, 128, 256)]
CASES += [(QWEN, T, 16, True) for T in (2048, 8192)]
CASES += [(SMALL, T, 16, False) for T in (16, 512, 8192)] + [(SMALL, 2048, 33, True)]
CASES += [(MANY, T, 16, False) for T in (512, 4096)] + [(WIDE, T, 16, False) for T in (256, 2048)]
PACKED_CASES = [(QWEN, T, 16, False) for T in (1, 8, 64, 512, 2048, 8192)]
PACKED_CASES += [(QWEN, 8192, 128, False), (QWEN, 2048, 16, True), (SMALL, 16, 16, False), (SMALL, 2048, 33, True)]
PACKED_CASES += [(MANY, T, 16, False) for T in (512, 4096)] + [(WIDE, T, 16, False) for T in (16, 256, 2048)]


def experts_of(shape, stored):
    if stored:
        from peft_moe_compat.cli.layers import Shape, make_experts

        return make_experts(Shape(*shape), torch.bfloat16, "cuda", stored, packed=True)
    E, k, H, I = shape
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).bfloat16()
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return experts


def build(shape, rank, stored):
    with torch.device("cuda"):
        block = torch.nn.ModuleDict({"experts": experts_of(shape, stored)})
        lora = LoraConfig(r=rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        inject_adapter_in_model(lora, block)
    for name, p in block.named_parameters():
        p.requires_grad_("lora_" in name)
        if stored and "lora_" in name:  # float8 as PEFT makes it of such a base
            p.data = p.data.bfloat16()
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return block


def median_ms(step):
    for _ in range(3):
        step()
    times = []
    for _ in range(args.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(sorted(times)[args.repeats // 2], 3) if times else 0.0


class Layer:
    """The layer of one row at a time, kept for the next row where that has the same weights."""

    def __init__(self):
        self.key, self.block = None, None

    def measured(self, stored, shape, T, rank, skewed, backends):
        """Milliseconds by what computes it: "stock PEFT", "torch" or "triton", our own choice."""
        key = (stored, tuple(shape), rank)
        if self.key != key:
            self.key, self.block = None, None
            torch.cuda.empty_cache()
            self.key, self.block = key, build(shape, rank, stored)
        torch.manual_seed(T + rank)
        block, (E, k, H, _) = self.block, shape
        hidden = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        logits = torch.rand(T, E, device="cuda")
        if skewed:  # one expert takes every second token
            logits[::2, 3] += 2
        weights, index = torch.topk(logits, k)
        weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
        gradient = torch.randn_like(hidden)

        def step():
            h = hidden.detach().requires_grad_()
            block["experts"](h, index, weights).backward(gradient)
            for p in block.parameters():
                p.grad = None

        found = []
        for backend in backends:
            if backend == "stock PEFT":
                found.append(median_ms(step))
                continue
            with peft_moe_compat.activate(), peft_moe_compat.set_backend(backend):
                found.append(median_ms(step))
        return found


class Process:
    """A checkout of this package, the first or the second, in a process that answers row by row."""

    def __init__(self, place, checkout):
        self.place, self.checkout = place, checkout
        command = [sys.executable, __file__, "--package", checkout, "--repeats", str(args.repeats)]
        more = ["--peft", args.peft] if args.peft else []
        self.process = subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measured(self, *row):
        print(json.dumps(row), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.checkout} failed; its error is above.")
        return json.loads(answer)[0]


def in_turns(processes, *row):
    """The milliseconds of each checkout."""
    times = {process: [] for process in processes}
    for i in range(ROUNDS_OF_SHORT):
        for process in processes if i % 2 else processes[::-1]:
            times[process].append(process.measured(*row))
        if i + 1 == ROUNDS and min(map(min, times.values())) > SHORT:
            break
    medians = [(process.place, statistics.median(found)) for process, found in times.items()]
    return [min(ms for place, ms in medians if place == one) for one in (0, 1)]


def serve():
    layer = Layer()
    for line in sys.stdin:
        print(json.dumps(layer.measured(*json.loads(line), ["triton"])), flush=True)


def main() -> None:
    rows, layer = [], Layer()
    checkouts = [args.against, args.package] if args.against else []
    processes = [Process(*placed) for _ in range(PROCESSES) for placed in enumerate(checkouts)]
    columns = ["against"] if checkouts else ["stock PEFT", "torch"]
    print(torch.cuda.get_device_name())
    heads = "".join(f"{column:>12}" for column in columns)
    print(f"{'E,k,H,I':20}{'stored':>15}{'tokens':>7}{'rank':>5}  routing {heads}         own")
    kinds = [("", CASES)] if args.format is None else [(stored, PACKED_CASES) for stored in args.format.split(",")]
    for stored, (shape, T, rank, skewed) in [(stored, case) for stored, cases in kinds for case in cases]:
        name = ",".join(map(str, shape))
        if args.shape not in (None, name):
            continue
        row = {"shape": shape, "format": stored or "bfloat16", "tokens": T, "rank": rank, "skewed": skewed}
        case = stored, shape, T, rank, skewed
        if checkouts:
            *times, own = in_turns(processes, *case)
        else:
            peers = columns[1:] if stored else columns
            *times, own = layer.measured(*case, [*peers, "triton"])
        found = dict(zip(columns[-len(times) :], times, strict=True))
        row |= found | {"own": own, "slower": own > 1.05 * min(times)}
        rows.append(row)
        shown = "".join(f"{row[column]:12.3f}" if column in row else " " * 12 for column in columns)
        print(
            f"{name:20}{row['format']:>15}{T:7}{rank:5}  {'skewed' if skewed else 'even':8}{shown}{own:12.3f}"
            f"  {'SLOWER' if row['slower'] else ''}",
            flush=True,
        )
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    serve() if "--package" in sys.argv else main()
