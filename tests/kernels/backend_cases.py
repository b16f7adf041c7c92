"""What tests of the table of backends share."""

import warnings

import jax.numpy as jnp
import numpy as np


def operands(head_dim=32, dtype=jnp.float32, queries=40, keys=72):
    rng = np.random.default_rng(queries)
    q = rng.standard_normal((1, 2, queries, head_dim))
    k, v = rng.standard_normal((2, 2, 2, keys, head_dim))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def caught(call):
    """A call's result and the messages of its warnings, those seen before among them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = call()
    return out, [str(warning.message) for warning in said]
