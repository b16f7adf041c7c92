"""Which marked tests run, how they compile, and that annotations hold in all of them."""

import gc
import os
import pathlib
import signal

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.compiling import set_flags

# Every call of a function of ours checks types and shapes, one letter being one length throughout
# it. A float may be a whole number, as PEP 484 has it. `JAXTYPING_DISABLE=1` checks nothing.
jaxtyping.install_import_hook(
    ["sparvar_jax", "pallas_kernels", "sparvar_convert"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

set_flags()

# A run in the background of a shell ignores interrupts, and so would every process that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of `-n` on a machine with a GPU share its memory.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Traces are millions of small objects that live on, which Python's collector would walk again and
# again.
gc.set_threshold(2_000_000, 20, 50)

MOST_MAPS = 25_000


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--optimise", action="store_true", help="compile as for users, not quickly")


def pytest_configure(config):
    """On a CPU the tests wait for compilers, not for arithmetic: leave LLVM's optimisation out.

    XLA's own passes run as ever, so the programs do the same operations. Processes that tests
    start compile as for users, and `--optimise` makes everything do so.
    """
    quick = not config.getoption("--optimise") and jax.default_backend() == "cpu"
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Let go of compiled programs when a process holds many.

    Each takes memory maps, of which Linux gives a process 65,530; XLA's compiler crashes beyond.
    What earlier modules left is not walked by collections that this one asks for: seconds each.
    """
    gc.freeze()
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and maps.read_text().count("\n") > MOST_MAPS:
        gc.unfreeze()
        gc.collect()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _annotations(request, monkeypatch):
    """Leave annotations unchecked where a test breaks them to see what users are told."""
    if request.node.get_closest_marker("unchecked"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_finish():
    """Never walk again what was imported and collected: it lives as long as the process."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Skip marked tests with the reason; `-m slow` asks for the slow ones too."""
    asked = config.getoption("--slow") or "slow" in (config.getoption("-m") or "").split()
    skips = {}
    if not asked:
        skips["slow"] = pytest.mark.skip(reason="slow: run with --slow")
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() != "gpu":
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for mark, skip in skips.items():
            if item.get_closest_marker(mark):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def compile_cache_of_its_own(tmp_path_factory, monkeypatch):
    """Commands switch the compile cache on for their process: no test sees that of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
            compilation_cache.reset_cache()  # it keeps the folder of its first use


def pytest_terminal_summary(terminalreporter):
    """Say how many golden files and fixtures took part in tests that ran, and what they noted.

    Here and not beside those tests: with `-n` only this file is read by the process that reports.
    """
    from tests.golden.support import coverage

    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    for report in reports:
        notes = [value for name, value in report.user_properties if name == "golden"]
        if notes:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {'; '.join(notes)}")
    for line in coverage(report.nodeid.partition("[")[2] for report in reports):
        terminalreporter.write_line(line)
