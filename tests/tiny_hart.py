"""A complete HART with tiny random weights in its released folders, made by the PyTorch twins."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparvar_convert.run import convert_source
from sparvar_convert.torch_twin.hart import HartTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from sparvar_jax.models.hart_parts import HartConfig
from sparvar_jax.models.vqvae import VqvaeConfig
from sparvar_jax.pipelines.pipeline import Pipeline

CONFIG = HartConfig.preset(
    "hart_tiny",
    depth=2,
    width=64,
    heads=2,
    sides=(1, 2, 3),
    residual_depth=1,
    residual_steps=4,
    dtype="float32",
)
TOKENIZER = VqvaeConfig(
    CONFIG.vocab, CONFIG.code_width, base_width=32, multipliers=(1, 2), blocks=1
)
WORDS = "a the red blue green apple triangle circle owl left of on wearing photograph".split()  # noqa: SIM905
SETTINGS = {
    "model_type": "hart_transformer_t2i",
    "depth": CONFIG.depth,
    "num_heads": CONFIG.heads,
    "num_sampling_steps": str(CONFIG.residual_steps),
    "attn_type": "llama",
    "mlp_type": "llama",
    "disable_aln": True,
    "sampler": "iddpm",
    "norm_eps": 1e-6,
}


def twins(seed: int = 0) -> tuple[HartTwin, VqvaeTwin]:
    """Both PyTorch models with random weights of a size that leaves nothing inert."""
    torch.manual_seed(seed)
    pair = HartTwin(CONFIG), VqvaeTwin(TOKENIZER, len(CONFIG.sides))
    for twin in pair:
        with torch.no_grad():
            for name, value in twin.named_parameters():
                gain = value.ndim == 1 and ("norm" in name or "ln" in name)
                spread = 0.1 if value.ndim == 1 else 1 / value[0].numel() ** 0.5
                centre = float(gain and name.endswith("weight"))
                value.copy_(torch.randn_like(value) * spread + centre)
        twin.requires_grad_(False)
    return pair


def write_llm(folder: Path, twin: HartTwin) -> Path:
    """Weights beside averaged ones: the first are half as large."""
    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in twin.state_dict().items()}
    torch.save(weights, folder / "ema_model.bin")
    trained = {n: v * 0.5 if n.startswith("blocks") else v for n, v in weights.items()}
    save_file({n: v.clone() for n, v in trained.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


def write_tokenizer(folder: Path, twin: VqvaeTwin) -> Path:
    """Weights under `vae.`, a discriminator beside them."""
    folder.mkdir(parents=True)
    weights = {f"vae.{name}": value.clone() for name, value in twin.state_dict().items()}
    weights["disc.head.weight"] = torch.zeros(2)
    weights["vae.decoder2.conv_in.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "hart_autoencoder_with_disc"}')
    return folder


def write_text(folder: Path) -> Path:
    """A Qwen2 as transformers writes it, in two shards; one holds a tensor that is not listed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=CONFIG.text_width,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="64KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / sorted(set(index["weight_map"].values()))[0]
    from safetensors.torch import load_file

    save_file({**load_file(shard), "visual.merger.weight": torch.zeros(2)}, shard)
    write_words(folder / "tokenizer.json")
    return folder


def write_words(file: Path) -> None:
    """A tokenizer of words with Qwen2's padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<unk>", *WORDS, "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(file))


@functools.cache
def released() -> tuple[Path, tuple[HartTwin, VqvaeTwin]]:
    """The released folders `llm`, `tokenizer` and `text` of one model, and its twins."""
    folder, pair = Path(tempfile.mkdtemp(prefix="tiny_hart-")), twins()
    write_llm(folder / "llm", pair[0])
    write_tokenizer(folder / "tokenizer", pair[1])
    write_text(folder / "text")
    return folder, pair


@functools.cache
def tiny_model() -> Path:
    """One model directory for all tests of a process."""
    folder = released()[0]
    for part in ("llm", "tokenizer", "text"):
        convert_source(folder / part, folder / "model")
    return folder / "model"


@functools.cache
def tiny_pipe() -> Pipeline:
    """One pipeline for all tests of a process, so that they share compiled steps."""
    return Pipeline.from_checkpoint(tiny_model(), dtype="float32")
