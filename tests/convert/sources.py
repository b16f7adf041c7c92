"""Small random checkpoints in every released container, written by PyTorch itself."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparvar_convert.torch_twin.bsq_vae import BsqVae
from sparvar_convert.torch_twin.infinity import Infinity

from sparvar_jax.models.infinity import InfinityConfig

INFINITY = InfinityConfig(
    depth=4, width=64, heads=2, text_width=128, bits=16, mlp_width=256, chunks=2, text_max_length=12
)

Weights = dict[str, torch.Tensor]


def randomised(module: torch.nn.Module, seed: int) -> Weights:
    """The module's state dict with every trained tensor drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name for name, _ in module.named_parameters()}
    return {
        key: torch.randn(value.shape, generator=generator) * 0.1 if key in trained else value
        for key, value in module.state_dict().items()
    }


def infinity_weights(config: InfinityConfig = INFINITY, seed: int = 0) -> Weights:
    return randomised(Infinity(config), seed)


def tokenizer_weights(code_width: int = 16, seed: int = 1) -> Weights:
    multipliers = (1, 2, 2)
    model = BsqVae(
        code_width=code_width,
        stride=4,
        encoder_multipliers=multipliers,
        decoder_multipliers=multipliers,
        base_width=32,
        encoder_blocks=1,
        decoder_blocks=2,
    )
    return randomised(model, seed)


def text_folder(folder: Path, width: int = 128) -> Path:
    """A random Flan-T5 folder as transformers writes it, with a tokenizer of single letters."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=40,
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_tokenizer(file: Path, letters: str = "abcdefghijklmnopqrstuvwxyz") -> None:
    """A tokenizer with T5's control tokens and a piece for every letter."""
    from tokenizers import Tokenizer, models

    pieces = ["<pad>", "</s>", "<unk>", *letters]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    Tokenizer(models.Unigram(vocabulary, unk_id=2)).save(str(file))


def flat(weights: Weights, folder: Path) -> Path:
    torch.save(weights, folder / "model.pth")
    return folder / "model.pth"


def legacy(weights: Weights, folder: Path) -> Path:
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def trained(weights: Weights, folder: Path, key: str = "gpt_fsdp") -> Path:
    """A training checkpoint with settings, optimizer state and averaged weights beside."""
    content = {
        "args": argparse.Namespace(lr=1e-4),
        "epoch": 3,
        "milestones": [],
        "trainer": {key: weights, "gpt_opt": {"state": {0: torch.zeros(2)}}},
    }
    content["trainer"]["gpt_ema_fsdp"] = {name: value * 0.5 for name, value in weights.items()}
    torch.save(content, folder / "ar-ckpt.pth")
    return folder / "ar-ckpt.pth"


def container(weights: Weights, folder: Path) -> Path:
    torch.save({"vae": weights, "ema": {}}, folder / "vae.pth")
    return folder / "vae.pth"


def single_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def sharded(weights: Weights, folder: Path, suffix: str = "safetensors", shards: int = 3) -> Path:
    """A folder with an index, in the layout of the transformers library."""
    place = folder / f"sharded_{suffix}"
    place.mkdir()
    stem, ending = (
        ("model", ".safetensors") if suffix == "safetensors" else ("pytorch_model", ".bin")
    )
    names, where = list(weights), {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{ending}"
        part = {name: weights[name] for name in names[number::shards]}
        if ending == ".bin":
            torch.save(part, place / file)
        else:
            save_file(part, place / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (place / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    return place
