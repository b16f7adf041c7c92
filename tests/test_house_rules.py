"""Rules of the house that hold for every file: who imports what, and how long a file may be."""

import ast
import pathlib

import pytest

from benchmarks import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("sparvar_jax", "pallas_kernels", "convert")


def files(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Top-level names of every module imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_there_are_files_to_check():
    assert all(len(files(package)) > 5 for package in PACKAGES)


@pytest.mark.parametrize("package", ["sparvar_jax", "pallas_kernels"])
def test_torch_stays_in_convert(package):
    assert [path for path in files(package) if "torch" in imports(path)] == []


def test_kernels_import_nothing_of_ours():
    ours = {"sparvar_jax", "sparvar_convert", "benchmarks", "tests", "examples"}
    assert [path for path in files("pallas_kernels") if imports(path) & ours] == []


def test_shipped_code_imports_no_tests_or_benchmarks():
    outside = {"benchmarks", "tests", "examples"}
    assert [path for path in files(*PACKAGES) if imports(path) & outside] == []


def test_files_stay_readable():
    long = {
        str(path): n for path in files(*PACKAGES) if (n := len(path.read_text().split("\n"))) > 400
    }
    assert long == {}


def test_readme_tables_are_what_the_result_files_say():
    assert report.render(report.README.read_text()) == report.README.read_text()
