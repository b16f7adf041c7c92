"""The models that are timed: released shapes with random weights, or a model directory.

Speed does not depend on the values, but zeros would be dishonest: matrix units draw less power on
them. Weights are normal, norms near one, made on the device.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from sparvar_jax.models import eight_bits, layers
from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.prefix_tokens import PrefixTokenizer
from sparvar_jax.models.qwen2 import Qwen2, Qwen2Config
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.models.text_tokens import Tokenizer, padded_length
from sparvar_jax.models.var import Var
from sparvar_jax.models.var_parts import VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.memory import parameter_bytes
from sparvar_jax.pipelines.prefix_text import PrefixEncoder, PrefixFeatures
from sparvar_jax.pipelines.text_encoder import TextEncoder, TextFeatures
from sparvar_jax.weights import checkpoint

TOKENIZERS = {"infinity_8b": "f8_d14"}
T5_XL = T5Config(
    vocab=32128, width=2048, head_dim=64, mlp_width=5120, depth=24, heads=32, dtype="bfloat16"
)
"""The encoder of Flan-T5-XL, whose features the released text-to-image models take."""
QWEN2 = Qwen2Config(
    vocab=151936, width=1536, heads=12, kv_heads=2, mlp_width=8960, depth=28, rope_theta=1e6,
    dtype="bfloat16",
)  # fmt: skip
"""The text encoder of HART."""
TEXT_TOKENS = 24  # a prompt of usual length, with its end token
LOG_TEMPERATURE = float(np.log(100))
"""The clamp: only attention as peaked as the models allow shows when a wrong key is read."""

PEAKED = 4.0
"""How much larger HART's queries and keys are made, which have no learned temperature."""

Weights = Literal["random", "checkpoint"]
Distribution = tuple[tuple[int, ...], Any, float, float]
"""Shape, dtype, spread and centre of a parameter's random values."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one benchmarked model consists of. size, ratio: what it draws unless told."""

    name: str
    transformer: Any
    tokenizer: Any
    weights: Weights
    size: str = "1M"
    ratio: float = 1.0

    @property
    def draws_classes(self) -> bool:
        return isinstance(self.transformer, Var)

    @property
    def begins_with_text(self) -> bool:
        return isinstance(self.transformer, Hart)

    @property
    def one_size(self) -> bool:
        """Whether it draws pictures of a single size."""
        return self.draws_classes or self.begins_with_text

    @property
    def codebook(self) -> Any:
        """What turns tokens into codes where that needs weights, else None."""
        return getattr(self.tokenizer, "codebook", None)


def build(
    name: str,
    *,
    dtype: str | None = None,
    fused: Any = None,
    matrices: str = "dense",
    stream: Any = None,
) -> Parts:
    """A released shape by name with random weights, or a model directory without text encoder.

    dtype: None is what suits the device. fused: implementation of the fused operations, None for
    the default. matrices: "int8" and "fp8" round those of the transformer's blocks, with inputs.
    stream: dtype of the residual stream, None for the model's own. Raises ValueError for an unknown
    name.
    """
    folder, dtype = Path(name), loading.compute_dtype(dtype)
    if folder.is_dir():
        parts = _from_directory(folder, dtype, matrices)
    else:
        parts = _from_preset(name, dtype, matrices)
    if stream is not None:
        config = dataclasses.replace(parts.transformer.config, stream=stream)
        parts.transformer.config = config
    if fused is not None:
        parts.transformer.config = _fused(parts.transformer.config, fused)
    jax.block_until_ready((nnx.state(parts.transformer), nnx.state(parts.tokenizer)))
    return parts


def _fused(config: Any, implementation: str) -> Any:
    """The configuration with an implementation of the fused operations; some models use none."""
    if not hasattr(config, "fused"):
        return config
    return dataclasses.replace(config, fused=implementation)


def _from_preset(name: str, dtype: str, matrices: Any = "dense") -> Parts:
    if name.startswith("var_"):
        kinds: Any = ((Var, VarConfig.preset(name)), (Vqvae, VqvaeConfig()))
    elif name.startswith("hart_"):
        config = HartConfig.preset(name)
        kinds = ((Hart, config), (Vqvae, VqvaeConfig(config.vocab, config.code_width)))
    else:
        codes = BsqVaeConfig.preset(TOKENIZERS.get(name, "f16_d32"))
        kinds = ((Infinity, InfinityConfig.preset(name)), (BsqVae, codes))
    modules = [
        randomise(abstract(kind, dataclasses.replace(config, dtype=dtype)), seed, form)
        for seed, ((kind, config), form) in enumerate(zip(kinds, (matrices, "dense"), strict=True))
    ]
    for block in modules[0].blocks if isinstance(modules[0], Hart) else ():
        block.attn.qkv.kernel[...] = PEAKED * block.attn.qkv.kernel[...]
    return Parts(name, *modules, weights="random")


def _from_directory(folder: Path, dtype: str, matrices: Any) -> Parts:
    model = loading.load_model(folder, dtype=dtype, text_encoder=False, weights=matrices)
    parts = Parts(folder.name, model.transformer, model.tokenizer, "checkpoint")
    if parts.one_size:
        return parts
    defaults = model.defaults
    return dataclasses.replace(parts, size=defaults.size, ratio=1 / defaults.aspect_ratio)


def text_encoder(
    name: str, *, dtype: str | None = None, matrices: Any = "dense"
) -> TextEncoder | PrefixEncoder:
    """The text encoder of a model directory; for a released shape its own with random weights.

    The random one takes every prompt for `TEXT_TOKENS` tokens. dtype, matrices: as in `build`.
    """
    if Path(name).is_dir():
        family = loading.family_in(Path(name))
        return family.encoder.from_checkpoint(name, dtype=dtype, weights=matrices)
    pieces = list(range(2, TEXT_TOKENS + 1))
    computing = loading.compute_dtype(dtype)
    if name.startswith("hart_"):
        config: Any = dataclasses.replace(QWEN2, dtype=computing)
        tokenizer: Any = PrefixTokenizer(Path("made up"), config.vocab, 0, lambda prompt: pieces)
        encoder = randomise(abstract(Qwen2, config), 2, matrices)
        return PrefixEncoder(lambda: encoder, tokenizer, HartConfig.preset(name).text_tokens)
    config = dataclasses.replace(T5_XL, dtype=computing)
    tokenizer = Tokenizer(Path("made up"), config.vocab, lambda prompt: pieces)
    encoder = randomise(abstract(T5Encoder, config), 2, matrices)
    longest = InfinityConfig.preset(name).text_max_length
    return TextEncoder(lambda: encoder, tokenizer, longest)  # type: ignore[arg-type,return-value]


def prefix_features(batch: int, config: HartConfig) -> PrefixFeatures:
    """Random text-encoder states of every token, padded as those of a prompt of usual length."""
    shape = (batch, config.text_tokens, config.text_width)
    text = jax.random.normal(jax.random.key(3), shape, jnp.float32)
    places = np.minimum(np.arange(config.text_tokens), TEXT_TOKENS - 1)
    return PrefixFeatures(text, np.tile(places.astype(np.int32), (batch, 1)))


def text_features(batch: int, width: int, longest: int) -> TextFeatures:
    """Random text-encoder states, padded as those of a prompt of `TEXT_TOKENS` tokens.

    longest: tokens of the longest text that the model takes.
    """
    shape = (batch, padded_length(TEXT_TOKENS, longest), width)
    text = jax.random.normal(jax.random.key(3), shape, jnp.float32).at[:, TEXT_TOKENS:].set(0)
    return TextFeatures(text, np.full((batch,), TEXT_TOKENS, np.int32))


def abstract(kind: Any, config: Any) -> Any:
    """A module with shapes in place of parameters."""
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def bytes_of(module: Any) -> int:
    """Bytes of a module's parameters; it may hold shapes alone."""
    return parameter_bytes(checkpoint.abstract_parameters(module))


def without_kernels(model: Any) -> Any:
    """The same weights with fused operations and 8-bit products left to XLA."""
    plain = nnx.merge(*nnx.split(model))
    for _, part in nnx.iter_modules(plain):
        if isinstance(part, layers.Linear):
            part.implementation = "xla"
    plain.config = _fused(model.config, "xla")
    return plain


def randomise(module: nnx.Module, seed: int, matrices: Any = "dense") -> nnx.Module:
    """An abstract module (`abstract`) with random parameters on the default device.

    matrices: as in `build`; each is rounded before the next is drawn.
    """
    leaves = checkpoint.abstract_parameters(module)
    wanted = {path: _distribution(path.rsplit(".", 1)[-1], leaf) for path, leaf in leaves.items()}
    programs = sorted(set(wanted.values()), key=str)
    # A model has some forty different shapes: compiled one by one they take longer than they run.
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(programs, pool.map(_compile_normal, programs), strict=True))
    dtypes = {} if matrices == "dense" else eight_bits.kernels(module, matrices)

    def drawn() -> Iterator[tuple[str, jax.Array]]:
        for path in leaves:
            key = jax.random.key(seed ^ zlib.crc32(path.replace(".", "/").encode()))
            yield path, compiled[wanted[path]](key)

    values = dict(eight_bits.rounded(drawn(), dtypes))
    eight_bits.narrow(module, dtypes)
    return checkpoint.fill(module, values)


def _distribution(name: str, leaf: Any) -> Distribution:
    centre = {"scale": 1.0, "log_temperature": LOG_TEMPERATURE}.get(name, 0.0)
    inputs = np.prod(leaf.shape[:-1]) if name == "kernel" else 2500
    return leaf.shape, leaf.dtype, float(inputs) ** -0.5, centre


def _compile_normal(distribution: Distribution) -> Any:
    shape, dtype, spread, centre = distribution

    def draw(key: PRNGKeyArray) -> jax.Array:
        return (centre + spread * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw).lower(jax.eval_shape(lambda: jax.random.key(0))).compile()
