"""From released file formats to a picture by the commands alone, with random weights.

A transformer of the smallest released shape in its released container, an f16 tokenizer, and a
Flan-T5-small folder written by transformers become one model directory, which draws a prompt.
"""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sparvar_convert.torch_twin.bsq_vae import BsqVae
from sparvar_convert.torch_twin.infinity import Infinity

from sparvar_jax.cli import main
from sparvar_jax.models.bsq_vae import BsqVaeConfig
from sparvar_jax.models.infinity import InfinityConfig
from sparvar_jax.pipelines import metadata
from sparvar_jax.weights import checkpoint
from tests.convert.sources import randomised
from tests.tiny_model import train_tokenizer

TEXT_WIDTH = 512
MINUTES = 60
# Programs compile as quickly as those of other tests, and for two of the seven scales: compiling
# is what this waits for. The slow test draws all scales as users do.
QUICK = ["--size", "0.06M", "--plan", "skip_last_scales(5)"]


def half(weights):
    """Float tensors as float16, which random files of this size had better be."""
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def write_transformer(file):
    config = InfinityConfig.preset("infinity_layer12", text_width=TEXT_WIDTH)
    torch.save({"trainer": {"gpt_fsdp": half(randomised(Infinity(config), 0))}}, file)


def write_tokenizer(file):
    config = BsqVaeConfig.preset("f16_d32")
    twin = BsqVae(
        config.code_width,
        config.stride,
        config.encoder_multipliers,
        config.decoder_multipliers,
        config.base_width,
        config.encoder_blocks,
        config.decoder_blocks,
    )
    torch.save({"vae": half(twin.state_dict()), "ema": {}}, file)


def write_text_encoder(folder):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=TEXT_WIDTH,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder)
    train_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("end-to-end")
    write_transformer(place / "ar-ckpt.pth")
    write_tokenizer(place / "infinity_vae_d32_random.pth")
    write_text_encoder(place / "flan-t5-small")
    for source in ("ar-ckpt.pth", "infinity_vae_d32_random.pth", "flan-t5-small"):
        assert main(["convert", str(place / source), "--into", str(place / "model")]) == 0
    return place / "model"


def draw(model, out, *options):
    """Run the command in a process of its own; its seconds, and the picture it wrote."""
    command = [sys.executable, "-m", "sparvar_jax", "generate", "a red apple"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--model", model, "--out", out, *options],
        capture_output=True,
        text=True,
        timeout=30 * MINUTES,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, np.asarray(Image.open(out))


def test_the_parts_are_described_as_converted(model):
    config, manifest = checkpoint.read_config(model), checkpoint.read_manifest(model)
    assert [config[part]["kind"] for part in checkpoint.PARTS] == ["infinity", "bsq_vae", "t5"]
    assert config["transformer"]["text_width"] == config["text"]["width"] == TEXT_WIDTH
    assert not config["transformer"]["patchify"]
    assert manifest["transformer"]["dtypes"].keys() == {"float16"}


def test_a_prompt_becomes_a_picture_of_256_pixels(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    seconds, picture = draw(model, tmp_path / "apple.png", *QUICK)
    assert picture.shape == (256, 256, 3)
    assert picture.std() > 1
    assert metadata.read_metadata(tmp_path / "apple.png")["prompt"] == "a red apple"
    assert list((tmp_path / "sparvar_jax" / "xla").iterdir())
    again, same = draw(model, tmp_path / "again.png", *QUICK)
    np.testing.assert_array_equal(same, picture)
    print(f"\n256 px on the CPU: {seconds:.0f} s cold, {again:.0f} s with a warm cache")


@pytest.mark.slow
def test_a_prompt_becomes_a_picture_of_1024_pixels(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds, picture = draw(model, tmp_path / "apple.png", "--size", "1M")
    assert picture.shape == (1024, 1024, 3)
    print(f"\n1024 px on the CPU: {seconds:.0f} s cold")
