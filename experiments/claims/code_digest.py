"""Digests of the code that a function uses, by which a cached result is known to be of the present code.

The digest of a function covers everything in this project that it can call: functions, classes, constants and default
arguments, found by reading the source. Comments, docstrings, annotations and the layout of the source do not count.
References are resolved by name: ``module.name`` through the imports, and ``anything.method`` to every method of that
name in the classes that are reached. Names that are made at run time (``getattr``) are not found.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Unit = tuple[str, str]
"""A module and the name of a definition in it: ``function``, ``CONSTANT``, ``Class`` or ``Class.method``. The rest of a
module is named ``""``."""

_PROJECT = {"rlhf_jax", *(path.stem for path in pathlib.Path(__file__).resolve().parents[1].iterdir())}
"""The packages and modules of this project."""


class _Source(NamedTuple):
    """What a unit consists of and refers to."""

    text: str
    names: tuple[str, ...]
    """Dotted names, such as ``ppo.make_train_step``."""
    attributes: frozenset[str]
    """Names after a dot, which may be methods."""
    imports: dict[str, str]
    """Names that the unit imports itself, and what they stand for."""


class _Module(NamedTuple):
    units: dict[str, _Source]
    imports: dict[str, str]
    """What each imported name of the module stands for: a module or ``module.name``."""
    methods: dict[str, tuple[str, ...]]
    """Names of the methods of each class."""


def closure(roots: Iterable[Callable[..., Any]]) -> dict[Unit, str]:
    """Returns the source of all units of this project that the functions or classes ``roots`` use."""
    reached: dict[Unit, str] = {}
    attributes: set[str] = set()
    waiting_methods: dict[str, list[Unit]] = {}
    pending: list[Unit] = [(root.__module__, root.__qualname__) for root in roots]
    while pending:
        module_name, name = unit = pending.pop()
        module = _read(module_name)
        if unit in reached or module is None or name not in module.units:
            continue
        source = module.units[name]
        reached[unit] = source.text
        pending.append((module_name, ""))
        pending += [found for dotted in source.names for found in _resolve(module_name, dotted, source.imports)]
        for attribute in source.attributes - attributes:
            attributes.add(attribute)
            pending += waiting_methods.pop(attribute, [])
        for method in module.methods.get(name, ()):
            method_unit = (module_name, f"{name}.{method}")
            if method in attributes or method.startswith("__"):
                pending.append(method_unit)
            else:
                waiting_methods.setdefault(method, []).append(method_unit)
    return reached


def digest(*roots: Callable[..., Any]) -> str:
    """Returns the SHA-256 digest of the code that ``roots`` use."""
    whole = hashlib.sha256()
    for (module, name), text in sorted(closure(roots).items()):
        whole.update(f"{module}:{name}\n{text}\n".encode())
    return whole.hexdigest()


def _resolve(module_name: str, dotted: str, imports: dict[str, str]) -> list[Unit]:
    """Returns the units that a dotted name in a module stands for: none if it is not of this project."""
    head, *rest = dotted.split(".")
    module = _read(module_name)
    assert module is not None
    if head in module.units and head not in imports:
        method = [(module_name, f"{head}.{rest[0]}")] if rest and rest[0] in module.methods.get(head, ()) else []
        return [(module_name, head), *method]
    target = imports.get(head) or module.imports.get(head)
    return [] if target is None else _resolve_absolute(target.split(".") + rest)


def _resolve_absolute(parts: list[str]) -> list[Unit]:
    for n in range(len(parts), 0, -1):  # the longest prefix that is a module
        name = ".".join(parts[:n])
        if _read(name) is not None:
            found: list[Unit] = [(name, "")]
            return found + (_resolve(name, ".".join(parts[n:]), {}) if n < len(parts) else [])
    return []


@functools.cache
def _read(name: str) -> _Module | None:
    """Parses a module; None if it is not a module of this project."""
    if name.partition(".")[0] not in _PROJECT:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a prefix of the name is not a package
        return None
    if spec is None or spec.origin is None:
        return None
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    return _parse(_text(spec.origin), package)


def _text(path: str) -> str:
    return pathlib.Path(path).read_text()


def _parse(text: str, package: str) -> _Module:
    units: dict[str, _Source] = {}
    methods: dict[str, tuple[str, ...]] = {}
    imports: dict[str, str] = {}
    rest: list[ast.stmt] = []
    body = _Strip().visit(ast.parse(text)).body
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= _imports(node, package)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            units[node.name] = _source([node], package)
        elif isinstance(node, ast.ClassDef):
            functions = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            for each in functions:
                units[f"{node.name}.{each.name}"] = _source([each], package)
            methods[node.name] = tuple(each.name for each in functions)
            node.body = [each for each in node.body if each not in functions]
            units[node.name] = _source([node], package)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and (names := _targets(node)):
            for each in names:
                parts = [units[each].text] if each in units else []
                source = _source([node], package)
                units[each] = source._replace(text="\n".join([*parts, source.text]))
        elif not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test)):
            rest.append(node)
            imports |= _nested_imports(node, package)
    units[""] = _source(rest, package)
    return _Module(units, imports, methods)


class _Strip(ast.NodeTransformer):
    """Removes docstrings and annotations."""

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
        return node


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _source(nodes: list[ast.stmt], package: str) -> _Source:
    names: list[str] = []
    attributes: set[str] = set()
    imports: dict[str, str] = {}
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute):
                attributes.add(node.attr)
                if (dotted := _dotted(node)) is not None:
                    names.append(dotted)
            elif isinstance(node, ast.Name):
                names.append(node.id)
        imports |= _nested_imports(top, package)
    text = "\n".join(ast.dump(node) for node in nodes)
    return _Source(text, tuple(dict.fromkeys(names)), frozenset(attributes), imports)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := _dotted(node.value)) is not None:
        return f"{head}.{node.attr}"
    return None


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _nested_imports(node: ast.AST, package: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in ast.walk(node):
        if isinstance(each, ast.Import | ast.ImportFrom):
            found |= _imports(each, package)
    return found


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> dict[str, str]:
    if isinstance(node, ast.Import):
        whole = ((each.asname, each.name) for each in node.names)
        return {alias or name.partition(".")[0]: name if alias else name.partition(".")[0] for alias, name in whole}
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    return {each.asname or each.name: f"{base}.{each.name}" for each in node.names}
