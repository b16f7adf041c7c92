"""Parts of convolutional tokenizers: group norm, convolutions, residual blocks and levels.

Maps are NHWC, kernels HWIO. Statistics of norms are float32 in every mode.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparvar_jax.models.bands import WHOLE, Bands

Dtype = Literal["float32", "bfloat16"]
NORM_EPS = 1e-6
_FOLD = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""Which rows of a 3x3 kernel [.., .., 3] meet each of the two rows of a map that its result sees
once enlarged, at an even and at an odd row."""


def norm_groups(width: int) -> int:
    """Groups of a group norm over `width` channels: 32, or 24 where only 24 divides."""
    for groups in (32, 24):
        if width % groups == 0:
            return groups
    raise ValueError(f"a group norm needs a width divisible by 32 or 24, got {width}")


class GroupNorm(nnx.Module):
    """Group norm with gain and bias; computes and returns float32."""

    def __init__(self, width: int) -> None:
        self.groups = norm_groups(width)
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(
        self, x: Float[Array, "B height width C"], bands: Bands = WHOLE
    ) -> Float[Array, "B height width C"]:
        x = x.astype(jnp.float32)
        # Both moments in one pass over memory, about the channel's middle pixel: about zero the
        # mean of squares minus the squared mean would cancel.
        y, z = bands.middle(x), x.shape[2] // 2
        pilot = bands.shared(x[:, y : y + 1, z : z + 1])
        shifted = x - pilot
        first = bands.mean(jnp.mean(shifted, axis=(1, 2), keepdims=True))
        second = bands.mean(jnp.mean(jnp.square(shifted), axis=(1, 2), keepdims=True))
        mean = self._over_group(pilot + first)
        offset = pilot - mean
        variance = jnp.maximum(self._over_group(second + (2 * first + offset) * offset), 0)
        gain = jax.lax.rsqrt(variance + NORM_EPS) * self.scale[...]
        return (x - mean) * gain + self.bias[...]

    def _over_group(self, x: Float[Array, "B 1 1 C"]) -> Float[Array, "B 1 1 C"]:
        """Every channel's value replaced by the mean of its group."""
        channels = x.reshape(x.shape[0], self.groups, -1)
        means = jnp.broadcast_to(jnp.mean(channels, axis=-1, keepdims=True), channels.shape)
        return means.reshape(x.shape)


class Conv(nnx.Module):
    """Convolution with bias in the dtype of its kernel; zero padding keeps the size at stride 1.

    exact: no tf32 in float32 products.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        dtype: Dtype,
        exact: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.exact = exact and dtype == "float32"
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype))

    def __call__(
        self,
        x: Float[Array, "B height width C"],
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bands: Bands = WHOLE,
    ) -> Float[Array, "B out_height out_width outputs"]:
        kernel = self.kernel[...]
        margin = kernel.shape[0] // 2
        padding = padding or (margin, margin)
        return self._product(x, kernel, stride, padding, bands) + self.bias[...]

    def doubled(
        self, x: Float[Array, "B height width C"], bands: Bands = WHOLE
    ) -> Float[Array, "B height2 width2 outputs"]:
        """This 3x3 convolution of x enlarged by two (nearest neighbour), which is never made.

        A row of the result sees two rows of x only, so that three kernel rows become two, and so do
        columns: a 2x2 kernel for each of the four places in a pixel of x, 4/9 of the products.
        """
        batch, height, width, _ = x.shape
        kernel = jnp.einsum(
            "yrk,zcl,klio->rciyzo",
            _FOLD,
            _FOLD,
            self.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        ).astype(self.kernel[...].dtype)
        out = self._product(x, kernel.reshape(*kernel.shape[:3], -1), 1, (1, 1), bands)
        out = out.reshape(*out.shape[:3], 2, 2, -1)
        rows = [
            jnp.stack([out[:, y : y + height, z : z + width, y, z] for z in range(2)], axis=3)
            for y in range(2)
        ]
        return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1) + self.bias[...]

    def _product(
        self,
        x: Float[Array, "B height width C"],
        kernel: Float[Array, "rows columns C Co"],
        stride: int,
        padding: tuple[int, int],
        bands: Bands,
    ) -> Float[Array, "B out_height out_width Co"]:
        x, rows = bands.with_neighbours(x.astype(kernel.dtype), padding)
        # Where exact, float32 means float32 on every device: no tf32.
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=(rows, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST if self.exact else None,
        )


class ResBlock(nnx.Module):
    """Norm, swish, 3x3 convolution, twice; plus the input, through 1x1 if the width changes."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv(outputs, outputs, dtype=dtype, rngs=rngs)
        changes = inputs != outputs
        self.shortcut = Conv(inputs, outputs, 1, dtype=dtype, rngs=rngs) if changes else None

    def __call__(
        self, x: Float[Array, "B height width C"], bands: Bands = WHOLE
    ) -> Float[Array, "B height width Co"]:
        y = self.conv1(jax.nn.silu(self.norm1(x, bands)), bands=bands)
        y = self.conv2(jax.nn.silu(self.norm2(y, bands)), bands=bands)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Level(nnx.Module):
    """The blocks of one resolution, and the convolution that leaves it, if any."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        change: Literal["downsample", "upsample"] | None,
        *,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nnx.List([ResBlock(w, outputs, dtype=dtype, rngs=rngs) for w in widths])
        conv = None if change is None else Conv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.downsample = conv if change == "downsample" else None
        self.upsample = conv if change == "upsample" else None

    def __call__(
        self, x: Float[Array, "B height width C"], bands: Bands = WHOLE
    ) -> Float[Array, "B h w Co"]:
        for block in self.block:
            x = block(x, bands)
        if self.downsample is not None:
            x = self.downsample(x, stride=2, padding=(0, 1))
        return x if self.upsample is None else self.upsample.doubled(x, bands)
