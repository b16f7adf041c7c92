"""What cannot be read or written ends in one line that names the file, and exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from sparvar_jax.cli import main
from sparvar_jax.weights import checkpoint
from tests import tiny_model
from tests.convert import sources


@pytest.fixture
def one_line(capsys):
    """Runs a command that must fail; returns the one line it says."""

    def run(*args) -> str:
        capsys.readouterr()
        assert main(list(map(str, args))) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1, told
        assert len(told) <= 500
        assert told.rstrip("\n").isprintable()
        return told

    return run


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return sources.text_folder(tmp_path_factory.mktemp("text") / "t5")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, released):
    from sparvar_convert.run import convert_source

    model = tmp_path_factory.mktemp("converted") / "model"
    convert_source(released.transformer, model)
    return model


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        for place in range(0, len(content), 7):
            content[place] ^= 0x55
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
@pytest.mark.parametrize("which", ["largest", "_METADATA", "manifest.ocdbt"])
def test_a_damaged_part_is_named(tmp_path, converted, one_line, which, how):
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    files = [path for path in (model / "transformer").rglob("*") if path.is_file()]
    if which == "largest":
        wanted = [max(files, key=lambda file: file.stat().st_size)]
    else:
        wanted = [file for file in files if file.name == which]
    for file in wanted:
        if how == "missing":
            file.unlink()
        else:
            damage(file, how)
    told = one_line("convert", model, "--export", tmp_path / "back.pth")
    assert re.search(r"transformer (is damaged: convert it again|holds neither)", told), told
    assert not (tmp_path / "back.pth").exists()


def test_running_out_of_device_memory_is_no_damage(tmp_path):
    from sparvar_jax.weights import orbax_calls

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"), orbax_calls.reading(tmp_path):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


class Odd:
    """Entries that are no plain tensors."""

    sparse = torch.eye(3).to_sparse()
    meta = torch.empty(3, device="meta")
    text = "a text"
    strange_dtype = torch.zeros(4, dtype=torch.uint8).view(torch.bits8)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"a": Odd.sparse}, r"a \(layout sparse_coo\)"),
        ({"a": Odd.meta}, r"a \(on device meta\)"),
        ({"a": Odd.text}, r"not tensors: a \(str\)"),
        ({"a": Odd.strange_dtype}, r"a \(dtype bits8\)"),
        ({7: torch.zeros(2)}, r"7 \(its key is int\)"),
        ({("a", 1): torch.zeros(2)}, "its key is tuple"),
    ],
    ids=["sparse", "meta", "text", "bits", "integer", "tuple"],
)
def test_entries_of_other_kinds_are_listed(tmp_path, released, one_line, entry, message):
    source = sources.flat(dict(released.weights) | entry, tmp_path)
    assert re.search(message, one_line("convert", source, "--into", tmp_path / "model"))


def test_tensors_that_processes_share_are_listed(tmp_path, one_line):
    code = (
        "import os, sys, torch, torch.distributed as dist;"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[1] + '.init', rank=0,"
        "world_size=1);"
        "from torch.distributed.tensor import init_device_mesh, distribute_tensor;"
        "mesh = init_device_mesh('cpu', (1,));"
        "torch.save({'head.bias': distribute_tensor(torch.zeros(4, 4), mesh)}, sys.argv[1]);"
        "os._exit(0)"
    )
    file = tmp_path / "shared.pth"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True)
    told = one_line("convert", file, "--into", tmp_path / "model")
    assert re.search(r"unsupported kinds: .*DTensor.*; (gather|save) the full", told)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", None),
        ("d_model", "wide"),
        ("num_layers", float("inf")),
        ("num_layers", float("nan")),
        ("d_ff", -1),
        ("d_kv", 1.5),
        ("num_heads", True),
        ("vocab_size", [32128]),
        ("layer_norm_epsilon", "small"),
        ("feed_forward_proj", 7),
        ("model_type", ["t5"]),
        ("relative_attention_num_buckets", {}),
    ],
)
def test_a_wrong_field_of_a_text_encoder_is_named(tmp_path, text_encoder, one_line, field, value):
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, field: value}))
    told = one_line("convert", folder, "--into", tmp_path / "model")
    assert f"config.json: {field} must be" in told


@pytest.mark.parametrize("content", ["[1]", "3", "null", "", "{", '"text"'])
def test_settings_that_are_no_object_are_named(tmp_path, text_encoder, one_line, content):
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in one_line("convert", folder, "--into", tmp_path / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": [1]}, "config.json: defaults must be an object, got a list of 1"),
        ({"transformer": 5}, "config.json: transformer must be an object, got 5"),
        ({"transformer.kind": []}, "config.json: transformer: kind must be a text, got a list"),
        ({"text.kind": None}, "config.json: text: kind must be a text, got null"),
        ({"defaults.plan": 5}, "config.json: defaults: plan must be a text, got 5"),
        ({"defaults.guidance": "high"}, "config.json: defaults: guidance must be a number or a"),
        ({"transformer.depth": "2"}, "config.json: transformer: depth must be a whole number"),
        ({"transformer.patchify": 1}, "transformer: patchify must be true or false, got 1"),
        ({"transformer.dtype": "int4"}, "transformer: dtype must be 'bfloat16' or 'float32'"),
        ({"transformer.heads": 3}, "config.json: transformer: width 64 must be divisible"),
        ({"tokenizer.encoder_multipliers": 1}, "encoder_multipliers must be a list with a whole"),
        ({"tokenizer.encoder_multipliers": [1, "2"]}, "encoder_multipliers must be a whole number"),
        ({"format": [1]}, "has format [1]"),
        ({"format": True}, "has format True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_field_of_a_model_is_named(tmp_path, tiny, one_line, change, message):
    config = json.loads((tiny / "config.json").read_text())
    ((place, value),) = change.items()
    part, _, field = place.partition(".")
    if field:
        config[part][field] = value
    else:
        config[part] = value
    for name in ("manifest.json", *checkpoint.PARTS):
        (tmp_path / name).symlink_to(tiny / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in one_line("info", "--model", tmp_path)


def test_an_index_in_another_encoding_is_named(tmp_path, released, one_line):
    folder = sources.sharded(released.weights, tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(json.dumps({"weight_map": {"ö": "a"}}, ensure_ascii=False).encode("latin-1"))
    told = one_line("convert", folder, "--into", tmp_path / "model")
    assert f"{index} is not UTF-8 text" in told


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_of_another_form_is_named(tmp_path, released, one_line, content):
    folder = sources.sharded(released.weights, tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in one_line("convert", folder, "--into", tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_tokenizer_is_found_at_once(tmp_path, text_encoder, one_line, name, how):
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    if name == "spiece.model":
        tiny_model.train_tokenizer(folder, vocab=40)
    damage(folder / name, how)
    told = one_line("convert", folder, "--into", tmp_path / "model")
    assert str(folder / name) in told
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("limit", [2_000, 20_000, 50_000])
def test_a_full_disk_while_converting(tmp_path, released, runner, limit):
    """No file may grow beyond the limit: a full disk, for one process."""
    code = runner("convert", released.transformer, "--into", tmp_path / "new", limit=limit)
    assert code == 2
    line = r"error: cannot write to \S*new \(File too large\): check space and permission\n"
    assert re.fullmatch(line, runner.told), runner.told
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["back.pth", "back.safetensors"])
def test_a_full_disk_while_exporting(tmp_path, converted, runner, name):
    assert runner("convert", converted, "--export", tmp_path / name, limit=20_000) == 2
    assert re.fullmatch(rf"error: cannot write .*{name} .*: check space\n", runner.told)
    assert os.listdir(tmp_path) == []


def test_nothing_to_write_to(tmp_path, converted, one_line):
    told = one_line("convert", converted, "--export", tmp_path / "none" / "back.pth")
    assert "does not exist" in told
