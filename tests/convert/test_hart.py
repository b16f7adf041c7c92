"""HART's three released folders, with random weights: in, beside the twins, and out again."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sparvar_convert.compare import compare_source
from sparvar_convert.export import save_state_dict
from sparvar_convert.families import detect, family_of
from sparvar_convert.hub import choose_files
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.side_by_side import Options
from sparvar_convert.sources import open_source

from sparvar_jax.weights import checkpoint
from tests import tiny_hart

RELEASED = ["llm/config.json", "llm/ema_model.bin", "llm/model.safetensors"]
RELEASED += ["tokenizer/config.json", "tokenizer/model.safetensors", "README.md"]


def test_averaged_weights_are_fetched_and_opened_unless_others_are_named():
    assert choose_files(RELEASED, "llm") == RELEASED[:2]
    assert choose_files(RELEASED, "llm/model.safetensors") == ["llm/model.safetensors"]
    assert choose_files(RELEASED, "tokenizer") == RELEASED[3:5]
    folder, (twin, _) = tiny_hart.released()
    key = "blocks.0.attn.proj.weight"
    for source, share in (("llm", 1.0), ("llm/model.safetensors", 0.5)):
        opened = open_source(folder / source)
        assert ("averaged" in opened.container) == (share == 1)
        np.testing.assert_array_equal(opened.reader.read(key), share * twin.state_dict()[key])
        assert family_of("hart").infer_config(opened).residual_steps == 4


@pytest.mark.parametrize("part", ["llm", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_beside_the_twin(part):
    """Every layer, residuals included: the noise is what the loop draws from its keys."""
    folder = tiny_hart.released()[0]
    found = compare_source(folder / part, tiny_hart.tiny_model(), Options(guidance=4.5))
    assert [row for row in found.rows if not row.within(1e-4)] == []
    layers = {row.layer for row in found.rows}
    assert layers >= ({"residual", "block 1"} if part == "llm" else {"picture", "latent"})


def test_parts_and_what_is_left_behind():
    model = tiny_hart.tiny_model()
    config, manifest = checkpoint.read_config(model), checkpoint.read_manifest(model)
    kinds = [config[part]["kind"] for part in checkpoint.PARTS]
    assert kinds == ["hart", "hart_vqvae", "qwen2"]
    expected = {**checkpoint.config_to_json(tiny_hart.CONFIG), "dtype": "bfloat16"}
    assert {**config["transformer"], "sides": tuple(config["transformer"]["sides"])} == {
        "kind": "hart",
        **expected,
    }
    assert config["text"]["rope_theta"] == 1e6
    left = {
        part: [key for keys in manifest[part]["ignored"].values() for key in keys]
        for part in checkpoint.PARTS
    }
    assert "attn_bias_for_masking" in left["transformer"]
    assert {"disc.head.weight", "vae.decoder2.conv_in.weight"} < set(left["tokenizer"])
    assert left["text"] == []  # its unlisted tensor was never a part of it


@pytest.mark.parametrize(("part", "file"), [("transformer", "llm"), ("tokenizer", "tokenizer")])
def test_written_back_as_it_was(tmp_path, part, file):
    save_state_dict(tiny_hart.tiny_model(), part, tmp_path / "back.pth")
    got = torch.load(tmp_path / "back.pth", weights_only=True)
    released = tiny_hart.released()[0]
    if part == "transformer":
        expected = torch.load(released / file / "ema_model.bin", weights_only=True)
        assert list(got["lvl_1L"].shape) == [1, tiny_hart.CONFIG.schedule.tokens]
    else:
        every = load_file(released / file / "model.safetensors")
        statistics = "vae.quantize.ema_vocab_hit_SV"
        unused = ("disc.", "vae.decoder2", statistics)
        expected = {key: value for key, value in every.items() if not key.startswith(unused)}
        assert not got.pop(statistics).any()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


def without(key):
    return lambda weights, settings: weights.pop(key)


def setting(name, value):
    return lambda weights, settings: settings.update({name: value})


def put(key, value):
    return lambda weights, settings: weights.update({key: value})


BAD = [
    (without("lvl_1L"), "lvl_1L is missing, which tells the token grids"),
    (put("lvl_1L", torch.full((1, 9), 7)), "expected squares|impossible sizes"),
    (put("lvl_1L", torch.full((1, 29), 2**40)), "must hold level numbers below 29"),
    (put("lvl_1L", torch.zeros(4)), r"lvl_1L has shape \[4\]"),
    (without("blocks.0.attn.q_bias"), "parameters left unfilled"),
    (put("blocks.0.ffn.fc1.weight", torch.zeros(2, 2)), "GELU feed-forward layers"),
    (put("attn_bias_for_masking", torch.zeros(1, 1, 29, 29)), "must be the mask of these"),
    (put("blocks.0.attn.zero_k_bias", torch.ones(64)), "must be all zero"),
    (put("head.bias", torch.full((128,), torch.nan)), "head.bias holds NaN or infinity"),
    (setting("attn_type", "gpt2"), "attn_type 'gpt2', expected 'llama'"),
    (setting("use_cross_attn", True), "use_cross_attn True, expected False"),
    (setting("num_sampling_steps", "ddim8"), "num_sampling_steps 'ddim8', expected a number"),
    (setting("num_sampling_steps", "1"), "residual_steps must be 2 to 1000"),
    (setting("num_heads", 5), "width 64 must be heads 5 times"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_transformers_are_refused_in_one_line(tmp_path, damage, message):
    weights = torch.load(tiny_hart.released()[0] / "llm" / "ema_model.bin", weights_only=True)
    settings = dict(tiny_hart.SETTINGS)
    damage(weights, settings)
    torch.save(weights, tmp_path / "ema_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match=message) as error:
        convert_source(tmp_path, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_text_encoders_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_hart.released()[0]
    text = shutil.copytree(folder / "text", tmp_path / "text")
    assert detect(open_source(text)).kind == "qwen2"
    settings = json.loads((text / "config.json").read_text())
    (text / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"lacks tokenizer\.json"):
        convert_source(text, tmp_path / "model")
    (text / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match="cannot be read as a tokenizer"):
        convert_source(text, tmp_path / "model")
    tiny_hart.write_words(text / "tokenizer.json")
    words = (text / "tokenizer.json").read_text().replace("<|endoftext|>", "<end>")
    (text / "tokenizer.json").write_text(words)
    with pytest.raises(ConversionError, match=r"no token <\|endoftext\|>"):
        convert_source(text, tmp_path / "model")
    settings |= {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}
    (text / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="type 'yarn' is not supported"):
        convert_source(text, tmp_path / "model")
    assert not (tmp_path / "model").exists()
