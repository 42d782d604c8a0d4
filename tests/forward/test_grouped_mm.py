from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from peft_moe_compat.forward import grouped_mm as module
from peft_moe_compat.forward.grouped_mm import alignment, backend_for, device_backend, grouped_mm

widths = st.integers(1, 20)


@st.composite
def problems(draw):
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    tail = draw(st.integers(0, 3))  # rows that belong to no group
    return counts, tail, draw(widths), draw(widths), draw(st.booleans())


def make(problem, dtype):
    counts, tail, features_in, features_out, transposed = problem
    rows = sum(counts)
    x = torch.randn(rows + tail, features_in, dtype=dtype, requires_grad=True)
    w = torch.randn(len(counts), features_out, features_in, dtype=dtype)
    w = w.transpose(1, 2) if transposed else w.transpose(1, 2).contiguous()
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    return x, w.requires_grad_(), offs, rows


def loop(x, w, offs):
    pieces, start = [], 0
    for e, end in enumerate(offs.tolist()):
        pieces.append(x[start:end] @ w[e])
        start = end
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(problems())
def test_both_backends_equal_a_loop_in_float64(dtype, problem):
    x, w, offs, rows = make(problem, dtype)
    y = grouped_mm(x, w, offs)
    grad = torch.randn(rows, w.shape[2]).to(dtype)
    dx, dw = torch.autograd.grad(y[:rows], (x, w), grad) if rows else (None, None)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = loop(x64, w64, offs)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4e-2)
    torch.testing.assert_close(y[:rows].double(), exact, rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    if rows:
        dx64, dw64 = torch.autograd.grad(exact, (x64, w64), grad.double())
        torch.testing.assert_close(dx[:rows].double(), dx64[:rows], rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(dw.double(), dw64, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_a_product_leaves_undefined_is_nan_here(dtype):
    """In these tests, see conftest: whoever reads past the last group gets numbers that no comparison takes."""
    x, w, offs, rows = make(([2, 3], 3, 8, 8, True), dtype)
    y = grouped_mm(x, w, offs)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for found in (y, dx, torch.empty_like(x), x.new_empty(x.shape)):
        assert found[rows:].isnan().all()
    assert not y[:rows].isnan().any()
    assert not dx[:rows].isnan().any()


def test_the_choice_of_backend():
    rows, aligned, odd = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 8), (2, 8, 16), (2, 8, 3)))
    assert backend_for(rows, aligned) == device_backend(torch.device("cpu")) == "torch"
    assert backend_for(rows, odd) == "loop"
    # torch 2.9 has the operator under a private name, for bfloat16 alone.
    assert backend_for(rows.float(), aligned.float()) == ("torch" if hasattr(functional, "grouped_mm") else "loop")
    assert backend_for(rows.double(), aligned.double()) == "loop"
    shifted = torch.zeros(2 * 8 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 8, 16)
    assert backend_for(rows, shifted) == "loop"
    assert device_backend(torch.device("mps")) == "loop"
    assert (alignment(torch.bfloat16), alignment(torch.float32), alignment(torch.float64)) == (8, 4, 2)


def test_without_a_torch_operator_the_loop_serves(monkeypatch):
    x, w, offs, _ = make(([2, 3], 0, 8, 8, True), torch.float32)
    expected = grouped_mm(x, w, offs)
    monkeypatch.setattr(module, "_torch_grouped_mm", None)
    assert backend_for(x, w) == "loop"
    torch.testing.assert_close(grouped_mm(x, w, offs), expected)


def test_gradients_of_any_strides_are_taken():
    """A sum's gradient is expanded, with strides of zero, which the torch operator refuses."""
    x, w, offs, _ = make(([2, 3], 0, 8, 8, True), torch.float32)
    grouped_mm(x, w, offs).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_is_not_differentiated_again(dtype):
    """An error, rather than a number without the product's part in it."""
    x, w, offs, _ = make(([2, 3], 0, 8, 8, True), dtype)
    gradients = torch.autograd.grad(grouped_mm(x, w, offs).square().sum(), (x, w), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


def test_what_needs_no_gradient_is_not_kept():
    x, w, offs, _ = make(([2, 3], 0, 8, 8, True), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        grouped_mm(x, w.detach(), offs)
    assert x.shape not in kept
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        kept.clear()
        grouped_mm(x.detach(), w, offs)
    assert w.shape not in kept


def test_operators_pass_torchs_own_checks():
    x, w, offs, _ = make(([2, 0, 3], 0, 8, 8, True), torch.float32)
    x, w = x.detach(), w.detach()
    torch.library.opcheck(module._multiply_op, (x, w, offs))
    torch.library.opcheck(module._weight_gradient_op, (x, torch.randn(5, 8), offs))


def test_the_input_takes_the_weights_dtype():
    """The product is not autocast-enabled: hidden states may arrive in another precision than the weights."""
    x, w, offs, _ = make(([2, 3], 0, 8, 8, True), torch.float32)
    assert grouped_mm(x.bfloat16(), w, offs).dtype == torch.float32
