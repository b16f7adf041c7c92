"""A complete class-conditional model with tiny random weights, made by the PyTorch twins."""

import functools
import tempfile
from pathlib import Path

import torch
from sparvar_convert.run import convert_source
from sparvar_convert.torch_twin.var import VarTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from sparvar_jax.models.var import VarConfig
from sparvar_jax.models.vqvae import VqvaeConfig
from sparvar_jax.pipelines.pipeline import Pipeline

SIDES = (1, 4, 8, 12)
CONFIG = VarConfig(2, 128, 2, sides=SIDES, classes=5, vocab=48, code_width=8, dtype="float32")
TOKENIZER = VqvaeConfig(48, 8, base_width=32, multipliers=(1, 2), blocks=1)


def twins(config: VarConfig, tokenizer: VqvaeConfig, seed: int = 0) -> tuple:
    """Both PyTorch models with random weights of a size that leaves nothing inert."""
    torch.manual_seed(seed)
    pair = VarTwin(config), VqvaeTwin(tokenizer, len(config.sides))
    for twin in pair:
        with torch.no_grad():
            for name, value in twin.named_parameters():
                spread = 0.1 if value.ndim == 1 else 1 / value[0].numel() ** 0.5
                value.copy_(torch.randn_like(value) * spread + ("norm" in name) * 1.0)
        twin.requires_grad_(False)
    return pair


def write_model(folder, config=CONFIG, tokenizer=TOKENIZER):
    """A model directory converted from released containers with random weights; and the twins."""
    pair = twins(config, tokenizer)
    folder.mkdir(exist_ok=True)
    for twin, name in zip(pair, ("var_d2.pth", "vae.pth"), strict=True):
        torch.save(twin.state_dict(), folder / name)
        convert_source(folder / name, folder / "model")
    return folder / "model", pair


@functools.cache
def tiny_model() -> tuple[Path, tuple[VarTwin, VqvaeTwin]]:
    """One model directory for all tests of a process, and its twins."""
    return write_model(Path(tempfile.mkdtemp(prefix="tiny_var-")))


@functools.cache
def tiny_pipe() -> Pipeline:
    """One pipeline for all tests of a process, so that they share compiled steps."""
    return Pipeline.from_checkpoint(tiny_model()[0], dtype="float32")
