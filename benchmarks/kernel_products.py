"""The four large products of a block: 8-bit kernels beside XLA's products in bfloat16 and 8 bits.

Every implementation starts from operands in its own dtype, as norms and epilogues leave them, and
ends with what the next operation of the model reads: bias and GELU applied, bfloat16, or e4m3 with
scales behind `fc1` where it computes in 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels as pk
from benchmarks.kernel_rows import Row, measure
from pallas_kernels import backends, support
from pallas_kernels import calls as kernel_calls
from pallas_kernels.quantised import BLOCK
from pallas_kernels.shapes import SQUARE_GRIDS

E4M3 = jnp.float8_e4m3fn
WIDTHS = {"8b": 3584, "2b": 2048}
TOKENS = {f"scale{scale}": SQUARE_GRIDS[scale][0] ** 2 for scale in (12, 8)}
PRODUCTS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
"""Inputs and outputs, in widths of the model."""
SAMPLED_ROWS = 128
# Results in bfloat16 are rounded by 2^-9 at most, 1.7e-3 in this norm, and e4m3 sums of tensor
# cores by as much again (14 bits); those in e4m3 by 2^-4 at most, 0.0255 if mantissas are spread
# evenly. Kernels that scale a block wrongly are off by far more than half of either.
TOLERANCE, TOLERANCE_E4M3 = 5e-3, 0.04


@dataclass(frozen=True)
class Product:
    """One product of a model's block at the tokens of one scale."""

    model: str
    scale: str
    kind: str
    width: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.scale}/{self.kind}"

    @property
    def inputs(self) -> int:
        return PRODUCTS[self.kind][0] * self.width

    @property
    def outputs(self) -> int:
        return PRODUCTS[self.kind][1] * self.width

    @property
    def gelu(self) -> bool:
        return self.kind == "fc1"


def all_products() -> list[Product]:
    """The products of Infinity at its last scale, and at the ninth, which has an eighth of it."""
    return [
        Product(model, scale, kind, width, tokens)
        for model, width in WIDTHS.items()
        for scale, tokens in TOKENS.items()
        for kind in PRODUCTS
    ]


@dataclass(frozen=True)
class Way:
    """One way to compute a product. dtype: of its operands; blocks: columns that share a scale."""

    name: str
    dtype: Any
    ours: bool

    def block(self, product: Product) -> int | None:
        """As the model quantises: outputs of `fc1` come in blocks if they are e4m3."""
        return BLOCK if self.ours and self.dtype == E4M3 and product.kind == "fc2" else None

    def result(self, product: Product) -> Any:
        """The dtype that the next operation reads."""
        return E4M3 if product.gelu and self.dtype != jnp.bfloat16 else jnp.bfloat16


WAYS = (
    Way("ours-int8", jnp.int8, ours=True),
    Way("ours-fp8", E4M3, ours=True),
    Way("xla-bf16", jnp.bfloat16, ours=False),
    Way("xla-int8", jnp.int8, ours=False),
    Way("xla-fp8", E4M3, ours=False),
)
Operands = dict[str, Any]
"""`x` (an array or `Eight`), `weight` [N, K] (bfloat16: [K, N]), its `scale` [N], `bias` [N]."""


def operands(product: Product, rows: int, way: Way) -> Operands:
    """Normal activations, through the GELU those of `fc2`; normal weights; in the way's dtype."""
    x, weights = _drawn(product, rows, way)
    return {"x": _activations(*x), **_weights(*weights)}


def _drawn(product: Product, rows: int, way: Way) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of `_activations` and `_weights`; products and ways share what they draw."""
    size = rows, product.tokens, product.inputs
    return (
        (size, product.kind == "fc2", way.dtype, way.block(product)),
        (product.inputs, product.outputs, way.dtype),
    )


@functools.cache
def _activations(size: tuple[int, ...], gelu: bool, dtype: Any, block: int | None) -> Any:
    def draw(key: jax.Array) -> Any:
        x = jax.random.normal(key, size, jnp.float32)
        x = (jax.nn.gelu(x) if gelu else x).astype(jnp.bfloat16)
        return x if dtype == jnp.bfloat16 else pk.quantise(x, dtype, block)

    return jax.jit(draw)(jax.random.key(0))


@functools.cache
def _weights(inputs: int, outputs: int, dtype: Any) -> Operands:
    def draw(key: jax.Array) -> Operands:
        weight = jax.random.normal(key, (outputs, inputs), jnp.float32) * inputs**-0.5
        bias = jax.random.normal(key, (outputs,), jnp.float32)
        if dtype == jnp.bfloat16:
            return {"weight": weight.T.astype(dtype), "scale": jnp.ones(outputs), "bias": bias}
        eight = pk.quantise(weight[None], dtype)
        return {"weight": eight.values[0], "scale": eight.scale[0, 0], "bias": bias}

    return jax.jit(draw)(jax.random.key(1))


def call(product: Product, way: Way, x: Any, weight: Array, scale: Array, bias: Array) -> Any:
    """The product: bfloat16, or `Eight`."""
    dtype = way.result(product)
    if way.ours:
        return pk.quantised_matmul(x, weight, scale, bias, gelu=product.gelu, dtype=dtype)
    if way.dtype == jnp.bfloat16:
        y = lax.dot_general(x, weight, (((2,), (0,)), ((), ()))) + bias.astype(dtype)
        return jax.nn.gelu(y, approximate=True) if product.gelu else y
    sums = jnp.int32 if way.dtype == jnp.int8 else jnp.float32
    contract = (((2,), (1,)), ((), ()))
    y = lax.dot_general(x.values, weight, contract, preferred_element_type=sums)
    y = y.astype(jnp.float32) * x.scale[0][..., None] * scale + bias
    y = jax.nn.gelu(y, approximate=True) if product.gelu else y
    return pk.quantise(y, E4M3, BLOCK) if dtype == E4M3 else y.astype(dtype)


def tolerance(product: Product, way: Way) -> float:
    """The relative error that rounding may make."""
    return TOLERANCE_E4M3 if way.result(product) == E4M3 else TOLERANCE


def error(product: Product, given: Operands, out: Any) -> tuple[float, float]:
    """Largest absolute and relative Frobenius error of sampled rows and blocks of columns, against
    float64 arithmetic on the same operands."""
    x, weight = given["x"], given["weight"]
    rows = product.tokens * len(x if isinstance(x, jax.Array) else x.values)
    tokens = np.linspace(0, rows - 1, min(SAMPLED_ROWS, rows)).astype(int)
    starts = np.unique([0, product.outputs // 2 // BLOCK * BLOCK, product.outputs - BLOCK])
    columns = np.concatenate([np.arange(BLOCK) + start for start in starts])
    if isinstance(x, jax.Array):
        weight = weight.T
    want = _wide(x, tokens) @ np.asarray(weight[columns], np.float64).T
    want = want * np.asarray(given["scale"], np.float64)[columns]
    want += np.asarray(given["bias"], np.float64)[columns]
    if product.gelu:
        want = 0.5 * want * (1 + np.tanh((2 / np.pi) ** 0.5 * (want + 0.044715 * want**3)))
    difference = _wide(out, tokens)[:, columns] - want
    return float(np.abs(difference).max()), float(np.linalg.norm(difference) / np.linalg.norm(want))


def _wide(x: Any, tokens: np.ndarray) -> Float[np.ndarray, "M C"]:
    """Some rows of a matrix, over all pictures, in float64."""
    values = x if isinstance(x, jax.Array) else x.values
    picked = np.asarray(values.reshape(-1, values.shape[-1])[tokens], np.float64)
    if isinstance(x, jax.Array):
        return picked
    scale = np.asarray(x.scale.reshape(len(x.scale), -1)[:, tokens], np.float64).T
    return picked * np.repeat(scale, picked.shape[1] // scale.shape[1], axis=1)


def run(products: list[Product], rows: list[int], calls: int, batches: int) -> Iterator[Row]:
    """Every way to compute each product, for each number of rows of the batch.

    All programs are compiled first, in parallel, so that nothing else runs while one is timed. A
    way that the compiler refuses is left out, and said to be.
    """
    wanted = [(product, many, way) for product in products for many in rows for way in WAYS]
    drawn = [_drawn(*one) for one in wanted]
    with ThreadPoolExecutor() as pool:
        for draw, what in ((_activations, 0), (_weights, 1)):
            list(pool.map(lambda one, draw=draw: draw(*one), {pair[what] for pair in drawn}))
        programs = list(pool.map(lambda one: _compiled(*one), wanted))
    for (product, many, way), program in zip(wanted, programs, strict=True):
        if isinstance(program, Exception):
            reason = (str(program).splitlines() or [type(program).__name__])[0]
            print(f"{product.name} {way.name}: left out: {reason[:200]}", flush=True)
            continue
        given = operands(product, many, way)
        median, spread, out = measure(lambda p=program, g=given: p(**g), calls, batches)
        flops = 2.0 * many * product.tokens * product.inputs * product.outputs
        yield Row(
            product.name, way.name, _served_by(product, way, given), many,
            jnp.dtype(way.dtype).name, round(median, 4), round(spread, 4), 1.0,
            round(flops / median / 1e9, 1), *error(product, given, out), tolerance(product, way),
        )  # fmt: skip


def _compiled(product: Product, rows: int, way: Way) -> Callable[..., Any] | Exception:
    """A jitted product that has run once: what calls it pays no more than its launch."""
    program = jax.jit(functools.partial(call, product, way))
    try:
        jax.block_until_ready(program(**operands(product, rows, way)))
    except Exception as refusal:  # whatever a compiler raises: older devices have no fp8
        return refusal
    return program


def _served_by(product: Product, way: Way, given: Operands) -> str:
    """The backend that computed it."""
    if not way.ours:
        return "xla"
    x = given["x"]
    asked = kernel_calls.QuantisedMatmul(
        device=support.device_of(x.values), values=x.values, scale=x.scale, weight=given["weight"],
        weight_scale=given["scale"], bias=given["bias"], gelu=product.gelu,
        dtype=jnp.dtype(way.result(product)),
    )  # fmt: skip
    return backends.select(asked).name
