"""`Int8Weight`, against bitsandbytes' own operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from peft_moe_compat.quantising.int8 import Int8Weight

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is optional")


def quantised(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed, scales, _ = functional.int8_vectorwise_quant(weight.reshape(-1, shape[-1]).half())
    exact = functional.int8_vectorwise_dequant(packed, scales).view(shape).to(dtype)
    return packed.view(shape), scales.view(shape[:2]), exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk", [1, 70, 2**24])
def test_values_are_those_of_bitsandbytes_to_the_last_bit(dtype, chunk, monkeypatch):
    monkeypatch.setattr("peft_moe_compat.quantising.int8._CHUNK", chunk)
    packed, scales, exact = quantised((7, 5, 9), dtype)
    found = Int8Weight(scales, (7, 5, 9), dtype)(packed)
    assert found.dtype == dtype
    assert torch.equal(found, exact)
    assert (exact.float() - exact.float().mean()).abs().max() > 1


def test_a_graph_computes_the_same():
    packed, scales, exact = quantised((3, 4, 8), torch.bfloat16)
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, "weight", Int8Weight(scales, packed.shape, exact.dtype), unsafe=True)
    read = torch.compile(lambda: module.weight * 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(read(), exact)
    assert set(module.state_dict()) == {"parametrizations.weight.original", "parametrizations.weight.0.scales"}


def test_no_more_than_a_chunk_is_held_in_float32(monkeypatch):
    monkeypatch.setattr("peft_moe_compat.quantising.int8._CHUNK", 4 * 8)
    packed, scales, _ = quantised((6, 4, 8), torch.bfloat16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Watch():
        Int8Weight(scales, packed.shape, torch.bfloat16)(packed)
    assert 0 < largest <= 4 * 8
