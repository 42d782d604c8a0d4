"""The house keeps its shape: imports point one way, triton stays in its room, only `patching` touches foreign objects.

Read from the source, imports inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peft_moe_compat

ROOT = Path(peft_moe_compat.__file__).parent
PACKAGE = "peft_moe_compat"

# Room -> the rooms its modules may import from, itself aside. `__init__` reaches everything.
ROOMS: dict[str, set[str]] = {
    "at_start": set(),
    "errors": set(),
    "releases": {"errors"},
    "families": {"errors"},
    "reasons": set(),
    "others": set(),
    "layout": {"errors"},
    "adapters": {"errors", "releases", "families", "layout"},
    "model": {"errors", "releases", "families", "reasons", "others", "layout"},
    "quantising": {"errors", "releases", "families", "reasons", "layout", "model"},
    "forward": {"errors", "families", "reasons", "layout", "model"},
    "patching": {
        *("errors", "releases", "families", "reasons", "others", "layout", "at_start"),
        *("adapters", "model", "quantising", "forward"),
    },
    "reporting": {"errors", "releases", "families", "reasons", "layout", "model", "forward", "patching"},
    "showing": {"errors", "reporting"},
    "integrations": {"errors", "patching", "handover", "showing"},
    "proving": {"errors", "releases", "adapters"},
    "fresh": {"errors", "adapters", "model", "patching", "proving"},
    "readings": {"errors", "layout", "model", "patching"},
    "handover": {"errors", "adapters", "model", "patching", "proving"},
}
ROOMS["cli"] = {*ROOMS}
ROOMS["__main__"] = {"cli"}
# Within `forward`, from below to above.
FORWARD = ["backend", "dropout", "grouped_mm", "frozen", "kernels", "fused_ops", "fused", "layer", "undecorated"]
# Room or module -> what it never imports, also not inside a function.
NEVER = {
    "adapters": {"peft", "transformers", "triton"},
    "layout": {"peft", "transformers", "triton"},
    "releases": {"peft", "transformers", "torch", "triton"},
    "families": {"peft", "transformers", "torch", "triton"},
    "reasons": {"peft", "transformers", "torch", "triton"},
    "others": {"peft", "transformers", "torch", "triton"},
    "errors": {"peft", "transformers", "torch", "triton"},
}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its syntax tree; "" is the package itself."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()
IS_PACKAGE = {name for name in MODULES if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}


def imports(name: str) -> list[tuple[str, bool, bool]]:
    """(module, whether it is ours, whether imported when the module itself is) of every import of a module."""
    tree, found = MODULES[name], []
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        early = id(node) not in late
        if isinstance(node, ast.Import):
            for alias in node.names:
                ours = alias.name.split(".")[0] == PACKAGE
                found.append((alias.name.partition(".")[2] if ours else alias.name, ours, early))
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.append((str(node.module), False, early))
                continue
            here = name.split(".") if name else []
            base = here[: len(here) - node.level + (name in IS_PACKAGE)]
            target = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*target, alias.name])
                found.append((full if full in MODULES else ".".join(target), True, early))
    return found


def room(name: str) -> str:
    return name.partition(".")[0]


def test_the_rooms_are_those_of_the_tree():
    assert {room(name) for name in MODULES if name} == {*ROOMS}
    assert len(MODULES) > 50


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_one_way(name):
    allowed = ROOMS[room(name)] | {room(name)}
    upward = [target for target, ours, _ in imports(name) if ours and target and room(target) not in allowed]
    # The public package, which imports nothing itself, is where a version number and `activate` come from.
    top = [target for target, ours, _ in imports(name) if ours and not target]
    assert upward == []
    assert not top or room(name) == "cli" or name == "integrations.swift"  # which is imported by its path


def test_within_forward_too():
    def height(name: str) -> int:
        return FORWARD.index(name.split(".")[1])

    inside = [name for name in MODULES if name.startswith("forward.")]
    assert {name.split(".")[1] for name in inside} == {*FORWARD}
    found = [(n, t) for n in inside for t, ours, _ in imports(n) if ours and t.startswith("forward.")]
    assert len(found) > 20
    assert [(name, target) for name, target in found if height(target) > height(name)] == []


def test_there_is_no_circle():
    """Of modules, whenever they are imported."""
    edges = {name: {target for target, ours, _ in imports(name) if ours and target != name} for name in MODULES if name}
    edges = {name: {t for t in targets if t and t in edges} for name, targets in edges.items()}
    while leaves := [name for name, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        edges = {name: targets - {*leaves} for name, targets in edges.items()}
    assert edges == {}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_what_a_room_never_imports(name):
    foreign = {target.split(".")[0] for target, ours, _ in imports(name) if not ours}
    assert not foreign & NEVER.get(room(name), set())
    if not name.startswith("forward.kernels"):
        assert "triton" not in foreign
    # Which need not be there yet when the package is; these wait for whoever names what is in them.
    waiting = ("quantising.published", "quantising.experts", "quantising.loading")
    if room(name) in ("model", "quantising", "forward", "patching", "cli", "reporting", "proving"):
        early = {target.split(".")[0] for target, ours, early in imports(name) if not ours and early}
        assert not early & {"peft", "transformers"} or name in waiting


def test_ours_is_imported_early_but_where_something_heavy_must_wait():
    """Each of these is the one door to a heavy or optional package; a comment there says which."""
    late = {(name, target) for name in MODULES if name for target, ours, early in imports(name) if ours and not early}
    late = {(name, target) for name, target in late if not name.startswith("cli.")}
    assert late == {
        ("forward.fused", "forward.fused_ops"),  # triton
        ("forward.fused", "forward.kernels.layer"),
        ("forward.fused", "forward.kernels.kinds"),
        ("forward.fused", "forward.kernels.trial"),
        ("patching.activation", "model.probe"),  # torch, at activation
        ("patching.activation", "patching.displaced"),
        ("patching.activation", "patching.reach"),
        ("patching.activation", "patching.replacement"),
        ("patching.activation", "patching.replacements"),
        ("patching.activation", "releases"),  # a type alone
        ("showing", "reporting"),  # torch
        ("quantising.registering", "quantising.experts"),  # transformers, once somebody has imported it
    }


# What is assigned outside `patching` to an object that came in as an argument, or to something imported.
ALLOWED = {
    # As every loader that wraps another does, so that PEFT's module has the one it has without.
    "at_start": ["module.__spec__.loader = module.__loader__ = self.loader"],
    "adapters.tensors": ["tensors.infos[info.name] = info"],  # made there
    "model.experts": [
        "setattr(cls_or_module, _DECLARED_ATTRIBUTE, is_transposed)",  # what the user says of it
        "function._dynamo_marked_constant = True",  # of functions of our own
    ],
}


def test_only_patching_touches_somebody_elses_objects():
    others = ("patching", "quantising", "cli")  # which packs the experts of a model that it is given
    found = {name: foreign_assignments(MODULES[name]) for name in MODULES if room(name) not in others}
    assert {name: lines for name, lines in found.items() if lines} == ALLOWED
    assert "setattr(self.owner, self.name, function)" in foreign_assignments(MODULES["patching.replacement"])


def foreign_assignments(tree: ast.Module) -> list[str]:
    """Assignments to attributes and items of what was imported, or came in as an argument; see `_is_own_container`."""
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for function in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
        arguments = [] if isinstance(function, ast.Module) else [*function.args.args, *function.args.kwonlyargs]
        theirs = imported | {argument.arg for argument in arguments if not _is_own_container(argument)}
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
                found.append(ast.unparse(node))
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete) else []:
                inner = target
                while isinstance(inner, ast.Attribute | ast.Subscript):
                    inner = inner.value
                if inner is not target and isinstance(inner, ast.Name) and inner.id in theirs:
                    found.append(ast.unparse(node))
    return list(dict.fromkeys(found))


def _is_own_container(argument: ast.arg) -> bool:
    """What a function may write into: itself, autograd's context, a dict or list that it says it fills."""
    if argument.arg in ("self", "cls", "ctx"):
        return True
    return argument.annotation is not None and ast.unparse(argument.annotation).startswith(("dict[", "list["))


def test_no_test_module_imports_another():
    here = Path(__file__).parent
    for file in here.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
            assert not any(part.startswith("test_") for full in names for part in full.split(".")), file
