"""Why a layer of a live model runs as it does: a code with its data, and the sentence of each code in one table.

Code decides by codes and never reads a sentence; a sentence is made where it is shown. What is concluded of adapter
files has its sentences in `adapters.conclusions`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["SENTENCES", "Reason", "because"]

SENTENCES = {
    # Why a wrapper runs PEFT's own forward. Source: model/wrappers.py, patching/activation.py, patching/reach.py.
    "not_active": "peft_moe_compat is not active: call peft_moe_compat.activate()",
    "displaced": "{0} is that of {1}, which does not come to peft_moe_compat's; {2}",
    "forward_bound": "the forward of {0} is bound to this wrapper, in place of the class's; {1}",
    "hooked_before": "accelerate hooked this wrapper before peft_moe_compat was active, and calls the forward of then",
    "not_dispatching": "{0} does not dispatch through transformers' experts registry",
    "class_forward_replaced": "the forward of {0} is that of {1}, in place of transformers'; {2}",
    "forward_replaced": "the forward of this {0} was replaced on the instance",
    "other_implementation": "experts implementation is {0!r}, not one of {1}",
    "foreign_implementation": "the experts implementation {0!r} is that of {1}; undo that, then call "
    "peft_moe_compat.activate()",
    "unknown_orientation": "orientation of {0} is unknown; call peft_moe_compat.declare_layout",
    "no_projection": "{0} is not an expert projection",
    "lora_in_8_bits": "the LoRA is held in 8 bits; leave autocast_adapter_dtype on, or use PEFT 0.20 or newer",
    # Why a stored format cannot be read, and what PEFT's own forward does to one. Source: model/weights.py.
    "mxfp4": "mxfp4 weights cannot be wrapped by PEFT as transformers' kernels hold them; load the model with "
    "peft_moe_compat.PackedMxfp4Config(), or with Mxfp4Config(dequantize=True)",
    "stored_as": "base weight is stored as {0}",
    "fp4_packed": "fp4 weights are packed two to a byte, and PEFT sizes its LoRA by the packed axis",
    "scale_shape": "{0}_scale_inv is {1}; {2} were expected of blocks of {3}",
    "peft_and_parametrised": "PEFT's own forward loses or accumulates LoRA on parametrised weights",
    "peft_and_fp8": "PEFT's own forward adds the update to the float8 values, before their scales",
    # Why no faster backend runs. Source: forward/fused.py.
    "backend_set": "the backend is set to {0!r}",
    "no_triton": "triton is not installed",
    "not_cuda": "the kernels are for CUDA devices",
    "rocm": "the kernels were never run on ROCm, and the assembly in their activation is for NVIDIA's devices",
    "old_device": "the kernels need compute capability 8.0",
    "no_memory": "there is no memory for a trial",
    "while_capturing": "they have not been tried yet, and cannot be while a CUDA graph is captured",
    "kernel_failed": "a kernel failed on {0}: {1}: {2}",
    "own_forward": "{0} has a forward of its own",
    "norm_follows": "a norm follows the experts",
    "quantised": "{0} is stored as {1}",
    "computed": "{0} is computed at each access",
    "trained": "{0} is trained too",
    "dtype": "the weights are {0}",
    "float32": "the weights are float32, which the kernels are no faster for",
    "width": "a width is no multiple of 8",
    "dropped_apart": "several adapters are active, and with lora_dropout each has masks of its own",
    "no_kernels": "no fused kernels: {0}",
    "not_for_torch": "its dtype or sizes are not those that torch's grouped products take",
    "unaligned": "its data do not start at a multiple of 16 bytes, as torch's grouped products want; copy it once: "
    "parameter.data = parameter.data.clone()",
    # Why no adapter is at work. Source: reporting.py.
    "not_wrapped": "not wrapped by PEFT",
    "disabled": "adapters are disabled",
    "merged": "adapters are merged into the weight",
    "merge_lost": "adapters are merged, but a merge into a quantised weight is lost; unmerge them",
    "none_active": "none of its adapters is active",
    "refused_spread": "refused, since its experts are spread over ranks",
}


class Reason(NamedTuple):
    """A code of `SENTENCES`, and what its sentence says of this case: text, numbers, or another reason."""

    code: str
    detail: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return SENTENCES[self.code].format(*self.detail)


def because(code: str, *detail: Any) -> Reason:
    return Reason(code, detail)
