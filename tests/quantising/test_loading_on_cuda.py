"""What loading packed models holds on a GPU: their packed size and a stack in bfloat16, whatever the device_map."""

from __future__ import annotations

import gc

import pytest
import torch
from support import mxfp4, zoo
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import peft_moe_compat
from peft_moe_compat.cli.layers import held_mib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not zoo.FUSED, reason="the quantisers of transformers 4 cannot say how to load"),
]
E, H, I, LAYERS = 32, 1024, 512, 8
STACK = E * H * 2 * I * 2 / 2**20  # MiB of the largest, in bfloat16
SLACK = 24  # MiB: what transformers and the quantisers hold beside it, whatever the size of the model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """With experts in stacks, one by one, and as gpt-oss is published."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("stacks", "single", "mxfp4")}
    sizes = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_hidden_layers": LAYERS}
    model = zoo.tiny_model("qwen3_moe", **sizes).to(torch.bfloat16)
    model.save_pretrained(folders["stacks"], save_original_format=False)
    model.save_pretrained(folders["single"])
    mxfp4.publish(folders["mxfp4"], hidden_size=H, intermediate_size=4 * I)
    return folders


@pytest.fixture
def loaded(record_property):
    """Loads a model: (model, MiB that it holds, MiB that loading it held at once)."""

    def load(folder, config, device_map):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map, **given)
        torch.cuda.synchronize()
        held, peak = held_mib(model), (torch.cuda.max_memory_allocated() - before) / 2**20
        record_property("MiB held, peak, of a stack", (round(held), round(peak), round(STACK)))
        return model, held, peak

    return load


def check(model, stored):
    """All of it is on the GPU, packed, and LoRA on it has gradients."""
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}
    model = zoo.peft_model(model.train())
    assert {p.format for row in peft_moe_compat.report(model).rows for p in row.parameters} == {stored}
    ids = zoo.token_ids().cuda()
    model(ids, labels=ids).loss.backward()
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(factor.grad is not None and bool(factor.grad.isfinite().all()) for factor in factors)


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
@pytest.mark.parametrize("experts", ["stacks", "single"])
@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"experts": "nf4"}, "bnb nf4"),
        ({"experts": "nf4", "double_quant": True}, "bnb nf4"),
        ({"experts": "int8"}, "bnb int8"),
    ],
    ids=["nf4", "nested", "int8"],
)
def test_experts_packed_while_they_load(options, stored, experts, device_map, checkpoints, loaded, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    config = peft_moe_compat.BitsAndBytesExpertsConfig(**options)
    model, packed, peak = loaded(checkpoints[experts], config, device_map)
    # transformers merges single experts into copies before it hands on the stack.
    assert peak < packed + (3 if experts == "single" else 1) * STACK + SLACK
    model.save_pretrained(tmp_path)
    del model
    again, held, peak = loaded(tmp_path, None, device_map)
    assert held == pytest.approx(packed, rel=0.01)
    assert peak < packed + SLACK
    check(again, stored)


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_fine_grained_fp8(device_map, checkpoints, loaded, tmp_path):
    upstream = pytest.importorskip("transformers.integrations.finegrained_fp8", exc_type=ImportError)
    if not hasattr(upstream, "FP8Experts"):
        pytest.skip("transformers 5.0 has no FP8Experts")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("transformers dequantises FP8 on devices older than 8.9")
    plain = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    ]  # the kernels of FP8 linears are in a package of their own
    config = FineGrainedFP8Config(weight_block_size=(128, 128), modules_to_not_convert=plain)
    loaded(checkpoints["single"], config, "cuda")[0].save_pretrained(tmp_path)
    model, packed, peak = loaded(tmp_path, None, device_map)
    assert peak < packed + STACK + SLACK
    check(model, "fp8 (fine-grained)")


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_mxfp4_as_it_is_published(device_map, checkpoints, loaded):
    config = peft_moe_compat.PackedMxfp4Config()
    model, packed, peak = loaded(checkpoints["mxfp4"], config, device_map)
    assert peak < packed + SLACK
    check(model, "mxfp4")
