"""A complete model directory with tiny random weights, for the tests of pipeline and commands."""

import math
import random
from pathlib import Path

import numpy as np
from flax import nnx

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.weights import checkpoint

WORDS = "a the red blue green apple triangle circle owl left of on wearing photograph".split()  # noqa: SIM905
TRANSFORMER = InfinityConfig(depth=2, width=64, heads=2, text_width=128, bits=8, dtype="float32")
TOKENIZER = BsqVaeConfig(8, 2, (1, 1), (1, 1), base_width=32, encoder_blocks=1, decoder_blocks=1)
TEXT = T5Config(vocab=64, width=128, head_dim=16, mlp_width=64, depth=1, heads=2)
PARTS = {
    "transformer": ("infinity", Infinity, TRANSFORMER),
    "tokenizer": ("bsq_vae", BsqVae, TOKENIZER),
    "text": ("t5", T5Encoder, TEXT),
}
# Few scales are drawn: compiling them is what the tests wait for.
DEFAULTS = {"plan": "skip_last_scales(3)", "guidance": 2.0, "temperature": 0.7, "size": "0.06M"}


def train_tokenizer(folder: Path, vocab: int = 64) -> None:
    """Write `spiece.model` with T5's control tokens, trained on made-up captions."""
    from sentencepiece import SentencePieceTrainer

    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=8)) for _ in range(300))
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "spiece"),
        vocab_size=vocab,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def random_parameters(module: type, config, seed: int) -> dict[str, np.ndarray]:
    """Dotted path -> random values of a size at which activations neither die nor explode."""
    draw = np.random.default_rng(seed)
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    parameters = {}
    for path, leaf in checkpoint.abstract_parameters(abstract).items():
        inputs = max(1, math.prod(leaf.shape[:-1])) if path.endswith("kernel") else 100
        value = draw.standard_normal(leaf.shape) / inputs**0.5 + path.endswith(".scale")
        parameters[path] = value.astype(leaf.dtype)
    return parameters


def write_tiny_model(folder: Path, parts: tuple[str, ...] = checkpoint.PARTS) -> Path:
    """Write the parts asked for; the folder is a model directory afterwards."""
    for seed, part in enumerate(parts):
        kind, module, config = PARTS[part]
        checkpoint.write_part(
            folder,
            part,
            random_parameters(module, config, seed),
            config={"kind": kind, **checkpoint.config_to_json(config)},
            source={"made": "random"},
            defaults=DEFAULTS if part == "transformer" else {},
            form="safetensors",
        )
    if "text" in parts:
        train_tokenizer(folder / "text")
    return folder
