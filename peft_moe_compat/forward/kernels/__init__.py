"""The fused forward and backward in Triton. Nothing else imports triton; `forward.fused` says when its modules are.

The layer, in the order of computation (S routed rows sorted by expert; R the rank padded for the matrix units):

    routing      top_k_index -> order, position, offs, and tables of row tiles that never cross an expert
    rows         x[s] = hidden[token(s)] and u = x A^T in one pass; out[t] = sum over k of weight * down[position]
    gemm         y = x W + u (scaling B)^T + bias, one rounding
    activation   h = act(gate) * up and u = h A^T in one pass; its backward in place, with <h, dh> and dy (scaling B)
    gradients    of lora_A and lora_B: one pass over the rows, gathered again where they were never kept
    layer        the autograd function that ties them together
    kinds        what of a layer and batch its kernels are compiled for
    trial        all that a layer launches, on a small problem, against torch
    interface    what these and those above tell each other; imports no triton
"""
