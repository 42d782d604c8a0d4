"""An experts module with no transformers in it, and the float64 loop over tokens that it is held against."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from peft_moe_compat import ExpertLora


class Experts(nn.Module):
    """What `@use_experts_implementation` makes of a class, in every variant, with no transformers in it."""

    def __init__(self, E, H, I, *, gated, transposed, biased, normed=False, dtype=torch.float64):
        super().__init__()
        self.num_experts, self.has_gate, self.is_transposed, self.has_bias = E, gated, transposed, biased
        self.has_post_expert_norm = normed
        self.up_name = "gate_up_proj" if gated else "up_proj"
        up = 2 * I if gated else I
        for name, out, into in ((self.up_name, up, H), ("down_proj", H, I)):
            stored = (E, into, out) if transposed else (E, out, into)
            setattr(self, name, nn.Parameter(torch.randn(stored, dtype=dtype) / into**0.5))
            if biased:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, out, dtype=dtype)))
        self.act_fn = torch.nn.functional.silu

    def _apply_gate(self, rows):  # interleaved, as gpt-oss has it
        gate, up = rows[..., ::2], rows[..., 1::2]
        return self.act_fn(gate) * up

    def post_expert_norm(self, rows):
        return rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def loop(experts, loras, hidden, index, weights, masks=None):
    """Token by token, expert by expert; ids past the last expert are skipped.

    `masks`: of a parameter whose LoRA has a dropout, what multiplies the LoRA's input, "T k r in".
    """

    def project(name, e, x, place):
        weight = getattr(experts, name)[e].double()
        weight = weight.T if experts.is_transposed else weight
        y = weight @ x
        if name in loras:
            lora = loras[name]
            rows = x.expand(lora.rank, -1) if masks is None else x * masks[name][place]
            y = y + lora.scaling * lora.B[e].double() @ (lora.A[e].double() * rows).sum(1)
        return y + getattr(experts, f"{name}_bias")[e].double() if experts.has_bias else y

    rows = []
    for t in range(hidden.shape[0]):
        total = hidden[t].double() * 0  # a gradient of zeros where every id is past the last expert
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if e >= experts.num_experts:
                continue
            up = project(experts.up_name, e, hidden[t].double(), (t, j))
            h = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
            y = project("down_proj", e, h, (t, j))
            if experts.has_post_expert_norm:
                y = experts.post_expert_norm(y)
            total = total + weights[t, j].double() * y
        rows.append(total)
    return torch.stack(rows) if rows else hidden.double() * 1.0


def compare(ours, exact, tolerance):
    """Within `tolerance` of the largest entry: sums of large terms round by the size of the terms."""
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=tolerance * max(1.0, scale))


@st.composite
def cases(draw):
    """(E, H, I, index, flags, ranks, scaling) of a layer."""
    E = draw(st.integers(1, 6))
    k = draw(st.integers(1, min(3, E)))
    T = draw(st.integers(1, 6))
    H, I = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):  # square, one projection or the other
        H = draw(st.sampled_from([I, 2 * I]))
    kind = draw(st.sampled_from(["distinct", "one expert takes all", "any", "sentinels"]))
    high = E if kind == "sentinels" else E - 1
    if kind == "distinct":
        index = [draw(st.permutations(range(E)))[:k] for _ in range(T)]
    elif kind == "one expert takes all":
        index = [[draw(st.integers(0, E - 1))] * k] * T
    else:
        index = [[draw(st.integers(0, high)) for _ in range(k)] for _ in range(T)]
    flags = {name: draw(st.booleans()) for name in ("gated", "transposed", "biased", "normed")}
    ranks = draw(st.tuples(*[st.none() | st.integers(1, 9)] * 2))
    return E, H, I, torch.tensor(index), flags, ranks, draw(st.floats(0.1, 4))


def factors(experts, E, H, I, ranks, scaling, dtype=torch.float64):
    """Name -> ExpertLora, trainable, of the ranks of the up and the down projection; None for none."""
    up = 2 * I if experts.has_gate else I
    made = {}
    for (name, out, into), r in zip(((experts.up_name, up, H), ("down_proj", H, I)), ranks, strict=True):
        if r is not None:
            A = (torch.randn(E, r, into, dtype=dtype) / into**0.5).requires_grad_()
            B = torch.randn(E, out, r, dtype=dtype, requires_grad=True)
            made[name] = ExpertLora(A, B, scaling)
    return made
