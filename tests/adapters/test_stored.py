"""Stored formats: read as their makers define them, written at the nearest number, and bit for bit where nothing moves.

| format | nearest within |
|---|---|
| float32, bfloat16, float16 | torch's own rounding, exactly |
| FP8 in blocks | half a step of float8 at the scale of the block |
| MXFP4 | the best of 16 numbers at one of three exponents, exactly |
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_moe_compat.adapters.stored import MXFP4, BlockFP8, Plain

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_by_hand(blocks, scales):
    """gpt-oss's definition, byte by byte: the lower half first, sign in the highest bit, 2 ** (scale - 127)."""
    rows = []
    for row in range(blocks.shape[0]):
        numbers = []
        for group in range(blocks.shape[1]):
            for byte in blocks[row, group].tolist():
                for code in (byte % 16, byte // 16):
                    number = NUMBERS[code % 8] * 2.0 ** (int(scales[row, group]) - 127)
                    numbers.append(-number if code >= 8 else number)
        rows.append(numbers)
    return torch.tensor(rows, dtype=torch.float64)


def mxfp4(rows, groups, seed, spread=20):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(127 - spread, 127 + spread, (rows, groups), generator=generator, dtype=torch.uint8)
    return [blocks, scales]


def fp8(rows, columns, block, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = -(-rows // block[0]), -(-columns // block[1])
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8)
        return [weight, exponents if dtype == torch.uint8 else exponents.view(dtype)]
    return [weight, torch.rand(shape, generator=generator).add(0.1).mul(0.01).to(dtype)]


def fp8_by_hand(weight, scale, block):
    numbers = scale.view(torch.uint8).double().sub(127).exp2() if scale.dtype.itemsize == 1 else scale.double()
    found = weight.double()
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            found[row, column] *= numbers[row // block[0], column // block[1]]
    return found


SCALES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8]


def fp8_format(block, dtype):
    return BlockFP8(block, exponents=dtype in (torch.uint8, torch.float8_e8m0fnu))


def bits(tensors):
    return [tensor.clone().view(torch.uint8) for tensor in tensors]


def test_mxfp4_is_read_as_it_is_defined_and_stays_what_it_is():
    tensors = mxfp4(5, 3, 0)
    expected = mxfp4_by_hand(*tensors)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(MXFP4().decode(tensors, dtype).double(), expected)
    before = bits(tensors)
    MXFP4().encode(tensors, expected.float())
    assert all(torch.equal(a, b) for a, b in zip(bits(tensors), before, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(-30, 30), st.booleans())
def test_mxfp4_is_written_as_well_as_its_best_exponent_allows(seed, power, outlier):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, 64, generator=generator, dtype=torch.float64) * 2**power
    if outlier:
        matrix[0, 3] *= 30
    tensors = mxfp4(2, 2, seed)
    MXFP4().encode(tensors, matrix)
    written = mxfp4_by_hand(*tensors)
    choices = torch.tensor([sign * number for number in NUMBERS for sign in (1, -1)], dtype=torch.float64)
    for row in range(2):
        for group in range(2):
            here = slice(32 * group, 32 * group + 32)
            block = matrix[row, here]
            best = min(
                float((block[:, None] - choices * 2.0**e).abs().amin(1).square().sum())
                for e in range(int(power) - 12, int(power) + 12)
            )
            assert float((block - written[row, here]).square().sum()) <= best * (1 + 1e-9)
    assert ((matrix - written).abs() <= MXFP4().margin(tensors) * (1 + 1e-9)).all()


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize(("rows", "columns", "block"), [(8, 12, (4, 4)), (7, 9, (4, 4)), (6, 4, (128, 128))])
def test_fp8_is_read_as_it_is_defined_and_stays_what_it_is(rows, columns, block, dtype):
    tensors = fp8(rows, columns, block, 0, dtype)
    form = fp8_format(block, dtype)
    expected = fp8_by_hand(*tensors, block)
    assert torch.equal(form.decode(tensors, torch.float64), expected)
    torch.testing.assert_close(form.decode(tensors, torch.float32).double(), expected, rtol=1e-6, atol=0)
    before = bits(tensors)
    form.encode(tensors, form.decode(tensors, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(bits(tensors), before, strict=True))


@pytest.mark.parametrize("dtype", SCALES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), power=st.floats(-15, 10))
@example(seed=455, power=0.0)  # the scale that is there errs less in all, and cuts one number off
def test_fp8_is_written_within_half_a_step(dtype, seed, power):
    block = (4, 4)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(9, 10, generator=generator) * 2**power
    form, tensors = fp8_format(block, dtype), fp8(9, 10, block, seed, dtype)
    form.encode(tensors, matrix)
    written = fp8_by_hand(*tensors, block)
    assert ((matrix.double() - written).abs() <= form.margin(tensors) * (1 + 1e-5)).all()
    # No worse than transformers' recipe, the largest of a block at float8's end.
    for row, column in [(0, 0), (4, 4), (8, 8)]:
        here = slice(row, row + 4), slice(column, column + 4)
        scale = matrix[here].abs().max() / 448
        scale = 2 ** scale.log2().ceil() if form.exponents else scale.to(dtype).float()
        usual = (matrix[here] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
        ours, theirs = ((matrix[here].double() - made).square().sum() for made in (written[here], usual))
        assert ours <= theirs * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_numbers_are_rounded_as_torch_does(dtype):
    matrix = torch.randn(6, 5, dtype=torch.float64)
    tensors = [torch.zeros(5, 6, dtype=dtype).t()]
    Plain(dtype).encode(tensors, matrix)
    assert torch.equal(tensors[0], matrix.to(dtype))
    assert ((matrix - tensors[0].double()).abs() <= Plain(dtype).margin(tensors)).all()
    decoded = Plain(dtype).decode(tensors, torch.float64)
    decoded += 1
    assert torch.equal(tensors[0], matrix.to(dtype))
