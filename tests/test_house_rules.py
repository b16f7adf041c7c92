"""Rules of the house that hold for every file: who imports what, and how long a file may be."""

import ast
import json
import pathlib
import re

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


@pytest.mark.parametrize("page", report.pages(), ids=lambda page: page.name)
def test_readme_tables_are_what_the_result_files_say(page):
    assert report.render(page.read_text()) == page.read_text()


def test_tables_can_keep_some_rows(tmp_path, monkeypatch):
    file = tmp_path / "cpu" / "convert.json"
    file.parent.mkdir()
    rows = [{"preset": name, "form": "flat", "seconds": 1.0} for name in ("a", "b", "c")]
    about = {"device": "x", "versions": {}, "date": "d", "commit": "e"}
    file.write_text(json.dumps({**about, "rows": rows}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = "<!-- table: cpu/convert where preset=a|c -->\n<!-- end -->"
    lines = report.render(page).splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:5]] == ["a", "c"]
    assert report.render(report.render(page)) == report.render(page)
    assert "| b |" in report.every_table()
    with pytest.raises(ValueError, match="no row whose preset is z"):
        report.table("cpu/convert", "preset", "z")


def test_the_readme_is_a_front_page():
    assert len(report.README.read_text().splitlines()) <= 200


def test_links_between_pages_and_files_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *(ROOT / "docs").glob("*/*.md")]
    pages = [page for page in pages if page.name != "every_file.md"]  # made in the build
    missing = []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            outside = not path or "://" in path or path.startswith("mailto:")
            if not outside and not (page.parent / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert missing == []
