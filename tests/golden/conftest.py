"""Collection rules of the golden tests, and what they note for the summary."""

import pytest


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
