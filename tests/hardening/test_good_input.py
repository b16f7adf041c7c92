"""Input that is right in another form than usual converts, and says what was done about it."""

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import shutil
import types

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from sparvar_convert.compare import compare_source
from sparvar_convert.export import export_part, save_state_dict
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.sources import open_source
from sparvar_convert.torch_twin.var import VarTwin

from sparvar_jax.cli import main
from sparvar_jax.models import text_tokens
from sparvar_jax.models.var import VarConfig
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.files import whole_file
from tests import tiny_model
from tests.convert import sources

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 791656\n"
)
VAR = VarConfig(1, 128, 2, sides=(1, 2), classes=5, vocab=8, code_width=4)


def exported(folder, part="transformer"):
    return dict(export_part(folder, part))


def same(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.mark.parametrize("kind", ["infinity", "var"])
def test_scales_of_heads_in_either_layout(tmp_path, released, kind, capsys):
    made = {
        "infinity": lambda: dict(released.weights),
        "var": lambda: sources.randomised(VarTwin(VAR), 0),
    }
    weights = made[kind]()
    (key,) = [name for name in weights if name.endswith("scale_mul_1H11")]
    flash = weights | {key: weights[key].reshape(1, 1, -1, 1)}
    assert flash[key].shape == (1, 1, 2, 1)
    convert_source(sources.flat(flash, tmp_path), tmp_path / "model")
    assert torch.equal(exported(tmp_path / "model")[key], weights[key])
    assert main(["convert", str(tmp_path / "model"), "--export", str(tmp_path / "b.pth")]) == 0
    assert "(scale_mul_1H11) as [1, H, 1, 1]" in capsys.readouterr().out
    assert torch.equal(torch.load(tmp_path / "b.pth", weights_only=True)[key], weights[key])
    wrong = weights | {key: weights[key].reshape(2, 1, 1, 1)}
    with pytest.raises(ConversionError, match="scale_mul_1H11"):
        convert_source(sources.flat(wrong, tmp_path), tmp_path / "other")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module._fsdp_wrapped_module.",
        "module.module.",
    ],
)
@pytest.mark.parametrize("container", ["flat", "safetensors"])
def test_shared_wrappers_are_taken_off_and_said(tmp_path, released, prefix, container, capsys):
    weights = {prefix + key: value for key, value in released.weights.items()}
    write = sources.flat if container == "flat" else sources.single_safetensors
    source = write(weights, tmp_path)
    assert main(["convert", str(source), "--into", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    assert all(f"{step}." in told for step in prefix.strip(".").split("."))
    assert same(exported(tmp_path / "model"), released.weights)


def test_wrappers_of_inner_modules_are_taken_off(tmp_path):
    """Blocks wrapped one by one; `module` is a part's own name there and stays."""
    weights = sources.infinity_weights()
    wrapped = {
        key.replace(".module.1.", ".module.1._fsdp_wrapped_module."): value
        for key, value in weights.items()
    }
    assert set(wrapped) != set(weights)
    convert_source(sources.flat(wrapped, tmp_path), tmp_path / "model")
    assert same(exported(tmp_path / "model"), weights)


def test_keys_that_become_one_are_refused(tmp_path, released):
    weights = dict(released.weights) | {"_orig_mod.head.bias": torch.zeros(32)}
    with pytest.raises(ConversionError, match=r"the same without wrappers: .*head\.bias"):
        convert_source(sources.flat(weights, tmp_path), tmp_path / "model")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_usual_containers_are_opened(tmp_path, released, key):
    torch.save({"epoch": 3, key: released.weights}, tmp_path / "trained.pth")
    done = convert_source(tmp_path / "trained.pth", tmp_path / "model")
    assert done.container == f"container ({key})"
    assert same(exported(tmp_path / "model"), released.weights)


SETTINGS = {
    "numpy float": np.float32(1e-4),
    "numpy integer": np.int64(3),
    "numpy boolean": np.bool_(True),
    "numpy array": np.arange(3),
    "numpy dtype": np.dtype("float16"),
    "numpy text": np.str_("adam"),
    "path": pathlib.PurePosixPath("/data/train"),
    "local path": pathlib.Path("data"),
    "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "decimal": decimal.Decimal("0.1"),
    "set": {1, 2},
    "range": range(3),
    "slice": slice(1),
    "namespace": types.SimpleNamespace(lr=1.0),
    "counter": collections.Counter("aab"),
    "version": torch.__version__,
    "within": argparse.Namespace(lr=np.float64(1e-4), out=pathlib.Path("x"), many=[np.int8(1)]),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_data(tmp_path, case, legacy):
    weights = {"a": torch.arange(3.0)}
    content = {"args": SETTINGS[case], "trainer": {"gpt_fsdp": weights}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    opened = open_source(tmp_path / "a.pth")
    assert opened.container == "training checkpoint (gpt_fsdp)"
    np.testing.assert_array_equal(opened.reader.read("a"), [0, 1, 2])


def test_settings_do_not_stand_for_weights(tmp_path):
    torch.save({"a": torch.zeros(2), "b": np.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"not tensors: b \("):
        open_source(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a.pth"])
def test_hidden_files_are_passed_over(tmp_path, released, name):
    if name.endswith("index.json"):
        folder = sources.sharded(released.weights, tmp_path)
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        sources.single_safetensors(released.weights, folder)
        if name == "a.pth":
            (folder / "model.safetensors").unlink()
            torch.save(released.weights, folder / name)
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    convert_source(folder, tmp_path / "model")
    assert same(exported(tmp_path / "model"), released.weights)


@pytest.mark.parametrize(
    "name", ["spiece.model", "tokenizer.json", "config.json", "model.safetensors"]
)
def test_pointers_of_git_lfs_in_a_text_folder(tmp_path, name):
    folder = sources.text_folder(tmp_path / "t5")
    (folder / name).write_text(POINTER)
    with pytest.raises(ConversionError, match=rf"{name} is a git-lfs pointer .*git lfs pull"):
        convert_source(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pointers_of_git_lfs_elsewhere(tmp_path, released):
    (tmp_path / "a.pth").write_text(POINTER)
    with pytest.raises(ConversionError, match="git-lfs"):
        convert_source(tmp_path / "a.pth", tmp_path / "model")
    folder = sources.sharded(released.weights, tmp_path)
    for name in ("model-00002-of-00003.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text(POINTER)
        with pytest.raises(ConversionError, match=rf"{name} is a git-lfs"):
            convert_source(folder, tmp_path / "model")
    model = tiny_model.write_tiny_model(tmp_path / "tiny", ("transformer",))
    (model / "transformer" / "weights.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match="git-lfs"):
        checkpoint.load_part(model, "transformer")
    (model / "config.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"config\.json is a git-lfs"):
        checkpoint.read_config(model)


def test_what_is_copied_can_be_opened(tmp_path):
    folder = sources.text_folder(tmp_path / "t5")
    tiny_model.train_tokenizer(folder, vocab=40)
    convert_source(folder, tmp_path / "model")
    for name in ("spiece.model", "tokenizer.json"):
        copied = tmp_path / "model" / "text" / name
        assert text_tokens.open_tokenizer(copied).vocab <= 40
        assert copied.read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = sources.text_folder(tmp_path / "t5")
    sources.write_tokenizer(folder / "tokenizer.json", "".join(map(chr, range(0x100, 0x140))))
    with pytest.raises(ConversionError, match=r"json has 67 pieces, the text encoder 40"):
        convert_source(folder, tmp_path / "model")


@pytest.mark.parametrize("length", [245, 255])
def test_long_names_of_files(tmp_path, released, length):
    convert_source(released.transformer, tmp_path / "model")
    out = tmp_path / ("n" * (length - 4) + ".pth")
    save_state_dict(tmp_path / "model", "transformer", out)
    assert same(torch.load(out, weights_only=True), released.weights)
    with whole_file(tmp_path / ("p" * length)) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / ("p" * length)).read_text() == "whole"


COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch, released):
    """A Hub cache with one complete repository, and no network."""
    folder = tmp_path / "hub"
    snapshot = folder / "models--someone--infinity" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "inner").mkdir()
    shutil.copy(released.transformer, snapshot / "model.pth")
    shutil.copy(released.tokenizer, snapshot / "inner" / "vae.pth")
    refs = folder / "models--someone--infinity" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (refs / "v1").write_text(COMMIT)

    def refuse(*args, **kwargs):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    return snapshot


@pytest.mark.parametrize(
    "address",
    [
        "hf://someone/infinity",
        "hf://someone/infinity@v1",
        f"hf://someone/infinity@{COMMIT}",
        "hf://someone/infinity/model.pth",
        "hf://someone/infinity/inner",
        "hf://someone/infinity/inner/vae.pth@v1",
    ],
)
def test_a_complete_cache_needs_no_network(tmp_path, cache, address):
    done = convert_source(address, tmp_path / "model")
    manifest = checkpoint.read_manifest(tmp_path / "model")[done.part]
    assert (manifest["source"], manifest["commit"]) == (address, COMMIT)


@pytest.mark.parametrize("case", ["other revision", "lost shard", "no index", "no tokenizer"])
def test_an_incomplete_cache_asks_the_network(tmp_path, cache, released, case):
    address = "hf://someone/infinity"
    if case == "other revision":
        address += f"@{OTHER}"
    elif case == "no tokenizer":
        text = sources.text_folder(tmp_path / "t5")
        (text / "tokenizer.json").unlink()
        shutil.copytree(text, cache, dirs_exist_ok=True)
    else:
        folder = sources.sharded(released.weights, tmp_path)
        shutil.copytree(folder, cache, dirs_exist_ok=True)
        lost = "model-00002-of-00003.safetensors"
        (cache / (lost if case == "lost shard" else "model.safetensors.index.json")).unlink()
    with pytest.raises(ConversionError, match=r"cannot fetch hf://someone/infinity.*offline"):
        convert_source(address, tmp_path / "model")


def test_what_is_fetched_names_its_commit(tmp_path, cache, monkeypatch):
    def fetch(repository, revision, allow_patterns):
        assert (repository, revision, allow_patterns) == ("an/other", None, ["model.pth"])
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: ["model.pth"]
    )
    convert_source("hf://an/other", tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["transformer"]["commit"] == COMMIT


def test_the_flash_layout_compares_equal(tmp_path):
    weights = {
        key: value.reshape(1, 1, -1, 1) if key.endswith("scale_mul_1H11") else value
        for key, value in sources.randomised(VarTwin(VAR), 0).items()
    }
    rows = compare_source(sources.flat(weights, tmp_path)).rows
    assert all(row.within(1e-4) for row in rows)
