"""Bad input through the command line: one line, exit code 2, nothing half-written."""

import os
import pickle
import re
import sys

import pytest
import torch

from sparvar_jax.cli import main
from tests.convert import sources
from tests.test_cli import own_cache  # noqa: F401  (a fixture that every test here uses)
from tests.tiny_model import write_tiny_model


class Code:
    """Unpickling this would make a folder named "ran"."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def truncated(weights, file):
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_key(weights, file):
    del weights["block_chunks.1.module.0.ffn.fc2.bias"]
    torch.save(weights, file)


def with_another_key(weights, file):
    torch.save(weights | {"block_chunks.0.module.0.gate": torch.zeros(3)}, file)


def with_a_wrong_shape(weights, file):
    weights["head.weight"] = weights["head.weight"][:-2]
    torch.save(weights, file)


def with_nan(weights, file):
    weights["pos_start"][0, 0, 5] = float("nan")
    torch.save(weights, file)


def pickle_with_code(weights, file):
    torch.save({**weights, "extra": Code()}, file)


def bare_pickle_with_code(weights, file):
    file.write_bytes(pickle.dumps(Code(), protocol=2))


class Builtin:
    """Unpickling this would call `print`, which a pickle names without a module."""

    def __reduce__(self):
        return print, ("ran",)


def builtin_in_a_pickle(weights, file):
    torch.save({**weights, "extra": Builtin()}, file)


def builtin_in_a_new_pickle(weights, file):
    file.write_bytes(pickle.dumps({"module": "builtins", "extra": [Builtin()]}, protocol=4))


def of_no_known_kind(weights, file):
    torch.save({"layer.weight": torch.zeros(2, 2)}, file)


def empty(weights, file):
    file.write_bytes(b"")


BAD_SOURCES = {
    truncated: "truncated",
    without_a_key: r"block_chunks\.1\.module\.0\.ffn\.fc2\.bias",
    with_another_key: r"block_chunks\.0\.module\.0\.gate",
    with_a_wrong_shape: r"head\.weight \[30, 64\]",
    with_nan: "pos_start holds NaN",
    pickle_with_code: r"posix\.mkdir, which could run code",
    bare_pickle_with_code: r"posix\.mkdir, which could run code",
    builtin_in_a_pickle: "its pickle wants to use print, which could run code",
    builtin_in_a_new_pickle: "its pickle wants to use print, which could run code",
    of_no_known_kind: "no known kind",
    empty: "truncated or not a PyTorch file",
}


def refused(arguments, capsys):
    """The single error line of a refused command."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("errors") / "model")


@pytest.mark.parametrize("spoil", BAD_SOURCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", ["convert", "compare"])
def test_bad_checkpoints(command, spoil, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "source.pth"
    spoil(sources.infinity_weights(), file)
    target = ["--into", tmp_path / "model"] if command == "convert" else []
    report = [] if command == "convert" else ["--out", tmp_path / "report.json"]
    line = refused([command, file, *target, *report], capsys)
    assert re.search(BAD_SOURCES[spoil], line), line
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


def test_a_checkpoint_of_the_wrong_kind(tmp_path, capsys):
    file = sources.container(sources.tokenizer_weights(), tmp_path)
    line = refused(["convert", file, "--into", tmp_path / "model", "--kind", "infinity"], capsys)
    assert "is of kind bsq_vae (Infinity BSQ tokenizer), expected infinity" in line
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs /proc, where root fails too"
)
def test_folders_without_permission(model, tmp_path, capsys):
    file = sources.flat(sources.infinity_weights(), tmp_path)
    assert "/proc" in refused(["convert", file, "--into", "/proc/model"], capsys)
    out = ["--out", "/proc/x.png"]
    assert "cannot write /proc/x.png" in refused(["generate", "x", "--model", model, *out], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--model", "MODEL"], "the prompt is empty"),
        (["x", "--model", "MODEL", "--aspect", "wide"], "W:H such as 16:9"),
        (["x", "--model", "MODEL", "--aspect", "0:1"], "W:H such as 16:9"),
        (["x", "--model", "MODEL", "--plan", "nope"], "unknown policy 'nope'"),
        (["x", "--model", "MODEL", "--plan", "skip_last_scales(9)"], "0..6, got 9"),
        (["x", "--model", "MODEL", "--size", "4K"], "0.06M, 0.25M, 0.60M, 1M"),
        (["x", "--model", "MODEL", "--seed", "-1"], "seed must lie in"),
        (["x", "--model", "MODEL", "--dtype", "int8"], "int8"),
        (["x", "--model", "MODEL", "--num", "0"], "num"),
        (["x", "--model", "MODEL", "--out", "PLACE/none/x.png"], "does not exist"),
        (["x", "--model", "MODEL", "--out", "PLACE/x.jpg"], "must name a .png"),
        (["x", "--model", "PLACE/none"], "none does not exist"),
        (["x", "--model", "PLACE"], "not a model directory"),
        (["--model", "MODEL"], "Missing argument"),
        (["--model", "MODEL", "--class", "1"], "this model draws prompts"),
        (["x", "--model", "MODEL", "--seed", "1", "--class", "1"], "this model draws prompts"),
    ],
)
def test_bad_calls_of_generate(model, tmp_path, arguments, message, capsys):
    out = [] if "--out" in arguments else ["--out", "PLACE/x.png"]
    filled = [
        text.replace("MODEL", str(model)).replace("PLACE", str(tmp_path))
        for text in ["generate", *arguments, *out]
    ]
    assert message in refused(filled, capsys)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


@pytest.mark.filterwarnings("default")  # as for users
def test_a_long_prompt_is_cut_with_one_warning(model, tmp_path, capsys):
    out = tmp_path / "x.png"
    arguments = ["--model", str(model), "--out", str(out), "--plan", "skip_last_scales(6)"]
    assert main(["generate", "a red apple " * 200, *arguments]) == 0
    line, times = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the prompt has 601 tokens and is cut to 512")
    assert times.startswith("loaded in ")
    assert out.is_file()


def test_a_damaged_model_directory(tmp_path, capsys):
    write_tiny_model(tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ["generate", "x", "--model", tmp_path / "model", "--out", tmp_path / "x.png"]
    assert "weights.safetensors is damaged" in refused(arguments, capsys)
    (tmp_path / "model" / "config.json").write_text("{")
    assert "not valid JSON" in refused(arguments, capsys)
    assert not (tmp_path / "x.png").exists()
