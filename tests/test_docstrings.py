"""Tests that public functions and constructors with four or more parameters document all of them."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1] / "rlhf_jax"
MANY = 4


def parameters(function):
    names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names += [name for name in (function.args.vararg, function.args.kwarg) if name]
    return [name.arg for name in names if name.arg not in ("self", "cls")]


def own_nodes(function):
    """Yields the nodes of a function's body, except nodes of functions and classes defined in the body."""
    nodes = list(function.body)
    while nodes:
        node = nodes.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))


def sections(docstring):
    """Returns the Google-style sections of a docstring: ``{"Args": [names], "Returns": [], ...}``."""
    found, name, indent = {}, None, None
    for line in docstring.splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Yields|Raises):", line):
            name, indent = heading[1], None
            found[name] = []
        elif line and not line.startswith(" "):
            name = None
        elif line and name:
            # Entries have the indentation of the first entry; deeper lines continue an entry.
            indent = len(line) - len(line.lstrip()) if indent is None else indent
            entry = re.match(r"((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:", line[indent:])
            found[name] += [part.strip(" *") for part in entry[1].split(",")] if entry else []
    return found


def missing(function, docstring, *, constructor):
    """Returns the parts that a docstring lacks."""
    names, nodes = parameters(function), list(own_nodes(function))
    if len(names) < MANY:
        return []
    written = sections(docstring or "")
    problems = [f"Args: {name}" for name in names if name not in written.get("Args", [])]
    problems += [f"Args: {name} is no parameter" for name in written.get("Args", []) if name not in names]
    yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes)
    returns = not (isinstance(function.returns, ast.Constant) and function.returns.value is None)
    if not constructor and returns and ("Yields" if yields else "Returns") not in written:
        problems.append("Yields:" if yields else "Returns:")
    if any(isinstance(node, ast.Raise) for node in nodes) and "Raises" not in written:
        problems.append("Raises:")
    return problems


def public_functions(path):
    """Returns ``(qualified name, function, docstring, is a constructor)`` for each public function of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, ast.get_docstring(node), False
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or method.name[0] != "_"):
                    constructor = method.name == "__init__"
                    documented = (method, node) if constructor else (method,)
                    docstring = "\n".join(ast.get_docstring(part) or "" for part in documented)
                    yield f"{node.name}.{method.name}", method, docstring, constructor


def test_public_functions_with_four_or_more_parameters_document_them():
    problems = []
    for path in sorted(ROOT.rglob("*.py")):
        for name, function, docstring, constructor in public_functions(path):
            if absent := missing(function, docstring, constructor=constructor):
                problems.append(f"{path.relative_to(ROOT)}:{function.lineno} {name}: {', '.join(absent)}")
    assert not problems, "\n" + "\n".join(problems)
