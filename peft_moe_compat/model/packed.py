"""A quantised stack as the kernels take it: its bytes, its scales, and how both become weights.

weight = round((number - zero point) * scale * (1 / steps)), in float32 and rounded once: what bitsandbytes, torchao and
transformers compute, bit for bit. One `Codec` says how a format does it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["CODES", "E2M1", "FLOAT8", "INT8", "Codec", "PackedWeight", "encoded"]

# What a byte holds: two indices into a table, or one number.
CODES, INT8, FLOAT8 = 0, 1, 2
# What the codes 0 to 15 of a 4-bit float with two exponent bits stand for (OCP Microscaling Formats).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Codec(NamedTuple):
    """How a format's bytes become weights: integers, for which kernels are compiled and graphs are guarded.

    Attributes:
        kind: `CODES`, `INT8` or `FLOAT8` (e4m3fn).
        high_first: Of `CODES`: whether a byte's high half is the first of its two weights.
        height, width: Rows and columns of an expert that share a scale. Height 0: `width` consecutive weights do,
            wherever rows end.
        exponent: Whether a scale is an exponent of two, biased by 127, rather than a float; the numbers of `CODES` are
            then `E2M1`, without a table.
        zeros: Whether each scale has a zero point, which is subtracted first.
        nested: How many consecutive scales, a byte each, share a scale of their own; 0 where scales are plain.
        steps: Whose inverse is multiplied last; 1 where nothing is.
    """

    kind: int
    high_first: bool = False
    height: int = 0
    width: int = 64
    exponent: bool = False
    zeros: bool = False
    nested: int = 0
    steps: int = 1


class PackedWeight(NamedTuple):
    """A frozen stack by its packed form; looks like the "E in out" tensor it stands for.

    Attributes:
        codec: How it is decoded.
        dtype: What it is decoded to.
        stored: E, rows and columns of an expert, as the format counts them.
        rows_are_in: Whether the rows of that are in-features, in the view at hand; see `mT`.
        data: uint8 or int8, contiguous.
        scales: Contiguous: float32, or uint8 for exponents and nested scales.
        table: 16 floats of `CODES`; None where these are `E2M1`.
        zero_points: int8, one for each scale.
        scale_table, scale_scales, scale_offset: 256 floats, one float for each `nested` scales, and one added to all.
    """

    codec: Codec
    dtype: torch.dtype
    stored: tuple[int, int, int]
    rows_are_in: bool
    data: Tensor
    scales: Tensor
    table: Tensor | None = None
    zero_points: Tensor | None = None
    scale_table: Tensor | None = None
    scale_scales: Tensor | None = None
    scale_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, in, out."""
        E, rows, columns = self.stored
        return (E, rows, columns) if self.rows_are_in else (E, columns, rows)

    @property
    def mT(self) -> PackedWeight:
        """With in- and out-features exchanged."""
        return self._replace(rows_are_in=not self.rows_are_in)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def is_decodable(self) -> bool:
        """Whether it is all there, as kernels read it, with blocks that end where experts do.

        bitsandbytes' scales stay behind where a model is moved, and what is offloaded lies on the meta device.
        """
        codec, (E, rows, columns) = self.codec, self.stored
        size, device = rows * columns, self.data.device
        tensors = [tensor for tensor in self[4:] if tensor is not None]
        return (
            all(type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous() and t.device == device for t in tensors)
            and not self.data.is_meta
            and self.data.numel() * self.data.element_size() * (2 if codec.kind == CODES else 1) == E * size
            and (torch.compiler.is_compiling() or self.data.data_ptr() % 16 == 0)  # a graph's tensors have no address
            and (codec.height > 0 or size % codec.width == 0)
            and (codec.kind != CODES or columns % 2 == 0)
            and size < 2**31
        )

    def scale_of_each(self) -> Tensor:
        """The scale of each weight, "E rows columns" float32, by torch."""
        codec, scale = self.codec, self.scales
        if codec.nested:
            table, outer, offset = cast(tuple[Tensor, Tensor, Tensor], self[-3:])
            outer = outer.reshape(-1).repeat_interleave(codec.nested)[: scale.numel()]
            scale = table[scale.reshape(-1).int()] * outer + offset
        elif codec.exponent:
            scale = torch.exp2(scale.float() - 127)
        return self._spread(scale.float())

    def _spread(self, of_blocks: Tensor) -> Tensor:
        """What there is one of for each scale, for each weight."""
        codec, (E, rows, columns) = self.codec, self.stored
        if not codec.height:
            return of_blocks.reshape(-1).repeat_interleave(codec.width).view(E, rows, columns)
        down, across = -(-rows // codec.height), -(-columns // codec.width)
        spread = of_blocks.reshape(E, down, across).repeat_interleave(codec.height, 1)[:, :rows]
        return spread.repeat_interleave(codec.width, 2)[..., :columns]

    def decoded(self) -> Tensor:
        """The whole stack "E in out", by torch."""
        codec = self.codec
        if codec.kind == CODES:
            bytes_ = self.data.reshape(-1).view(torch.uint8).int()
            halves = [bytes_ >> 4, bytes_ & 15] if codec.high_first else [bytes_ & 15, bytes_ >> 4]
            table = torch.tensor(E2M1, device=bytes_.device) if self.table is None else self.table
            number = table[torch.stack(halves, -1)]
        else:
            form = torch.int8 if codec.kind == INT8 else torch.float8_e4m3fn
            number = self.data.reshape(-1).view(form).float()
        number = number.view(self.stored)
        if codec.zeros:
            number = number - self._spread(self.zero_points.float())  # type: ignore[union-attr]
        value = number * self.scale_of_each()
        if codec.steps != 1:
            value = value * (1 / codec.steps)
        return value.to(self.dtype) if self.rows_are_in else value.to(self.dtype).mT


def encoded(exact: Tensor, codec: Codec, dtype: torch.dtype) -> PackedWeight:
    """The nearest numbers of a codec to a stack "E rows columns": for trials, no quantiser of any format."""
    E, rows, columns = exact.shape
    looked_up = codec.kind == CODES and not codec.exponent
    table = torch.linspace(-1, 1, 16, device=exact.device) if looked_up else None
    largest = {CODES: 1.0 if looked_up else E2M1[7], INT8: 127.0, FLOAT8: 448.0}[codec.kind] / codec.steps
    height, width = (codec.height, codec.width) if codec.height else (1, columns)
    down, across = -(-rows // height), -(-columns // width)
    padded = torch.nn.functional.pad(exact.float(), (0, across * width - columns, 0, down * height - rows))
    blocks = padded.view(E, down, height, across, width).abs().amax((2, 4))
    if not codec.height:
        blocks = exact.float().reshape(-1, codec.width).abs().amax(1)
    scale = blocks.reshape(-1) / largest
    more: tuple[Tensor, ...] = ()
    if codec.exponent:
        scales = (scale.log2().ceil() + 127).to(torch.uint8)
    elif codec.nested:
        outer = torch.nn.functional.pad(scale, (0, -scale.numel() % codec.nested)).view(-1, codec.nested).amax(1)
        scales = (scale / outer.repeat_interleave(codec.nested)[: scale.numel()] * 255).ceil().to(torch.uint8)
        more = torch.linspace(0, 1, 256, device=exact.device), outer, torch.zeros((), device=exact.device)
    else:
        scales = scale
    zeros = torch.zeros(scales.shape, dtype=torch.int8, device=exact.device) if codec.zeros else None
    data = torch.empty(0, dtype=torch.uint8, device=exact.device)
    result = PackedWeight(codec, dtype, (E, rows, columns), True, data, scales, table, zeros, *more)
    scaled = exact.float() / result.scale_of_each()
    if codec.kind == CODES:
        codes = ((scaled.clamp(-1, 1) + 1) * 7.5).round()
        if not looked_up:
            sizes = torch.tensor(E2M1[:8], device=exact.device)
            codes = torch.bucketize(scaled.abs(), (sizes[1:] + sizes[:-1]) / 2) + 8 * (scaled < 0)
        first, second = codes.to(torch.uint8).view(-1, 2).unbind(1)
        data = first << 4 | second if codec.high_first else second << 4 | first
    elif codec.kind == INT8:
        data = (scaled * codec.steps).round().clamp(-127, 127).to(torch.int8)
    else:
        data = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return result._replace(data=data.contiguous())
