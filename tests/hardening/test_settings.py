"""What a process, a user or a machine configures changes no picture and breaks no command."""

import contextlib
import json
import pwd
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.cli import console, main
from sparvar_jax.pipelines.numbers import image_keys
from sparvar_jax.pipelines.pipeline import Pipeline
from tests.tiny_model import write_tiny_model
from tests.tiny_var import tiny_model, tiny_pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("settings") / "model")


def odd_settings():
    """Other random bits, and nothing done silently, as JAX_* variables would set them."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_prng_impl("rbg"))
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    stack.enter_context(jax.threefry_partitionable(False))
    return stack


def test_a_shift_of_all_seeds_changes_no_key():
    expected = jax.random.key_data(image_keys([0, 7, 2**32 - 1], 3))
    plain = [jax.random.key(seed, impl="threefry2x32") for seed in (0, 7, np.uint32(2**32 - 1))]
    np.testing.assert_array_equal(jax.random.key_data(jnp.stack(plain)), expected)
    jax.config.update("jax_random_seed_offset", 5)
    try:
        np.testing.assert_array_equal(jax.random.key_data(image_keys(7, 1))[0], expected[1])
    finally:
        jax.config.update("jax_random_seed_offset", 0)


def test_settings_of_jax_change_no_picture_of_a_class():
    options = {"plan": "skip_last_scales(2)"}
    expected = tiny_pipe()([1, 3], seed=7, **options)
    with odd_settings():
        pipe = Pipeline.from_checkpoint(tiny_model()[0], dtype="float32")
        np.testing.assert_array_equal(pipe([1, 3], seed=7, **options), expected)


def test_settings_of_jax_change_no_picture_of_a_prompt(folder):
    options = {"seed": 3, "plan": "skip_last_scales(6)", "guidance": 2.0}
    expected = Pipeline.from_checkpoint(folder)(["a red apple"], **options)
    with odd_settings():
        found = Pipeline.from_checkpoint(folder)(["a red apple"], **options)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def nobody(monkeypatch):
    """A user of a container: no home, no name."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_home_gets_one_warning_and_no_cache(nobody):
    before = jax.config.values["jax_compilation_cache_dir"]
    with pytest.warns(UserWarning, match="compiled programs are not kept: .*JAX_COMPILATION_CACHE"):
        assert console.use_compilation_cache() is None
    assert jax.config.values["jax_compilation_cache_dir"] == before


@pytest.mark.filterwarnings("error")
def test_a_user_without_home_can_name_a_cache(nobody, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert console.use_compilation_cache() == tmp_path


@pytest.mark.filterwarnings("default:compiled programs are not kept")
def test_commands_work_without_a_home(nobody, folder, tmp_path, capsys):
    assert main(["plans", "dense", "--depth", "2"]) == 0
    assert main(["info", "--model", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    out = ["--out", str(tmp_path / "a.png")]
    assert main(["generate", "--class", "1", "--model", str(folder), *out]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: compiled programs are not kept")
    assert second.startswith("error: Missing argument")


def test_what_stands_in_a_manifest_is_shown_as_text(folder, tmp_path, capsys):
    """Control characters are written out; brackets are no markup of the table's."""
    model = shutil.copytree(folder, tmp_path / "[red]model[/nothing]")
    manifest = json.loads((model / "manifest.json").read_text())
    for part in manifest:
        manifest[part]["source"] = "\x1b[2J\x1b]0;x\x07[/nothing][bold]" + "s" * 5000
    (model / "manifest.json").write_text(json.dumps(manifest))
    config = json.loads((model / "config.json").read_text())
    config["defaults"]["plan"] = "dense"
    (model / "config.json").write_text(json.dumps(config))
    assert main(["info", "--model", str(model)]) == 0
    told = capsys.readouterr().out
    assert "[red]model[/nothing]" in told
    assert r"\x1b[2J" in "".join(told.split())
    assert all(line.isprintable() for line in told.split("\n"))
    assert len(told) < 10_000
