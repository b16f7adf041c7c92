"""The command line on a tiny model: what it writes, prints and returns."""

import collections
import json
import re

import jax
import numpy as np
import pytest
import torch
import typer
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from sparvar_jax.cli import console, main
from sparvar_jax.pipelines import loading, metadata
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.runtime import programs
from sparvar_jax.weights import checkpoint
from tests.convert import sources
from tests.tiny_model import write_tiny_model
from tests.tiny_var import tiny_model, tiny_pipe

SHORT = ["--plan", "skip_last_scales(5)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The compile cache of a command goes to the test's folder, and is forgotten afterwards."""
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_generate_writes_the_pipelines_pictures_with_metadata(model, tmp_path, capsys):
    out = tmp_path / "apple.png"
    arguments = ["a red apple", "--model", str(model), "--seed", "3", "--num", "2", *SHORT]
    assert main(["generate", *arguments, "--out", str(out), "--negative", "an owl"]) == 0
    expected = Pipeline.from_checkpoint(model)(
        ["a red apple"] * 2, plan=SHORT[1], seed=3, negative="an owl"
    )
    for index, picture in enumerate(expected):
        file = tmp_path / f"apple-{3 + index}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)
        told = metadata.read_metadata(file)
        assert told["prompt"] == "a red apple"
        assert told["negative"] == "an owl"
        assert (told["seed"], told["plan"], told["guidance"]) == (str(3 + index), SHORT[1], "2.0")
        assert "jax" in told["versions"]
    shown = capsys.readouterr()
    assert "apple-4.png: 32x32" in shown.out
    assert re.fullmatch(
        r"loaded in [\d.]+ s, compiled in [\d.]+ s, drawn in [\d.]+ s "
        r"\(\d+ of \d+ programs from the compile cache\)\n",
        shown.err,
    )
    assert not list(tmp_path.glob(".*"))


def test_the_text_encoder_can_run_first_and_be_freed(model, tmp_path):
    outs = [tmp_path / "together.png", tmp_path / "freed.png"]
    arguments = ["a red apple", "--model", str(model), "--negative", "an owl", *SHORT]
    for out, options in zip(outs, ([], ["--free-text-encoder"]), strict=True):
        assert main(["generate", *arguments, "--out", str(out), *options]) == 0
    pictures = [np.asarray(Image.open(out)) for out in outs]
    np.testing.assert_array_equal(*pictures)
    assert metadata.read_metadata(outs[1]) == metadata.read_metadata(outs[0])


def test_warmup_leaves_nothing_to_compile(model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cache" / "sparvar_jax" / "xla"
    compilation_cache.reset_cache()  # it keeps the folder of its first use
    # Every program is kept, also those that compile in no time.
    enough = "jax_persistent_cache_min_compile_time_secs"
    update = jax.config.update
    monkeypatch.setattr(jax.config, "update", lambda k, v: update(k, 0.0 if k == enough else v))
    assert main(["warmup", "--model", str(model), "--num", "2", *SHORT]) == 0
    assert str(folder) in capsys.readouterr().out
    kept = named_programs(folder)
    assert {"decode", "draw_scale", "encode", "with_learned_guidance"} <= kept.keys()
    jax.clear_caches()
    out = ["--out", str(tmp_path / "x.png")]
    arguments = ["a red apple", "--model", str(model), "--num", "2", *SHORT]
    assert main(["generate", *arguments, *out]) == 0
    after = named_programs(folder)
    compilation_cache.reset_cache()
    assert {name: after[name] for name in kept} == kept


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_generate_finds_the_steps_that_warmup_kept(model, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(programs, "KEPT_ON", ("cpu",))
    if kind == "text":
        common, asked = ["--model", str(model), *SHORT], ["a red apple"]
    else:
        common, asked = ["--model", str(tiny_model()[0])], ["--class", "2"]
    assert main(["warmup", *common]) == 0
    kept = len(list((tmp_path / "cache" / "sparvar_jax" / "xla" / "programs").iterdir()))
    before = console.count_programs()
    monkeypatch.setattr(programs, "keep", lambda *_: pytest.fail("a step was compiled again"))
    assert main(["generate", *asked, *common, "--out", str(tmp_path / "x.png")]) == 0
    assert kept >= 2
    assert console.count_programs()[1] - before[1] >= kept


def named_programs(folder):
    """Function -> how many programs of it the cache holds."""
    names = (file.name.removeprefix("jit_") for file in folder.glob("*-cache"))
    return collections.Counter(re.sub(r"-[0-9a-f]+-cache$", "", name) for name in names)


def test_class_models_draw_classes(tmp_path, capsys):
    model, _ = tiny_model()
    out = tmp_path / "class.png"
    common = ["--model", str(model), "--out", str(out)]
    assert main(["generate", "--class", "2", "--seed", "4", *common]) == 0
    with Image.open(out) as picture:
        drawn = np.asarray(picture).astype(int)
    assert np.abs(drawn - tiny_pipe()([2], seed=4)[0]).max() <= 1
    told = metadata.read_metadata(out)
    assert (told["class"], told["seed"], told["guidance"]) == ("2", "4", "1.5")
    assert "negative" not in told
    capsys.readouterr()
    for arguments, message in (
        (["a cat"], "give --class N instead of a prompt"),
        ([], "give --class N"),
        (["--class", "5"], "classes must lie in 0..4"),
        (["--class", "2", "--size", "1M"], "leave out size"),
        (["--class", "2", "--free-text-encoder"], "leave out free_text_encoder"),
    ):
        assert main(["generate", *arguments, *common]) == 2
        assert message in capsys.readouterr().err


def test_info_and_warmup_of_a_class_model(capsys):
    model, _ = tiny_model()
    assert main(["info", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "pictures of 24x24" in shown
    assert "vqvae" in shown
    assert "12x12" in shown
    assert "peak about" in shown
    assert main(["warmup", "--model", str(model), "--plan", "skip_last_scales(2)"]) == 0
    assert main(["info", "--model", str(model), "--aspect", "2:1"]) == 2
    assert "leave out aspect" in capsys.readouterr().err


def test_plans_lists_presets_and_shows_one(capsys):
    assert main(["plans"]) == 0
    listed = capsys.readouterr().out
    assert "sparvar-paper" in listed
    assert "drop_uncond(...)" in listed
    assert main(["plans", "dense+drop_uncond(3)", "--depth", "2", "--size", "0.25M"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in shown[1:11]] == ["both"] * 7 + ["cond"] * 3


def test_info_shows_parts_plan_and_memory(model, capsys):
    assert main(["info", "--model", str(model), "--aspect", "2:1", "--plan", "dense"]) == 0
    shown = capsys.readouterr().out
    count = sum(
        leaf.size
        for leaf in checkpoint.abstract_parameters(
            loading.describe_model(model).transformer
        ).values()
    )
    assert f"{count:,}" in shown
    assert "pictures of 44x22" in shown
    assert "density 1.000" in shown
    assert "peak about" in shown


def test_inspect_writes_numbers_and_pictures(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "found"
    assert (
        main(["inspect", "a cat", "--model", str(model), "--size", "0.06M", "--out", str(out)]) == 0
    )
    content = json.loads((out / "inspect.json").read_text())
    # The last three scales of every layer; shares of attention mass lie in 0..1.
    assert {row["scale"] for row in content["rows"]} == {4, 5, 6}
    shares = [share for row in content["rows"] for share in row["sinks"]]
    assert min(shares) >= 0
    assert max(shares) <= 1 + 1e-6
    assert (out / "sinks.png").stat().st_size > 0
    file = tmp_path / "file"
    file.write_text("")
    assert main(["inspect", "a cat", "--model", str(model), "--out", str(file)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_convert_adds_a_part_and_writes_it_back(tmp_path, capsys):
    weights = sources.infinity_weights()
    file = sources.flat(weights, tmp_path)
    assert main(["convert", str(file), "--into", str(tmp_path / "model")]) == 0
    assert "Infinity transformer (infinity) from a flat state dict" in capsys.readouterr().out
    back = tmp_path / "back.pth"
    assert main(["convert", str(tmp_path / "model"), "--export", str(back)]) == 0
    returned = torch.load(back, weights_only=True)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[key], weights[key]) for key in weights)
    assert main(["convert", str(file)]) == 2
    assert "either --into DIR" in capsys.readouterr().err


def test_compare_returns_0_inside_and_1_outside_the_tolerance(tmp_path, capsys):
    file = tmp_path / "tokenizer.pth"
    torch.save({"vae": sources.tokenizer_weights()}, file)
    report = tmp_path / "report.json"
    arguments = ["compare", str(file), "--out", str(report)]
    assert main(arguments) == 0
    assert "inside the tolerance" in capsys.readouterr().out
    assert json.loads(report.read_text())["passed"]
    assert report.with_suffix(".png").is_file()
    assert main([*arguments, "--tolerance", "1e-12"]) == 1
    assert "OUTSIDE" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "none.pth"), "--out", str(report)]) == 2


def test_the_compile_cache_lies_in_the_cache_folder(tmp_path):
    assert console.use_compilation_cache() == tmp_path / "cache" / "sparvar_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert console.use_compilation_cache() == tmp_path / "mine"
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert console.use_compilation_cache() == "gs://bucket/cache"
    assert jax.config.values["jax_compilation_cache_dir"] == "gs://bucket/cache"
    # XLA's own kernel cache broke programs compiled by threads.
    assert "kernel_cache" not in jax.config.values["jax_persistent_cache_enable_xla_caches"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (NotImplementedError("not on this device"), 2, "error: not on this device"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (ImportError("No module named 'torch'"), 1, "sparvar-jax[convert"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "--dtype bfloat16"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_foreseen_errors_are_one_line_with_an_exit_code(error, code, text, capsys):
    app = typer.Typer()

    @app.command()
    def fail():
        raise error

    assert console.run(app, []) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_other_errors_and_asked_for_ones_keep_their_traceback(model):
    app = typer.Typer()

    @app.command()
    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        console.run(app, [])
    with pytest.raises(ValueError, match="unknown policy"):
        main(["--traceback", "plans", "nope"])
    assert main(["plans", "nope"]) == 2
