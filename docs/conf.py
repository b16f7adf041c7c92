"""How the documentation is built: `sphinx-build -W docs docs/_build`.

Notebooks (pages with a `jupytext` header) run in the build, on the CPU; a page of every result file
is made from `benchmarks/results`.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]
# Notebooks run in a process of their own, which must find the same packages.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import report  # noqa: E402
from sparvar_jax import __version__  # noqa: E402

project = "sparvar_jax"
author = "The sparvar_jax developers"
copyright = "the sparvar_jax developers, Apache-2.0"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_title = f"sparvar_jax {release}"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 280
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True

autodoc_typehints = "none"  # shapes are in the docstrings; annotations in the source
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True


def tidy(lines: list[str]) -> list[str]:
    """Docstrings of this house as reStructuredText: hanging indents and lists without blank lines.

    Blocks that start with a colon are fields that were made before.
    """
    found: list[str] = []
    block, listing = None, False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            block, listing = None, False
        elif block is None:
            block, fields, listing = indent, text.startswith((":", "..")), text.startswith("- ")
        elif not fields:
            starts = text.startswith("- ") and indent <= block
            if starts != listing and (starts or indent <= block):
                found.append("")
                listing = starts
            line = line if listing else " " * block + text
        found.append(line)
    return found


def _tidy(app, what, name, thing, options, lines: list[str]) -> None:
    del app, what, name, thing, options
    lines[:] = tidy(lines)


def _every_result(app: object) -> None:
    """Write the page with a table of every result file there is."""
    del app
    folder = pathlib.Path(__file__).parent / "results"
    text = report.every_table()
    file = folder / "every_file.md"
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


def setup(app):
    """Sphinx calls this."""
    app.connect("builder-inited", _every_result)
    app.connect("autodoc-process-docstring", _tidy, priority=900)  # after napoleon
