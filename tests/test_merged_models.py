"""A merged checkpoint, loaded by transformers, against the installed PEFT: unmerged, and by merge_and_unload."""

from __future__ import annotations

import json

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import zoo
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import peft_moe_compat
from peft_moe_compat.families import FAMILIES


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def same_weights(model, other, tolerance=1e-6):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)


def made(tmp_path, family, attention, **config):
    """A base in shards of a few tensors, PEFT's model of it with random LoRA, and its adapter."""
    torch.manual_seed(0)
    base = zoo.tiny_model(family, **config)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = zoo.peft_model(base, target_modules=list(attention))
    model.save_pretrained(tmp_path / "adapter")
    return model


def shards(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("attention", [(), ("q_proj", "o_proj")], ids=["experts", "attention"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_merged_is_unmerged_and_what_peft_merges(tmp_path, family, attention):
    model, ids = made(tmp_path, family, attention), zoo.token_ids()
    expected = logits(model, ids)
    done = peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert max(row.relative for row in done.rows) < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(base, ids) - expected).abs().max() > 0.1
    same_weights(merged, model.merge_and_unload())
    assert shards(tmp_path / "out") == shards(tmp_path / "base")
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert peft_moe_compat.verify_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_its_dtype_and_is_rounded_once(tmp_path, dtype):
    family = zoo.FAMILIES[0]
    torch.manual_seed(0)
    zoo.tiny_model(family).to(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = zoo.peft_model(base)
    model.save_pretrained(tmp_path / "adapter")
    peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    stored = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out")]
    types = [{name: tensor.dtype for name, tensor in tensors.items()} for tensors in stored]
    assert types[0] == types[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    exact = model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        # Where float32's own order of summing decides a tie, the neighbour is right as well.
        assert (tensor.to(dtype) == exact[name].to(dtype)).float().mean() > 0.999, name
        torch.testing.assert_close(tensor.float(), exact[name], rtol=torch.finfo(dtype).eps / 1.9, atol=1e-6)


@pytest.mark.skipif(
    Version(transformers_version) < Version("5"), reason="transformers before 5 has no save_original_format"
)
@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family in ("qwen3_moe", "nemotron_h")])
def test_a_base_saved_as_the_model_holds_it(tmp_path, family):
    """With fused experts under the names of transformers 5, instead of the Hub's."""
    torch.manual_seed(0)
    base = zoo.tiny_model(family)
    base.save_pretrained(tmp_path / "base", save_original_format=False)
    model, ids = zoo.peft_model(base), zoo.token_ids()
    model.save_pretrained(tmp_path / "adapter")
    peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)


RENAMED = {
    "deepseek_v4": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "hy_v3": {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2},
    # Its attention has experts too, of sizes of their own.
    "jetmoe": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "kv_channels": 10,
        "num_key_value_heads": 2,
    },
    "laguna": {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
}
COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    "family", [f for f in RENAMED if f in CONFIG_MAPPING_NAMES and (zoo.FUSED or FAMILIES[f].fused_in_4)]
)
def test_what_a_checkpoint_calls_otherwise_is_merged(family, tmp_path):
    """Routers, shared experts and attention too, under the names that transformers writes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **RENAMED[family])
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    linears = [n for n, p in base.named_parameters() if ".layers." in n and n.endswith(".weight") and p.ndim == 2]
    model = zoo.peft_model(base, target_parameters=[*peft_moe_compat.expert_parameters(base), *linears])
    model.save_pretrained(tmp_path / "adapter")
    peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(
        base.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
    )
    for of_peft in (model, loaded):
        same_weights(merged, of_peft.merge_and_unload())
    assert peft_moe_compat.verify_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").same


def vision_model():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def as_on_the_hub(model, folder):
    """Saved as qwen3_vl_moe is on the Hub, "E in out"; transformers 5.0.0 saves something else."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    turned = Version(transformers_version) >= Version("5")
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if turned and name.endswith(("gate_up_proj", "down_proj")) else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.skipif(
    Version(transformers_version) == Version("5.0.0"),
    reason="transformers 5.0.0 loads no checkpoint of qwen3_vl_moe that has the form of the Hub's",
)
def test_a_model_whose_checkpoint_is_transposed(tmp_path):
    """qwen3_vl_moe: "E in out" on the Hub, "E out in" in transformers 5."""
    from peft import __version__ as peft_version

    torch.manual_seed(0)
    as_on_the_hub(vision_model(), tmp_path / "base")
    base = type(vision_model()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    model, ids = zoo.peft_model(base), zoo.token_ids()
    model.save_pretrained(tmp_path / "adapter")
    said = f"peft=={peft_version},transformers=={transformers_version}"
    peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", written_by=said)
    merged = type(base).from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_modules_saved_whole_are_put_in_the_place_of_the_bases(tmp_path):
    family = zoo.FAMILIES[0]
    torch.manual_seed(0)
    base = zoo.tiny_model(family, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    model, ids = zoo.peft_model(base, modules_to_save=["lm_head"]), zoo.token_ids()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n).mul_(3)
    model.save_pretrained(tmp_path / "adapter")
    done = peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.replaced == ("lm_head.weight",)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=2e-5)
    assert peft_moe_compat.verify_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").same
