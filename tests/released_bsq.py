"""Released tokenizer weights as a JAX model, through the converter's rules, so checking those."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sparvar_convert.stream import convert_tensors
from sparvar_convert.tables.bsq_vae import TABLE, infer_config

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.weights import checkpoint, storage
from tests.convert.fakes import DictReader


def load_released(config: BsqVaeConfig, weights: Mapping[str, np.ndarray]) -> BsqVae:
    """Model of this configuration, which the weights' names and shapes must tell by themselves."""
    reader, arrays = DictReader(dict(weights)), {}
    assert infer_config(reader) == BsqVaeConfig(**{**vars(config), "dtype": "float32"})
    module = nnx.eval_shape(lambda: BsqVae(config, rngs=nnx.Rngs(0)))
    expected = checkpoint.abstract_parameters(module)
    convert_tensors(TABLE, reader, expected, arrays.__setitem__)
    tree = {path: jnp.asarray(array, expected[path].dtype) for path, array in arrays.items()}
    return checkpoint.fill(module, storage.nest(tree))
