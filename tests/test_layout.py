"""Tests of the project layout: names, sizes, docstrings, and the direction of imports."""

import ast
import pathlib
from collections import Counter

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = (
    *(
        "atomic",
        "types",
        "masking",
        "aggregation",
        "kl",
        "rewards",
        "advantages",
        "losses",
        "distributed",
        "parallel",
        "checkpoint",
    ),
    *("sinks", "metrics", "lm", "generation", "diagnostics", "feedback", "data", "train", "simulation", "report"),
)
EXPERIMENTS = (
    ("launch",),
    ("recipe",),
    ("sweeps",),
    ("preferences", "planning", "fault_injection", "benchmarks"),
    ("finetune",),
    ("judging", "distillation", "constitution"),
    ("online",),
)
COMMANDS = ("feedback.commands", "feedback.__main__")
"""Commands in the library, which may import everything, and which nothing else imports."""
COMMANDS_OF_A_STAGE = {"dpo", "ppo", "reward_model", "sft"}
"""Commands that may share their name with the module of `rlhf_jax.train` that they run."""


def modules(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def packages(folder):
    return sorted(path.parent for path in (ROOT / folder).rglob("__init__.py"))


def imported(path):
    """Returns the dotted names that a module imports at run time, `from a import b` as ``a.b``."""
    names = []

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def test_module_names_are_unique():
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    names = Counter(path.stem for path in [*modules("rlhf_jax"), *modules("experiments")])
    shared = {name for name, count in names.items() if count > 1}
    assert shared <= commands & COMMANDS_OF_A_STAGE


@pytest.mark.parametrize("folder", ["rlhf_jax", "experiments", "tests"])
def test_no_folder_has_more_than_16_modules(folder):
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules(folder))
    limits = {"experiments": 24}  # these are commands, each of which its help describes
    assert not {name: size for name, size in sizes.items() if size > limits.get(name, 16)}


@pytest.mark.parametrize("folder", ["rlhf_jax", "experiments"])
def test_every_package_has_a_docstring(folder):
    for package in packages(folder):
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))), package


def code_lines(path):
    """Returns the number of lines of a module, without docstrings."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented) and ast.get_docstring(node)]
    docstrings = [node.body[0] for node in nodes]
    return len(source.splitlines()) - sum((part.end_lineno or 0) - part.lineno + 1 for part in docstrings)


def test_library_modules_have_under_400_lines_without_docstrings():
    lines = {path.relative_to(ROOT).as_posix(): code_lines(path) for path in modules("rlhf_jax")}
    assert not {name: count for name, count in lines.items() if count >= 400}


def test_test_folders_mirror_the_packages():
    known = {package.relative_to(ROOT / "rlhf_jax").as_posix() for package in packages("rlhf_jax")}
    known |= {package.relative_to(ROOT / "experiments").as_posix() for package in packages("experiments")}
    known |= {"experiments", "cases"}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in modules("tests")}
    assert folders <= known


def test_library_modules_import_only_from_earlier_packages():
    wrong = []
    for path in [*modules("rlhf_jax"), *(package / "__init__.py" for package in packages("rlhf_jax"))]:
        parts = path.relative_to(ROOT / "rlhf_jax").with_suffix("").parts
        if parts == ("__init__",) or ".".join(parts).startswith(COMMANDS):
            continue
        own = LIBRARY.index(parts[0])
        for name in imported(path):
            other = name.removeprefix("rlhf_jax.")
            if name != other and (LIBRARY.index(other.split(".")[0]) > own or other.startswith(COMMANDS)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_experiments_import_only_from_earlier_packages():
    level = {name: i for i, names in enumerate(EXPERIMENTS) for name in names}
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    level |= {name: len(EXPERIMENTS) for name in commands}
    wrong = []
    for path in modules("experiments"):
        own = path.relative_to(ROOT / "experiments").parts[0].removesuffix(".py")
        for name in imported(path):
            other = name.split(".")[0]
            if other in level and other != own and level[other] >= level[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
