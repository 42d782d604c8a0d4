"""Compiles kernels ahead of time for devices that need not be there, and prints what they take, as JSON.

A process of its own, since the tests run under triton's interpreter, which leaves nothing to compile. Given "launched",
it prints the kernels there are and those that a layer launches, each of which triton has compiled for a Hopper.
"""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_moe_compat import layout
from peft_moe_compat.forward.kernels import (
    activation,
    decode,
    dropout,
    gemm,
    gradients,
    launch,
    layer,
    loaded_gemm,
    packed_gemm,
    routing,
    rows,
    unpack,
)
from peft_moe_compat.forward.kernels import factors as _factors
from peft_moe_compat.forward.kernels.common import Config, fitting
from peft_moe_compat.forward.kernels.interface import Nonlinearity
from peft_moe_compat.forward.kernels.launch import Kernel
from peft_moe_compat.model.packed import CODES, FLOAT8, INT8, Codec, encoded

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.sass import overwritten

TYPES = {"order": "*i32", "offs": "*i32", "tiles": "*i32", "factor": "*fp32", "grad": "*fp32", "dots": "*fp32"}
TYPES |= {
    "dweights": "*fp32",
    "words": "*i32",
    "places": "*i32",
    "seed": "*i64",
    "S": "i32",
    "across": "i32",
    "digits": "i32",
    "alpha": "fp32",
    "limit": "fp32",
    "scaling": "fp32",
    "k": "i32",
}
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Sizes of a user's model: multiples of 16, which the launch tells triton.
ALIGNED = {"I", "D", "N", "K", "stride_e", "stride_r"}


CAPABILITIES = (80, 86, 89, 90, 100, 120)
CODECS = {
    "nf4": Codec(CODES, True),
    "nf4, nested": Codec(CODES, True, nested=256),
    "mxfp4": Codec(CODES, height=1, width=32, exponent=True),
    "int8": Codec(INT8, height=1, width=128, steps=127),
    "int8, zero points": Codec(INT8, height=1, width=128, zeros=True),
    "float8": Codec(FLOAT8, height=128, width=128),
}


def compiled(kernel, capability, dtype, constants, config, fuse=True, **types):
    signature, values, attributes = {}, {}, {}
    names = kernel.jit.arg_names
    integers = {"I", "D", "N", "K", "rank", "stride_e", "stride_r", "stride_d"}
    for place, name in enumerate(names):
        if name in constants:
            signature[name], values[place,] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name) or TYPES.get(name) or ("i32" if name in integers else f"*{dtype}")
        if signature[name].startswith("*") or name in ALIGNED:
            attributes[place,] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": fuse}
    source = ASTSource(kernel.jit, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(name, capability, dtype, R, found):
    def of_cubin(option):
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

    text = of_cubin("-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    ahead = re.search("async_copy_global_to_local|async_tma_copy_global", found.asm["ttgir"])
    return {
        "loses NaN": re.search(r"(min|max)\.f32", found.asm["ptx"]) is not None,
        "kernel": name, "capability": capability, "dtype": dtype, "R": R, "registers": registers, "stack": stack,
        "shared": found.metadata.shared, "loads ahead": ahead is not None,
        "overwritten": overwritten(of_cubin("-sass")) if capability == 90 else [],
    }  # fmt: skip


def bound_by_memory(capability, dtype, R):
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32", "R": R}
    forward, backward, gather, gradient = (
        fitting(config, R, FLOATS[dtype], capability in (90, 100))
        for config in (activation.FORWARD, activation.BACKWARD, rows.GATHER, gradients.GRADIENT)
    )
    gate = {"NAME": "silu", "GATED": True, "INTERLEAVED": False, "BLOCK": 32, "PARTS": 2, **precision}
    last = {"DOTS": True, **gate, "BLOCK_I": backward.columns}
    for drop in (False, True):
        what, gate["DROP"] = ", dropping" if drop else "", drop
        yield f"activate{what}", activation._activate, {**gate, "BLOCK_I": forward.columns}, forward
        tile = {"GATHER": True, "DROP": drop, "BLOCK": 64, "BLOCK_D": gather.columns, **precision}
        yield f"gather{what}", rows._gather, {"DOTS": False, **tile}, gather
        tile = {"GATHER": True, "DROP": drop, "BLOCK": 128, "BLOCK_D": gradient.columns, **precision}
        yield f"gradient{what}", gradients._factor_gradient, {"WEIGHTED": False, **tile}, gradient
    yield "draw", dropout._draw, {"ROWS": dropout.ROWS, "COLUMNS": dropout.COLUMNS}, Config(0, 4, 3)
    tile = {"BIAS": False, "DROP": True, "BLOCK": 64, "BLOCK_N": 128 if R <= 64 else 64, **precision}
    yield "add, dropping", gemm._add, tile, Config(0, 4, 3)
    yield "backward", activation._backward, {"WAIT": False, **last}, backward
    yield "backward, waiting", activation._backward, {"WAIT": True, **last}, backward
    if (capability, dtype, R) == (90, "bf16", 16):
        for name, gated in (("clamped", True), ("relu", False), ("relu2", False)):
            other = {"NAME": name, "GATED": gated}
            yield f"activate, {name}", activation._activate, {**gate, **other, "BLOCK_I": forward.columns}, forward
            yield f"backward, {name}", activation._backward, {"WAIT": False, **last, **other}, backward


def product(capability, R, along_k, drop=False):
    config, depth, described = gemm.TILINGS[max(least for least in gemm.TILINGS if least <= capability)]
    constants = {
        "R": R, "BIAS": not drop, "DROP": drop, "ALONG_K": along_k,
        "BLOCK": 128, "BLOCK_N": config.columns, "BLOCK_K": depth,
        "GROUP": gemm.GROUP_TILES, "EARLY": 32, "PRECISION": "tf32", "DESCRIBED": described,
    }  # fmt: skip
    types = {"limit": "i32"}
    if described:
        tile = f"{config.columns}, {depth}" if along_k else f"{depth}, {config.columns}"
        types |= {"x": f"tensordesc<bf16[128, {depth}]>", "weight": f"tensordesc<bf16[{tile}]>"}
    return compiled(gemm._product, capability, "bf16", constants, config, **types)


def unpacking(capability, codec, rows_are_in):
    """(name, kernel, constants, config, types) of those that decode quantised weights."""
    weight = encoded(torch.ones(1, 128, 256), codec, torch.bfloat16)
    weight = weight if rows_are_in else weight.mT
    scales = "*fp32" if weight.scales.dtype == torch.float32 else "*u8"
    types = {"data": "*u8", "out": "*bf16", "scales": scales, "zero_points": "*i8", "rank": "i32", "x": "*bf16"}
    types |= dict.fromkeys(("table", "scale_table", "scale_scales", "scale_offset"), "*fp32")
    types |= dict.fromkeys(("first_expert", "first_row", "first_column"), "i32")
    *fields, converts = unpack.codec_of(weight)
    known = {"CODEC": (*fields, int(converts and capability >= 89))}
    name = f"{'in' if rows_are_in else 'out'} {codec}"
    span = unpack.span_of(weight, 256)
    sizes = {"ROWS": 128, "COLUMNS": 256, "SPAN": span, "SPANS": unpack.UNPACKED // span}
    yield f"unpack, {name}", unpack._unpack, {**known, **sizes}, Config(0, 4, 1), types
    for block in (16, 64, 128) if packed_gemm.unpacks_many(codec, capability) else (16, 64):
        config, depth = packed_gemm.unpacking_of(codec, capability, block)
        span = unpack.span_of(weight, min(config.columns, depth))
        sizes = {"R": 16, "BIAS": True, "SPAN": span, "BLOCK": block, "BLOCK_N": config.columns, "BLOCK_K": depth}
        known["PRECISION"] = "tf32"
        yield f"in the product, {name}", packed_gemm._unpacking_product, {**known, **sizes}, config, types
    if capability == 90:
        columns, depth, rows = loaded_gemm.CONFIG.columns, loaded_gemm.DEPTH, loaded_gemm.BLOCK
        height, width = (depth, columns) if rows_are_in else (columns, depth)
        types |= {"limit": "i32", "data": f"tensordesc<u8[{height}, {width // (2 if codec.kind == CODES else 1)}]>"}
        for part, height in (("", rows), ("half_", rows // 2)):
            types |= {f"{part}{of}": f"tensordesc<bf16[{height}, {n}]>" for of, n in (("x", depth), ("low", 16))}
        sizes = {"R": 16, "BIAS": True, "SPAN": loaded_gemm._span(weight), "GROUP": gemm.GROUP_TILES}
        sizes |= {"BLOCK": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        yield f"loaded, {name}", loaded_gemm._loaded_product, {**known, **sizes}, loaded_gemm.CONFIG, types


LAUNCHES = []


class Nowhere:
    """A driver for triton: compiles for compute capability 9.0, loads and launches nothing."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    launcher_cls = staticmethod(lambda *_: lambda *given: LAUNCHES.append(given))

    class utils:
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 227 * 1024, "max_num_regs": 65536})
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))  # module, function, registers, spills, threads


def _layer(H, up, down, tokens):
    """Forward and backward of so many tokens, dropping where H is 96, and a forward alone of those of the last."""
    E, k = up.shape[0], 2
    base = []
    for weight in (up, down):
        factors = torch.empty(E * 16, weight.shape[1]), torch.empty(weight.shape[2], 16 * E)
        base.append((weight, None, layout.flat(*factors, E, orientation="linear", scaling=1.0)))
    for T in tokens:
        grad = T > 8
        hidden = torch.empty(T, H, dtype=torch.bfloat16, requires_grad=grad)
        index, weights = torch.zeros(T, k, dtype=torch.int64), torch.empty(T, k, dtype=torch.bfloat16)
        for _ in range(1 + grad):  # twice, since the second backward finds what the first has spent
            drops = ((16, 0.5),) if grad and H == 96 else ()
            of_up, of_down = (layer.Projection.of(*held, lora._replace(dropout=drops)) for *held, lora in base)
            for factor in (*of_up[2:4], *of_down[2:4]):
                factor.tensor.requires_grad_(grad)
            routed = hidden, index, weights
            out = layer.fused_experts(Nonlinearity("silu", True), *routed, of_up, lambda of_down=of_down: of_down)
            if grad:
                out.sum().backward()


def repeated():
    """What triton's launcher gets of a repeated launch, with hooks and without: all but those; whether any were."""
    knobs, found = triton.knobs.runtime, []
    chain, some = knobs.launch_enter_hook, triton.knobs.HookChain()
    some.add(print)
    for hook in (some, print, None, chain):  # as triton has them, and as somebody may set them
        knobs.launch_enter_hook = hook
        LAUNCHES.clear()
        layer.routing(torch.zeros(256, 2, dtype=torch.int64), 4)
        found += [[str(getattr(each, "shape", each)) for each in given] for given in LAUNCHES]
        imported = importlib.util.module_from_spec(launch.__spec__)  # as where a hook was there before
        launch.__spec__.loader.exec_module(imported)
        assert imported._ENTER is chain
    return [given[:6] + given[9:] for given in found], [given[7] != "None" for given in found]


def launched():
    """Names of all kernels, and of those that two layers launched; `repeated`."""
    triton.runtime.driver.set_active(Nowhere())
    gemm.multiply = lambda x, weight, offs: x.new_empty(len(x), weight.shape[2])  # would read what no kernel wrote
    names = []
    ours, threads = threading.current_thread(), set()

    def note(*, src, **_):
        names.append(src.name)
        threads.add(threading.current_thread())

    triton.knobs.compilation.listener = note
    with launch.compiled_together():
        layer.routing(torch.zeros(256, 2, dtype=torch.int64), 4)
    together = {"names": sorted(names), "apart": ours not in threads, "launches": len(LAUNCHES)}
    for H in (128, 96):  # with the tiled product and without
        _layer(H, torch.empty(4, H, 128, dtype=torch.bfloat16), torch.empty(4, 64, H, dtype=torch.bfloat16), (256, 8))
    for codec, transposed in itertools.product(CODECS.values(), (True, False)):
        up, down = (
            encoded(torch.randn(4, *(shape if transposed else shape[::-1])), codec, torch.bfloat16)
            for shape in ((128, 256), (128, 128))
        )
        _layer(128, up if transposed else up.mT, down if transposed else down.mT, (1400, 512, 20, 4))
    modules = activation, decode, dropout, _factors, gemm, gradients, loaded_gemm, packed_gemm, routing, rows, unpack
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, Kernel)]
    defined = sorted({kernel.jit.__name__ for kernel in kernels})
    given, hooks = repeated()
    return {"defined": defined, "launched": sorted(set(names)), "together": together, "given": given, "hooks": hooks}


def main():
    if sys.argv[1:] == ["launched"]:
        json.dump(launched(), sys.stdout)
        return
    found = []
    ranks = [(capability, "bf16", 16) for capability in CAPABILITIES]
    ranks += itertools.product((80, 90), ("bf16",), (64, 256))
    for capability, dtype, R in (*ranks, (80, "fp32", 16), (90, "fp32", 16)):
        for name, kernel, constants, config in bound_by_memory(capability, dtype, R):
            if "waiting" not in name or (capability, R, dtype) == (90, 16, "bf16"):
                result = compiled(kernel, capability, dtype, constants, config)
                found.append(usage(name, capability, dtype, R, result))
    for capability, codec, rows_are_in in itertools.product(CAPABILITIES, CODECS.values(), (True, False)):
        for name, kernel, constants, config, types in unpacking(capability, codec, rows_are_in):
            result = compiled(kernel, capability, "bf16", constants, config, fuse=False, **types)
            found.append(usage(name, capability, "bf16", 16, result))
    for capability, R, along_k in itertools.product(CAPABILITIES, (16, 32), (True, False)):
        found.append(usage("product", capability, "bf16", R, product(capability, R, along_k)))
        if R == 16:
            found.append(usage("product, dropping", capability, "bf16", R, product(capability, R, along_k, drop=True)))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
