"""Quantised stacks in the fused kernels: the same bits as the format's own dequantisation, and a float64 loop over it.

In triton's interpreter on CPU (`tox -e kernels`), and natively where there is a GPU, as `test_kernels.py`.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is on no CPU-only install but the tox environment `kernels`")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import bitsandbytes
import torchao.quantization as ao
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts_loop import Experts, compare, loop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize

import peft_moe_compat
from peft_moe_compat.forward import fused
from peft_moe_compat.forward.kernels import kinds, loaded_gemm, packed_gemm
from peft_moe_compat.forward.kernels.interface import Nonlinearity
from peft_moe_compat.forward.kernels.launch import Form
from peft_moe_compat.forward.kernels.unpack import unpack
from peft_moe_compat.forward.layer import experts_forward
from peft_moe_compat.layout import flat
from peft_moe_compat.model import weights
from peft_moe_compat.model.experts import REGISTRY_MODULE
from peft_moe_compat.model.packed import CODES, FLOAT8, INT8, Codec, encoded
from peft_moe_compat.quantising.int8 import Int8Weight
from peft_moe_compat.quantising.mxfp4 import Mxfp4Weight

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# The interpreter rounds to bfloat16 towards zero.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def _triton():
    with peft_moe_compat.set_backend("triton"):
        yield


def bnb4(quant_type, nested=False, blocksize=64):
    def quantise(module, name):
        replace_parameter_4bit(module, name, nested, quant_type, blocksize)

    return quantise


def int8(module, name):
    weight = module._parameters[name].detach()
    packed, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).half())
    setattr(module, name, nn.Parameter(packed.view(weight.shape), requires_grad=False))
    scales = scales.view(weight.shape[:2])
    parametrize.register_parametrization(module, name, Int8Weight(scales, weight.shape, weight.dtype), unsafe=True)


def torchao(config):
    def quantise(module, name):
        ao.quantize_(module, ao.FqnToConfig({name: config}), filter_fn=None)

    return quantise


def int8_with_zero_points(module, name):
    weight = module._parameters[name].detach() + 0.02  # more numbers above zero than below
    packed = ao.Int8Tensor.from_hp(weight, ao.PerRow(), mapping_type=ao.MappingType.ASYMMETRIC)
    setattr(module, name, nn.Parameter(packed, requires_grad=False))


def mxfp4(module, name):
    """Random blocks, of about the size of what they replace."""
    E, into, out = module._parameters[name].shape
    blocks = torch.randint(0, 256, (E, out, into // 32, 16), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(121, 124, (E, out, into // 32), dtype=torch.uint8, device=DEVICE)
    setattr(module, name, nn.Parameter(blocks, requires_grad=False))
    parametrize.register_parametrization(module, name, Mxfp4Weight(scales, DTYPE), unsafe=True)


def fp8(block, halves=False):
    def quantise(module, name):
        weight = module._parameters[name].detach()
        shape = weights._scale_shape(weight, block)
        if halves and name == "gate_up_proj":
            shape = (shape[0], 2, shape[2])
        scale = torch.rand(shape, device=DEVICE) * 1e-2 + 1e-3
        spread = scale.repeat_interleave(-(-weight.shape[1] // shape[1]), 1)[:, : weight.shape[1]]
        spread = spread.repeat_interleave(-(-weight.shape[2] // shape[2]), 2)[..., : weight.shape[2]]
        packed = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        module._parameters[name] = nn.Parameter(packed, requires_grad=False)
        module._parameters[f"{name}_scale_inv"] = nn.Parameter(scale, requires_grad=False)
        module.block_size = block
        if type(module).__name__ != "FP8Experts":
            module.__class__ = type("FP8Experts", (type(module),), {"__module__": weights.FP8_MODULE})

    return quantise


# Name -> (how to quantise a stack in place, whether stacks are "E in out").
FORMATS = {
    "nf4": (bnb4("nf4"), False),
    "nf4, transposed": (bnb4("nf4"), True),
    "nf4, nested": (bnb4("nf4", True), False),
    "fp4, blocks of 128": (bnb4("fp4", True, 128), True),
    "int8 rows": (int8, False),
    "int8 rows, transposed": (int8, True),
    "torchao int8": (torchao(ao.Int8WeightOnlyConfig()), False),
    "torchao int8, zero points": (int8_with_zero_points, True),
    "torchao float8": (torchao(ao.Float8WeightOnlyConfig()), True),
    "mxfp4": (mxfp4, True),
    "fp8": (fp8((128, 128)), False),
    "fp8, blocks that end past the stack": (fp8((96, 80)), False),
    "fp8, one scale": (fp8(None), False),
    "fp8, one scale of gate and one of up": (fp8(None, halves=True), False),
    "fp8, blocks higher than gate and up": (fp8((1024, 96), halves=True), False),
}


def own(module, name):
    """The weight as its format itself dequantises it."""
    first = parametrize.is_parametrized(module, name) and module.parametrizations[name][0]
    state = getattr(first, "quant_state", None)
    if state is None or DEVICE.type != "cpu":
        return weights.read(module, name, DTYPE)
    # bitsandbytes 0.50.2 on CPU scales rows wrongly that are no multiple of a block; its portable code does not.
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    data = module.parametrizations[name].original.reshape(-1)
    return _dequantize_4bit_compute(data, absmax, state.code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("shape", [(3, 64, 128), (2, 160, 64), (1, 96, 192)], ids=str)
def test_the_same_bits_as_the_formats_own(stored, shape):
    torch.manual_seed(0)
    quantise, _ = FORMATS[stored]
    module = nn.Module()
    values = torch.randn(shape) * torch.randn(*shape[:2], 1)
    module.weight = nn.Parameter(values.to(DTYPE).to(DEVICE), requires_grad=False)
    quantise(module, "weight")
    packed, expected = weights.packed(module, "weight", DTYPE), own(module, "weight")
    assert packed.shape == expected.shape
    assert torch.equal(packed.decoded(), expected)
    E, rows, columns = packed.stored
    some_rows, some_columns = (rows // 4, rows), (columns // 2, columns)
    for rectangle in (
        ((0, E), (0, rows), (0, columns)),
        ((E - 1, E), some_rows, (0, columns)),
        ((0, E), (0, rows), some_columns),
    ):
        found = unpack(packed, torch.arange(1, E + 1, dtype=torch.int32, device=DEVICE), *rectangle)
        stack = expected if packed.rows_are_in else expected.mT
        assert torch.equal(found, stack[tuple(slice(*ends) for ends in rectangle)])


def test_every_exponent_and_every_float8():
    module = nn.Module()
    blocks = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(16).view(1, 256, 1, 16)
    module.weight = nn.Parameter(blocks, requires_grad=False)
    scales = torch.arange(255, dtype=torch.uint8, device=DEVICE)  # 255 stands for no number
    scales = torch.cat([scales, scales[:1]]).view(1, 256, 1)
    parametrize.register_parametrization(module, "weight", Mxfp4Weight(scales, torch.bfloat16), unsafe=True)
    packed = weights.packed(module, "weight", torch.bfloat16)
    found = unpack(packed, torch.ones(1, dtype=torch.int32, device=DEVICE), (0, 1), (0, 256), (0, 32))
    if INTERPRETED:  # which rounds what is below bfloat16's numbers towards zero
        normal = module.weight.abs() > 2**-125
        assert torch.equal(found.mT[normal], module.weight[normal])
    else:
        assert torch.equal(found.mT, module.weight)
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 256).view(torch.float8_e4m3fn)
    packed = encoded(torch.ones(1, 1, 256, device=DEVICE), Codec(FLOAT8, height=1, width=256), torch.float32)
    packed = packed._replace(data=numbers, scales=torch.ones(1, device=DEVICE))
    found = unpack(packed, torch.ones(1, dtype=torch.int32, device=DEVICE), (0, 1), (0, 1), (0, 256))
    assert torch.equal(found.nan_to_num(1234.0), numbers.float().nan_to_num(1234.0))


def build(E, H, I, transposed, quantise, rank=4):
    """An experts module with transformers' default gate, quantised, and LoRA on both projections."""

    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    _apply_gate.__module__ = REGISTRY_MODULE
    experts = Experts(E, H, I, gated=True, transposed=transposed, biased=True, dtype=DTYPE).to(DEVICE)
    experts.__class__ = type("Concatenated", (Experts,), {"_apply_gate": _apply_gate})
    loras = {}
    for name, out, into in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        factors = torch.randn(E * rank, into) / into**0.5, torch.randn(out, rank * E) / rank**0.5
        factors = (factor.to(DEVICE).requires_grad_() for factor in factors)
        loras[name] = flat(*factors, E, orientation="linear", scaling=0.7)
        quantise(experts, name)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    return experts, loras


class Read(nn.Module):
    """Stands for an experts module, with its stacks as its format dequantises them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.stacks = {n: own(experts, n) for n in ("gate_up_proj", "down_proj")}

    def __getattr__(self, name):
        if name in ("experts", "stacks", "_modules"):
            return super().__getattr__(name)
        return self.stacks[name] if name in self.stacks else getattr(self.experts, name)


def check(experts, loras, index, tolerance):
    """Output and gradients against a float64 loop over the weights as the format itself dequantises them."""
    T, H = len(index), weights.read(experts, "down_proj", DTYPE).shape[2 if experts.is_transposed else 1]
    hidden = torch.randn(T, H).to(DTYPE).to(DEVICE).requires_grad_()
    routing = torch.rand(index.shape).to(DTYPE).to(DEVICE).requires_grad_()
    leaves = [hidden, routing, *(tensor for lora in loras.values() for tensor in lora[:2])]
    exact = loop(Read(experts), {n: lora.canonical() for n, lora in loras.items()}, hidden, index, routing)
    assert fused.runs_fused(experts, hidden, index)
    ours = experts_forward(experts, loras, hidden, index.to(DEVICE), routing)
    compare(ours, exact, tolerance)
    grad = torch.randn_like(exact)
    theirs = torch.autograd.grad(exact, leaves, grad, allow_unused=True, materialize_grads=True)
    for _ in range(2):
        mine = torch.autograd.grad(ours, leaves, grad.to(DTYPE), retain_graph=True)
        for found, expected in zip(mine, theirs, strict=True):
            compare(found, expected, 10 * tolerance)
    with torch.no_grad():
        compare(experts_forward(experts, loras, hidden, index.to(DEVICE), routing), exact, tolerance)


@settings(max_examples=20 if INTERPRETED else 60, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 999), st.data())
def test_output_and_gradients_equal_a_float64_loop(stored, seed, data):
    """Decoded in the product, in a row's product, and ahead of a product that is not tiled; experts without rows."""
    torch.manual_seed(seed)
    quantise, transposed = FORMATS[stored]
    E, k = data.draw(st.sampled_from([(1, 1), (3, 2), (6, 2)]))
    T = data.draw(st.sampled_from([1, 5, 40]))
    H, I = data.draw(st.sampled_from([(64, 32), (96, 64), (32, 160)]))
    index = torch.randint(0, E + 1, (T, k)) if seed % 2 else torch.full((T, k), E - 1)
    check(*build(E, H, I, transposed, quantise), index, 1e-2 if INTERPRETED else 4e-2)


@pytest.mark.parametrize(
    ("stored", "sizes"),
    [*((stored, (2, 128, 64)) for stored in FORMATS), ("int8 rows", (2, 64, 80)), ("mxfp4", (1, 192, 64))],
)
def test_loaded_packed_by_the_tiled_product(stored, sizes, monkeypatch):
    """Columns that end within a tile, experts with rows for a half tile and for several tiles."""
    launched = set()
    monkeypatch.setattr(loaded_gemm, "BELOW_OF_MUCH", 10**9)
    monkeypatch.setattr(loaded_gemm, "BELOW", 10**9)
    run = loaded_gemm.loaded_linear
    monkeypatch.setattr(packed_gemm, "loaded_linear", lambda *a: (launched.add(a[1].shape), run(*a))[1])
    torch.manual_seed(0)
    quantise, transposed = FORMATS[stored]
    index = torch.multinomial(torch.tensor([0.75, 0.25]), 400, replacement=True)[:, None] * (sizes[0] - 1)
    check(*build(*sizes, transposed, quantise), index, 1e-2 if INTERPRETED else 4e-2)
    E, H, I = sizes
    products = {(E, H, 2 * I), (E, I, H), (E, H, I), (E, 2 * I, H)}  # and of the gradients, in all of which K is second
    here = DEVICE.type == "cpu" or torch.cuda.get_device_capability()[0] == 9
    assert launched == {product for product in products if here and product[1] % 64 == 0}


@pytest.mark.parametrize(
    "scratch", [2**30, 2 * 65 * 256 * 128, 30000, 20000], ids=["whole", "some experts", "one with room", "part of one"]
)
@pytest.mark.parametrize(
    "stored", ["nf4", "nf4, transposed", "int8 rows", "mxfp4", "fp8, blocks that end past the stack"]
)
def test_part_by_part_ahead_of_the_tiled_product(stored, scratch, monkeypatch):
    """Bit for bit what the same kernels give for the dequantised weights."""
    monkeypatch.setattr(packed_gemm, "SCRATCH", scratch)
    monkeypatch.setattr(packed_gemm, "AHEAD_FROM", 64)
    monkeypatch.setattr(packed_gemm, "is_loaded", lambda *_: False)
    torch.manual_seed(0)
    quantise, transposed = FORMATS[stored]
    experts, loras = build(2, 128, 128, transposed, quantise)
    plain = Experts(2, 128, 128, gated=True, transposed=transposed, biased=True, dtype=DTYPE).to(DEVICE)
    plain.__class__ = type("Concatenated", (Experts,), {"_apply_gate": type(experts)._apply_gate})
    for name in ("gate_up_proj", "down_proj"):
        plain._parameters[name] = nn.Parameter(own(experts, name))
        plain._parameters[f"{name}_bias"] = experts._parameters[f"{name}_bias"]
    plain.requires_grad_(False)
    index = torch.randint(0, 2, (80, 2), device=DEVICE)
    hidden = torch.randn(80, 128, device=DEVICE).to(DTYPE).requires_grad_()
    routing = torch.rand(80, 2, device=DEVICE).to(DTYPE).requires_grad_()
    leaves = [hidden, routing, *(tensor for lora in loras.values() for tensor in lora[:2])]
    results = []
    for module in (experts, plain):
        out = experts_forward(module, loras, hidden, index, routing)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("rank", [4, 64])
def test_decoded_parts_take_the_room_that_a_layer_has_and_no_more(rank, monkeypatch):
    """At its highest a step holds as much more than the unquantised layer's as is decoded at a time without room."""
    taken = []
    parts = packed_gemm._parts
    monkeypatch.setattr(packed_gemm, "SCRATCH", 2**21)
    monkeypatch.setattr(packed_gemm, "AHEAD_FROM", 64)
    monkeypatch.setattr(packed_gemm, "is_loaded", lambda *_: False)
    monkeypatch.setattr(packed_gemm, "_parts", lambda *a: (taken.append(a[2]), parts(*a))[1])
    E, H, I, T = (2, 128, 64, 160) if INTERPRETED else (8, 1024, 512, 4096)
    peaks = []
    for quantise in (lambda *_: None, bnb4("nf4")):
        torch.manual_seed(0)
        experts, loras = build(E, H, I, False, quantise, rank)
        index = torch.randint(0, E, (T, 2), device=DEVICE)
        hidden = torch.randn(T, H, device=DEVICE).to(DTYPE).requires_grad_()
        routing = torch.rand(T, 2, device=DEVICE).to(DTYPE).requires_grad_()
        for _ in range(2):  # the first holds the trial's too
            held = DEVICE.type == "cuda" and (torch.cuda.reset_peak_memory_stats(), torch.cuda.memory_allocated())[1]
            taken.clear()
            out = experts_forward(experts, loras, hidden, index, routing)
            torch.autograd.grad(out.sum(), [hidden, *(t for lora in loras.values() for t in lora[:2])])
            del out
            peaks.append(DEVICE.type == "cuda" and torch.cuda.max_memory_allocated() - held)
    gradients = 4 * E * rank * (I + H)
    activation = 2 * T * I * DTYPE.itemsize
    assert taken == [activation, 0, 0, activation - gradients]
    assert peaks[3] - peaks[1] <= 2**21


@pytest.mark.parametrize(
    "codec",
    [
        Codec(CODES, True),
        Codec(CODES, True, nested=256),
        Codec(CODES, height=1, width=32, exponent=True),
        Codec(INT8, height=1, width=128, zeros=True),
        Codec(FLOAT8, height=128, width=128),
    ],
    ids=str,
)
def test_a_stack_encoded_for_a_trial_is_near_what_it_stands_for(codec):
    exact = torch.randn(2, 64, 128, device=DEVICE)
    found = encoded(exact, codec, torch.float32)
    assert found.shape == (2, 64, 128)
    assert found.mT.shape == (2, 128, 64)
    assert ((found.decoded() - exact).norm() / exact.norm()).item() < (0.2 if codec.kind == CODES else 0.04)


@pytest.mark.parametrize("T", [4, 20, 120, 200])
@pytest.mark.parametrize("stored", ["nf4, nested", "int8 rows", "mxfp4", "fp8", "torchao int8, zero points"])
def test_the_trial_is_of_what_the_layer_launches(stored, T, monkeypatch):
    launched = {"trial": set(), "layer": set()}
    place, errors = "layer", []

    def call(self, grid, *arguments, run=Form.__call__):
        launched[place].add(self.kernel.jit.__name__)
        run(self, grid, *arguments)

    def tried(*arguments, run=fused._trial):
        nonlocal place
        place = "trial"
        errors.append(run(*arguments))
        place = "layer"
        return errors[-1]

    monkeypatch.setattr(Form, "__call__", call)
    monkeypatch.setattr(fused, "_trial", tried)
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_TRIED_ON", (DEVICE.type,))
    torch.manual_seed(0)
    quantise, transposed = FORMATS[stored]
    experts, loras = build(2, 128, 128, transposed, quantise)
    index = (torch.arange(2 * T, device=DEVICE) % 2).view(T, 2)
    with torch.set_grad_enabled(T > 8):
        hidden = torch.randn(T, 128, device=DEVICE).to(DTYPE).requires_grad_()
        out = experts_forward(experts, loras, hidden, index, torch.rand(T, 2, device=DEVICE).to(DTYPE))
        if T > 8:
            out.sum().backward()
    assert launched["trial"] == launched["layer"]
    assert [0 < error < fused._TRIAL_ERROR / 2 for error in errors] == [True]
    assert kinds.Kind(*next(iter(fused._tried[hidden.device]))).up[-1] is not None


@pytest.mark.parametrize(
    "stored", ["nf4, nested", "int8 rows, transposed", "torchao int8, zero points", "torchao float8", "mxfp4", "fp8"]
)
def test_one_graph_trains_as_eager_does(stored, monkeypatch):
    """The packed tensors go into the graph's operators as they are: nothing is dequantised beside them.

    What the graph would have tried is asked for everywhere, constants alone; the interpreter does not take the trials.
    """
    asked, run = [], fused._trial

    def trial_of(device, kind, rows):
        asked.append((kind, rows))
        return run(device, kind, rows) if DEVICE.type in tried_on else 0.0

    tried_on = fused._TRIED_ON
    monkeypatch.setattr(fused, "_trial", trial_of)
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_TRIED_ON", (DEVICE.type,))
    torch._dynamo.reset()
    torch.manual_seed(0)
    quantise, transposed = FORMATS[stored]
    experts, loras = build(4, 64, 32, transposed, quantise)
    graphs = []

    def forward(hidden, index, routing):
        return experts_forward(experts, loras, hidden, index, routing)

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(forward, backend=aot_autograd(fw_compiler=backend), fullgraph=True, dynamic=True)
    factors = [tensor for lora in loras.values() for tensor in lora[:2]]
    for T in (40, 17):
        hidden = torch.randn(T, 64, device=DEVICE).to(DTYPE).requires_grad_()
        routing = torch.rand(T, 2, device=DEVICE).to(DTYPE).requires_grad_()
        index = torch.randint(0, 5, (T, 2), device=DEVICE)
        gradient = torch.randn_like(hidden)
        results = []
        for run in (compiled, forward):
            out = run(hidden, index, routing)
            results.append([out, *torch.autograd.grad(out, [hidden, routing, *factors], gradient)])
        assert all(map(torch.equal, *results))
    assert len(graphs) == 2  # forward and backward, once for both
    assert {rows for _, rows in asked} >= {16 * 4, 64 * 4, packed_gemm.AHEAD_FROM * 4}
    assert all(type(n) in (int, bool) for kind, rows in asked for n in (rows, *kind[1], *kind[-1], *kind[5][-1]))
    with torch.no_grad():  # few rows, and more
        for T in (3, 30):
            routed = hidden[:T].detach(), torch.randint(0, 4, (T, 2), device=DEVICE)[: len(hidden[:T])], routing[:T]
            compare(compiled(*routed), forward(*routed), 1e-6)
    operators = {name for graph in graphs for name in graph if "peft_moe_compat" in name}
    assert operators == {
        f"peft_moe_compat.experts_{name}.default" for name in ("training", "training_backward", "inference")
    }
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("E", [2, 40, 200])
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_graph_tries_is_all_that_its_batches_need(E, packed, grad):
    """How the rows are sorted aside, which depends on their number more finely."""
    weight = torch.zeros(E, 32, 32)
    if packed:
        weight = encoded(weight, Codec(CODES, height=1, width=32, exponent=True), DTYPE)
    up = down = (weight, None, None)
    routed = (
        torch.zeros(1, 32, dtype=DTYPE, requires_grad=grad),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, 2),
    )

    def kind(rows):
        return kinds.kind_of(Nonlinearity("silu", False), routed, up, down, rows)[:-1]

    tried = {kind(rows) for rows in kinds.rows_of_every_kind(E, 2, packed)}
    assert {kind(rows) for rows in [*range(2, 300, 2), *(E * n for n in range(1, 300))]} <= tried


def test_a_graph_is_tried_before_it_runs(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_TRIED_ON", (DEVICE.type,))
    experts, loras = build(2, 64, 64, False, bnb4("nf4"))
    compiled = torch.compile(lambda *routed: experts_forward(experts, loras, *routed), backend="eager", fullgraph=True)
    hidden, index = torch.randn(4, 64, device=DEVICE).to(DTYPE), torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        compiled(hidden, index, torch.ones(4, 1, device=DEVICE).to(DTYPE))
    found = {kinds.Kind(*kind) for of_device in fused._tried.values() for kind in of_device}
    assert {kind.tiles for kind in found} == {None, (16, 64), (64, 64), (64, 128)}
    assert all(kind.up[-1] is not None for kind in found)
    torch._dynamo.reset()


def test_what_the_kernels_do_not_decode_keeps_the_plain_path():
    experts, loras = build(2, 64, 32, False, bnb4("nf4", blocksize=4096))  # a block that spans experts
    index = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    hidden = torch.randn(3, 64, device=DEVICE).to(DTYPE)
    assert fused.fused_reason(experts, DEVICE).code == "quantised"
    out = experts_forward(experts, loras, hidden, index, torch.ones(3, 1, device=DEVICE).to(DTYPE))
    exact = loop(Read(experts), {n: lora.canonical() for n, lora in loras.items()}, hidden, index, torch.ones(3, 1))
    compare(out, exact, 4e-2)


@pytest.mark.parametrize("what", ["scales", "numbers"])
def test_what_lies_elsewhere_is_not_decoded_here(what):
    experts, _ = build(2, 64, 32, False, bnb4("nf4"))
    assert fused.fused_reason(experts, DEVICE) is None
    held = experts.parametrizations["down_proj"]
    if what == "scales":
        held[0].quant_state.absmax = held[0].quant_state.absmax.to("meta")
    else:
        held.original = nn.Parameter(held.original.to("meta"), requires_grad=False)
    assert fused.fused_reason(experts, DEVICE).code == "quantised"
