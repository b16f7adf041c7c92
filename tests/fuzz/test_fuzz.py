"""Mutated input is read or refused in one line: a few hundred cases here, `-m tests.fuzz` more.

The campaign runs in a process of its own, with a limit of memory and of time for every case.
"""

import contextlib
import io
import os
import pickle
import time

import pytest

hypothesis = pytest.importorskip("hypothesis")

from tests.fuzz import campaign, canary, limits, mutations, seeds, targets  # noqa: E402

CASES = 30


@pytest.fixture(scope="module")
def child():
    made = campaign.Child(patience=240)
    yield made
    made.close()


def test_mutated_input_is_read_or_refused(child):
    """In one test, so that workers share one child."""
    counts = {name: child.try_target(name, CASES, 0, set(), 60.0) for name in targets.TARGETS}
    found = [found.as_test() for one in counts.values() for found in one.found]
    assert not found, "\n" + "\n".join(found)
    assert min(one.cases for one in counts.values()) >= CASES // 3, counts
    assert all(one.read or one.refused for one in counts.values())


def test_code_in_a_pickle_is_heard(tmp_path):
    """The proof that no code ran can fail: Python's own loader does run it."""

    class Bird:
        def __reduce__(self):
            return canary.sing, ()

    class Process:
        def __reduce__(self):
            return os.system, ("true",)

    canary.watch()
    for harm in (Bird(), Process()):
        with pytest.raises(canary.Ran, match=r"canary|os\.system"), canary.listening():
            pickle.loads(pickle.dumps(harm))
    with canary.listening():
        pickle.loads(pickle.dumps({"a": 1}))


def test_names_of_code_are_put_into_pickles():
    """Some step of damage puts each name into the pickle of a checkpoint."""
    content = seeds.torch_files()[-1]
    asked = {
        mutations.on_pickle(content, (operation, place << 9, "")).count(name)
        for name in (b"csystem"[1:], b"sing")
        for operation in range(11)
        for place in range(len(mutations.NAMES))
    }
    assert 1 in asked


PLANTED = {
    "traceback": (lambda: {}["x"], KeyError),
    "memory": (lambda: bytearray(2 << 30), limits.TooMuch),
    "canary": (canary.sing, canary.Ran),
    "control": (lambda: targets._command(["convert", "x"]), None),
}


@pytest.mark.parametrize("case", PLANTED)
def test_faults_are_found(monkeypatch, case):
    run, error = PLANTED[case]
    planted = targets.Target(targets.TARGETS["plan"].cases, lambda text, folder: run())
    monkeypatch.setitem(targets.TARGETS, "planted", planted)
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected:
        limits.limited(lambda: targets.check("planted", "dense"))


def test_a_case_that_does_not_end_is_ended():
    start = time.process_time()
    with pytest.raises(limits.TooLong):
        limits.limited(lambda: [None for _ in iter(int, 1)], memory=8 << 30, seconds=0.2)
    assert time.process_time() - start < 20


def test_what_a_library_writes_itself_is_heard():
    with pytest.raises(limits.Noise, match="noise"), limits.quiet():
        os.write(2, b"noise")


def test_a_failure_is_shrunk_and_printed_as_a_test(monkeypatch):
    def fails(text, folder):
        if "csla" in text:
            raise KeyError(text)

    planted = targets.Target(targets.TARGETS["plan"].cases, fails)
    monkeypatch.setitem(targets.TARGETS, "planted", planted)
    monkeypatch.setattr(campaign, "_parent", [os.open(os.devnull, os.O_WRONLY)])
    said = list(campaign.try_target("planted", 200, 0, set(), 60.0))
    (found,) = [campaign.Found(*message["found"]) for message in said if "found" in message]
    assert found.case in ("'csla'", "'csla()'")
    assert f"check('planted', {found.case})" in found.as_test()
    with pytest.raises(KeyError):
        exec_test(found.as_test())
    known = list(campaign.try_target("planted", 50, 0, {found.signature}, 60.0))
    assert not [message for message in known if "found" in message]


def exec_test(text):
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(text, scope)  # what a user would paste
        next(value for name, value in scope.items() if name.startswith("test_"))()


def test_a_child_that_dies_is_a_failure_and_is_replaced(child):
    counts = child.try_target("no such target", 10, 0, set(), 10.0)
    assert [found.kind for found in counts.found] == ["death with 1"]
    assert child._process is None
