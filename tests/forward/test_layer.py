"""`experts_forward` alone, over drawn shapes and routings, against a float64 loop over tokens (`experts_loop`)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support import zoo
from support.experts_loop import Experts, cases, compare, factors, loop

from peft_moe_compat import ExpertLora, LayoutError
from peft_moe_compat.forward.layer import experts_forward


def check(case, dtype, tolerance):
    E, H, I, index, flags, ranks, scaling = case
    torch.manual_seed(0)
    experts = Experts(E, H, I, **flags, dtype=dtype)
    loras = factors(experts, E, H, I, ranks, scaling, dtype)
    hidden = torch.randn(index.shape[0], H, dtype=dtype, requires_grad=True)
    weights = torch.rand(index.shape, dtype=dtype, requires_grad=True)
    leaves = [hidden, weights, *experts.parameters(), *(t for lora in loras.values() for t in (lora.A, lora.B))]
    ours = experts_forward(experts, loras, hidden, index, weights)
    exact = loop(experts, loras, hidden, index, weights)
    grad = torch.randn_like(exact)
    compare(ours, exact, tolerance)
    assert ours.dtype == dtype
    mine = torch.autograd.grad(ours, leaves, grad.to(dtype), allow_unused=True)
    theirs = torch.autograd.grad(exact, leaves, grad, allow_unused=True)
    for leaf, a, b in zip(leaves, mine, theirs, strict=True):
        assert a is not None or b is None
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))  # noqa: PLW2901
        compare(a, b, 10 * tolerance)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_float64_on_the_loop_backend(case):
    check(case, torch.float64, 1e-9)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_float32_on_whatever_backend_serves(case):
    E, H, I, *rest = case
    check((E, 4 * H, 4 * I, *rest), torch.float32, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["on the loop backend", "on torch's"])
@pytest.mark.parametrize("marked", [None, True], ids=["a class that does not say", "expert parallel"])
def test_a_graph_leaves_out_what_other_ranks_compute(dtype, marked):
    """Forward and backward with sentinels, whose rows the grouped products leave undefined; biases train too."""
    torch._dynamo.reset()
    E, H, I = 4, 16, 8
    experts = Experts(E, H, I, gated=True, transposed=False, biased=True, dtype=dtype)
    if marked is not None:
        experts._is_expert_parallel = marked
    loras = factors(experts, E, H, I, (3, 5), 0.7, dtype)
    index = torch.tensor([[0, E], [E, E], [2, 0], [E + 1, 3], [2, 2]])
    hidden = torch.randn(len(index), H, dtype=dtype, requires_grad=True)
    weights = torch.rand(index.shape, dtype=dtype, requires_grad=True)
    leaves = [hidden, weights, *experts.parameters(), *(t for lora in loras.values() for t in (lora.A, lora.B))]

    def forward(hidden, index, weights):
        return experts_forward(experts, loras, hidden, index, weights)

    ours = torch.compile(forward, backend="aot_eager", fullgraph=True)(hidden, index, weights)
    exact = loop(experts, loras, hidden, index, weights)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    compare(ours, exact, tolerance)
    assert exact[1].count_nonzero() == 0
    grad = torch.randn_like(exact)
    mine, theirs = torch.autograd.grad(ours, leaves, grad.to(dtype)), torch.autograd.grad(exact, leaves, grad)
    for a, b in zip(mine, theirs, strict=True):
        compare(a, b, 10 * tolerance)
    torch._dynamo.reset()


def test_no_tokens_at_all():
    experts = Experts(3, 8, 4, gated=True, transposed=False, biased=True)
    loras = factors(experts, 3, 8, 4, (2, 2), 1.0)
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    index, weights = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.float64)
    out = experts_forward(experts, loras, empty, index, weights)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert loras["down_proj"].A.grad.count_nonzero() == 0


def test_every_lora_parameter_gets_a_gradient_even_with_no_token():
    """Data-parallel training needs a zero gradient, not None, from experts that no token reached."""
    experts = Experts(4, 8, 4, gated=True, transposed=False, biased=False)
    loras = factors(experts, 4, 8, 4, (2, 2), 1.0)
    hidden, weights = torch.randn(3, 8, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    experts_forward(experts, loras, hidden, torch.zeros(3, 1, dtype=torch.long), weights).sum().backward()
    for lora in loras.values():
        for factor in (lora.A, lora.B):
            assert factor.grad[0].count_nonzero() > 0
            assert factor.grad[1:].count_nonzero() == 0


def test_weights_of_all_experts_are_gathered():
    """transformers 5.0 hands some classes the whole routing distribution, "T E"."""
    experts = Experts(4, 8, 4, gated=True, transposed=False, biased=False)
    loras = factors(experts, 4, 8, 4, (2, None), 1.0)
    hidden, dense = torch.randn(3, 8, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    index = torch.tensor([[0, 2], [3, 4], [1, 0]])  # 4 is computed elsewhere, and has no weight here
    torch.testing.assert_close(
        experts_forward(experts, loras, hidden, index, dense),
        loop(experts, loras, hidden, index, dense.gather(1, index.clamp(max=3))),
    )


def test_the_torch_backend_never_waits_for_the_device(monkeypatch):
    """Every way to read a tensor's value on the host raises; shapes alone must be enough, forward and backward."""
    experts = Experts(4, 16, 8, gated=True, transposed=False, biased=True, normed=True, dtype=torch.bfloat16)
    loras = factors(experts, 4, 16, 8, (3, 5), 1.0, torch.bfloat16)
    index, weights = zoo.routing(4, 6, 2)
    hidden = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)

    def waits(*args, **kwargs):
        raise AssertionError("a host synchronisation")

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    experts_forward(experts, loras, hidden, index, weights).sum().backward()
    monkeypatch.undo()
    assert hidden.grad.count_nonzero() > 0


def test_repeated_runs_are_bit_identical():
    experts = Experts(4, 16, 8, gated=True, transposed=False, biased=False, dtype=torch.float32)
    loras = factors(experts, 4, 16, 8, (4, 4), 1.0, torch.float32)
    index, weights = zoo.routing(4, 50, 2)
    hidden = torch.randn(50, 16)
    first = experts_forward(experts, loras, hidden, index, weights)
    assert all(torch.equal(experts_forward(experts, loras, hidden, index, weights), first) for _ in range(3))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_factors_of_another_shape_are_refused_at_use(name):
    experts = Experts(3, 8, 4, gated=True, transposed=False, biased=False)
    wrong = ExpertLora(torch.zeros(3, 2, 5, dtype=torch.float64), torch.zeros(3, 7, 2, dtype=torch.float64))
    index, weights = zoo.routing(3, 4, 2)
    with pytest.raises(LayoutError, match=rf"Experts\.{name}.*another PEFT release"):
        experts_forward(experts, {name: wrong}, torch.randn(4, 8, dtype=torch.float64), index, weights.double())


def test_the_kept_memory_does_not_grow_with_the_weights():
    """Autograd keeps the stack itself and per-row tensors; no other tensor of the size of the stack."""
    experts = Experts(16, 32, 32, gated=True, transposed=False, biased=False, dtype=torch.float32)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    loras = factors(experts, 16, 32, 32, (4, 4), 1.0, torch.float32)
    index, weights = zoo.routing(16, 8, 2)
    own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts_forward(experts, loras, torch.randn(8, 32, requires_grad=True), index, weights)
    extra = [t.shape for t in kept if t.untyped_storage().data_ptr() not in own and t.numel() >= 16 * 32 * 32]
    assert extra == []
