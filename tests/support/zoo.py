"""Every experts class of the installed transformers, found in its source and built small from its own config."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

E, TOP_K, T, H, R = 5, 2, 7, 16, 3
# transformers 4 decorates no experts class, has no registry of their forwards, and keeps most experts one by one.
FUSED = Version(transformers.__version__) >= Version("5")
needs_registry = pytest.mark.skipif(not FUSED, reason="transformers before 5.0 has no registry of experts forwards")

_COUNT_NAMES = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"}
_TOP_K_NAMES = {"num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"}
_INTERMEDIATE_NAMES = {
    "expert_ffn_hidden_size",
    "expert_intermediate_size",
    "ffn_hidden_size",
    "intermediate_size",
    "moe_ffn_hidden_size",
    "moe_intermediate_size",
}


@dataclass(frozen=True)
class Found:
    """One experts class in the source of transformers."""

    package: str
    name: str
    decorated: bool

    def __str__(self) -> str:
        return f"{self.package}-{self.name}"

    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}")


def _stacks(cls: ast.ClassDef) -> bool:
    """Whether __init__ makes an nn.Parameter of three sizes, the first of which counts experts (or groups of them)."""
    for node in ast.walk(cls):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parameter") and node.args):
            continue
        if isinstance(node.args[0], ast.Call):
            sizes: list[ast.expr] = list(node.args[0].args)
            if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
                sizes = list(sizes[0].elts)
            if len(sizes) == 3 and any(word in ast.unparse(sizes[0]) for word in ("expert", "groups")):
                return True
    return False


def find_classes() -> list[Found]:
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "xpert" not in text or path.stem != f"modeling_{path.parent.name}":
            continue
        # Parsed are the classes that may be some: all of transformers would take five seconds.
        blocks = [block for block in text.split("\n\n\n") if "Parameter(" in block or "@use_experts_impl" in block]
        for node in ast.parse("\n\n".join(blocks)).body:
            if isinstance(node, ast.ClassDef):
                decorated = any("use_experts_implementation" in ast.unparse(d) for d in node.decorator_list)
                if decorated or _stacks(node):
                    found.append(Found(path.parent.name, node.name, decorated))
    return found


CLASSES = find_classes()
DECORATED = [c for c in CLASSES if c.decorated]
# Inkling's shared experts run on every token: no router reaches them, so they are no target of this library.
UNDECORATED = [c for c in CLASSES if not c.decorated and "SharedExperts" not in c.name]


def each(classes: list[Found]) -> Any:
    """Parametrizes a test over classes, saying why where transformers 4 has none of them; 5 must have some."""
    assert classes or not FUSED, "no experts class of this transformers is left"
    none = pytest.param(None, marks=pytest.mark.skip(reason="transformers before 5.0 decorates no experts class"))
    return pytest.mark.parametrize("found", classes or [none], ids=str)


def _small(config: Any, intermediate: int) -> None:
    """Sets every size the experts could read, on this config and those nested in it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _small(value, intermediate)
        for names, size in (
            (_COUNT_NAMES, E),
            (_TOP_K_NAMES, TOP_K),
            (_INTERMEDIATE_NAMES, intermediate),
            ({"hidden_size", "moe_hidden_size"}, H),
            ({"zero_expert_num"}, 2),
        ):
            if name in names:
                setattr(config, name, [size] * len(value) if isinstance(value, list) else size)


def _configs(found: Found, intermediate: int) -> list[Any]:
    """Small configs the class might be built from: its own model's, and those nested in them."""
    package = importlib.import_module(f"transformers.models.{found.package}.configuration_{found.package}")
    candidates = []
    for _, cls in inspect.getmembers(package, inspect.isclass):
        if issubclass(cls, transformers.PretrainedConfig) and cls.__module__ == package.__name__:
            try:
                config = cls()
            except (TypeError, ValueError, AttributeError):  # needs sub-configs: found through their own class
                continue
            _small(config, intermediate)
            config._experts_implementation = "grouped_mm"
            candidates.append(config)
    return candidates


def _arguments(cls: type[nn.Module], config: Any, intermediate: int) -> dict[str, Any]:
    known = {
        "config": config,
        "num_experts": E,
        "groups": E,
        "input_size": H,
        "in_features": H,
        "output_size": intermediate,
        "out_features": intermediate,
        "intermediate_size": intermediate,
    }
    signature = inspect.signature(cls.__init__).parameters
    return {name: known[name] for name in signature if name in known}


def build(found: Found, intermediate: int = 12) -> nn.Module:
    """The class with E experts, hidden size H and this intermediate size, its weights drawn at random, float32.

    A class that cannot be built is a failure of the test that asked for it.
    """
    cls = getattr(found.module(), found.name)
    reasons = []
    for config in _configs(found, intermediate):
        try:
            module = cls(**_arguments(cls, config, intermediate))
        except (AttributeError, TypeError, KeyError) as error:
            reasons.append(f"{type(config).__name__}: {error}")
            continue
        sizes = {p.shape[0] for p in module.parameters() if p.ndim == 3}
        if not sizes or max(sizes) > 4 * E or max(max(p.shape) for p in module.parameters()) > 8 * H:
            reasons.append(f"{type(config).__name__}: {[tuple(p.shape) for p in module.parameters()]}")
            continue
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
        return module
    raise AssertionError(f"{found} could not be built small: {reasons}")


def wrap(module: nn.Module, parameters: list[str], r: int = R, **config: Any) -> nn.Module:
    """A holder whose `experts` is the module with an adapter "default" on the named parameters, both factors random."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.ModuleDict({"experts": module})
    lora = LoraConfig(r=r, lora_alpha=5, target_modules=[], target_parameters=parameters, **config)
    inject_adapter_in_model(lora, holder)
    randomise(holder)
    return holder


def randomise(model: nn.Module, std: float = 0.2) -> None:
    """Random LoRA factors (lora_B starts at zero), trainable; everything else frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            nn.init.normal_(parameter, std=std)


def routing(num_experts: int = E, tokens: int = T, k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """Distinct experts per token and normalised weights: "T k" and "T k"."""
    weights, index = torch.topk(torch.randn(tokens, num_experts).softmax(-1), k)
    return index, weights / weights.sum(-1, keepdim=True)


def gradients(module: nn.Module, inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """Output, and the gradients of every float input and of every trainable parameter, by name.

    `inputs` go in by position. The loss weighs the output elements differently, so that no gradient is constant.
    """
    module.zero_grad()
    leaves = {n: v.detach().clone().requires_grad_(v.is_floating_point()) for n, v in inputs.items()}
    out = module(*leaves.values(), **keywords)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    (out * weight).sum().backward()
    result = {"output": out.detach()}
    result |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    result |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return result


def config_of(model: Any) -> dict[str, Any]:
    """config.json of the model inside a PeftModel, as `save_pretrained` would write it."""
    base = model.get_base_model()
    return {**base.config.to_dict(), "architectures": [type(base).__name__]}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Same names, and every tensor within `tolerance` of its counterpart's largest entry."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.double().abs().max().clamp(min=1e-12)
        error = (ours[name].double() - expected.double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
        assert expected.count_nonzero() > 0, f"{name} is all zero: it would agree with anything"


def add_adapter(wrapper: Any, name: str, r: int, scaling: float = 0.7) -> None:
    """A further adapter on one wrapper, made by hand: most releases refuse a second one on target_parameters."""
    first = next(iter(wrapper.lora_A))
    A, B = wrapper.lora_A[first], wrapper.lora_B[first]
    rows = r * wrapper.num_experts
    wrapper.lora_A[name] = nn.Linear(A.in_features, rows, bias=False, dtype=A.weight.dtype)
    wrapper.lora_B[name] = nn.Linear(rows, B.out_features, bias=False, dtype=A.weight.dtype)
    wrapper.r[name], wrapper.lora_alpha[name], wrapper.scaling[name] = r, r * scaling, scaling


def wrappers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora.layer import ParamWrapper

    return [m for m in model.modules() if isinstance(m, ParamWrapper)]


_COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "top_k_experts": 2,
        "head_dim": 8,
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["attention", "moe"],
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def _fused(family: str) -> bool:
    """Whether the installed transformers has the family, with its experts in fused stacks."""
    try:
        config = transformers.AutoConfig.for_model(family, **_COMMON | _FAMILIES[family])
    except ValueError:  # an unknown model type
        return False
    if family not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return any(p.ndim == 3 and "experts" in n for n, p in model.named_parameters())


FAMILIES = [family for family in _FAMILIES if _fused(family)]


def tiny_model(family: str, **config: Any) -> Any:
    """A two-layer causal LM of the family with random float32 weights, in training mode."""
    sizes = _COMMON | _FAMILIES[family] | config
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def peft_model(model: Any, adapter_name: str = "default", **lora: Any) -> Any:
    """The model with random LoRA on all its experts and nothing else."""
    from peft import LoraConfig, get_peft_model

    import peft_moe_compat

    targets = peft_moe_compat.expert_parameters(model)
    options = {"r": R, "lora_alpha": 5, "target_modules": [], "target_parameters": targets} | lora
    wrapped = get_peft_model(model, LoraConfig(**options), adapter_name=adapter_name)
    randomise(wrapped)
    return wrapped


def token_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 61, (batch, length))


def loss_and_gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The causal-LM loss, the logits and every gradient, by name."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    result = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    return result | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
