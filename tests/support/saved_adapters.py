"""Adapters of small models as the installed PEFT saves them, and what else could have been written in their place."""

from __future__ import annotations

import json

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from peft_moe_compat.adapters.orientations import orientations

from . import zoo

FAMILY = zoo.FAMILIES[0]

# Names of the linears of dense layers and of experts, shared ones too; families that have those beside fused ones.
LINEARS = ["gate_proj", "up_proj", "down_proj"]
SHARED = [
    family for family in zoo.FAMILIES if any("shared_experts" in n for n, _ in zoo.tiny_model(family).named_modules())
]


def flipped(A, B, E):
    """PEFT's flat pair "(E r) p", "q (r E)" the other way round, by a loop over experts and ranks."""
    r = A.shape[0] // E
    flipped_A, flipped_B = torch.empty(E * r, B.shape[0]), torch.empty(A.shape[1], r * E)
    for e in range(E):
        for j in range(r):
            flipped_A[e * r + j] = B[:, j * E + e]
            flipped_B[:, j * E + e] = A[e * r + j]
    return flipped_A, flipped_B


def rewrite(folder, change=lambda A, B, E: (A, B), **config):
    """Changes the expert pairs and the config of a saved adapter, and drops the stamp; None drops an entry."""
    file, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name in [n for n in tensors if "experts" in n and ".lora_A." in n]:
        other = name.replace(".lora_A.", ".lora_B.")
        A, B = change(tensors[name], tensors[other], E)
        tensors[name], tensors[other] = A.contiguous(), B.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    content = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in content.items() if config.get(key, "") is not None}))
    return folder


E = 6  # experts of every family in the zoo
SQUARE = {"hidden_size": 24}  # I == H
HERE = f"peft=={peft.__version__},transformers=={transformers.__version__}"
RELEASES = ("0.18.1", "0.19.1", "0.19.0")


def save(folder, family=FAMILY, sizes=None, **lora):
    """An adapter with random factors as the installed PEFT writes it: its model, and a fresh copy of the base."""
    torch.manual_seed(1)
    model = zoo.tiny_model(family, **(sizes or {})).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fresh():
        base = zoo.tiny_model(family, **(sizes or {})).eval()
        base.load_state_dict(state)
        return base

    wrapped = zoo.peft_model(model, **lora).eval()
    wrapped.save_pretrained(folder)
    return wrapped, fresh


def assert_equal(model, expected, adapter="default"):
    """Bit for bit the same factors: converting only moves values."""
    pairs = list(zip(zoo.wrappers(model), zoo.wrappers(expected), strict=True))
    assert pairs
    for found, wanted in pairs:
        for linears, others in ((found.lora_A, wanted.lora_A), (found.lora_B, wanted.lora_B)):
            assert torch.equal(linears[adapter].weight, others["default"].weight)


def written_otherwise(family=FAMILY):
    """A PEFT release that lays the family out the other way than the installed one does."""
    here, *others = (orientations(v, transformers.__version__, family) for v in (peft.__version__, *RELEASES))
    return next(version for version, there in zip(RELEASES, others, strict=True) if there != here)


def change_file(folder, change, **config):
    """Changes all tensors of an adapter at once, and its config; drops the stamp."""
    file, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def assert_same_logits(model, expected):
    ids = zoo.token_ids()
    with torch.no_grad():
        found, wanted = model.eval()(input_ids=ids).logits, expected.eval()(input_ids=ids).logits
    zoo.assert_same({"": found}, {"": wanted}, 1e-4)


def mlp_linears(model):
    """Names of the linears of dense layers and shared experts."""
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in linears if name.rpartition(".")[2] in LINEARS]


def one_by_one(base, folder, shared):
    """A file as transformers 4 has it, LoRA on every expert's linears; adds its updates to the model.

    Args:
        base: A model with fused experts, `gate_up_proj` and `down_proj`.
        folder: Where the file goes.
        shared: Whether shared experts and dense layers have LoRA too.
    """
    r, scaling, tensors = 2, 4.0, {}

    def update(name, fan_in, fan_out):
        A, B = torch.randn(r, fan_in) * 0.2, torch.randn(fan_out, r) * 0.2
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = A, B
        return (scaling * B.double() @ A.double()).float()

    with torch.no_grad():
        for path, experts in list(base.named_modules()):
            for e in range(E if hasattr(experts, "gate_up_proj") else 0):
                H, I = experts.down_proj.shape[1:]
                gate, up = (update(f"{path}.{e}.{name}", H, I) for name in ("gate_proj", "up_proj"))
                experts.gate_up_proj[e] += torch.cat([gate, up])
                experts.down_proj[e] += update(f"{path}.{e}.down_proj", I, H)
        for name in mlp_linears(base) if shared else ():
            linear = base.get_submodule(name)
            linear.weight += update(name, linear.in_features, linear.out_features)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r * scaling, "target_modules": LINEARS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
