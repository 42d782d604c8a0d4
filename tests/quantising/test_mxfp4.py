"""The parametrization that dequantises MXFP4, against transformers' own function."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import mxfp4, zoo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import peft_moe_compat
from peft_moe_compat.errors import PeftMoeCompatError
from peft_moe_compat.quantising import mxfp4 as ours

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(1, 300))
def test_every_bit_is_that_of_transformers(num_experts, out_features, blocks, dtype, chunk):
    """Every byte and every exponent, in chunks that divide the rows or do not."""
    packed, scales = mxfp4.random_packed(num_experts, out_features, blocks, 0, 256)
    expected = convert_moe_packed_tensors(packed, scales, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_CHUNK", chunk)
        module = ours.Mxfp4Weight(scales, dtype)
        found = module(packed)
    assert (found.shape, found.dtype) == (module.shape, module.dtype) == (expected.shape, dtype)
    assert torch.equal(bits(found), bits(expected))


def bits(weight):
    return weight.contiguous().view(torch.int16 if weight.dtype.itemsize == 2 else torch.int32)


def test_all_256_bytes_at_every_exponent():
    packed = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    for dtype in DTYPES:
        found = ours.Mxfp4Weight(scales, dtype)(packed)
        assert torch.equal(bits(found), bits(convert_moe_packed_tensors(packed, scales, dtype=dtype)))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes, below a size."""

    def __init__(self, below):
        super().__init__()
        self.below, self.bytes = below, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() < self.below:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_scratch_is_bounded_beside_the_weight():
    packed, scales = mxfp4.random_packed(32, 1024, 64)  # 32 MiB, and 128 MiB dequantised
    module = ours.Mxfp4Weight(scales)
    with Largest(below=128 << 20) as largest:
        module(packed)
    assert (2 << 20) < largest.bytes <= 8 * ours._CHUNK


def experts():
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.randn(3, 64, 5)))
    ours.hold_packed(module, "weight")
    packed, scales = mxfp4.random_packed(3, 5, 2)
    module.parametrizations.weight.original.data.copy_(packed)
    module.parametrizations.weight[0].scales.copy_(scales)
    return module, packed, scales


def test_a_module_holds_what_was_published_and_gives_the_weight():
    module, packed, scales = experts()
    expected = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)
    assert torch.equal(module.weight, expected)
    assert not module.weight.requires_grad
    state = module.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "parametrizations.weight.original": torch.uint8,
        "parametrizations.weight.0.scales": torch.uint8,
    }
    twin = copy.deepcopy(module)
    twin.parametrizations.weight[0].scales.fill_(127)
    assert torch.equal(module.weight, expected)
    assert not torch.equal(twin.weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_dtype_follows_the_module_as_a_parameters_does(dtype):
    module, packed, scales = experts()
    module.to(dtype)
    assert torch.equal(module.weight, convert_moe_packed_tensors(packed, scales, dtype=dtype))
    assert module.parametrizations.weight.original.dtype == torch.uint8
    assert module.to("meta").weight.device.type == "meta"


@pytest.mark.skipif(zoo.FUSED, reason="the quantisers of transformers 5 can say how a checkpoint is loaded")
def test_transformers_4_is_refused_with_the_release_that_can():
    with pytest.raises(PeftMoeCompatError, match=r"transformers 5\.0 or newer.*Mxfp4Config\(dequantize=True\)"):
        peft_moe_compat.PackedMxfp4Config()
