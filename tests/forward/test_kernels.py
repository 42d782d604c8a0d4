"""The fused kernels against a float64 loop: through triton's interpreter on CPU, and natively where there is a GPU.

TRITON_INTERPRET=1 python -m pytest tests/forward/test_kernels.py      (tox -e kernels)
python -m pytest tests/forward/test_kernels.py -m gpu
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is on no CPU-only install but the tox environment `kernels`")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from support import zoo
from support.experts_loop import Experts, compare, loop
from support.precision import LOW, low_precision
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import peft_moe_compat
from peft_moe_compat import CompatWarning, ExpertLora
from peft_moe_compat.forward import fused
from peft_moe_compat.forward import fused_ops as operators
from peft_moe_compat.forward.kernels import gemm, layer, trial
from peft_moe_compat.forward.kernels.common import Config, Factor
from peft_moe_compat.forward.kernels.dropout import Drop, drawn, kept_of
from peft_moe_compat.forward.kernels.factors import packed, unpacked
from peft_moe_compat.forward.kernels.launch import Form
from peft_moe_compat.forward.kernels.routing import route
from peft_moe_compat.forward.layer import experts_forward
from peft_moe_compat.layout import flat
from peft_moe_compat.model.experts import REGISTRY_MODULE

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
EXAMPLES = 12 if INTERPRETED else 24


@pytest.fixture(autouse=True)
def _triton():
    with peft_moe_compat.set_backend("triton"):
        yield


def clamped(module):
    """The experts as gpt-oss has them, by class name and home, which is how the kernels know its gate."""

    def _apply_gate(self, rows):
        gate, up = rows[..., ::2], rows[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    _apply_gate.__module__ = "transformers.models.gpt_oss.modeling_gpt_oss"
    module.__class__ = type("GptOssExperts", (type(module),), {"_apply_gate": _apply_gate})
    module.alpha, module.limit = 1.7, 1.2
    return module


def concatenated(module):
    """The experts with transformers' default gate."""

    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    _apply_gate.__module__ = REGISTRY_MODULE
    module.__class__ = type("Concatenated", (type(module),), {"_apply_gate": _apply_gate})
    return module


GATES = {"default": concatenated, "clamped": clamped, "own": lambda module: module, "none": lambda module: module}
ACTIVATIONS = {
    "silu": nn.SiLU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@st.composite
def cases(draw, kinks=True):
    """`kinks`: activations whose slope jumps, where a rounded argument may fall on the other side."""
    E, k = draw(st.sampled_from([(1, 1), (3, 1), (5, 2), (8, 3)]))
    T = draw(st.sampled_from([1, 3, 17, 70]))
    kind = draw(st.sampled_from(["any", "one expert takes all", "sentinels"]))
    high = E if kind == "sentinels" else E - 1
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, high + 1, (T, k), generator=generator)
    if kind == "one expert takes all":
        index[:] = draw(st.integers(0, E - 1))
    ranks = draw(st.sampled_from([(4, 4), (3, 5), (16, None), (None, 9), (40, 17)]))
    p = draw(st.sampled_from([0.0, 0.0, 0.3]))
    H, I = draw(st.sampled_from([(16, 8), (24, 40), (64, 64)]))
    flags = {name: draw(st.booleans()) for name in ("transposed", "biased")}
    gate = draw(st.sampled_from(sorted(set(GATES) - (set() if kinks else {"clamped"}))))
    act = draw(st.sampled_from(sorted(set(ACTIVATIONS) - (set() if kinks else {"relu"}))))
    return E, H, I, index, flags, gate, act, ranks, seed, p


def build(case, dtype):
    E, H, I, index, flags, gate, act, ranks, seed, dropout = (*case, 0.0)[:10]
    torch.manual_seed(seed)
    experts = GATES[gate](Experts(E, H, I, gated=gate != "none", dtype=dtype, **flags))
    experts.act_fn = ACTIVATIONS[act]
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    up = (1 if gate == "none" else 2) * I
    loras = {}
    for (name, out, into), r in zip(((experts.up_name, up, H), ("down_proj", H, I)), ranks, strict=True):
        if r is not None:  # lora_B as PEFT packs it
            p, q = (out, into) if seed % 2 else (into, out)
            lora_A, lora_B = torch.randn(E * r, p) / p**0.5, torch.randn(q, r * E) / r**0.5
            orientation = "reversed" if seed % 2 else "linear"
            factors = lora_A.requires_grad_(), lora_B.requires_grad_()
            lora = flat(*factors, E, orientation=orientation, scaling=0.7)
            loras[name] = lora._replace(dropout=((r, dropout),) if dropout else ())
    hidden = torch.randn(index.shape[0], H).to(dtype).requires_grad_()
    weights = torch.rand(index.shape).to(dtype).requires_grad_()
    return experts, loras, hidden, index, weights


def moved(experts, loras):
    there = {n: x._replace(lora_A=x.lora_A.to(DEVICE), lora_B=x.lora_B.to(DEVICE)) for n, x in loras.items()}
    return experts.to(DEVICE), there


def parameters(loras):
    return [t for lora in loras.values() for t in lora[:2]]


def after(seed, function, *args):
    torch.manual_seed(seed)
    return function(*args)


def masks_of(loras, index):
    """What a forward after the seed 1 drops, "T k 1 in" by parameter; None without a dropout."""
    if not any(lora.dropout for lora in loras.values()):
        return None
    torch.manual_seed(1)
    found = {}
    for name, lora in sorted(loras.items(), reverse=True):  # the up projection's seed is the first to be drawn
        E, into = lora.num_experts, lora.canonical().in_features
        drop = drawn(lora, DEVICE)
        rows = trial.masks(
            layer.Projection(torch.empty(E, into, 0), drop=drop), layer.routing(index.to(DEVICE), E), index.shape[1]
        )
        found[name] = rows.cpu().double().unsqueeze(2)
        kept = found[name] != 0
        assert torch.allclose(found[name][kept], torch.tensor(1 / (1 - drop.p)).double())
        assert abs(kept.double().mean() - (1 - drop.p)) <= 5 * (drop.p * (1 - drop.p) / kept.numel()) ** 0.5
    return found


def check(case, dtype, tolerance, change=lambda experts, loras: None):
    experts, loras, hidden, index, weights = build(case, dtype)
    change(experts, loras)
    leaves = [hidden, weights, *parameters(loras)]
    masks = masks_of(loras, index)
    exact = loop(experts, {n: lora.canonical() for n, lora in loras.items()}, hidden, index, weights, masks)
    grad = torch.randn_like(exact)
    # Zeros for what no row reaches that is computed here.
    theirs = torch.autograd.grad(exact, leaves, grad, allow_unused=True, materialize_grads=True)

    experts, there = moved(experts, loras)
    arguments = hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)
    assert fused.runs_fused(experts, *arguments[:2])
    ours = after(1, experts_forward, experts, there, *arguments)
    compare(ours.cpu(), exact, tolerance)
    assert ours.dtype == dtype
    mine = torch.autograd.grad(ours, leaves, grad.to(dtype).to(DEVICE), retain_graph=True)
    again = torch.autograd.grad(ours, leaves, grad.to(dtype).to(DEVICE))
    for a, b, c in zip(mine, theirs, again, strict=True):
        compare(a, b, 10 * tolerance)
        compare(c, b, 10 * tolerance)
    with torch.no_grad():
        compare(after(1, experts_forward, experts, there, *arguments).cpu(), exact, tolerance)


def test_a_row_has_one_mask_whoever_computes_it():
    """A batch, and a part of it that is told which of its rows it has, forward and backward."""
    T, E, k = 8, 2, 2
    index = torch.rand(T, E + 1, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]  # some elsewhere
    case = E, 64, 8, index, {"transposed": False, "biased": False}, "default", "silu", (4, 4), 0, 0.4
    experts, loras, *routed = build(case, torch.float32)
    experts, loras = moved(experts, loras)

    def run(at, *told):
        hidden, *routing = (tensor.detach()[at].to(DEVICE) for tensor in routed)
        out = after(1, experts_forward, experts, loras, hidden.requires_grad_(), *routing, None, *told)
        return torch.cat([out, *torch.autograd.grad(out.sum(), hidden)], 1).detach()

    whole, part = run(slice(None)), torch.arange(T - 1, 0, -2)
    compare(run(part, torch.arange(T * k).view(T, k)[part].to(DEVICE)), whole[part], 1e-5)
    assert (run(part) - whole[part]).abs().amax(1).count_nonzero() >= 3


@settings(max_examples=EXAMPLES, deadline=None)
@given(cases())
def test_forward_and_gradients_equal_a_float64_loop(case):
    check(case, torch.float32, 2e-5)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(cases(kinks=False))
def test_in_half_precision(case):
    check(case, torch.float16, 1e-2)


@pytest.mark.skipif(INTERPRETED, reason="triton's interpreter keeps bfloat16 as integers and multiplies those")
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(cases(kinks=False))
def test_in_bfloat16(case):
    check(case, torch.bfloat16, 4e-2)


@pytest.mark.parametrize(
    ("gate", "act", "at"),
    [("clamped", "silu", 1.0), ("clamped", "silu", -1.0), ("default", "relu", 0.0), ("none", "relu", 0.0)],
)
def test_the_gradient_at_a_kink_is_torchs(gate, act, at):
    """Where the argument is the limit itself, or zero, as it often is in half precision."""
    I = 8

    def put(experts, loras):
        bias = experts.get_parameter(f"{experts.up_name}_bias")
        with torch.no_grad():
            experts.get_parameter(experts.up_name).zero_()
            loras[experts.up_name].lora_B.zero_()  # gets the gradient of the argument, and adds nothing to it
            bias.fill_(at)
            if gate == "default":
                bias[:, I:] = 1.0
        experts.limit = 1.0

    flags = {"transposed": False, "biased": True}
    check((3, 16, I, torch.randint(0, 3, (9, 2)), flags, gate, act, (4, 5), 0), torch.float32, 2e-5, put)


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_a_base_parameter_that_trains_gets_its_gradient(name):
    """From torch: the kernels have none for it."""
    flags = {"transposed": False, "biased": True}
    case = 3, 16, 8, torch.randint(0, 3, (9, 2)), flags, "default", "silu", (4, 5), 0
    experts, loras, *inputs = build(case, torch.float32)
    experts, loras = moved(experts, loras)
    trained = experts.get_parameter(name).requires_grad_()
    inputs = [t.to(DEVICE) for t in inputs]
    assert fused.fused_reason(experts, DEVICE) == ("trained", (name,))
    experts_forward(experts, loras, *inputs).sum().backward()
    exact = loop(experts, {n: lora.canonical() for n, lora in loras.items()}, *inputs)
    compare(trained.grad, torch.autograd.grad(exact.sum(), trained)[0], 2e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(4, 8), (70, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_tiled_product(monkeypatch, transposed, ranks, dtype, capability):
    """Its tiles are too large for the cases above, so here they are made small."""
    tiling = gemm.TILINGS[capability]
    if INTERPRETED:
        monkeypatch.setattr(layer, "tile_sizes", lambda S, E: (16, 64))
        tiling = tiling._replace(config=Config(32, 4, 2), depth=32)
    monkeypatch.setattr(gemm, "tiling_of", lambda x: tiling if INTERPRETED else tiling.of(x.dtype))
    torch.manual_seed(0)
    index = torch.randint(0, 3, (75 if INTERPRETED else 400, 2))
    flags = {"transposed": transposed, "biased": True}
    check((3, 64, 128, index, flags, "default", "silu", ranks, 0), dtype, 2e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("E", [1, 5, 130])
@pytest.mark.parametrize("S", [1, 63, 1000])
def test_routing_is_a_stable_sort_with_tiles_that_never_cross_an_expert(E, S):
    index = torch.randint(0, E + 1, (S, 1)).clamp(max=E)  # E itself is computed elsewhere
    found = route(index.to(DEVICE), E, 16, 64)
    flat = index.reshape(-1)
    here = int((flat < E).sum())
    expected = torch.sort(flat, stable=True).indices
    assert torch.equal(found.order[:here].cpu().long(), expected[:here])
    ends = torch.stack([(flat <= e).sum() for e in range(E)])
    assert torch.equal(found.offs.cpu().long(), ends)
    position = found.position[:S].cpu().long()
    assert torch.equal(position >= 0, flat < E)
    assert torch.equal(expected[position[position >= 0]], torch.arange(S)[flat < E])
    for tiles in (found.small, found.large):
        table = tiles.table[: 2 * tiles.limit].view(-1, 2).cpu().tolist()
        wanted, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            wanted += [[expert, row] for row in range(start, end, tiles.block)]
            start = end
        assert table[: len(wanted)] == wanted
        assert all(expert == -1 for expert, _ in table[len(wanted) :])
        assert int(tiles.table[2 * tiles.limit]) == len(wanted)


def test_packing_and_back():
    B = torch.randn(10, 18, device=DEVICE)  # "d (r E)"
    factor = Factor(B, 3, 1, 6, 18, 2.0)
    apart = packed(factor, torch.empty(6, 4, 10, device=DEVICE), 100)
    assert torch.equal(apart.tensor, 2.0 * B.view(10, 3, 6).permute(2, 0, 1))
    assert apart[1:] == (3, 30, 1, 3, 1.0)
    assert torch.equal(unpacked(apart, factor, 6, 10), 2.0 * B)


def test_factors_in_any_other_form():
    """Of several adapters, say, which are concatenated: as those of one adapter, gradients included."""
    torch.manual_seed(0)
    flags = {"transposed": False, "biased": False}
    case = 5, 16, 8, torch.randint(0, 5, (20, 2)), flags, "default", "silu", (4, 5), 0
    experts, loras, *inputs = build(case, torch.float32)
    experts, there = moved(experts, loras)
    canonical = {n: lora.canonical() for n, lora in there.items()}
    assert all(isinstance(lora, ExpertLora) for lora in canonical.values())
    outs = [experts_forward(experts, form, *(t.to(DEVICE) for t in inputs)) for form in (there, canonical)]
    torch.testing.assert_close(outs[0], outs[1])
    for a, b in zip(*(torch.autograd.grad(out.sum(), parameters(loras)) for out in outs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", [0, 1], ids=["linear", "reversed"])
def test_gradients_are_taken_over_without_a_copy(monkeypatch, seed):
    flags = {"transposed": False, "biased": False}
    case = 5, 16, 8, torch.randint(0, 5, (20, 2)), flags, "default", "silu", (4, 5), seed
    experts, loras, *inputs = build(case, torch.float32)
    experts = experts.to(DEVICE)
    leaves = {
        n: x._replace(lora_A=x.lora_A.detach().to(DEVICE), lora_B=x.lora_B.detach().to(DEVICE))
        for n, x in loras.items()
    }
    for leaf in parameters(leaves):
        leaf.requires_grad_()
    made = []

    def noted(*args, run=layer.factor_gradient, **kwargs):
        gradient = run(*args, **kwargs)
        made.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(layer, "factor_gradient", noted)
    experts_forward(experts, leaves, *(t.to(DEVICE) for t in inputs)).sum().backward()
    assert {leaf.grad.data_ptr() for leaf in parameters(leaves)} == set(made[-4:])  # a trial may have come first


@pytest.mark.parametrize("ranks", [(4, 5), (None, 4)], ids=str)
def test_one_graph_trains_as_eager_does(ranks, tried):
    """With other numbers of tokens from step to step, and without keeping a row that was gathered.

    All sizes of tiles are tried when it is traced.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    flags = {"transposed": False, "biased": True}
    kept, frames = [], 0

    def forward(hidden, index, weights):
        return experts_forward(experts, loras, hidden, index, weights)

    def backend(graph, inputs):
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(forward, backend=aot_autograd(fw_compiler=backend), fullgraph=True, dynamic=True)
    case = 4, 48, 16, torch.randint(0, 5, (40, 2)), flags, "default", "silu", ranks, 0
    experts, loras, *_ = build(case, torch.float32)
    experts, loras = moved(experts, loras)
    loras = {n: x._replace(lora_A=x.lora_A.detach(), lora_B=x.lora_B.detach()) for n, x in loras.items()}
    for lora in loras.values():
        lora.lora_A.requires_grad_(), lora.lora_B.requires_grad_()
    for T in (40, 17, 64):
        hidden = torch.randn(T, 48, device=DEVICE, requires_grad=True)
        weights = torch.rand(T, 2, device=DEVICE, requires_grad=True)
        index = torch.randint(0, 5, (T, 2), device=DEVICE)
        leaves = [hidden, weights, *parameters(loras)]
        expected = forward(hidden, index, weights)
        gradient = torch.randn_like(expected)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found = compiled(hidden, index, weights)
        compare(found, expected, 1e-6)
        mine, theirs = (torch.autograd.grad(out, leaves, gradient) for out in (found, expected))
        for a, b in zip(mine, theirs, strict=True):
            compare(a, b, 1e-6)
        assert (2 * T, 32) in {t.shape for t in kept}
        assert (2 * T, 48) not in {t.shape for t in kept}
    assert frames == 2  # forward and backward, once for all three
    assert {kind[8] for kinds in fused._tried.values() for kind in kinds} == {(16, 16), (16, 64), (64, 64), (64, 128)}
    assert tried["layer"] <= tried["trial"]
    with torch.no_grad():
        compare(compiled(hidden, index, weights), forward(hidden, index, weights), 1e-6)
    torch._dynamo.reset()


def test_the_operators_leave_their_inputs_as_they_are():
    """The kernels work in place, but a graph may need once more what it has handed to an operator."""
    flags = {"transposed": True, "biased": False}
    case = 3, 16, 8, torch.randint(0, 3, (20, 2)), flags, "default", "silu", (4, 5), 0
    experts, loras, *inputs = build(case, torch.float32)
    experts, there = moved(experts, loras)
    held = [(experts.get_parameter(name), None, there[name]) for name in ("gate_up_proj", "down_proj")]
    routed = tuple(t.to(DEVICE) for t in inputs)
    out = operators.experts(fused._nonlinearity(experts), routed, *held)
    leaves = [inputs[0], inputs[2], *parameters(loras)]
    first, second = (torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.count_nonzero() > 0
        assert torch.equal(a, b)


def test_what_the_backward_keeps():
    """Token-level tensors, the up projection's output and the routing; no gathered rows and no activation."""
    torch.manual_seed(0)
    case = (
        4,
        48,
        24,
        torch.randint(0, 4, (40, 2)),
        {"transposed": False, "biased": False},
        "default",
        "silu",
        (4, 4),
        0,
    )
    experts, loras, hidden, index, weights = build(case, torch.float32)
    experts, loras = moved(experts, loras)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts_forward(experts, loras, hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
    by_row = [tuple(t.shape) for t in kept if t.ndim == 2 and t.shape[0] == 80]
    assert sorted(by_row) == [(80, 16), (80, 16), (80, 48)]


@zoo.each(zoo.DECORATED)
def test_every_experts_class_that_the_kernels_run(found):
    """And that what they do not run goes to torch with a reason, without a word."""
    experts = zoo.build(found, 16)
    names = [f"experts.{n}" for n in peft_moe_compat.model.experts.projections(experts)]
    holder = zoo.wrap(experts, names).to(DEVICE)
    index, weights = zoo.routing()
    given = {"hidden_states": torch.randn(zoo.T, zoo.H), "top_k_index": index, "top_k_weights": weights}
    given = {n: v.to(DEVICE) for n, v in given.items()}
    reason = fused.fused_reason(experts, DEVICE)
    assert reason in (None, ("norm_follows", ())), reason
    ours = zoo.gradients(holder["experts"], given, {})
    with peft_moe_compat.set_backend("torch"):
        assert fused.fused_reason(experts, DEVICE) == ("backend_set", ("torch",))
        zoo.assert_same(ours, zoo.gradients(holder["experts"], given, {}), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
@zoo.each(LOW)
def test_as_near_to_float64_as_stock(found, dtype, stock, monkeypatch):
    """Of the output, and of what the adapter adds to it."""
    ran = []
    monkeypatch.setattr(layer, "fused_experts", lambda *a, run=layer.fused_experts: ran.append(1) or run(*a))
    (output, effect), (stock_output, stock_effect) = low_precision(dtype, 1e-2, found, stock, device=DEVICE)
    assert ran
    assert output <= 1.05 * stock_output
    assert effect <= 1.05 * stock_effect


def test_a_kernel_that_does_not_compile_is_given_up_once(monkeypatch):
    from triton.runtime.errors import OutOfResources

    case = (3, 16, 8, torch.randint(0, 3, (5, 2)), {"transposed": False, "biased": False}, "default", "silu", (4, 4), 0)
    experts, loras, hidden, index, weights = build(case, torch.float32)
    experts, loras = moved(experts, loras)
    arguments = hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)
    expected = experts_forward(experts, loras, *arguments)

    def fails(*_args, **_kwargs):
        raise OutOfResources(2**20, 2**17, "shared memory")

    monkeypatch.setattr(layer, "fused_experts", fails)
    monkeypatch.setattr(fused, "_given_up", {})
    with pytest.warns(CompatWarning, match="shared memory"):
        found = experts_forward(experts, loras, *arguments)
    compare(found.cpu(), expected.cpu(), 2e-5)
    assert fused.fused_reason(experts, hidden.to(DEVICE).device).code == "kernel_failed"
    experts_forward(experts, loras, *arguments)  # no second warning: it would be an error


# A layer's (E, H, I, tokens), its gate and flags, ranks, and seed, odd for factors in the reversed orientation.
KINDS = {
    "large tiles": ((5, 640, 640, 200), "default", {"transposed": False, "biased": False}, (8, 40), 0),
    "medium tiles": ((5, 640, 648, 50), "clamped", {"transposed": True, "biased": True}, (16, 4), 1),
    "small tiles": ((5, 648, 640, 8), "none", {"transposed": False, "biased": False}, (70, 16), 0),
    "fewer rows than experts": ((20, 640, 640, 2), "default", {"transposed": False, "biased": False}, (8, 8), 0),
    "a gate of its own": ((3, 656, 640, 100), "own", {"transposed": True, "biased": False}, (None, 9), 0),
    "small sizes": ((2, 64, 24, 130), "default", {"transposed": False, "biased": True}, (4, None), 0),
}


@pytest.fixture
def tried(monkeypatch):
    """The device's kernels are tried as on a new one; what is launched in a trial, and what beside it."""
    launched = {"trial": set(), "layer": set()}
    place = "layer"

    def call(self, grid, *arguments, run=Form.__call__):
        launched[place].add((self.kernel.jit.__name__, *sorted(self.meta.items())))
        run(self, grid, *arguments)

    def trial(*arguments, run=fused._trial):
        nonlocal place
        place = "trial"
        launched["errors"].append(run(*arguments))
        place = "layer"
        return launched["errors"][-1]

    launched["errors"] = []
    monkeypatch.setattr(Form, "__call__", call)
    monkeypatch.setattr(fused, "_trial", trial)
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_given_up", {})
    monkeypatch.setattr(fused, "_TRIED_ON", (DEVICE.type,))
    return launched


def layer_of(kind, dtype=torch.float16, dropout=0.0):
    """(experts, LoRA, routed) on the device, every expert with a row where there are enough."""
    (E, H, I, T), gate, flags, ranks, seed = KINDS[kind]
    index = torch.arange(T * 2).view(T, 2) % E
    experts, loras, *routed = build((E, H, I, index, flags, gate, "silu", ranks, seed, dropout), dtype)
    return *moved(experts, loras), [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in routed]


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trial_launches_what_the_layer_launches(tried, kind, dtype):
    experts, loras, routed = layer_of(kind, dtype)
    with torch.autocast(DEVICE.type, torch.float16):  # of no effect on the trial
        experts_forward(experts, loras, *routed).sum().backward()
    assert {"_product" if kind == "large tiles" else "_add"} <= {name for name, *_ in tried["layer"]}
    assert tried["trial"] == tried["layer"]
    assert len(tried["errors"]) == 1
    assert 0 < tried["errors"][0] < fused._TRIAL_ERROR / 2


@pytest.mark.parametrize("kind", ["large tiles", "small tiles", "a gate of its own"])
def test_the_trial_launches_what_a_layer_with_a_dropout_launches(tried, kind):
    experts, loras, routed = layer_of(kind, dropout=0.3)
    experts_forward(experts, loras, *routed).sum().backward()
    assert tried["layer"] <= tried["trial"]  # which has to see the masks beside
    assert {name for name, *how in tried["layer"] if ("DROP", True) in how} >= {
        "_product" if kind == "large tiles" else "_add",
        "_factor_gradient",
        "_gather",
    }


@pytest.mark.parametrize("kind", ["small sizes", "small tiles"])  # LoRA on one projection, and on both
def test_masks_are_those_of_the_seed_whether_a_trial_comes_between_or_not(tried, kind):
    """As in a checkpointed region, of which the first forward tries the kernels and the recomputation does not."""
    experts, loras, routed = layer_of(kind, torch.float32, dropout=0.3)
    first, again = (after(3, experts_forward, experts, loras, *routed) for _ in range(2))
    assert len(tried["errors"]) == 1
    assert torch.equal(first, again)
    assert not torch.equal(first, after(4, experts_forward, experts, loras, *routed))
    one = torch.autograd.grad(first.sum(), parameters(loras), retain_graph=True)
    two = torch.autograd.grad(first.sum(), parameters(loras))  # of which the up projection is computed again
    for gradient, other in zip(one, two, strict=True):
        torch.testing.assert_close(gradient, other)


def test_no_element_of_a_mask_says_anything_of_another():
    """Of the same row in the same word and the next, of the next row, and of another seed."""
    p, found = 0.05, []
    where = route(torch.zeros(512, 1, dtype=torch.int64, device=DEVICE), 1, 64, 128)
    for seed in (2**62 + 5, 2**62 + 6):
        words = kept_of(Drop(torch.tensor(seed, device=DEVICE), p), where, 512).words
        bits = (words.unsqueeze(2) >> torch.arange(32, device=DEVICE) & 1).flatten(1).cpu().double()
        found.append((bits - (1 - p)) / (p * (1 - p)) ** 0.5)
    bits, other = found
    pairs = [(bits[:, :-d], bits[:, d:]) for d in range(1, 65)]
    pairs += [(bits[:-1], bits[1:]), (bits, other), (bits, torch.ones_like(bits))]
    for one, two in pairs:
        assert abs((one * two).mean()) < 5 / one.numel() ** 0.5 + 0.002


def test_the_trial_of_few_rows_launches_what_they_launch(tried):
    experts, loras, routed = layer_of("small tiles")
    with torch.no_grad():
        experts_forward(experts, loras, *routed)
        experts_forward(experts, loras, *(t[:3] for t in routed))
    assert {name for name, *_ in tried["layer"]} == {"_low", "_up", "_down"}
    assert tried["trial"] == tried["layer"]
    assert len(tried["errors"]) == 1
    assert 0 < tried["errors"][0] < fused._TRIAL_ERROR / 2


# Functions of this package that a layer may call, for which a step of few tokens waits: 198 and 77 (Python 3.11).
# Who needs more raises this, and says what it costs in benchmarks/NOTES.md.
MOST_CALLS = {"forward": 204, "backward": 80}


@pytest.mark.skipif(not INTERPRETED, reason="counts calls of this thread, and a device's backward has its own")
def test_a_layer_asks_little_of_the_processor(monkeypatch):
    found = next(found for found in zoo.find_classes() if found.name == "Qwen3MoeExperts")
    experts = zoo.wrap(zoo.build(found, 64).bfloat16(), ["gate_up_proj", "down_proj"])["experts"]
    experts.get_base_layer().config._experts_implementation = "grouped_mm"
    monkeypatch.setattr(fused, "_TRIED_ON", (DEVICE.type,))
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_trial", lambda *_: 0.0)
    monkeypatch.setattr(Form, "__call__", lambda *_: None)
    monkeypatch.setattr(gemm, "multiply", lambda x, weight, _: x.new_empty(len(x), weight.shape[2]))
    package, calls, step = str(Path(peft_moe_compat.__file__).parent), dict.fromkeys(MOST_CALLS, 0), "forward"

    def note(frame, event, _):
        calls[step] += event == "call" and frame.f_code.co_filename.startswith(package)

    hidden = torch.randn(300, zoo.H, dtype=torch.bfloat16, requires_grad=True)
    index, weights = zoo.routing(tokens=300)
    with peft_moe_compat.activate():
        experts(hidden, index, weights.bfloat16()).sum().backward()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            out = experts(hidden, index, weights.bfloat16()).sum()
            step = "backward"
            out.backward()
        finally:
            sys.setprofile(before)
    assert {each: 0 < calls[each] <= most for each, most in MOST_CALLS.items()} == dict.fromkeys(MOST_CALLS, True), (
        calls
    )


def test_stacks_of_two_dtypes_are_left_to_torch():
    experts, _, _ = layer_of("small sizes", torch.bfloat16)
    assert fused.fused_reason(experts, DEVICE) is None
    experts.down_proj.data = experts.down_proj.data.half()
    assert "torch.bfloat16 and torch.float16" in str(fused.fused_reason(experts, DEVICE))


def test_where_nothing_can_be_built_nothing_is_launched(tried, monkeypatch):
    def call(*_args, **_kwargs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(Form, "__call__", call)
    experts, loras, routed = layer_of("small sizes")
    with pytest.warns(CompatWarning, match="Failed to find C compiler"):
        found = experts_forward(experts, loras, *routed)
    with peft_moe_compat.set_backend("torch"):
        assert torch.equal(found, experts_forward(experts, loras, *routed))


@pytest.mark.parametrize("wrong", ["large tiles", "sorting", "not a number"])
def test_wrong_numbers_of_large_tiles_alone_are_found_before_they_are_used(tried, monkeypatch, wrong):
    def tiled(x, weight, where, *rest, run=gemm._tiled):
        y = run(x, weight, where, *rest)
        if wrong != "sorting" and where.large.block == 128:
            y[:, 256:] += 1 if wrong == "large tiles" else torch.nan
        return y

    def wrongly(index, E, small, large, run=trial.route):
        found = run(index, E, small, large)
        if wrong == "sorting" and large == 128:
            found.position.copy_(found.position.flip(0))
        return found

    monkeypatch.setattr(gemm, "_tiled", tiled)
    monkeypatch.setattr(trial, "route", wrongly)
    experts, loras, routed = layer_of("large tiles")
    few = [t.detach()[:8] for t in routed]
    experts_forward(experts, loras, *few)
    assert len(tried["errors"]) == 1  # and no warning, which would be an error
    with pytest.warns(CompatWarning, match="are off by|sorted wrongly"):
        found = experts_forward(experts, loras, *routed)
    again = experts_forward(experts, loras, *routed)  # no second warning
    with peft_moe_compat.set_backend("torch"):
        expected = experts_forward(experts, loras, *routed)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert fused.fused_reason(experts, routed[0].device).code == "kernel_failed"


@pytest.mark.parametrize(("rows", "E"), [(6, 5), (40, 2), (300, 2)], ids=str)
@pytest.mark.parametrize("I", [8, 48])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
def test_equal_inputs_give_equal_bits(dtype, biased, I, rows, E):
    """Of tiles of all sizes, with and without the wait for rows of odd width, and of a second backward.

    The kernels that work in place must not race.
    """
    index = torch.randint(0, E, (rows // 2, 2), generator=torch.Generator().manual_seed(0))
    flags = {"transposed": False, "biased": biased}
    experts, loras, hidden, index, weights = build((E, 16, I, index, flags, "default", "gelu_tanh", (4, 4), 0), dtype)
    leaves = [hidden, weights, *parameters(loras)]
    experts, loras = moved(experts, loras)
    first = None
    for _ in range(1 if INTERPRETED else 20):
        out = experts_forward(experts, loras, hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
        once = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        found = [out.detach(), *once]
        first = first or found
        for again in (found, [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]):
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [False, True])
def test_an_expert_elsewhere_adds_nothing_whatever_overflows_here(grad):
    """A row that another rank computes may be run through an expert of this one, whose numbers do not fit it."""
    experts = Experts(2, 16, 8, gated=True, transposed=False, biased=False, dtype=torch.float16)
    experts = concatenated(experts).to(DEVICE).requires_grad_(False)
    experts.gate_up_proj[0] = 40
    hidden = torch.full((1, 16), 8, dtype=torch.float16, device=DEVICE, requires_grad=grad)
    index, weights = torch.tensor([[1, 2]], device=DEVICE), torch.rand(1, 2).half().to(DEVICE)
    out = experts_forward(experts, {}, hidden, index, weights)
    with peft_moe_compat.set_backend("loop"):
        compare(out.detach().cpu(), experts_forward(experts, {}, hidden, index, weights).detach().cpu(), 2e-3)


@pytest.mark.parametrize("gate", ["default", "clamped", "none"])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_what_is_no_number_stays_that(gate, act):
    experts = Experts(2, 16, 8, gated=gate != "none", transposed=False, biased=False, dtype=torch.float16)
    experts = GATES[gate](experts).to(DEVICE).requires_grad_(False)
    experts.act_fn = ACTIVATIONS[act]
    getattr(experts, experts.up_name)[1] = torch.nan
    index, weights = torch.tensor([[0], [1]], device=DEVICE), torch.ones(2, 1).half().to(DEVICE)
    hidden = torch.ones(2, 16, dtype=torch.float16, device=DEVICE)
    for grad in (False, True):
        out = experts_forward(experts, {}, hidden.detach().requires_grad_(grad), index, weights)
        assert out.isnan().all(1).tolist() == [False, True]


def test_auto_takes_the_kernels_in_half_precision():
    with peft_moe_compat.set_backend("auto"):
        for dtype, reason in ((torch.float16, None), (torch.float32, ("float32", ()))):
            experts = Experts(3, 16, 8, gated=True, transposed=False, biased=False, dtype=dtype)
            found = fused.fused_reason(experts.requires_grad_(False).to(DEVICE), DEVICE)
            assert found == reason
        assert fused.fastest(DEVICE) == "triton"
