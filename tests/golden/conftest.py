"""Collection and reporting rules of the golden tests."""

import re

import pytest

from tests.golden.support import golden_folder, golden_stems


def pytest_pycollect_makeitem(collector, name, obj):
    """Generate no test, not even a skipped one, from an empty parameter list (no files)."""
    for mark in getattr(obj, "pytestmark", ()):
        if mark.name == "parametrize" and len(mark.args) > 1 and not list(mark.args[1]):
            return []
    return None


@pytest.fixture
def golden_note(record_property):
    """Function that adds a line (measured error, exempt bits) to the summary of the run."""
    return lambda text: record_property("golden", text)


def pytest_terminal_summary(terminalreporter):
    """Say how many golden files took part in tests that ran."""
    folder = golden_folder()
    if not folder.is_dir():
        terminalreporter.write_line(
            f"golden folder {folder} is absent: no golden parity was checked"
            " (set SPARVAR_GOLDEN_DIR)"
        )
        return
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    for report in reports:
        notes = [value for name, value in report.user_properties if name == "golden"]
        if notes:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {'; '.join(notes)}")
    ids = {report.nodeid.partition("[")[2] for report in reports}
    stems = golden_stems()
    checked = [stem for stem in stems if any(re.search(rf"\b{re.escape(stem)}\b", i) for i in ids)]
    line = f"golden files checked: {len(checked)} of {len(stems)} (folder {folder})"
    missed = sorted(set(stems) - set(checked))
    terminalreporter.write_line(line + (f"; not checked: {', '.join(missed)}" if missed else ""))
