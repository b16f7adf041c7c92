"""Released (PyTorch-layout) tokenizer weights into the JAX module, without the converter."""

import re

import numpy as np
from flax import nnx

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig


def parameter_of(key: str, value: np.ndarray) -> tuple[tuple[str | int, ...], np.ndarray]:
    """Parameter path and array of one released tensor."""
    norm = ".norm." in key
    key = re.sub(r"\.mid\.block_([12])", lambda m: f".mid.{int(m[1]) - 1}", key)
    key = key.replace(".conv.", ".").replace(".norm.", ".").replace("sample.conv.", "sample.")
    key = key.replace("nin_shortcut", "shortcut")
    if key.endswith(".weight"):
        key = key.removesuffix("weight") + ("scale" if norm else "kernel")
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    return path, value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def load_released(config: BsqVaeConfig, weights: dict[str, np.ndarray]) -> BsqVae:
    """Model with these weights; every parameter must be filled, with the shape it has."""
    model = BsqVae(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    given = dict(parameter_of(k, v) for k, v in weights.items() if not k.endswith("lfq.mask"))
    assert given.keys() == flat.keys(), given.keys() ^ flat.keys()
    for path, value in given.items():
        assert flat[path].shape == value.shape, path
        flat[path] = flat[path].replace(value.astype(flat[path].dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat.items()))
