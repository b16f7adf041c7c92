"""`sparvar quantise`: the same pictures as rounding at load, whole directories, clear refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.cli import main
from sparvar_jax.models import eight_bits
from sparvar_jax.pipelines import quantising, sharing
from sparvar_jax.pipelines.loading import load_model
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.quantising import quantise_model
from sparvar_jax.weights import checkpoint, storage
from tests import tiny_var
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def narrow(dense):
    into = dense.parent / "toy-int8"
    assert main(["quantise", str(dense), "--into", str(into)]) == 0
    return into


def same_leaves(one, other):
    ours, theirs = (jax.tree.leaves(model.transformer) for model in (one, other))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_it_draws_what_rounding_at_load_draws(dense, narrow):
    call = {"seed": 3, "size": "0.06M", "plan": "skip_last_scales(5)"}
    pipes = [
        Pipeline.from_checkpoint(narrow, dtype="float32"),
        Pipeline.from_checkpoint(dense, dtype="float32", weights="int8"),
    ]
    same_leaves(pipes[0].model, pipes[1].model)
    ours, theirs = (pipe(["a red apple"], **call) for pipe in pipes)
    np.testing.assert_array_equal(ours, theirs)
    assert pipes[0].model.defaults == pipes[1].model.defaults


@pytest.mark.parametrize(("form", "dtype"), [("int8", "bfloat16"), ("fp8", "float32")])
def test_classes_too_in_both_forms_whatever_is_computed_in(form, dtype, tmp_path):
    source = tiny_var.tiny_model()[0]
    quantise_model(source, tmp_path / "narrow", form)
    stored = load_model(tmp_path / "narrow", dtype=dtype)
    same_leaves(stored, load_model(source, dtype=dtype, weights=form))
    assert eight_bits.form_of(stored.transformer) == form
    kernels = {x.dtype for x in jax.tree.leaves(stored.transformer) if x.dtype.itemsize == 1}
    e4m3, int8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)
    assert kernels == ({int8, e4m3} if form == "int8" else {e4m3})


def test_the_directory_says_what_it_is(dense, narrow, capsys):
    assert main(["info", "--model", str(narrow)]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if " transformer " in one)
    assert " int8 " in line
    assert main(["info", "--model", str(dense), "--weights", "fp8"]) == 0
    assert " fp8 " in capsys.readouterr().out
    manifest = json.loads((narrow / "manifest.json").read_text())
    assert {manifest[part]["quantised"]["model"] for part in checkpoint.PARTS} == {"toy"}
    sizes = [
        sum(file.stat().st_size for file in (folder / "transformer").rglob("*") if file.is_file())
        for folder in (dense, narrow)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_saved_model_stays_what_it_is(dense, tmp_path):
    model = load_model(dense, dtype="float32", weights="int8")
    sharing.save(model, tmp_path / "saved")
    same_leaves(load_model(tmp_path / "saved", dtype="float32"), model)


def test_a_run_that_was_stopped_is_gone_on_with(dense, narrow, tmp_path, monkeypatch):
    into, write = tmp_path / "narrow", storage.OrbaxWriter.write

    def stopped(self, path, array):
        write(self, path, array)
        if path.endswith("kernel_scale"):
            raise KeyboardInterrupt

    monkeypatch.setattr(quantising.OrbaxWriter, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantise_model(dense, into)
    monkeypatch.undo()
    assert not (into / "transformer").exists()
    (into / ".stage-12345678").mkdir()  # what a killed run leaves
    kept = (into / "tokenizer" / storage.SAFETENSORS).stat()
    assert quantise_model(dense, into) == ("transformer",)
    assert (into / "tokenizer" / storage.SAFETENSORS).stat() == kept
    assert quantise_model(dense, into) == ()
    assert sorted(p.name for p in into.iterdir()) == sorted(p.name for p in narrow.iterdir())
    same_leaves(load_model(into), load_model(narrow))


def test_bad_input_is_one_line(dense, narrow, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert main([*map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    target = tmp_path / "out"
    quantise = ["quantise", "--into", target]
    assert "does not exist" in refused(*quantise, tmp_path / "nothing" / "here")
    assert "8 bits already" in refused(*quantise, narrow)
    assert "choose another folder" in refused(
        "quantise", dense, "--into", narrow, "--format", "fp8"
    )
    assert "choose another folder" in refused("quantise", dense, "--into", dense)
    assert "stored as int8" in refused("info", "--model", narrow, "--weights", "fp8")
    damaged = shutil.copytree(dense, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    config["transformer"]["matrices"] = "int4"
    (damaged / "config.json").write_text(json.dumps(config))
    assert "form int4, expected int8 or fp8" in refused("info", "--model", damaged)
    config["transformer"]["matrices"] = "int8"
    (damaged / "config.json").write_text(json.dumps(config))
    assert "do not fit" in refused("generate", "a", "--model", damaged, "--out", tmp_path / "a.png")
    monkeypatch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert "cannot write to" in refused(*quantise, dense)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]
