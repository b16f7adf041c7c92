"""Collection and reporting rules of the golden tests."""

import pytest

from tests.golden.support import coverage


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
    """Say how many golden files and fixtures took part in tests that ran, and what they noted."""
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    for report in reports:
        notes = [value for name, value in report.user_properties if name == "golden"]
        if notes:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {'; '.join(notes)}")
    for line in coverage(report.nodeid.partition("[")[2] for report in reports):
        terminalreporter.write_line(line)
