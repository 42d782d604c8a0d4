"""What a layer may take on cards that were not measured: their data sheets' bound, and the H200's share of its own.

    python benchmarks/estimate.py

Arithmetic alone: 8192 tokens, forward and backward, bfloat16, r = 16. A product takes the longer of its operations and
its bytes, every other kernel its bytes. On an H200 products and the rest reach a share of that (results/trace.txt);
an estimate is the bound of another card at the same shares, of kernels whose tiles were tuned for Hopper.
tests/test_docs.py compares it with what an H100 took, and docs/performance.md with what this prints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TOKENS = 8192
TRACE = Path(__file__).parent / "results" / "trace.txt"


class Layer(NamedTuple):
    """E, k, H, I, gated; and its name in results/trace.txt."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    name: str


LAYERS = {
    "Qwen3-30B": Layer(128, 8, 2048, 768, "qwen3-30b"),
    "gpt-oss-20b sizes": Layer(32, 4, 2880, 2880, "gptoss-20b"),
    "Mixtral": Layer(8, 2, 4096, 14336, "mixtral"),
}


class Card(NamedTuple):
    """Compute capability; and of the vendor's data sheet: TFLOP/s of dense bfloat16 summed in float32, and GB/s."""

    capability: str
    tflops: float
    bandwidth: float


CARDS = {
    "A100 80 GB SXM": Card("8.0", 312, 2039),
    "A40": Card("8.6", 149.7, 696),
    "RTX 3090": Card("8.6", 71, 936),
    "L40S": Card("8.9", 362, 864),
    "RTX 4090": Card("8.9", 165.2, 1008),
    "H100 SXM": Card("9.0", 989, 3350),
    "H200": Card("9.0", 989, 4800),
    "B200": Card("10.0", 2250, 8000),
    "RTX PRO 6000": Card("12.0", 503.8, 1792),
    "RTX 5090": Card("12.0", 209.5, 1792),
}


def bounds(layer: Layer, card: Card) -> tuple[float, float]:
    """(milliseconds of the four base products, of all other kernels), by the data sheet."""
    E, k, H, I, _ = layer
    S = TOKENS * k
    rate, bandwidth = card.tflops * 1e9, card.bandwidth * 1e6  # a millisecond
    products = 0.0
    for K, N in ((H, 2 * I), (I, H), (H, I), (2 * I, H)):  # up, down, and their gradients
        products += max(2 * S * K * N / rate, 2 * (S * K + S * N + E * K * N) / bandwidth)
    tokens, narrow, wide, rows = 2 * TOKENS * H, 2 * S * I, 4 * S * I, 2 * S * H
    gathers, combines = 2 * (tokens + rows), 2 * (rows + tokens)
    activation, gradient = wide + narrow, 2 * (wide + narrow)
    factors = narrow + wide + 2 * tokens  # gathered rows are read again, from a cache where it holds the tokens
    return products, (gathers + combines + activation + gradient + factors) / bandwidth


def measured(layer: Layer) -> tuple[float, float]:
    """The same of results/trace.txt, an H200."""
    lines = re.findall(rf"^trace {layer.name} (.*?) +([\d.]+) x +([\d.]+) us$", TRACE.read_text(encoding="utf-8"), re.M)
    times = {name: float(count) * float(us) / 1000 for name, count, us in lines}
    return times["_product"], sum(times.values()) - times["_product"]


def estimate(layer: Layer, card: Card) -> float:
    """Milliseconds, where both parts reach what they do on an H200."""
    own = bounds(layer, CARDS["H200"])
    return sum(bound * took / of for bound, took, of in zip(bounds(layer, card), measured(layer), own, strict=True))


def table() -> str:
    """A row for each card, in Markdown."""
    lines = ["| card | compute capability | " + " | ".join(LAYERS) + " |", "|---" * (2 + len(LAYERS)) + "|"]
    for name, card in CARDS.items():
        cells = [f"{sum(bounds(layer, card)):.1f} / {estimate(layer, card):.1f} ms" for layer in LAYERS.values()]
        lines.append(f"| {name} | {card.capability} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
