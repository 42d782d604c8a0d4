"""The table of families, compared with the classes, models and conversion mappings of the installed transformers.

What a release lacks is not compared under it; the last tests say what each release must have compared.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from support import zoo
from torch import nn
from transformers.models.auto import configuration_auto

from peft_moe_compat.adapters import orientations as storage
from peft_moe_compat.adapters.base_model import BaseModel
from peft_moe_compat.adapters.names import linear_role, role_of
from peft_moe_compat.adapters.placing import hub_paths
from peft_moe_compat.adapters.rewriting import rewritten
from peft_moe_compat.adapters.shapes import parameter_order
from peft_moe_compat.families import (
    FAMILIES,
    FLAT_CLASSES,
    PACKED_CLASSES,
    ROUTERS,
    STORED_OTHERWISE,
    UNDECLARED_CLASSES,
    Family,
    family,
)
from peft_moe_compat.model import experts as live_experts
from peft_moe_compat.releases import NEWEST_TESTED

H, I = zoo.H, 12
INSTALLED = Version(transformers.__version__)
SOURCES = Path(transformers.__file__).parent
LAYERS = 4
_MROPE = {"rope_type": "default", "mrope_section": [24, 20, 20]}
# What the default config of a package lacks for a model with experts to be built of it.
_LACKING = {
    "dbrx": {"rope_theta": 10000.0},
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * LAYERS},
    "diffusion_gemma": {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots1": {"n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma4": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 16},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS},
    "hunyuan_v1_moe": {"head_dim": 128},
    "jetmoe": {"pad_token_id": 0},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "qwen3_omni_moe": {"rope_scaling": _MROPE},
    "qwen3_vl_moe": {"rope_scaling": _MROPE, "pad_token_id": 0},
    "qwen4_exp": {
        "ple_embed_dim": 16,
        "ple_layer_ids": [0],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}


def package_of(model_type: str) -> str:
    return configuration_auto.model_type_to_module_name(model_type)


def _registered() -> list[str]:
    """The families of the table that the installed transformers has, by its own registry of configs."""
    known = configuration_auto.CONFIG_MAPPING_NAMES
    return [model_type for model_type in FAMILIES if model_type in known or f"{model_type}_text" in known]


REGISTERED = _registered()
CLASSES = zoo.DECORATED + zoo.UNDECORATED
# The families that a package of transformers holds: those of the table, and the one it is called after.
_IN_PACKAGE: dict[str, set[str]] = {}
for _model_type in REGISTERED:
    _IN_PACKAGE.setdefault(package_of(_model_type), set()).add(_model_type)
_APART = re.compile(r"self\.experts = nn\.ModuleList\(\s*\[|class DbrxExpertGLU\(")
PACKAGES = sorted(
    {found.package for found in CLASSES}
    | {path.parent.name for path in SOURCES.glob("models/*/modeling_*.py") if _APART.search(path.read_text("utf-8"))}
)


def rows(package: str) -> dict[str, Family]:
    return {model_type: family(model_type) for model_type in sorted(_IN_PACKAGE.get(package, set()) | {package})}


# All classes but those without a gate, and those of half an experts module, whose parent applies it.
GATED = [c for c in CLASSES if "gate_up_proj" in inspect.getsource(getattr(c.module(), c.name))]
each_class = pytest.mark.parametrize("found", CLASSES, ids=str)
each_gated = pytest.mark.parametrize("found", GATED, ids=str)
each_package = pytest.mark.parametrize("package", PACKAGES)


# --- classes ---------------------------------------------------------------------------------------------------------


def _projections(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.ndim == 3}


def _stored_transposed(module: nn.Module) -> bool:
    """From the sizes: every class here is built with hidden size 16 and intermediate size 12."""
    found = {shape[2] == H if name == "down_proj" else shape[1] == H for name, shape in _projections(module).items()}
    (transposed,) = found
    return transposed


def _gate_of(module: nn.Module):
    """The class's own function of a row of its up projection, "2I -> I": through its forward where it has no other."""
    if hasattr(module, "_apply_gate"):
        return lambda row: module._apply_gate(row[None])[0]
    transposed = _stored_transposed(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.zero_()
            if name == "down_proj":
                eye = torch.eye(I, H, dtype=parameter.dtype)
                parameter.copy_((eye if transposed else eye.T).expand_as(parameter))
    takes = list(inspect.signature(module.forward).parameters)
    experts, tokens = module.down_proj.shape[0], 1 if "router_indices" in takes or "top_k_index" in takes else zoo.E
    x = torch.zeros(tokens, H, dtype=module.down_proj.dtype)
    x[:, 0] = 1
    known = {
        "hidden_states": x,
        "router_indices": torch.tensor([[0, 1]]),
        "top_k_index": torch.tensor([[0, 1]]),
        "routing_weights": torch.eye(1, experts, dtype=x.dtype),
        "top_k_weights": torch.eye(1, 2, dtype=x.dtype),
    }

    @torch.no_grad()
    def gate(row):
        first = module.gate_up_proj[0]
        (first[0] if transposed else first[:, 0]).copy_(row)
        return module(*[known[name] for name in takes]).reshape(-1, H)[0, :I]

    return gate


def _gates_and_ups(gate) -> tuple[set[int], set[int]]:
    """Columns of the up projection: those that act as gates, and those the output is linear in, but for a soft cap."""
    found: tuple[set[int], set[int]] = set(), set()
    start = torch.linspace(0.2, 0.5, 2 * I, dtype=torch.double)
    for column in range(2 * I):
        step = torch.zeros_like(start)
        step[column] = 0.15
        below, at, above = (gate(start + k * step) for k in (-1, 0, 1))
        assert not torch.equal(below, above), f"column {column} does nothing"
        found[(above - 2 * at + below).norm() < 5e-3 * (above - below).norm()].add(column)
    return found


@each_class
def test_the_class_is_stored_and_declared_as_its_row_says(found):
    module = zoo.build(found, I)
    stored, declared = _stored_transposed(module), getattr(module, "is_transposed", None)
    for row in rows(found.package).values():
        assert (row.transposed.at(INSTALLED) if row.transposed else (False, False)) == (stored, declared is True)
        assert declared is None or declared == stored
        assert declared is not None or row.undeclared[found.name] == stored
    assert live_experts.is_transposed(module) == stored
    assert UNDECLARED_CLASSES.get(found.name, stored) == stored or declared is not None


@each_class
def test_parameters_have_the_names_and_the_order_of_the_row(found):
    module = zoo.build(found, I)
    names = list(_projections(module))
    assert live_experts.projections(module) == tuple(names)
    if names == ["weight"]:
        return  # half of an experts module: which half, and its name, the model tells
    for model_type, row in rows(found.package).items():
        assert names == list(BaseModel(model_type).parameters.values())
        assert getattr(module, "has_gate", True) == row.gated
    assert parameter_order("experts", sorted(names, reverse=True)) == tuple(names)
    assert None not in {role_of("experts", name) for name in names}


@each_gated
def test_gates_lie_in_the_columns_the_row_says(found):
    module = zoo.build(found, I).double().eval()
    gates, ups = _gates_and_ups(_gate_of(module))
    assert {len(gates), len(ups)} == {I}
    for row in rows(found.package).values():
        assert gates == (set(range(0, 2 * I, 2)) if row.interleaved else set(range(I)))
        assert getattr(module, "is_concatenated", not row.interleaved) == (not row.interleaved)


@each_gated
def test_the_clamped_glu_is_the_classes_that_the_row_says(found):
    module = zoo.build(found, I).double().eval()
    gate_of = _gate_of(module)
    row = torch.linspace(-20, 20, 2 * I, dtype=torch.double)[torch.randperm(2 * I)]
    clamped = False
    if hasattr(module, "alpha") and hasattr(module, "limit"):
        gate, up = (row[::2], row[1::2]) if family(found.package).interleaved else row.chunk(2)
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
        clamped = torch.allclose(gate_of(row), (up + 1) * gate * torch.sigmoid(gate * module.alpha))
    for facts in rows(found.package).values():
        assert (found.name in facts.clamped) == clamped


def _flat_classes() -> dict[str, tuple[str, ...]]:
    """Classes that make two-dimensional parameters whose rows are experts times something, by their source."""
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCES.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for cls in ast.parse(text).body if "num_experts *" in text else ():
            for node in ast.walk(cls) if isinstance(cls, ast.ClassDef) else ():
                if not (isinstance(node, ast.Assign) and re.search(r"Parameter\(\s*torch\.", ast.unparse(node))):
                    continue
                rows_of = node.value.args[0].args[0]
                if isinstance(rows_of, ast.BinOp) and "num_experts" in ast.unparse(rows_of):
                    found.setdefault(cls.name, []).append(node.targets[0].attr)
    return {name: tuple(parameters) for name, parameters in found.items()}


def test_the_flat_classes_are_those_of_transformers():
    found = _flat_classes()
    assert {name: set(parameters) for name, parameters in found.items()} == {
        name: set(parameters) for name, parameters in FLAT_CLASSES.items()
    }
    for name in found:
        (owner,) = (model_type for model_type, row in FAMILIES.items() if name in row.flat)
        assert hasattr(importlib.import_module(f"transformers.models.{owner}.modeling_{owner}"), name)


def test_the_packed_classes_are_those_of_transformers():
    found = {}
    for cls in ast.parse((SOURCES / "integrations" / "mxfp4.py").read_text(encoding="utf-8")).body:
        if isinstance(cls, ast.ClassDef):
            packed = [
                node.targets[0].attr.removesuffix("_blocks")
                for node in ast.walk(cls)
                if isinstance(node, ast.Assign) and "Parameter(" in (text := ast.unparse(node)) and "uint8" in text
            ]
            found[cls.name] = tuple(name for name in packed if not name.endswith("_scales"))
    found = {name: parameters for name, parameters in found.items() if parameters}
    assert found == PACKED_CLASSES
    for name in found:
        (owner,) = (model_type for model_type, row in FAMILIES.items() if name in row.packed)
        assert (owner, name.removeprefix("Mxfp4")) in {(c.package, c.name) for c in CLASSES}


# --- models ----------------------------------------------------------------------------------------------------------


def _shrink(config, package: str) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value, package)
        elif name in zoo._COUNT_NAMES and isinstance(value, int) and value > 1:
            setattr(config, name, zoo.E)
        elif name in zoo._INTERMEDIATE_NAMES and isinstance(value, int):
            setattr(config, name, 64)
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            setattr(config, name, value[:LAYERS])
    if layers and layers > LAYERS:
        config.num_hidden_layers = LAYERS
    for name, value in _LACKING.get(package, {}).items():
        if not getattr(config, name, None):
            setattr(config, name, value)


@cache
def model_of(package: str) -> nn.Module:
    """The smallest model of a package that has routed experts, on the meta device, from its default config."""
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    reasons = []
    classes = [cls for _, cls in inspect.getmembers(modeling, inspect.isclass) if cls.__module__ == modeling.__name__]
    for cls in sorted(classes, key=lambda cls: "Text" not in cls.__name__):
        of_models = issubclass(cls, transformers.PreTrainedModel) and cls.__name__.endswith("Model")
        if not of_models or getattr(cls, "config_class", None) is None:
            continue
        try:
            config = cls.config_class()
            _shrink(config, package)
            with torch.device("meta"):
                model = cls(config)
        except (AttributeError, TypeError, ValueError, KeyError, ImportError) as error:
            reasons.append(f"{cls.__name__}: {error!r}")
            continue
        if any(_is_of_experts(name, parameter) for name, parameter in model.named_parameters()):
            return model
        reasons.append(f"{cls.__name__}: no experts")
    raise AssertionError(f"no model of {package} could be built: {reasons}")


_LINEAR = re.compile(r"^(?P<path>.+\.experts)\.\d+\.(?P<linear>\w+)\.weight$")


def _is_of_experts(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter belongs to routed experts: to one of them, or to a stack of them all."""
    stack = parameter.ndim == 3 and bool(re.search(r"experts\.|(input|output)_linear\.", name))
    return not re.search("shared|attention", name) and (bool(_LINEAR.match(name)) or stack or ".experts.mlp." in name)


@cache
def experts_of(package: str) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model_of(package).named_parameters() if _is_of_experts(n, p)}


def _stacks(package: str) -> dict[tuple[str, str], torch.Tensor]:
    """(path of the experts module, parameter) -> the stack."""
    return {
        (name.rpartition(".")[0], name.rpartition(".")[2]): parameter
        for name, parameter in experts_of(package).items()
        if parameter.ndim == 3
    }


@cache
def conversions_of(package: str) -> list:
    """What turns the Hub's names into those of the model: transformers 5's own list, none in transformers 4."""
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return []
    lookup = importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping
    model = model_of(package)
    keys = dict.fromkeys([package, f"{package}_text", model.config.model_type, type(model).__name__])
    return [conversion for key in keys for conversion in lookup(key) or ()]


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")


def _fusing(package: str) -> dict[str, list[str]]:
    """Parameter of the fused experts -> the Hub's names for the linears it is made of, in their order, with a star."""
    return {
        _plain(target).rpartition(".")[2]: [_plain(source) for source in conversion.source_patterns]
        for conversion in conversions_of(package)
        for target in conversion.target_patterns
        if all(".*." in source and "experts" in source for source in conversion.source_patterns)
    }


def _roles_of_linears(expert: nn.Module) -> dict[str, str]:
    """Of one expert of transformers 4: by its sizes, and by which of two linears the output is proportional to."""
    linears = {name: module for name, module in expert.named_children() if isinstance(module, nn.Linear)}
    (down,) = (name for name, each in linears.items() if each.out_features > each.in_features)
    found = {"down": down}
    x = torch.randn(3, linears[down].out_features)
    before = expert(x)
    for name in linears.keys() - {down}:
        weight = linears[name].weight
        weight.data.mul_(2)
        found["up" if torch.allclose(expert(x), 2 * before) else "gate"] = name
        weight.data.div_(2)
    return found


@cache
def hub_linears(package: str) -> dict[str, str]:
    """Role -> an expert's linear in the Hub's checkpoints; empty where they hold stacks."""
    if fusing := _fusing(package):
        roles = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}
        return {
            role: source.split(".")[-2]
            for parameter, sources in fusing.items()
            for role, source in zip(roles[parameter], sources, strict=True)
        }
    apart = next((match["path"] for name in experts_of(package) if (match := _LINEAR.match(name))), None)
    if apart is None:
        return {}
    expert = model_of(package).get_submodule(f"{apart}.0").to_empty(device="cpu")
    for parameter in expert.parameters():
        nn.init.normal_(parameter, std=0.1)
    return _roles_of_linears(expert)


def _converted(name: str, package: str) -> str:
    """A name of the Hub's as the conversions of transformers make it the model's."""
    for conversion in conversions_of(package):
        for source in conversion.source_patterns:
            pattern, (target, *rest) = source.replace("*", r"\d+"), conversion.target_patterns
            if not rest and re.search(pattern, name):
                name = re.sub(pattern, target, name)
                break
    return name


# transformers 5.0 looks for phimoe's experts in `mlp`: neither the models of 4.57 nor the conversions of 5.24 do.
_NOBODYS_PATH = ("phimoe", "mlp.experts.*.w1.weight")
# Checkpoints whose paths no row can say: mistral_large4's experts stand in the layer itself; ernie4_5_vl_moe's are one
# list for text and images, split on loading.
_OTHER_PATHS = {"ernie4_5_vl_moe", "mistral_large4"}


@each_package
def test_the_model_holds_its_experts_apart_or_together_as_the_row_says(package):
    apart = any(map(_LINEAR.match, experts_of(package)))
    for model_type in rows(package):
        assert storage.has_separate_experts(model_type, peft.__version__, transformers.__version__) == apart


@each_package
def test_every_stack_has_a_role_and_renamed_ones_the_names_of_the_row(package):
    stacks = _stacks(package)
    assert stacks or package == "dbrx" or any(map(_LINEAR.match, experts_of(package)))
    for model_type, row in rows(package).items():
        for path, name in stacks:
            role = role_of(path, name)
            assert role in ("gate_up", "up", "down")
            place = storage.expert_parameter(model_type, transformers.__version__, path, role)
            assert place in ((None,) if row.renamed is None else ((path, name),))
    by_role = {role_of(*place): stack.numel() for place, stack in stacks.items()}
    if by_role.keys() == {"gate_up", "down"} and package != "longcat_flash":  # whose zero experts have gate and up rows
        assert by_role["gate_up"] == 2 * by_role["down"]


@each_package
def test_a_family_was_renamed_where_transformers_renames_its_stacks(package):
    roles = {"gate_up_proj": "gate_up", "down_proj": "down"}
    renames = {
        roles[parameter]: (_plain(conversion.source_patterns[0]).removesuffix(".weight"), path)
        for conversion in conversions_of(package)
        for path, _, parameter in [_plain(conversion.target_patterns[0]).rpartition(".")]
        if parameter in roles and _plain(conversion.source_patterns[0]).endswith(".weight")
        if len(conversion.source_patterns) == 1 and "*" not in conversion.source_patterns[0]
    }
    renamed = renames if renames.keys() == {"gate_up", "down"} else {}
    for model_type, row in rows(package).items():
        if row.renamed is not None and (renamed or row.renamed.since <= INSTALLED):
            assert {role: old for role, (old, _) in renamed.items()} == row.renamed.apart
            assert {new for _, new in renamed.values()} == {row.renamed.together}
            for old, new in renamed.values():
                newest = storage.expert_parameter(model_type, None, f"layers.0.{old}", "down")
                assert newest == (f"layers.0.{new}", "down_proj")
        elif row.renamed is None:
            assert not renamed


@each_package
def test_linears_are_called_as_in_the_checkpoints(package):
    linears = hub_linears(package)
    for model_type, row in rows(package).items():
        assert linears.items() <= row.linears.items()
        assert not linears or linears.keys() == ({"gate", "up", "down"} if row.gated else {"up", "down"})
        assert all(BaseModel(model_type).linear(role) == name for role, name in linears.items())
    assert all(linear_role(name) == role for role, name in linears.items())


@each_package
def test_experts_stand_where_they_do_in_the_checkpoints(package):
    linears, fusing = hub_linears(package), _fusing(package)
    sources = {_plain(source) for conversion in conversions_of(package) for source in conversion.source_patterns}
    for model_type, row in rows(package).items() if linears else ():
        base = BaseModel(model_type)
        if not fusing:  # transformers 4, which keeps the checkpoints' names
            paths = {match["path"] for match in map(_LINEAR.match, experts_of(package)) if match}
            assert row.block_sparse_moe == any("block_sparse_moe" in path for path in paths)
            assert {base.per_expert_path(base.fused_path(path)) for path in paths} == paths
        elif not any((package, source) == _NOBODYS_PATH for source in sources):
            assert row.block_sparse_moe == any("block_sparse_moe" in source for source in sources)
            for path, name in _stacks(package) if package not in _OTHER_PATHS else ():
                linear = fusing[name][0].split(".")[-2]
                theirs = f"{base.per_expert_path(path)}.0.{linear}.weight"
                # Some patterns are those of the whole model, of which this is the text part.
                found = [_converted(f"{prefix}{theirs}", package) for prefix in ("", "model.language_model.")]
                assert any(converted.endswith(f"{path}.{name}") for converted in found), found
                assert base.fused_path(base.per_expert_path(path)) == path


def _whole_models():
    """(model_type, a causal model of its default config, without weights) of families with fused experts."""
    auto = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for model_type in sorted(name for name in auto if package_of(name) in PACKAGES):
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type))
        except (AttributeError, ImportError, KeyError, TypeError, ValueError):  # not made of its defaults alone
            continue
        if any(p.ndim == 3 and "expert" in name for name, p in model.named_parameters()):
            yield model_type.removesuffix("_text"), model


@pytest.mark.skipif(INSTALLED < Version("5"), reason="transformers 4 keeps the checkpoints' names")
def test_linears_and_routers_are_called_as_in_the_checkpoints_or_the_family_is_known_not_to_tell():
    from transformers.core_model_loading import revert_weight_conversion

    compared = set()
    for model_type, model in _whole_models():
        kinds = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name and name.endswith(".weight"):
                kinds[re.sub(r"\.\d+\.", ".N.", name)] = name, parameter
        for name, parameter in kinds.values():
            theirs = {hub.partition("layers.")[2] for hub in revert_weight_conversion(model, {name: parameter})}
            path = name.partition("layers.")[2].removesuffix(".weight")
            ours = {f"{spelled}.weight" for spelled in hub_paths(path, BaseModel(model_type))}
            assert (len(theirs) == 1 and theirs <= ours) or model_type in STORED_OTHERWISE, (model_type, name, theirs)
            if path.rpartition(".")[2] in ROUTERS and "mlp" in path and "block_sparse_moe" in min(theirs):
                there = BaseModel(model_type).beside_experts(path, "per_expert")
                assert {f"{there}.weight"} == theirs
                assert BaseModel(model_type).beside_experts(there, "fused") == path
        compared.add(model_type)
    assert len(compared) > 15


# --- names in target_modules -----------------------------------------------------------------------------------------


def _attributes(cls: ast.ClassDef) -> dict[str, str]:
    """Attribute -> what `__init__` calls for it."""
    found = {}
    for node in ast.walk(cls):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            if name.startswith("self."):
                found[name.removeprefix("self.")] = ast.unparse(node.value.func)
    return found


def test_routers_that_are_bare_parameters_are_called_as_the_table_says():
    routers = set()
    for path in SOURCES.glob("models/*/modeling_*.py"):
        classes = {
            node.name: _attributes(node)
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.ClassDef)
        }
        for attributes in classes.values():
            beside = {name: classes.get(cls, {}) for name, cls in attributes.items() if "experts" in attributes}
            routers |= {
                name
                for name, held in beside.items()
                if held.get("weight") == "nn.Parameter" and not ("expert" in name or "norm" in name)
            }
    assert {"gate", "router"} <= routers <= ROUTERS


def _rewritten() -> dict[str, str]:
    """model_type -> the pattern by which PEFT and transformers rewrite its targets; nothing before transformers 5."""
    found = importlib.util.find_spec("transformers.conversion_mapping")
    mapping = found and importlib.import_module(found.name)
    patterns = {"mixtral": "mixtral"} | mapping._MODEL_TO_CONVERSION_PATTERN if mapping else {}
    known = configuration_auto.CONFIG_MAPPING_NAMES
    return {m: pattern for m, pattern in patterns.items() if pattern in ("mixtral", "qwen2_moe") and m in known}


def test_families_whose_targets_are_rewritten():
    names = {"mixtral": {"w1", "w3", "w2"}, "qwen2_moe": {"gate_proj", "up_proj", "down_proj"}}
    try:
        theirs = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # before PEFT 0.19, and beside transformers 4
        theirs = None
    if theirs is not None:
        assert {pattern: {*table} - {"gate"} for pattern, table in theirs._MOE_TARGET_MODULE_MAPPING.items()} == names
    found = _rewritten()
    for model_type, pattern in found.items():
        assert names[pattern] == {*family(model_type.removesuffix("_text")).linears.values()}
    newest = str(NEWEST_TESTED)
    ours = {m for m in configuration_auto.CONFIG_MAPPING_NAMES if rewritten(m, newest, transformers.__version__)}
    assert ours == {m.removesuffix("_text") for m in found} & configuration_auto.CONFIG_MAPPING_NAMES.keys()


# --- what has been compared ------------------------------------------------------------------------------------------


def test_no_row_says_nothing():
    assert [model_type for model_type, row in FAMILIES.items() if row == Family()] == []


def test_every_family_that_the_release_registers_is_compared():
    assert {"gpt_oss", "llama4", "mixtral", "phimoe", "qwen3_vl_moe"} <= set(REGISTERED)
    # A package without a modeling file, as that of sarvam_moe, has the classes of another family.
    assert {p for p in _IN_PACKAGE if any((SOURCES / "models" / p).glob("modeling_*.py"))} <= set(PACKAGES)
    assert {package for package in PACKAGES if experts_of(package)} == set(PACKAGES)
    assert {"gpt_oss", "llama4", "qwen3_vl_moe"} <= {found.package for found in GATED}


def test_the_names_of_linears_are_compared_wherever_the_row_differs():
    unlike = {m for m in REGISTERED if family(m).linears != Family().linears or family(m).block_sparse_moe}
    assert {"mixtral", "minimax", "phimoe"} <= unlike
    assert all(hub_linears(package_of(model_type)) for model_type in unlike)
