"""An experts module with no transformers in it, and the float64 loop over tokens that it is held against."""

from __future__ import annotations

import torch
from torch import nn


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


def loop(experts, loras, hidden, index, weights):
    """Token by token, expert by expert; ids past the last expert are skipped."""

    def project(name, e, x):
        weight = getattr(experts, name)[e].double()
        weight = weight.T if experts.is_transposed else weight
        if name in loras:
            lora = loras[name]
            weight = weight + lora.scaling * lora.B[e].double() @ lora.A[e].double()
        y = weight @ x
        return y + getattr(experts, f"{name}_bias")[e].double() if experts.has_bias else y

    rows = []
    for t in range(hidden.shape[0]):
        total = hidden[t].double() * 0  # a gradient of zeros where every id is past the last expert
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if e >= experts.num_experts:
                continue
            up = project(experts.up_name, e, hidden[t].double())
            h = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
            y = project("down_proj", e, h)
            if experts.has_post_expert_norm:
                y = experts.post_expert_norm(y)
            total = total + weights[t, j].double() * y
        rows.append(total)
    return torch.stack(rows) if rows else hidden.double() * 1.0


def compare(ours, exact, tolerance):
    """Within `tolerance` of the largest entry: sums of large terms round by the size of the terms."""
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=tolerance * max(1.0, scale))
