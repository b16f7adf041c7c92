"""Golden VAR files as models: weights go through the rule tables, so these are checked as well."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from sparvar_convert.stream import convert_tensors
from sparvar_convert.tables import var as var_table
from sparvar_convert.tables import vqvae as vqvae_table

from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.weights import checkpoint, storage
from tests.convert.fakes import DictReader


def var_config(sidecar: dict) -> VarConfig:
    """The transformer's shape as a sidecar states it."""
    config, tokenizer = sidecar["config"]["var"], sidecar["config"]["vqvae"]
    return VarConfig(
        config["depth"],
        config["embed_dim"],
        config["num_heads"],
        sides=tuple(config["patch_nums"]),
        classes=config["num_classes"],
        vocab=tokenizer["vocab_size"],
        code_width=tokenizer["z_channels"],
        mlp_width=round(config["mlp_ratio"] * config["embed_dim"]),
        shared_ada=config["shared_aln"],
        l2_norm=config["attn_l2_norm"],
        dtype="float32",
    )


def vqvae_config(sidecar: dict) -> VqvaeConfig:
    """The tokenizer's shape as a sidecar states it."""
    config = sidecar["config"]["vqvae"]
    return VqvaeConfig(
        config["vocab_size"],
        config["z_channels"],
        config["ch"],
        tuple(config["ch_mult"]),
        config["num_res_blocks"],
        config["share_quant_resi"],
        config["quant_resi"],
    )


def load_var(config: VarConfig, weights: Mapping[str, np.ndarray]) -> Var:
    """The transformer with released weights."""
    module = nnx.eval_shape(lambda: Var(config, rngs=nnx.Rngs(0)))
    return _load(module, var_table.table(config.sides), weights)


def load_vqvae(config: VqvaeConfig, weights: Mapping[str, np.ndarray]) -> Vqvae:
    """The tokenizer with released weights."""
    module = nnx.eval_shape(lambda: Vqvae(config, rngs=nnx.Rngs(0)))
    return _load(module, vqvae_table.TABLE, weights)


def _load(module, table, weights):
    expected, arrays = checkpoint.abstract_parameters(module), {}
    convert_tensors(table, DictReader(dict(weights)), expected, arrays.__setitem__)
    tree = {path: jax.numpy.asarray(array, expected[path].dtype) for path, array in arrays.items()}
    return checkpoint.fill(module, storage.nest(tree))
