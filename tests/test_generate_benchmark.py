"""The benchmark of generations on a tiny model: what it measures, checks, keeps and leaves out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from benchmarks import _record as record
from benchmarks import (
    cold_start,
    generate,
    generate_run,
    models,
    report,
    seconds_chart,
    tolerances,
)
from benchmarks import generate_stats as stats
from benchmarks.generate_bench import Bench, schedule_of
from benchmarks.generate_check import check
from benchmarks.generate_suites import SUITES, Group
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.weights.matrix import FEWEST_TOKENS
from tests import tiny_model, tiny_var
from tests.tiny_model import random_parameters

OPTIONS = generate_run.Options(repeats=2, dtype="float32")
SHORT = "skip_last_scales(5)"  # two steps to compile, where the plan does not matter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose attention is peaked, as that of trained models is."""

    def peaked(module, config, seed):
        parameters = random_parameters(module, config, seed)
        for path in parameters:
            if path.endswith("log_temperature"):
                parameters[path][...] = np.log(100)
        return parameters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "random_parameters", peaked)
        return str(tiny_model.write_tiny_model(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def bench(folder):
    made = Bench(models.build(folder, dtype="float32"), 1, cache="full")
    made.compile([made.plan("dense")])
    return made


def group(model, *plans, batch=1, text="features"):
    return Group(model, batch, None, text, plans)


def measured(groups, options=OPTIONS, budget=1e9):
    rows = []
    problems = generate_run.run(groups, options, budget, rows.append)
    return rows, problems


def test_the_headline_comes_first_and_options_replace_what_a_suite_says():
    latency = SUITES["latency"].groups()
    assert [(one.model, one.plans) for one in latency] == [
        ("infinity_2b", ("dense",)),
        ("infinity_2b", ("sparvar-paper", "sparvar-fast", "sparvar-fast+drop_uncond(3)")),
        ("infinity_8b", ("dense",)),
        ("infinity_8b", ("sparvar-paper", "sparvar-fast", "sparvar-fast+drop_uncond(3)")),
    ]
    classes = SUITES["classes"].asked(["var_d30"], ["dense"], [2, 1], None).groups()
    assert [(one.model, one.batch, one.plans) for one in classes] == [
        ("var_d30", 2, ("dense",)),
        ("var_d30", 1, ("dense",)),
    ]


def test_sizes_beyond_the_released_ones_are_square():
    assert schedule_of(1.0, "2.25M").final == (96, 96)
    with pytest.raises(ValueError, match="square only"):
        schedule_of(1.5, "2.25M")


def test_every_row_is_handed_on_measured_and_then_checked(folder):
    rows, problems = measured([group(folder, "dense"), group(folder, "sparvar-fast")])
    assert problems == []
    assert [(row["plan"], "check" in row) for row in rows] == [
        ("dense", False),
        ("dense", True),
        ("sparvar-fast", False),
        ("sparvar-fast", True),
    ]
    dense, sparse = rows[1], rows[3]
    assert dense["check"]["problem"] is None
    assert dense["kernels"] == {"dense": "xla"}
    assert sparse["kernels"] == {
        name: "xla" for name in ("dense", "cs4a decision", "cs4a", "csla boxes")
    }
    assert len(dense["seconds_by_scale"]) == 7
    assert len(dense["seconds_all"]) == 2
    assert dense["images_per_second"] == pytest.approx(1 / dense["seconds_median"])
    assert dense["density"] == 1 > sparse["density"]
    assert dense["cold_seconds"] > dense["compile_seconds"]
    assert sparse["cold_seconds"] is None  # the process was warm


def test_batches_and_classes(folder):
    classes = str(tiny_var.tiny_model()[0])
    rows, problems = measured([group(folder, SHORT, "sparvar-paper", batch=2)])
    assert problems == []
    assert [(row["batch"], row["size"]) for row in rows] == [(2, "0.06M")] * 4
    assert rows[1]["check"]["problem"] is None is rows[3]["check"]["problem"]
    unchecked = dataclasses.replace(OPTIONS, check=False)
    rows, problems = measured([group(classes, "sparvar-paper", batch=3)], unchecked)
    assert problems == []
    assert [(row["batch"], row["size"], row["pixels"]) for row in rows] == [(3, None, [24, 24])]


def test_the_check_sees_other_weights_and_only_them(bench):
    plan = bench.plan("dense")
    good = check(bench, plan)
    # Both are float32 programs of the same operations: they differ in rounding alone.
    assert good.cache_error < 1e-4
    assert good.token_agreement > 0.99
    assert good.problem is None
    wrong = Bench(bench.parts, 1)
    wrong.generator = Generator(jax.tree.map(lambda leaf: 1.05 * leaf, bench.parts.transformer))
    assert "keys and values differ" in str(check(wrong, plan).problem)


def test_eight_bit_products_have_a_tolerance_of_their_own(folder):
    """The reference multiplies the same 8-bit numbers: on a CPU both programs are XLA's."""
    parts = models.build(folder, dtype="float32", matrices="int8")
    narrow = Bench(dataclasses.replace(parts, weights="random"), 1)
    plan = narrow.plan("dense")
    assert plan.schedule.scales[-1].tokens >= FEWEST_TOKENS
    done = check(narrow, plan)
    assert done.problem is None
    assert done.tolerance == tolerances.INFINITY_EIGHT
    assert done.cache_error < 1e-4
    assert tolerances.tolerance(parts) == tolerances.TRAINED_EIGHT
    other = Bench(narrow.parts, 1)
    kernel = nnx.merge(*nnx.split(narrow.parts.transformer))
    proj = kernel.blocks[0].attn.proj
    proj.kernel_scale = nnx.data(nnx.Param(0.5 * proj.kernel_scale[...]))
    other.generator = Generator(kernel)
    assert "keys and values differ" in str(check(other, plan).problem)


def test_without_time_everything_is_left_out(folder):
    rows, problems = measured([group(folder, "dense")], budget=1.0)
    assert rows == []
    assert len(problems) == 1
    assert "left out for time" in problems[0]


def test_a_row_that_fails_does_not_end_the_run(folder, monkeypatch):
    draw = generate_run.measure

    def measure(bench, plan, repeats):
        if bench.batch == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: 5 GiB\nand more")
        return draw(bench, plan, repeats)

    monkeypatch.setattr(generate_run, "measure", measure)
    rows, problems = measured([group(folder, SHORT, batch=2), group(folder, SHORT)])
    assert rows[0]["failed"] == "out of memory"
    assert rows[-1]["check"]["problem"] is None
    assert len(problems) == 1


def test_rows_stay_until_measured_again_or_with_other_versions(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(generate.console, "use_compilation_cache", lambda: None)
    out, file = str(tmp_path / "results"), tmp_path / "results" / "generate-memory.json"
    common = ["memory", "--models", folder, "--plans", SHORT, "--repeats", "1", "--out", out]

    def rows():
        return [(row["text"], row["batch"]) for row in json.loads(file.read_text())["rows"]]

    generate.main(common)
    assert rows() == [("encoder freed", 1), ("encoder", 1)]
    row = json.loads(file.read_text())["rows"][0]
    record.add("generate-memory", row | {"batch": 4}, key=generate.KEY, folder=out)
    record.add("generate-memory", row, key=generate.KEY, folder=out)
    assert rows() == [("encoder freed", 1), ("encoder", 1), ("encoder freed", 4)]
    monkeypatch.setattr(record, "commit", lambda: "another")
    record.add("generate-memory", row, key=generate.KEY, folder=out)
    commits = [row["commit"] for row in json.loads(file.read_text())["rows"]]
    assert commits == ["another", commits[1], commits[1]] != ["another"] * 3
    monkeypatch.setattr(record, "versions", lambda: {"jax": "another"})
    record.add("generate-memory", row, key=generate.KEY, folder=out)
    assert rows() == [("encoder freed", 1)]


def test_operations_and_memory_are_those_of_the_shapes(bench):
    plan = bench.plan("dense")
    scales = bench.setting.schedule.scales
    width, hidden, layers, rows = 64, 256, 2, 2
    products = 6 * width**2 + 2 * width * hidden  # qkv, proj; cross q, proj; fc1, fc2
    expected = sum(
        rows * layers * (2 * products * scale.tokens + 4 * width * scale.tokens * scale.end)
        for scale in scales
    )
    assert stats.transformer_tflop(bench, plan) == pytest.approx(expected / 1e12)
    planned = stats.memory(bench, plan)
    cached = plan.schedule.layout("packed").total
    assert planned["cache"] * 2**30 == 2 * layers * rows * cached * width * 4
    assert planned["peak"] > planned["weights"] + planned["cache"]


def test_operations_count_what_a_folded_text_saves(bench):
    config = InfinityConfig.preset("tiny", text_max_length=16, dtype="bfloat16")
    model = models.randomise(models.abstract(Infinity, config), 0)
    folded = Bench(dataclasses.replace(bench.parts, transformer=model), 1, "0.06M")
    plan = folded.plan("dense")
    width, hidden, layers, rows, heads, tokens = 128, 512, 4, 2, 2, 16
    products = 4 * width**2 + 2 * width * heads * tokens + 2 * width * hidden
    expected = sum(
        rows * layers * (2 * products * scale.tokens + 4 * width * scale.tokens * scale.end)
        for scale in plan.schedule.scales
    )
    assert stats.transformer_tflop(folded, plan) == pytest.approx(expected / 1e12)


def test_random_text_is_as_long_as_a_prompt_and_no_longer_than_the_model_takes():
    assert models.text_features(2, 8, longest=512).features.shape == (2, 32, 8)
    assert models.text_features(2, 8, longest=16).features.shape == (2, 16, 8)


def test_a_copied_tree_names_its_commit(monkeypatch):
    monkeypatch.setenv("SPARVAR_COMMIT", "abc")
    assert record.commit() == "abc"
    monkeypatch.delenv("SPARVAR_COMMIT")
    assert record.commit() != "abc"


def test_random_weights_keep_activations_alive():
    config = InfinityConfig.preset("tiny", dtype="float32")
    module = models.randomise(models.abstract(Infinity, config), 0)
    values = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    kernel = values["blocks.0.ffn.fc1.kernel"]
    # The spread of n normal values is off by about 1 / sqrt(2 n).
    assert kernel.std() * config.width**0.5 == pytest.approx(1, abs=5 / (2 * kernel.size) ** 0.5)
    assert abs(values["blocks.0.cross_norm.scale"].mean() - 1) < 0.02
    assert not np.array_equal(kernel, values["blocks.1.ffn.fc1.kernel"])


def test_tables_show_failures_and_refuse_wrong_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    row = {"model": "m", "plan": "dense", "batch": 8, "failed": "out of memory"}
    asked = row | {"path": "portable", "cache": "lean"}
    record.write("generate-throughput", [row, asked], folder=str(tmp_path))
    shown = report.table("generate-throughput")
    assert "| m | dense | defaults | 8 |  | out of memory |" in shown
    assert "| m | dense | portable kernels, lean cache | 8 |  | out of memory |" in shown
    assert "portable" not in report.table("generate-throughput", "with", "defaults")
    assert jax.devices()[0].device_kind in shown
    wrong = row | {"check": {"problem": "too far", "cache_error": 1.0}}
    record.write("generate-latency", [wrong], folder=str(tmp_path))
    with pytest.raises(ValueError, match="too far"):
        report.table("generate-latency")


def test_curves_of_seconds_are_ordered_and_need_their_file(tmp_path):
    row = {"model": "m", "plan": "dense", "pixels": [1024, 1024], "seconds_median": 0.2}
    small = row | {"pixels": [512, 512], "seconds_median": 0.1}
    rows = [row, small, row | {"plan": "sparvar-fast"}, {"plan": "dense", "failed": "memory"}]
    dense = seconds_chart.curves("generate-sizes", rows)["dense"]
    assert dense == [(512, 0.1, "0.100"), (1024, 0.2, "0.200")]
    with pytest.raises(SystemExit, match="run its benchmark first"):
        seconds_chart.main([str(tmp_path), "generate-sizes"])
    record.write("generate-sizes", rows[:3], folder=str(tmp_path))
    seconds_chart.main([str(tmp_path), "generate-sizes"])
    with Image.open(tmp_path / "generate-sizes.png") as picture:
        assert picture.width > 500


def test_the_curve_of_devices_begins_with_one(tmp_path):
    alone = {"one_device": {"seconds_median": 0.6}, "model": "m", "plan": "dense", "pictures": 1}
    two = alone | {"devices": 2, "mesh": "1x2x1", "seconds_median": 0.37}
    four = alone | {"devices": 4, "mesh": "1x2x2", "seconds_median": 0.27}
    rows = [four, two, two | {"pictures": 4, "seconds_median": 1.0}]
    rows.append(two | {"matrices": "int8", "seconds_median": 0.25})
    wanted = [(1, 0.6, "0.600"), (2, 0.37, "0.370 (1x2x1)"), (4, 0.27, "0.270 (1x2x2)")]
    small = [(1, 0.6, "0.600"), (2, 0.25, "0.250 (1x2x1)")]
    found = seconds_chart.curves("generate-devices", rows)
    assert found == {"dense": wanted, "dense, int8": small}
    record.write("generate-devices", rows, folder=str(tmp_path))
    seconds_chart.main([str(tmp_path), "generate-devices"])
    assert (tmp_path / "generate-devices.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(folder, tmp_path):
    cold_start.main(["--model", folder, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "generate-cold.json").read_text())["rows"]
    assert [row["cache"] for row in rows] == ["empty", "filled"]
    assert rows[1]["compile_seconds"] < rows[0]["compile_seconds"]
