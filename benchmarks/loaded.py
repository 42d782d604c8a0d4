r"""Where decoding in the product wins: the grouped product with a quantised stack, by rows to an expert.

    python benchmarks/loaded.py

Milliseconds by CUDA events, medians of 3, of the bfloat16 product and of the three that read a quantised stack: loaded
packed by the copy engine and decoded in registers (`loaded_gemm`), decoded ahead, decoded in the product by address
(below 256 rows); then how far the first is from the bfloat16 product of the same weights, whose bits it should have.
Qwen3-30B's two stacks, in both orders, routing drawn for each number of rows.
"""

from __future__ import annotations

import torch

from peft_moe_compat.forward.kernels import gemm, layer, loaded_gemm, packed_gemm
from peft_moe_compat.model.packed import CODES, FLOAT8, INT8, Codec, PackedWeight, encoded

E, ROWS = 128, (128, 192, 256, 384, 512, 640, 768)


def codecs(columns: int) -> dict[str, Codec]:
    return {
        "fp8": Codec(FLOAT8, height=128, width=128),
        "int8": Codec(INT8, height=1, width=columns, steps=127),
        "mxfp4": Codec(CODES, height=1, width=32, exponent=True),
        "nf4": Codec(CODES, True, width=64),
        "nf4, nested": Codec(CODES, True, width=64, nested=256),
    }


def packed(name: str, K: int, N: int, rows_are_in: bool) -> PackedWeight:
    exact = torch.randn(E, K, N, device="cuda", dtype=torch.bfloat16) * 0.05
    stored = exact if rows_are_in else exact.mT.contiguous()
    weight = encoded(stored, codecs(stored.shape[2])[name], torch.bfloat16)
    return weight if rows_are_in else weight.mT


def median_ms(product, times: int = 5) -> float:
    product()
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            product()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / times)
    return sorted(found)[1]


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    print("format, stored, K, N, rows to an expert: bfloat16, loaded, ahead, in the product; error")
    for name in codecs(1):
        for K, N in ((2048, 1536), (768, 2048)):
            for rows_are_in in (False, True):
                weight = packed(name, K, N, rows_are_in)
                dense = weight.decoded() if rows_are_in else weight.decoded().mT.contiguous().mT
                for rows in ROWS:
                    route = layer.routing(torch.randint(0, E, (E * rows, 1), device="cuda"), E)
                    x = torch.randn(E * rows, K, device="cuda", dtype=torch.bfloat16)
                    tiling, nothing = packed_gemm.tiling_of(x), (None, None, None)
                    products = {
                        "bfloat16": lambda: gemm.grouped_linear(x, dense, route, None, None),
                        "loaded": lambda: loaded_gemm.loaded_linear(x, weight, route, *nothing),
                        "ahead": lambda: packed_gemm._ahead(x, weight, route, *nothing, tiling),
                        "in the product": lambda: packed_gemm._unpacked_in_product(
                            x, weight, route, route.large, *nothing
                        ),
                    }
                    if rows > 256:
                        del products["in the product"]
                    exact = products["bfloat16"]().float()
                    error = (products["loaded"]().float() - exact).norm() / exact.norm()
                    times = " ".join(f"{median_ms(product):7.3f}" for product in products.values())
                    order = "in out" if rows_are_in else "out in"
                    print(f"{name:12}{order:7} {K:5}{N:5}{rows:4}  {times}  {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
