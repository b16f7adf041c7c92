"""Numbers in files are checked before anything of their size is built.

A case that believed its file would ask for gigabytes or never end, so all run in one process whose
memory is limited, and the slowest may take as long as a conversion that is right.
"""

import dataclasses
import json
import re
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.torch_twin.var import VarTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from sparvar_jax.models.var import VarConfig
from sparvar_jax.models.vqvae import VqvaeConfig
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.family import families
from sparvar_jax.pipelines.sampling_jobs import SampleJob, parse_classes
from sparvar_jax.weights import checkpoint, json_file, storage
from tests import tiny_model
from tests.convert import sources

VAR = VarConfig(1, 64, 1, sides=(1, 2), classes=5, vocab=8, code_width=4)


@pytest.fixture(autouse=True)
def little_memory():
    """4 GiB more than now: imports and compilers reserve much, a believed number takes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
    start = time.perf_counter()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.perf_counter() - start < 20


def refused(weights, folder, message):
    source = sources.flat(weights, folder)
    with pytest.raises(ConversionError, match=message) as error:
        convert_source(source, folder / "model")
    assert len(str(error.value)) < 500
    assert not (folder / "model").exists()


EXTRA_KEYS = {
    "block": ("blocks.60000000.x", "infinity", "count 60000001 blocks"),
    "block of VAR": ("blocks.60000000.x", "var", "1 unknown keys: blocks.60000000.x"),
    "block of T5": ("encoder.block.60000000.x", "t5", "unknown keys"),
    "chunk": ("block_chunks.60000000.module.1.x", "chunks", "count 120000002 blocks"),
    "block in chunk": ("block_chunks.1.module.60000000.x", "chunks", "count 120000002 blocks"),
    "digits": (f"blocks.{'9' * 5000}.x", "infinity", "unknown keys"),
    "encoder level": ("encoder.down.60000000.block.0.x", "bsq", "count 60000001 levels"),
    "decoder level": ("decoder.up.60000000.block.0.x", "bsq", "count 60000001 levels"),
    "decoder block": ("decoder.up.0.block.60000000.x", "bsq", "count 60000001 levels or blocks"),
    "phi": ("quantize.quant_resi.qresi_ls.60000000.x", "vqvae", "unknown keys"),
}


@pytest.mark.parametrize("case", EXTRA_KEYS)
def test_numbers_in_names_are_compared_with_how_many_there_are(tmp_path, released, case):
    key, kind, message = EXTRA_KEYS[case]
    if kind == "t5":
        folder = sources.text_folder(tmp_path / "t5")
        from safetensors.numpy import load_file

        file = folder / "model.safetensors"
        save_file({**load_file(file), key: np.zeros(1, np.float32)}, file)
        with pytest.raises(ConversionError, match=message):
            convert_source(folder, tmp_path / "model")
        return
    make = {
        "infinity": lambda: dict(released.weights),
        "chunks": sources.infinity_weights,
        "var": lambda: sources.randomised(VarTwin(VAR), 0),
        "bsq": sources.tokenizer_weights,
        "vqvae": lambda: sources.randomised(
            VqvaeTwin(VqvaeConfig(8, 4, base_width=32, multipliers=(1, 2), blocks=1)), 0
        ),
    }
    refused(make[kind]() | {key: torch.zeros(1)}, tmp_path, message)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.tensor([[0, 1, 1, 1, 2**33]]), "level numbers below 5"),
        (torch.tensor([[0, 1, 1, 1, -1]]), "level numbers below 5"),
        (torch.tensor([[0, 1, 1, 1, float("nan")]]), "level numbers below 5"),
        (torch.tensor([[2**33]]), r"lvl_1L has shape \[1, 1\], expected \[1, 5\]"),
    ],
)
def test_levels_of_tokens_are_bounded_by_the_tokens(tmp_path, buffer, message):
    refused(sources.randomised(VarTwin(VAR), 0) | {"lvl_1L": buffer}, tmp_path, message)


def test_many_tokens_make_no_mask(tmp_path):
    weights = sources.randomised(VarTwin(VAR), 0) | {"pos_1LC": torch.zeros(1, 30000, 64)}
    del weights["lvl_1L"], weights["attn_bias_for_masking"]
    refused(weights, tmp_path, "pos_1LC has 30000 tokens")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 64).expand(10**12, 64),
        torch.zeros(1).as_strided((10**6, 10**6), (0, 0)),
        torch.zeros(64).as_strided((60, 64), (1, 0)),
    ],
    ids=["rows", "square", "overlap"],
)
def test_tensors_larger_than_their_storage_are_refused(tmp_path, released, tensor):
    weights = dict(released.weights) | {"head.weight": tensor}
    refused(weights, tmp_path, r"unsupported kinds: head\.weight \(expanded")


def test_tensors_that_share_one_storage_are_refused(tmp_path):
    shared = torch.zeros(1 << 16)
    weights = {f"w{index}": shared[index:] for index in range(1000)}
    refused(weights, tmp_path, "share .* stored ones")


def test_tied_tensors_are_no_such_case(tmp_path, released):
    weights = dict(released.weights)
    zeros = torch.zeros(64)
    tied = [key for key, value in weights.items() if value.shape == (64,) and "zero" not in key]
    done = convert_source(
        sources.flat(weights | dict.fromkeys(tied[:2], zeros), tmp_path), tmp_path / "m"
    )
    assert done.tensors


@pytest.mark.parametrize(
    ("key", "shape", "field"),
    [
        ("lvl_embed.weight", (0, 2**40), "width"),
        ("cfg_uncond", (2**40, 0), "text_"),
        ("word_embed.weight", (0, 2**40), "bits"),
        ("blocks.0.sa.scale_mul_1H11", (1, 0, 1, 1), r"scale_mul_1H11 \[1, 0, 1, 1\] gives"),
    ],
)
def test_sizes_of_empty_tensors_are_bounded(tmp_path, released, key, shape, field):
    weights = {name: value for name, value in released.weights.items()} | {key: torch.zeros(shape)}
    refused(weights, tmp_path, field)


CONFIGS = {
    ("transformer", "depth"): 10**9,
    ("transformer", "width"): 2**40,
    ("transformer", "heads"): 0,
    ("transformer", "chunks"): -1,
    ("tokenizer", "encoder_multipliers"): [1] * 10**5,
    ("tokenizer", "decoder_blocks"): 10**9,
    ("tokenizer", "stride"): 2**60,
    ("text", "depth"): 10**9,
    ("text", "vocab"): float("inf"),
    ("text", "norm_eps"): float("nan"),
    ("defaults", "guidance"): 10**400,
    ("defaults", "temperature"): [1.0] * 10**5,
    ("defaults", "plan"): "x" * 10**6,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("case", CONFIGS, ids=".".join)
def test_every_size_of_a_configuration_has_a_bound(tmp_path, model, case):
    part, field = case
    config = json.loads((model / "config.json").read_text())
    config[part][field] = CONFIGS[case]
    for name in ("manifest.json", "transformer", "tokenizer", "text"):
        (tmp_path / name).symlink_to(model / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {part}: {field} m") as error:
        loading.load_model(tmp_path)
    assert len(str(error.value)) < 500


def test_all_numbers_of_all_configurations_have_bounds():
    known = families()
    kinds = [kinds for family in known for kinds in family.parts.values()]
    classes = [config for kind in kinds for _, config in kind.values()]
    for cls in (*classes, *(family.defaults for family in known)):
        for field in dataclasses.fields(cls):
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert field.name in json_file.BOUNDS, (cls, field.name)


def test_stored_shapes_are_compared_before_they_are_read(tmp_path, model):
    """A part that says of itself it is large: its file is a hole, which takes no disk.

    Mapped it fits the limit of memory, mapped and read it does not.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "manifest.json", "tokenizer", "text"):
        (folder / name).symlink_to(model / name)
    (folder / "transformer").mkdir()
    size = 3 << 30
    header = {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (folder / "transformer" / storage.SAFETENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    config = checkpoint.read_config(folder)
    with pytest.raises(ValueError, match=r"do not fit Infinity: .*1 unknown: x \["):
        loading.load_part(folder, config, "transformer")


@pytest.mark.parametrize("change", ["infinite", "shape", "dtype", "lost values"])
def test_scales_of_quantised_weights_are_checked(tmp_path, change):
    values, scale = storage.quantize_int8(np.ones((64, 32), np.float32))
    if change == "infinite":
        scale[3] = np.inf
    elif change == "shape":
        scale = np.ones((64, 1), np.float32)
    elif change == "dtype":
        scale = scale.astype(np.float16)
    else:
        values = values.astype(np.int32)
    save_file({"w": values, f"w{storage.SCALE_SUFFIX}": scale}, tmp_path / storage.SAFETENSORS)
    with pytest.raises(ValueError, match=r"w is damaged: expected int8 values and one finite"):
        storage.PartReader(tmp_path).restore()


def test_archives_that_unpack_to_more_are_refused(tmp_path):
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            for _ in range(64):
                stream.write(b"N0" * (1 << 19))
        archive.writestr("archive/version", "3")
    assert file.stat().st_size < 1 << 20
    with pytest.raises(ConversionError, match=r"unpacks to \d+"):
        convert_source(file, tmp_path / "model")


def test_pickles_that_ask_for_memory_are_refused(tmp_path):
    class Much:
        def __reduce__(self):
            return bytearray, (10**12,)

    torch.save({"a": Much()}, tmp_path / "much.pth")
    with pytest.raises(ConversionError, match=r"much\.pth"):
        convert_source(tmp_path / "much.pth", tmp_path / "model")
    text = b"\x80\x02" + b"\x8d" + struct.pack("<Q", 2**40) + b"X."  # a string of a TiB
    (tmp_path / "text.pth").write_bytes(text)
    with pytest.raises(ConversionError, match=r"text\.pth is truncated"):
        convert_source(tmp_path / "text.pth", tmp_path / "model")
    header = struct.pack("<Q", 2**62) + b"{}"
    (tmp_path / "a.safetensors").write_bytes(header)
    with pytest.raises(ConversionError, match="not a safetensors file"):
        convert_source(tmp_path / "a.safetensors", tmp_path / "model")


@pytest.mark.parametrize(
    "content",
    [b"[" * 10**6, b'{"a": ' + b"9" * 10**5 + b"}", b"{" + b" " * (5 << 20) + b"}"],
    ids=["brackets", "digits", "size"],
)
def test_json_is_bounded(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json .*: convert the model again"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("text", ["0-99999999999", "0-" + "9" * 400, "5-3", "0,99999999999"])
def test_classes_are_checked_by_their_ends(text):
    with pytest.raises(ValueError, match="classes must"):
        parse_classes(text, 1000)


def test_jobs_have_bounds():
    for values in ({"batch": 10**9}, {"per_class": 10**12}):
        with pytest.raises(ValueError, match="at most"):
            SampleJob((0, 1), **{"per_class": 1, **values})
