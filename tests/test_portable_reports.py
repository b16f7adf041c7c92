"""What is said of kernels for GPUs that are not here: tables, estimates, and findings of tools."""

import json
import sys

import pytest

from benchmarks import assemble, expected, kernels, sanitize, tune
from benchmarks.gpus import GPUS
from pallas_kernels import support
from pallas_kernels.portable import tuning

SAID = """
kernels: dense_attention
ptxas info    : Compiling entry function 'wrapped_transpose' for 'sm_80'
ptxas info    : Function properties for wrapped_transpose
    0 bytes stack frame, 64 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 13 registers, used 0 barriers
ptxas info    : Compiling entry function 'dense_attention' for 'sm_80'
ptxas info    : Function properties for dense_attention
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 234 registers, used 1 barriers
"""
LAUNCHED = {"dense_128": {"dense_attention": 98304}}


def problems(said, launched=LAUNCHED, family="8.0"):
    rows = assemble._rows(GPUS[family], "dense/128", said, launched)
    return rows, assemble._wrong(GPUS[family], rows, said)


def test_what_the_assembler_says_of_our_kernels_is_kept():
    (row,), wrong = problems(SAID.format(stores=0, loads=0))
    assert (row.kernel, row.target, row.registers, row.shared) == (
        "dense_attention", "sm_80", 234, 98304,
    )  # fmt: skip
    assert row.spills == 0
    assert wrong == []


def test_spills_room_and_failures_are_problems():
    assert problems(SAID.format(stores=12, loads=20))[1] == ["dense_attention spills 32 bytes"]
    fits = SAID.format(stores=0, loads=0)
    large = {"dense_128": {"dense_attention": 101377}}
    assert problems(fits, large, "8.6")[1] == [
        "dense_attention needs 101377 bytes of shared memory"
    ]
    assert problems("kernels: dense_attention\n")[1] == ["not assembled: dense_attention"]
    assert problems("nothing")[1] == ["not assembled: no kernel"]
    assert problems("failed: ValueError: no\n")[1] == ["ValueError: no"]


def test_launches_are_read_by_program(tmp_path):
    line = "001: kCustomKernel [source | next=002 (1)] dense_attention grid: [32, 56, 1] threads: "
    file = tmp_path / "module_0001.jit_dense_128.thunk_sequence.txt"
    file.write_text(f"{line}[256, 1, 1]  shared_memory: 98304 bytes\n")
    assert assemble._launches(tmp_path) == LAUNCHED


def test_the_table_of_the_results_is_what_the_file_says():
    file = assemble.record.RESULTS / "assembled.json"
    rows = json.loads(file.read_text())["rows"]
    assert file.with_suffix(".md").read_text() == assemble.table(rows)
    assert {row["family"] for row in rows} == set(GPUS)
    assert not any(row["spills"] for row in rows)


def test_expected_times_follow_from_published_numbers(tmp_path):
    assert expected.factor(GPUS["9.0"]) == 1.0
    # 989 / 312 TFLOP/s; bandwidth alone would give 3.35 / 2.04.
    assert expected.factor(GPUS["8.0"]) == pytest.approx(3.17, abs=5e-3)
    rows = [
        {"case": "8b/scale12/dense", "implementation_used": name, "median_ms": ms}
        for name, ms in (("portable", 2.0), ("cudnn", 1.0))
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": rows}))
    times = expected.measured(tmp_path / "kernels.json")
    assert times == {"dense": 2.0}
    line = next(line for line in expected.table(times).splitlines() if "A100" in line)
    assert line.endswith("| 8.0 | assembled | 3.17 | about 6.34 ms |")
    assert expected.measured(tmp_path / "missing.json") == {}


def test_the_page_of_kernels_is_what_the_files_say():
    page = expected.PAGE.read_text()
    assert expected.render(page, expected.measured()) == page
    with pytest.raises(ValueError, match="has no table"):
        expected.render("# Kernels", {})


@pytest.mark.parametrize(
    ("tool", "summary", "status", "want"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", 0, []),
        ("memcheck", "ERROR SUMMARY: 3 errors", 86,
         ["memcheck: ERROR SUMMARY: 3, exit status 86"]),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, []),
        ("racecheck", "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warnings)", 0,
         ["racecheck: RACECHECK SUMMARY: 1, exit status 0"]),
        ("racecheck", "no GPU", 1, ["racecheck gave no summary, exit status 1"]),
    ],
)  # fmt: skip
def test_findings_of_the_sanitizer_are_problems(tmp_path, tool, summary, status, want):
    command = tmp_path / "compute-sanitizer"
    script = f"print('ran: dense'); print('========= {summary}'); raise SystemExit({status})"
    command.write_text(f"#!{sys.executable}\n{script}\n")
    command.chmod(0o755)
    assert sanitize.watch(tool, str(command)) == want


def test_a_result_that_is_not_finite_is_a_problem(tmp_path):
    command = tmp_path / "compute-sanitizer"
    command.write_text(
        f"#!{sys.executable}\nprint('ran: dense not finite\\nERROR SUMMARY: 0 errors')\n"
    )
    command.chmod(0o755)
    assert sanitize.watch("memcheck", str(command)) == ["ran: dense not finite"]


def test_tiles_are_tried_where_the_table_says_and_put_back(monkeypatch):
    """A call reads the candidate's tiles; wrong and failing ones are left out."""
    device = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
    monkeypatch.setattr(support, "device_of", lambda *operands: device)
    before = tuning.tiles("windows", 128, True, 128, (8, 0))

    def run(case, rows, calls, batches):
        config = tuning.tiles("windows", 128, True, 128, (8, 0))
        if config.stages == 4:
            raise RuntimeError("no room")
        ms = config.block_q * config.block_k / 1000 + config.stages
        error = 1.0 if config.block_k == 32 else 2e-3
        named = dict(case=case.name, implementation="", dtype="", batch_rows=rows, median_ms=ms)
        errors = dict(max_error=0.0, relative_error=error, tolerance=kernels.TOLERANCE)
        return kernels.Row(
            **named, **errors, implementation_used="portable", spread_ms=0.0, density=1.0,
            tflops_kept=1.0,
        )  # fmt: skip

    monkeypatch.setattr(kernels, "run_ours", run)
    found = tune.times("csla-boxes", 1, 1)
    best = min(found, key=found.get)
    assert (best.block_q, best.block_k, best.warps, best.stages) == (64, 64, 4, 2)
    assert len(found) == 8
    assert tuning.tiles("windows", 128, True, 128, (8, 0)) == before
    assert all(192 % config.block_q == 0 for config in tune.candidates(192))
