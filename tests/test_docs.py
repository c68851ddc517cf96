"""Tests that the documentation's Python blocks run and that its commands name existing scripts and flags."""

import ast
import builtins
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from rlhf_jax.feedback import __main__ as store_commands

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if not {"_build", "tutorials", "jupyter_execute"} & set(page.parts)]
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """Returns the fenced blocks of a language, each padded with empty lines so that line numbers match the page."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: m.start(2)].count("\n") + m[2] for m in FENCE.finditer(text) if m[1] == language]


def commands(page):
    """Yields the command lines that run a script of experiments/, in console blocks and in the text."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"python (experiments/(?!NAME)\w+\.py[^`'\n]*)", text):
        yield line.split("#")[0].split("&&")[0].strip()


@pytest.mark.parametrize("name", [name for name, page in NAMES.items() if blocks(page, "python")])
def test_the_python_blocks_of_a_page_run_in_order(name, tmp_path):
    # The blocks run in a separate process, since some pages choose the number of devices before JAX starts.
    script = tmp_path / "page.py"
    program = "import jax\njax.config.update('jax_platforms', 'cpu')\n"
    for block in blocks(NAMES[name], "python"):
        program += f"exec(compile({block!r}, {name!r}, 'exec'), globals())\n"
    script.write_text(program, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def load_script(script):
    """Imports a script under another name, since a package may have its name."""
    name = f"{pathlib.Path(script).stem}_script"
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / script)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


OWN = ["--model", "MODEL", "--data.path", "FILE"]


@pytest.fixture(scope="module")
def flags():
    """Returns the flags of each script, read from its --help, which depends on whether model and data are given."""

    @functools.cache
    def of(script, own=False):
        assert (ROOT / script).is_file(), f"{script} does not exist"
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
            load_script(script).main([*OWN * own, "--help"])
        assert left.value.code in (0, None)
        return {"--help", *re.findall(r"--[\w.-]+", shown.getvalue())}

    return of


@pytest.mark.parametrize("name", [name for name, page in NAMES.items() if list(commands(page))])
def test_commands_name_scripts_and_flags_that_exist(name, flags):
    for command in commands(NAMES[name]):
        script, *arguments = shlex.split(command)
        given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        known = flags(script, set(OWN) & given == {"--model", "--data.path"})
        assert given <= known, f"{command}: unknown {sorted(given - known)}"


def store_flags(name):
    """Returns the flags of a command of a comparison store."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        store_commands.main([name, "--help"])
    return {"--help", *re.findall(r"--[\w.-]+", shown.getvalue())}


def test_commands_of_a_store_name_flags_that_exist():
    for page in PAGES:
        for name, rest in re.findall(r"python -m rlhf_jax\.feedback (\w+)([^`\n]*)", page.read_text(encoding="utf-8")):
            given = {argument.split("=")[0] for argument in shlex.split(rest) if argument.startswith("--")}
            assert given <= store_flags(name), f"{page}: {name}{rest}"


def test_flags_that_pages_mention_exist(flags):
    scripts = [f"experiments/{path.name}" for path in sorted((ROOT / "experiments").glob("*.py"))]
    known = set().union(*(flags(script, own) for script in scripts for own in (False, True))) | {
        "--doctest-modules",
        "--keep-going",
    }
    known = known.union(*map(store_flags, ("serve", "assign", "report", "export", "import")))
    for name, page in NAMES.items():
        mentioned = set(re.findall(r"`(--[a-z][\w.-]*\w)(?![\w.*-])", page.read_text(encoding="utf-8")))
        assert mentioned <= known, f"{name}: unknown {sorted(mentioned - known)}"


def test_names_that_pages_mention_exist():
    prefixes = {}  # first part of a name on a page -> full name of the module
    for package in ("rlhf_jax.data", "rlhf_jax.distributed", "rlhf_jax.train", "rlhf_jax"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            prefixes[module.name] = f"{package}.{module.name}"
    for page, path in NAMES.items():
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for name, first in re.findall(r"`((?:rlhf_jax\.)?(\w+)\.[\w.]*\w)[`(<]", text):
            if first in prefixes and not name.endswith((".py", ".jsonl", ".html", ".md")):
                full = prefixes[first] + name.removeprefix("rlhf_jax.").removeprefix(first)
                parent, last = full.rsplit(".", 1)
                holder = pkgutil.resolve_name(parent)
                assert hasattr(holder, last) or last in holder.__annotations__, f"{page}: {name} does not exist"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_programs_of_the_python_page_are_complete_and_short(tmp_path):
    _, *programs = blocks(ROOT / "docs" / "python.md", "python")
    assert len(programs) == 5
    for program in programs:
        assert len([line for line in program.splitlines() if line.strip()]) <= 40
        names = {node.id for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Name)}
        assert names <= defined(program) | set(dir(builtins)), "a program uses a name of another one"


def defined(program):
    """Returns the names that a program binds."""
    names = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            names |= {each.arg for each in node.args.args} | (
                {node.name} if isinstance(node, ast.FunctionDef) else set()
            )
    return names


def test_the_run_on_a_slice_of_16_chips_has_batches_that_divide_them():
    (command,) = [
        each for each in commands(ROOT / "docs" / "hosts.md") if "--mesh.data -1" in each and "--mesh.fsdp 4" in each
    ]
    _, *arguments = shlex.split(command.rstrip("'\\"))
    instructgpt = importlib.import_module("instructgpt")
    instructgpt.parse(["4" if argument == "-1" else argument for argument in arguments])
