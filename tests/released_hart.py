"""Golden HART files as models: weights go through the rule tables, so these are checked as well."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from sparvar_convert.stream import convert_tensors
from sparvar_convert.tables import hart as hart_table
from sparvar_convert.tables import hart_vqvae as tokenizer_table
from sparvar_convert.tables import qwen2 as qwen2_table

from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.hart_parts import mlp_width
from sparvar_jax.models.qwen2 import Qwen2, Qwen2Config
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.weights import checkpoint, storage
from tests.convert.fakes import DictReader


def hart_config(sidecar: dict) -> HartConfig:
    """The transformer's shape as a sidecar states it."""
    config, tokenizer = sidecar["config"]["transformer"], sidecar["config"]["tokenizer"]
    return HartConfig(
        config["depth"],
        config["embed_dim"],
        config["num_heads"],
        sides=tuple(config["patch_nums"]),
        text_tokens=config["context_token"],
        text_width=config["context_dim"],
        vocab=tokenizer["vocab_size"],
        code_width=tokenizer["z_channels"],
        mlp_width=mlp_width(config["embed_dim"], config["mlp_ratio"]),
        context_norm=config["use_context_norm"],
        sinusoidal=config["use_timestep_embed"],
        residual_width=config["diff_width"],
        residual_depth=config["diff_depth"],
        residual_steps=int(config["num_sampling_steps"]),
        dtype="float32",
    )


def tokenizer_config(sidecar: dict) -> VqvaeConfig:
    """The tokenizer's shape as a sidecar states it."""
    config = sidecar["config"]["tokenizer"]
    return VqvaeConfig(
        config["vocab_size"],
        config["z_channels"],
        config["ch"],
        tuple(config["ch_mult"]),
        config["num_res_blocks"],
        config["share_quant_resi"],
        config["quant_resi"],
    )


def text_config(sidecar: dict) -> Qwen2Config:
    """The text encoder's shape as a sidecar states it; what it says in words is the released."""
    config = sidecar["config"]["text_encoder"]
    return Qwen2Config.from_hf({"rope_theta": 1e6, **config, "model_type": "qwen2"})


def load_hart(config: HartConfig, weights: Mapping[str, np.ndarray]) -> Hart:
    """The transformer with released weights."""
    module = nnx.eval_shape(lambda: Hart(config, rngs=nnx.Rngs(0)))
    return _load(module, hart_table.table(config), weights)


def load_tokenizer(config: VqvaeConfig, weights: Mapping[str, np.ndarray]) -> Vqvae:
    """The tokenizer with released weights."""
    module = nnx.eval_shape(lambda: Vqvae(config, rngs=nnx.Rngs(0)))
    return _load(module, tokenizer_table.TABLE, weights)


def load_qwen2(config: Qwen2Config, weights: Mapping[str, np.ndarray]) -> Qwen2:
    """The text encoder with released weights."""
    module = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    return _load(module, qwen2_table.TABLE, weights)


def _load(module, table, weights):
    expected, arrays = checkpoint.abstract_parameters(module), {}
    convert_tensors(table, DictReader(dict(weights)), expected, arrays.__setitem__)
    tree = {path: jax.numpy.asarray(array, expected[path].dtype) for path, array in arrays.items()}
    return checkpoint.fill(module, storage.nest(tree))
