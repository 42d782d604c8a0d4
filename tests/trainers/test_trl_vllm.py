"""TRL's own trainer and `VLLMGeneration`, with doubles of vLLM: what it is handed after each step.

Doubles: `_Llm` of `vllm.LLM`, `_Manager` of `WorkerLoRAManager` (0.33; tests/readers has the real one), `_Server` of
`requests.Session` and what `vllm serve` answers to TRL's own client.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_client, vllm_generation

from peft_moe_compat import AdapterError, adapter_tensors
from peft_moe_compat.integrations.trl import adapter_in_vllm
from trainers.running import TARGETS, make_model

STEPS = 3
COMPLETION = [7, 8, 4]
SERVER = {"vllm_mode": "server", "vllm_server_base_url": "http://server"}


class _Request(SimpleNamespace):
    def __init__(self, lora_name, lora_int_id, lora_path, load_inplace=False):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path, load_inplace=load_inplace)


class _Lora:
    """As `LoRAModel`, whose lora_B the manager scales in place."""

    @classmethod
    def from_lora_tensors(cls, *, tensors, peft_helper, lora_model_id, device, dtype, **_):
        assert (device, dtype, lora_model_id) == ("cpu", torch.float32, 1)
        found = cls()
        found.config, found.tensors = peft_helper, {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.mul_(3)
        return found


class _Manager:
    _lora_model_cls = _Lora

    def __init__(self):
        self.loaded = []

    def add_adapter(self, request):
        assert request.load_inplace
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        self.loaded.append(
            self._lora_model_cls.from_local_checkpoint(
                request.lora_path,
                {"experts"},
                peft_helper=config,
                lora_model_id=request.lora_int_id,
                device="cpu",
                dtype=torch.float32,
                model_vocab_size=61,
                weights_mapper=None,
                skip_prefixes=None,
                moe_ep_spec=None,
            )
        )


class _Llm:
    made = ()

    def __init__(self, **options):
        self.options, self.calls, self.merged = options, [], []
        self.manager = _Manager()
        model = SimpleNamespace(load_weights=lambda pairs: self.merged.extend((n, t.clone()) for n, t in pairs))
        runner = SimpleNamespace(model=model, lora_manager=self.manager)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        _Llm.made += (self,)

    def generate(self, prompts, sampling_params, use_tqdm, lora_request=None):
        self.calls.append(("generate", None if lora_request is None else lora_request.lora_int_id))
        logprobs = [{token: SimpleNamespace(rank=1, logprob=-1.0)} for token in COMPLETION]
        one = SimpleNamespace(token_ids=COMPLETION, logprobs=logprobs)
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[one]) for p in prompts]

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))


class _Server:
    """Double of `requests.Session`, with the server behind it: what is asked, and the adapters as they are found."""

    def __init__(self, refuses=False):
        self.asked, self.loaded, self.models, self.refuses = [], [], ["base"], refuses

    def mount(self, *_):
        pass

    def get(self, url, **_):
        return self.post(url)

    def post(self, url, json=None):
        path, json = url.removeprefix("http://server"), json or {}
        self.asked.append((path, json.get("model")))
        found = self.answer(path, json)
        return _Answer(404 if found is None else 200, found)

    def answer(self, path, body):
        if path == "/v1/load_lora_adapter":
            if self.refuses:
                return None
            assert body["load_inplace"]
            folder = Path(body["lora_path"])
            config = json.loads((folder / "adapter_config.json").read_text())
            self.loaded.append((folder, config, load_file(folder / "adapter_model.safetensors")))
            self.models.append(body["lora_name"])
            return "Success: added."
        if path == "/v1/completions":
            assert body["model"] in self.models
            logprobs = {
                "tokens": [f"token_id:{token}" for token in COMPLETION],
                "token_logprobs": [-1.0] * len(COMPLETION),
                "top_logprobs": [{}] * len(COMPLETION),
            }
            one = {"token_ids": COMPLETION, "logprobs": logprobs}
            return {"choices": [{"prompt_token_ids": p, **one} for p in body["prompt"] for _ in range(body["n"])]}
        return {
            "/v1/models": {"data": [{"id": "base"}]},
            "/server_info": {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}},
        }.get(path, {"success": True})


class _Answer:
    def __init__(self, status_code, body):
        self.status_code, self._body, self.text, self.headers = status_code, body, str(body), {}

    def json(self):
        assert isinstance(self._body, dict), "no JSON"
        return self._body


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """A vLLM as far as TRL's modules look for one."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["vllm.lora.request"].LoRARequest = _Request
    for module in (vllm_generation, vllm_client):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(vllm_generation, "LLM", _Llm, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **options: options, raising=False)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda *_, **__: None)  # NCCL
    monkeypatch.setattr(_Llm, "made", ())


@pytest.fixture
def server(monkeypatch):
    """In the place of requests, which is no requirement of TRL's own."""
    server = _Server()
    requests = SimpleNamespace(
        Session=lambda: server, get=server.get, exceptions=SimpleNamespace(RequestException=OSError)
    )
    monkeypatch.setattr(vllm_client, "is_requests_available", lambda: True)
    for name, value in {"requests": requests, "HTTPAdapter": dict, "Retry": dict}.items():
        monkeypatch.setattr(vllm_client, name, value, raising=False)
    return server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


def trained(base, folder, *, make=adapter_in_vllm, **options):
    """A trainer after three steps, its model's LoRA at the end of each, and the base's weights before."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=options.pop("dtype", torch.float32))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=TARGETS))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    arguments = trl.GRPOConfig(
        str(folder),
        use_vllm=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=STEPS,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["a b c", "d e f g"] * 8})
    rewards = iter(range(10_000))

    def reward(completions, **_):
        return [float(next(rewards)) for _ in completions]

    with make():
        trainer = trl.GRPOTrainer(
            model, reward, arguments, train_dataset=prompts, processing_class=AutoTokenizer.from_pretrained(base)
        )
    steps = []
    sync = trainer.vllm_generation.sync_weights

    def watched():
        steps.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
        sync()

    trainer.vllm_generation.sync_weights = watched
    trainer.train()
    return model, steps, before


def handed_over(model, steps):
    """What `adapter_tensors` gives for the LoRA of each step."""
    held = dict(model.named_parameters())
    for step in steps:
        with torch.no_grad():
            for name, value in step.items():
                held[name].copy_(value)
        stream = adapter_tensors(model, "vllm")
        yield json.loads(json.dumps(stream.config)), {name: tensor.clone() for name, tensor in stream}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def check(model, steps, before, loaded):
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not same(steps[0], steps[1])
    assert not same(steps[1], steps[2])
    assert len(loaded) == len(steps) == STEPS
    for (config, tensors), (wanted, expected) in zip(loaded, handed_over(model, steps), strict=True):
        assert config == wanted
        assert same(tensors, expected)


@pytest.mark.parametrize("sleep", [False, True])
def test_the_worker_in_the_process_is_handed_the_adapter(base, tmp_path, sleep):
    found = trained(base, tmp_path, vllm_mode="colocate", vllm_enable_sleep_mode=sleep)
    (llm,) = _Llm.made
    assert (llm.options["enable_lora"], llm.options["max_loras"], llm.options["max_lora_rank"]) == (True, 1, 8)
    check(*found, [(lora.config, lora.tensors) for lora in llm.manager.loaded])
    assert llm.merged == []
    calls = [("reset_prefix_cache",), ("generate", 1)]
    if sleep:
        calls = [("wake_up", "weights"), calls[0], ("wake_up", "kv_cache"), calls[1], ("sleep", 1)]
    assert llm.calls == [("sleep", 1)] * sleep + calls * STEPS


def test_the_server_is_handed_the_adapter(base, tmp_path, server):
    folder = tmp_path / "handed"
    found = trained(base, tmp_path, make=lambda: adapter_in_vllm(folder), **SERVER)
    check(*found, [(config, tensors) for _, config, tensors in server.loaded])
    asked = [asked for asked in server.asked if asked[0] in ("/v1/load_lora_adapter", "/v1/completions")]
    assert asked == [("/v1/load_lora_adapter", None), ("/v1/completions", "peft_moe_compat")] * STEPS
    assert not {path for path, _ in server.asked} & {"/update_weights", "/start_weight_update"}
    folders = [loaded for loaded, _, _ in server.loaded]
    assert len(set(folders)) == STEPS
    assert list(folder.iterdir()) == folders[-1:]


def test_trainers_one_after_the_other_share_the_folder(base, tmp_path, server):
    for name in ("first", "second"):
        trained(base, tmp_path / name, make=lambda: adapter_in_vllm(tmp_path / "handed"), **SERVER)
    assert len({loaded for loaded, _, _ in server.loaded}) == 2 * STEPS


def test_a_server_that_does_not_load_it(base, tmp_path, server):
    server.refuses = True
    with pytest.raises(AdapterError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        trained(base, tmp_path, make=lambda: adapter_in_vllm(tmp_path / "handed"), **SERVER)
    with pytest.raises(AdapterError, match="from a folder"):
        trained(base, tmp_path, **SERVER)


def test_what_trl_does_without(base, tmp_path):
    """Every parameter is sent, by the names of the base, and merging in bfloat16 leaves other weights."""
    model, _, before = trained(base, tmp_path, make=nullcontext, vllm_mode="colocate", dtype=torch.bfloat16)
    (llm,) = _Llm.made
    assert "enable_lora" not in llm.options
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    assert {name for name, _ in llm.merged} == names
    assert len(llm.merged) == STEPS * len(names)
    after = dict(model.named_parameters())
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert any("experts" in name for name in changed)
