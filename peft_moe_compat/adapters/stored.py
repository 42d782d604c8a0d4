"""How a checkpoint stores a weight matrix, and how a new value is put into its place: pure tensor code, one class each.

A matrix is given as the tensors it is stored in. `decode` gives its numbers, `encode` puts others there, in the same
dtype and packing, rounded once; what is stored so already stays bit for bit. `margin` bounds what that rounding
explains, entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MXFP4", "BlockFP8", "Format", "Plain"]

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_BETWEEN = (_FP4[1:] + _FP4[:-1]) / 2
_FP4_HALF_STEPS = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 2.0])  # to 6 a number up to 8 may have been cut
_MXFP4_BLOCK = 32


class Format:
    """A stored format, of matrices "rows columns".

    Attributes:
        name: For messages.
        packed: Whether what is stored is no tensor of the numbers.
    """

    name = ""
    packed = True

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The numbers, in a wider dtype; a tensor of its own."""
        raise NotImplementedError

    def encode(self, tensors: Sequence[Tensor], matrix: Tensor) -> None:
        """Puts the numbers of `matrix`, of a wider dtype, into `tensors`."""
        raise NotImplementedError

    def margin(self, tensors: Sequence[Tensor]) -> Tensor:
        """How far a number may be from what is stored in its place, float64."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Format):
    """One floating-point tensor."""

    dtype: torch.dtype

    packed = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.dtype).removeprefix("torch.")

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype, copy=True)

    def encode(self, tensors: Sequence[Tensor], matrix: Tensor) -> None:
        tensors[0].copy_(matrix)

    def margin(self, tensors: Sequence[Tensor]) -> Tensor:
        return _half_steps(tensors[0], tensors[0].double())


@dataclass(frozen=True)
class BlockFP8(Format):
    """float8 "rows columns" and a scale for each block: transformers' fine-grained FP8, as DeepSeek and Qwen have it.

    Attributes:
        block: Rows and columns of a block; those at the ends may be smaller.
        exponents: Whether the scales are powers of two, as their exponents in a byte (ue8m0).
    """

    block: tuple[int, int]
    exponents: bool = False

    name = "FP8 in blocks"

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        weight, scale = tensors
        return weight.to(dtype) * self._spread(self._scale(scale, dtype), weight)

    def encode(self, tensors: Sequence[Tensor], matrix: Tensor) -> None:
        weight, scale = tensors
        most = torch.finfo(weight.dtype).max
        end = most + _half_steps(weight, matrix.new_tensor(most))
        largest = self._largest(matrix.abs())
        wanted = (largest / most).clamp(min=torch.finfo(torch.float32).tiny)
        numbers, scales, errors = None, scale, None
        # The scale that is there comes first: where it serves as well, nothing moves that was not updated.
        for candidate in (scale, self._as_scale(wanted, scale.dtype)):
            spread = self._spread(self._scale(candidate, matrix.dtype), weight)
            rounded = (matrix / spread).clamp(-most, most).to(weight.dtype)
            error = self._total((rounded.to(matrix.dtype) * spread - matrix).square())
            if numbers is None or errors is None:
                fits = largest <= end * self._scale(candidate, matrix.dtype)  # cuts none off by more than rounding
                numbers, errors = rounded, error.where(fits, torch.inf)
                continue
            better = error < errors
            numbers = _where(self._spread(better, weight), rounded, numbers)
            scales, errors = _where(better, candidate, scales), torch.minimum(error, errors)
        assert numbers is not None  # noqa: S101
        weight.copy_(numbers)
        scale.copy_(scales)

    def margin(self, tensors: Sequence[Tensor]) -> Tensor:
        weight, scale = tensors
        return _half_steps(weight, weight.double()) * self._spread(self._scale(scale, torch.float64), weight)

    def _scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (scale.to(dtype) - 127).exp2() if scale.dtype == torch.uint8 else scale.to(dtype)

    def _as_scale(self, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.exponents:
            return wanted.to(dtype)
        power = wanted.log2().ceil().clamp(-127, 127)
        return (power + 127).to(dtype) if dtype == torch.uint8 else power.exp2().to(dtype)

    def _spread(self, scale: Tensor, like: Tensor) -> Tensor:
        rows, columns = like.shape
        return scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]

    def _blocks(self, matrix: Tensor) -> Tensor:
        """ "rows columns" -> "R height C width", filled up with zeros."""
        (rows, columns), (height, width) = matrix.shape, self.block
        padded = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height))
        return padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)

    def _largest(self, matrix: Tensor) -> Tensor:
        return self._blocks(matrix).amax((1, 3))

    def _total(self, matrix: Tensor) -> Tensor:
        return self._blocks(matrix).sum((1, 3))


class MXFP4(Format):
    """gpt-oss: blocks "rows G 16", two numbers to a byte, the lower bits first; scales "rows G", exponents of two."""

    name = "MXFP4"

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        blocks, scales = tensors
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        table = torch.cat((_FP4, -_FP4)).to(dtype)
        return (table[codes] * _power(scales, dtype)[..., None]).flatten(1)

    def encode(self, tensors: Sequence[Tensor], matrix: Tensor) -> None:
        blocks, scales = tensors
        numbers = matrix.view(matrix.shape[0], -1, _MXFP4_BLOCK)
        # With 4 to 8 the largest is cut to 6, or with half as much loses a bit: whichever is better for the block.
        fitting = (numbers.abs().amax(2).frexp().exponent - 3 + 127).clamp(0, 254)
        codes, exponents, errors = None, scales, None
        for candidate in (scales, fitting.to(torch.uint8), (fitting + 1).clamp(max=254).to(torch.uint8)):
            power = _power(candidate, matrix.dtype)[..., None]
            made, size = _fp4(numbers / power)
            error = (size * power - numbers.abs()).square().sum(2)
            if codes is None or errors is None:
                codes, errors = made, error
                continue
            better = error < errors
            codes = torch.where(better[..., None], made, codes)
            exponents = torch.where(better, candidate, exponents)
            errors = torch.minimum(error, errors)
        assert codes is not None  # noqa: S101
        blocks.copy_(codes[..., 0::2] | codes[..., 1::2] << 4)
        scales.copy_(exponents)

    def margin(self, tensors: Sequence[Tensor]) -> Tensor:
        blocks, scales = tensors
        numbers = self.decode((blocks, torch.full_like(scales, 127)), torch.float64).abs()
        steps = _FP4_HALF_STEPS.double()[torch.bucketize(numbers, _FP4_BETWEEN.double())]
        return steps * _power(scales, torch.float64).repeat_interleave(_MXFP4_BLOCK, 1)


def _fp4(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest numbers, ties to the even code, and their absolute values."""
    sizes, between = numbers.abs(), _FP4_BETWEEN.to(numbers.dtype)
    codes = torch.bucketize(sizes, between)
    codes += (codes % 2 == 1) & (sizes == between[codes.clamp(max=len(between) - 1)])
    return (codes + 8 * numbers.signbit()).to(torch.uint8), _FP4.to(numbers.dtype)[codes]


def _power(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents.int() - 127)


def _half_steps(stored: Tensor, numbers: Tensor) -> Tensor:
    """Half of the distance between neighbours of a floating-point format, at each of its numbers."""
    about = torch.finfo(stored.dtype)
    exponents = torch.frexp(numbers.abs().clamp(min=about.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(numbers, about.eps / 4), exponents)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where`, of dtypes of a byte too, which it does not take."""
    if a.dtype.itemsize > 1:
        return torch.where(condition, a, b)
    return torch.where(condition, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)
