"""DeepSpeed ZeRO-3 on CPU: the experts' weights and LoRA are gathered where they are read, and saved whole.

The oracle is stock PEFT in one process.
"""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import zoo
from torch import nn

import peft_moe_compat
from peft_moe_compat import ParallelismError
from peft_moe_compat.patching.sharding import get_in_out_features

from .ranks import run

R, STEPS, LR = 3, 2, 0.5
MAX_NORM = 0.5  # less than the gradients have; DeepSpeed clips to 1 unless told otherwise
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = {"r": R, "lora_alpha": 5, "target_modules": [], "target_parameters": TARGETS}
IDS = torch.arange(1, 19).view(2, 9)
# No threshold: every parameter is partitioned, however small.
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": MAX_NORM,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def _load(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")


def _trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sgd(model):
    return torch.optim.SGD(_trained(model).values(), lr=LR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model of each family, and an adapter for it."""
    folder = tmp_path_factory.mktemp("zero3")
    for family in ("qwen3_moe", "gpt_oss"):
        torch.manual_seed(0)
        zoo.tiny_model(family).save_pretrained(folder / family)
        model = get_peft_model(_load(f"{folder}/{family}"), LoraConfig(**LORA))
        zoo.randomise(model)
        model.save_pretrained(folder / f"{family}-adapter")
    return folder


def _one_process(folder, family):
    """Stock PEFT on the whole batch."""
    peft_moe_compat.deactivate()
    try:
        model = PeftModel.from_pretrained(_load(f"{folder}/{family}"), f"{folder}/{family}-adapter", is_trainable=True)
        model.train()
        found, optimizer = {}, _sgd(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            if step == 0:
                found = {"loss": loss.detach()} | {n: p.grad.clone() for n, p in _trained(model).items()}
            assert nn.utils.clip_grad_norm_(_trained(model).values(), MAX_NORM) > MAX_NORM
            optimizer.step()
        model.save_pretrained(folder / f"{family}-one-process")
        with torch.no_grad():
            return found, model(input_ids=IDS).logits
    finally:
        peft_moe_compat.activate()


def _attempt(function):
    try:
        function()
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return None


def _on_two_ranks(folder: str):
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed reserves gigabytes it never touches
    os.environ.update(DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    # DeepSpeed would compile a shared-memory transport, and use gloo for the rest.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    ids = IDS[rank : rank + 1]
    keeps = HfDeepSpeedConfig(DEEPSPEED)  # from here on, transformers loads under deepspeed.zero.Init

    def engine(family, checkpointing=False, input_gradients=True):
        base = _load(f"{folder}/{family}")
        sizes = {tuple(p.shape) for n, p in base.named_parameters() if "experts" in n}
        assert sizes == {(0,)}, sizes
        model = PeftModel.from_pretrained(base, f"{folder}/{family}-adapter", is_trainable=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if input_gradients:
            model.enable_input_require_grads()
        started = deepspeed.initialize(model=model, config=DEEPSPEED, optimizer=_sgd(model))[0]
        assert all(p.numel() == 0 for p in _trained(model).values())
        return model, started

    def gradients(model, started):
        loss = started(input_ids=ids, labels=ids).loss
        started.backward(loss)
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        return {"loss": mean / 2} | {n: safe_get_full_grad(p) for n, p in _trained(model).items()}

    found = {}
    for family in ("qwen3_moe", "gpt_oss"):
        found[family, "checkpointed"] = gradients(*engine(family, checkpointing=True))
        model, started = engine(family)
        found[family, "gradients"] = gradients(model, started)
        started.step()
        for _ in range(STEPS - 1):
            started.backward(started(input_ids=ids, labels=ids).loss)
            started.step()
        found[family, "plain save"] = _attempt(lambda: model.save_pretrained(f"{folder}/{family}-{rank}"))  # noqa: B023
        with torch.no_grad():
            found[family, "logits"] = started(input_ids=IDS).logits
        whole = started._zero3_consolidated_16bit_state_dict()
        if rank == 0:
            model.save_pretrained(f"{folder}/{family}-consolidated", state_dict=whole)
        with deepspeed.zero.GatheredParameters(list(_trained(model).values())):
            if rank == 0:
                model.save_pretrained(f"{folder}/{family}-gathered")
        stream = peft_moe_compat.adapter_tensors(model, "per-expert")
        found[family, "handed over"] = {name: tensor.clone() for name, tensor in stream}
        peft_moe_compat.save_adapter(model, f"{folder}/{family}-handed-over", "per-expert")
        torch.distributed.barrier()
    found["lost gradients"] = _attempt(lambda: gradients(*engine("qwen3_moe", input_gradients=False)))
    peft_moe_compat.deactivate()
    found["stock"] = _attempt(lambda: gradients(*engine("qwen3_moe", input_gradients=False)))
    del keeps
    return found


@pytest.fixture(scope="module")
def ranks(folder):
    return run(2, _on_two_ranks, str(folder))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_two_ranks_equal_one_process(folder, ranks, family):
    """Loss, gradients (also under checkpointing), training, and the file, whichever way it is saved."""
    expected, logits = _one_process(folder, family)
    assert sum("lora_" in name for name in expected) == 8
    for rank in ranks:
        zoo.assert_same(rank[family, "gradients"], expected, 2e-5)
        zoo.assert_same(rank[family, "checkpointed"], expected, 2e-5)
    for rank in ranks:
        zoo.assert_same({"logits": rank[family, "logits"]}, {"logits": logits}, 1e-4)
    trained = load_file(folder / f"{family}-one-process" / "adapter_model.safetensors")
    for way in ("consolidated", "gathered"):
        zoo.assert_same(load_file(folder / f"{family}-{way}" / "adapter_model.safetensors"), trained, 1e-4)
        loaded = PeftModel.from_pretrained(_load(f"{folder}/{family}"), folder / f"{family}-{way}")
        with torch.no_grad():
            zoo.assert_same({"logits": loaded(input_ids=IDS).logits}, {"logits": logits}, 1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_handed_over_is_what_is_converted(folder, ranks, tmp_path, family):
    saved, out = folder / f"{family}-gathered", tmp_path / "out"
    peft_moe_compat.convert_adapter(saved, out, to="per-expert", model=folder / family)
    expected = load_file(out / "adapter_model.safetensors")
    for found in ranks:
        zoo.assert_same(found[family, "handed over"], expected, 0)
    zoo.assert_same(load_file(folder / f"{family}-handed-over" / "adapter_model.safetensors"), expected, 0)


def test_a_piece_of_an_adapter_is_not_saved(folder, ranks):
    for family in ("qwen3_moe", "gpt_oss"):
        for rank, found in enumerate(ranks):
            kind, message = found[family, "plain save"]
            assert kind == "ParallelismError"
            assert "deepspeed.zero.GatheredParameters" in message
            assert not (folder / f"{family}-{rank}" / "adapter_model.safetensors").exists()


def test_inputs_without_gradient(ranks):
    """DeepSpeed reduces a leaf module's gradients too early there, of stock PEFT as well; it is refused by name."""
    for rank in ranks:
        kind, message = rank["lost gradients"]
        assert kind == "ParallelismError"
        assert "enable_input_require_grads" in message
        # Of upstream, without this library: fails as soon as it is mended there.
        assert "The size of tensor a (0) must match the size of tensor b" in rank["stock"][1]


class _Experts(nn.Module):
    """Experts whose parameter is partitioned, as `deepspeed.zero.Init` leaves it."""

    is_transposed = False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(0))
        self.gate_up_proj.ds_shape = torch.Size((4, 6, 8))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_lora_for_a_partitioned_parameter():
    wrapper = zoo.wrap(_Experts(), ["experts.gate_up_proj"])["experts"]
    assert wrapper.lora_A["default"].weight.shape == (4 * R, 8)
    assert wrapper.lora_B["default"].weight.shape == (6, 4 * R)


def test_a_peft_that_cannot_make_it_is_named():
    class Wrapper:
        def __init__(self, parameter):
            self.get_param = lambda: parameter

    def of_peft_0_20(self, module):
        raise ValueError("lora.ParamWrapper was initialized with 1 dimensional Parameter, but only 2d and 3d are ...")

    features = get_in_out_features(of_peft_0_20)
    with pytest.raises(ParallelismError, match=r"Update PEFT to 0\.21"):
        features(Wrapper(_Experts().gate_up_proj), None)
    with pytest.raises(ValueError, match="1 dimensional Parameter"):
        features(Wrapper(nn.Parameter(torch.empty(3))), None)
