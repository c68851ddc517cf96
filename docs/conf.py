"""Settings of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build``."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
from typing import Any

from docutils import nodes
from sphinx.util import logging

import rlhf_jax

project = "rlhf_jax"
author = "the rlhf_jax authors"
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints", "claims/**"]  # claims.md includes the last
# A name in single backticks is a link where it names an object of the library, and code where it does not.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(pathlib.Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "rlhf_jax"
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": False,
    "use_download_button": False,
    "navbar_persistent": [],
}
html_copy_source = False
html_show_sphinx = False

API = pathlib.Path(__file__).parent / "api" / "generated"


def public_modules() -> list[str]:
    """Every module of the library none of whose names begins with an underscore, parents first."""
    found = pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax.")
    names = [module.name for module in found]
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def page(top: str, modules: list[str]) -> str:
    """The reference page of one module, or of one package with all its modules.

    A package documents the names that it re-exports, and its modules only the rest.
    """
    lines = []
    exported = {
        id(vars(package)[name])
        for package in (importlib.import_module(module) for module in modules)
        if hasattr(package, "__path__")
        for name in getattr(package, "__all__", ())
    }
    for module in modules:
        loaded = importlib.import_module(module)
        own = [
            name
            for name, value in vars(loaded).items()
            if getattr(value, "__module__", None) == module and not name.startswith("_") and id(value) in exported
        ]
        lines += [module, ("=" if module == top else "-") * len(module), "", f".. automodule:: {module}"]
        # Where a function has the name of its module, the package's attribute is the function.
        parent, _, short = module.rpartition(".")
        shadowed = getattr(importlib.import_module(parent), short) is not loaded
        lines += ["   :members:", *([f"   :exclude-members: {', '.join(own)}"] if own else [])]
        lines += [*(["   :no-index:"] if shadowed else []), ""]
    return "\n".join(lines)


def write_reference(app: Any) -> None:
    """Writes ``api/generated/*.rst`` from the modules that exist, so that no public module can be left out.

    A page that `docs/api/index.md` does not list is an error of the build.
    """
    API.mkdir(parents=True, exist_ok=True)
    modules = public_modules()
    pages = {}
    for top in (name for name in modules if name.count(".") == 1):
        pages[top] = page(top, [name for name in modules if name == top or name.startswith(f"{top}.")])
    for old in API.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for top, text in pages.items():
        file = API / f"{top}.rst"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what dataclasses and named tuples generate."""
    doc = getattr(obj, "__doc__", None) or ""
    generated = doc.startswith("Alias for field number") or (name == "replace" and what == "class")
    return True if generated else None


def exists(name: str) -> bool:
    """Whether a dotted name is an object of the library, or a field without a default."""
    parent, _, last = name.rpartition(".")
    try:
        return hasattr(holder := pkgutil.resolve_name(parent), last) or last in holder.__annotations__
    except (ImportError, AttributeError):
        return False


def short_names(app: Any, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Resolves ``losses.dpo`` and ``train.ppo.update`` as names below ``rlhf_jax``."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"].rstrip("()")
    for prefix in ("rlhf_jax.", "rlhf_jax.train.", "rlhf_jax.data.", f"{node.get('py:module')}."):
        if prefix + target in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], prefix + target, node, content
            )
    if target.startswith("rlhf_jax.") and not exists(target):
        logging.getLogger(__name__).warning("%s does not exist", target, location=node)
    return None


def setup(app: Any) -> None:
    """Connects the functions above."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", short_names)
