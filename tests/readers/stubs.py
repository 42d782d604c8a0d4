"""Runs modules of a package that cannot be imported here: real where we name them, placeholders elsewhere.

vLLM and SGLang import CUDA kernels, distributed groups and half the world at module level. Their reading code needs
none of it, so inside `Package(...)` the modules listed as real are executed from their own source files, unchanged, and
every other module of the package is a stub whose attributes are placeholders: classes that accept anything, and falsy
values that can be called and indexed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Placeholder:
    """Falsy, equal to all that is falsy; its attributes, items and results are placeholders; decorates to no effect."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (inspect.isclass(args[0]) or inspect.isfunction(args[0])):
            return args[0]
        return Placeholder()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder()

    def __getitem__(self, key: object) -> Any:
        return Placeholder()

    def __iter__(self) -> Any:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return not other

    def __hash__(self) -> int:
        return 0


class _StubMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder()


class StubClass(metaclass=_StubMeta):
    """A class of a stubbed module: may be subclassed, subscripted and instantiated with anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: object) -> Any:
        return cls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder()


def _stub_attribute(name: str) -> Any:
    if name[:1].isupper() and any(letter.islower() for letter in name):
        return _StubMeta(name, (StubClass,), {})
    return Placeholder()


class _StubModule(types.ModuleType):
    sources: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for source in self.sources:
            module = importlib.import_module(source)
            if name in vars(module):
                return vars(module)[name]
        value = _stub_attribute(name)
        setattr(self, name, value)
        return value


class Package(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A package importable only inside `with package:`.

    Args:
        root: The folder that holds the package's folder.
        name: The package.
        real: Modules executed from their own files.
        reexports: Stub module -> real modules that its attributes are looked up in first.
        doubles: (module, attribute) -> what stands there instead of a placeholder, or of a real module's own.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        real: Sequence[str],
        reexports: Mapping[str, Sequence[str]] | None = None,
        doubles: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        self.root, self.name, self.real = Path(root), name, frozenset(real)
        self.reexports, self.doubles = dict(reexports or {}), dict(doubles or {})
        self._modules: dict[str, types.ModuleType] = {}
        for module in self.real:
            if not self._file(module).is_file():
                raise FileNotFoundError(f"{self._file(module)} is missing: run tests/readers/fetch.py, or pin anew.")

    def _file(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def __enter__(self) -> Package:
        sys.meta_path.insert(0, self)
        sys.modules.update(self._modules)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.meta_path.remove(self)
        for module in [key for key in sys.modules if key == self.name or key.startswith(self.name + ".")]:
            self._modules[module] = sys.modules.pop(module)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname != self.name and not fullname.startswith(self.name + "."):
            return None
        if fullname in self.real:
            loader = _RealLoader(self, fullname)
            return importlib.util.spec_from_file_location(fullname, self._file(fullname), loader=loader)
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _StubModule(spec.name)
        module.sources = self.reexports.get(spec.name, ())
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        self.set_doubles(module)

    def set_doubles(self, module: types.ModuleType) -> None:
        for (owner, attribute), value in self.doubles.items():
            if owner == module.__name__:
                setattr(module, attribute, value)


class _RealLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, package: Package, fullname: str) -> None:
        super().__init__(fullname, str(package._file(fullname)))
        self.package = package

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        self.package.set_doubles(module)

    def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:
        """Writes no byte code beside the fetched files."""


class ModelFile:
    """Single classes of a source file, cut down to named members, without importing the file.

    A class keeps the wanted assignments and methods of its own body and of the bases that its file defines or takes
    from a sibling file; every other base is dropped.
    """

    def __init__(self, path: Path, members: Sequence[str], known: Mapping[str, Any]) -> None:
        self.path, self.members, self.known = Path(path), frozenset(members), dict(known)
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.names: dict[str, Any] = {"__name__": "lifted"}

    def resolve(self, name: str) -> Any:
        """The value of a module-level name; KeyError if the file has none."""
        if name in self.known:
            return self.known[name]
        if name in self.names:
            return self.names[name]
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self._class(node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(node, alias)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                self._bind(node.value)
                return eval(compile(ast.Expression(node.value), str(self.path), "eval"), self.names)
        raise KeyError(name)

    def _bind(self, *nodes: ast.AST) -> None:
        """Puts every module-level name that the nodes mention within their reach."""
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if isinstance(node, ast.Name) and node.id not in self.names:
                with contextlib.suppress(KeyError):
                    self.names[node.id] = self.resolve(node.id)

    def _imported(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> Any:
        if isinstance(node, ast.ImportFrom):
            sibling = self.path.with_name(f"{(node.module or '').split('.')[-1]}.py")
            inside = node.level == 1 or (node.module or "").endswith(f"models.{sibling.stem}")
            if inside and sibling.is_file():
                return ModelFile(sibling, list(self.members), self.known).resolve(alias.name)
            if node.level == 0 and (node.module or "").split(".")[0] in ("typing", "collections", "functools"):
                return getattr(importlib.import_module(node.module or ""), alias.name)
            return _stub_attribute(alias.name)
        if alias.name in ("re", "regex", "typing", "math"):
            return importlib.import_module(alias.name)
        return Placeholder()

    def _class(self, node: ast.ClassDef) -> type:
        bases = []
        for base in node.bases:
            if isinstance(base, ast.Name):
                try:
                    value = self.resolve(base.id)
                except KeyError:
                    continue
                if isinstance(value, type) and not issubclass(value, StubClass) and value not in bases:
                    bases.append(value)
        body = [statement for statement in node.body if self._wanted(statement)]
        for statement in body:
            if isinstance(statement, ast.FunctionDef):
                for argument in [*statement.args.args, *statement.args.kwonlyargs]:
                    argument.annotation = None
                statement.returns = None
            if isinstance(statement, ast.AnnAssign):
                statement.annotation = ast.copy_location(ast.Constant(None), statement)
        self._bind(*body)
        space: dict[str, Any] = {}
        exec(compile(ast.Module(body, []), str(self.path), "exec"), self.names, space)
        space.pop("__annotations__", None)
        return type(node.name, tuple(bases), space)

    def _wanted(self, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.FunctionDef):
            return statement.name in self.members
        if isinstance(statement, ast.AnnAssign):
            target = statement.target
            return isinstance(target, ast.Name) and statement.value is not None and target.id in self.members
        if isinstance(statement, ast.Assign):
            return any(isinstance(target, ast.Name) and target.id in self.members for target in statement.targets)
        return False
