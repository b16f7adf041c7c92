"""`sparvar quantise`: the same pictures as rounding at load, whole directories, clear refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.cli import main
from sparvar_jax.models import eight_bits
from sparvar_jax.models.text_tokens import load_tokenizer
from sparvar_jax.pipelines import loading, memory, quantising, sharing
from sparvar_jax.pipelines.loading import load_model
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.quantising import quantise_model
from sparvar_jax.pipelines.text_encoder import TextEncoder
from sparvar_jax.weights import checkpoint, storage
from tests import tiny_model, tiny_var
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
    ours, theirs = (jax.tree.leaves((m.transformer, m.text_encoder)) for m in (one, other))
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


def test_transformers_gives_the_features_of_an_exported_text_encoder(dense, narrow):
    """The directory's matrices are int8 with scales; exported they are what these stand for, and
    from them transformers computes in float64 what ours does in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from sparvar_convert.export import export_part

    ours = TextEncoder.from_checkpoint(narrow, dtype="float32")
    features, lengths = ours(["a red apple", "an owl"])
    alike = TextEncoder.from_checkpoint(dense, dtype="float32", weights="int8")
    np.testing.assert_array_equal(alike(["a red apple", "an owl"]).features, features)
    ids, _ = load_tokenizer(narrow / "text").encode(["a red apple", "an owl"], features.shape[1])
    config = tiny_model.TEXT
    model = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab, d_model=config.width, d_kv=config.head_dim,
            d_ff=config.mlp_width, num_layers=config.depth, num_heads=config.heads,
            feed_forward_proj="gated-gelu",
        )
    ).double().eval()  # fmt: skip
    tensors = dict(export_part(narrow, "text"))
    model.load_state_dict({name: value.double() for name, value in tensors.items()}, strict=False)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids).long(), attention_mask=mask.long())
    expected = (out.last_hidden_state * mask[..., None]).numpy()
    # Sums of a hundred float32 terms, see test_t5.py.
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()
    dtypes = {x.dtype for x in jax.tree.leaves(load_model(narrow).text_encoder.blocks)}
    assert dtypes == {jnp.dtype("int8"), jnp.dtype("float32")}


def test_forms_that_mean_the_same_to_a_part_do_not_contradict(dense, narrow, tmp_path):
    """Both forms round a text encoder alike, so what one left is what the other asks for."""
    quantise_model(dense, tmp_path / "fp8", "fp8")
    loaded = load_model(tmp_path / "fp8", weights="fp8")
    sharing.save(loaded, tmp_path / "saved")
    same_leaves(load_model(tmp_path / "saved", weights="fp8"), loaded)
    described = loading.describe_model(tmp_path / "saved", weights="fp8")
    assert eight_bits.form_of(described.text_encoder) == "int8"
    assert eight_bits.form_of(described.transformer) == "fp8"
    half = loading.describe_model(dense).text_encoder
    full = memory.parameter_bytes(checkpoint.abstract_parameters(half))
    rounded = memory.parameter_bytes(checkpoint.abstract_parameters(described.text_encoder))
    matrices = sum(
        np.prod(leaf.shape)
        for path, leaf in checkpoint.abstract_parameters(half).items()
        if path.endswith("kernel")
    )
    scales = sum(
        leaf.shape[-1]
        for path, leaf in checkpoint.abstract_parameters(half).items()
        if path.endswith("kernel")
    )
    assert rounded == full - 3 * matrices + 4 * scales


def test_the_directory_says_what_it_is(dense, narrow, capsys):
    assert main(["info", "--model", str(narrow)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (one for one in lines if " text " in one)
    assert " int8 " in line
    (line,) = (one for one in lines if " transformer " in one)
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
        if path.endswith("qkv.kernel_scale"):
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
