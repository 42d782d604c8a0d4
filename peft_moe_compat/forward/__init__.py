"""Computes: routed experts with LoRA, in fused kernels, by torch's grouped products or in a loop."""
