"""What the run-time asks of a model: the contract of every family.

A model owns parameters and the pure functions of one scale; the loop over scales, caches, guidance
and randomness belong to `sparvar_jax.runtime`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from sparvar_jax.models import sampling
from sparvar_jax.models.groups import PICTURE, at_once, in_groups
from sparvar_jax.models.layers import Precision
from sparvar_jax.models.sampling import Controls
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.strategy import Place

How = Literal["sample", "greedy", "smooth"]
"""How tokens come from logits: drawn, the likeliest, or mixtures of codes where there are such."""


class Forced(NamedTuple):
    """Tokens to take instead of drawn ones. drawn: where they are drawn after all."""

    tokens: Shaped[Array, "B T ..."]
    drawn: Bool[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class Draw:
    """How one scale's tokens are drawn; handed to `ScaleModel.finish` while a step is traced.

    keys: one an image, already of this scale; None takes the likeliest tokens. guided: whether
    logits of both halves of the rows are mixed. complete: whether logits of all rows are asked for.
    codebook: what turns tokens into codes where that needs weights.
    """

    controls: Controls
    index: int
    batch: int
    keys: Key[Array, "B"] | None
    how: How
    guided: bool
    complete: bool = False
    forced: Forced | None = None
    codebook: Any = None

    def rows(self, x: Float[Array, "R ..."]) -> Float[Array, "R2 ..."]:
        """The rows that the head must see."""
        return x if self.guided or self.complete else x[: self.batch]

    def guide(self, raw: Float[Array, "R ..."]) -> Float[Array, "B ..."]:
        """Raw logits divided by the temperature, and mixed where guidance is on."""
        tempered = raw / self.controls.temperature[self.index]
        if not self.guided:
            return tempered[: self.batch]
        return sampling.mix(tempered, self.controls.guidance[self.index])

    def by_pictures(
        self,
        finish: Callable[[Float[Array, "R T C"], Any, Draw], Drawn],
        x: Float[Array, "R T C"],
        head: Any,
    ) -> Drawn:
        """What `finish` draws, of so many pictures at once that they fill a device.

        x, head: rows lead every array, those that `rows` leaves. A vocabulary's logits of a batch
        take more memory than its blocks. All at once where inner arrays or tokens are given.
        """
        halves = len(x) // self.batch
        group = at_once(self.batch, PICTURE * x.shape[1])
        if group == self.batch or self.complete or self.forced is not None:
            return finish(x, head, self)

        def paired(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(halves, self.batch, *leaf.shape[1:]).swapaxes(0, 1)

        def some(parts: Any) -> tuple[jax.Array, jax.Array | None]:
            (x, head), keys = parts
            batch = len(x)
            rows = jax.tree.map(
                lambda leaf: leaf.swapaxes(0, 1).reshape(halves * batch, *leaf.shape[2:]), (x, head)
            )
            drawn = finish(rows[0], rows[1], dataclasses.replace(self, keys=keys, batch=batch))
            return drawn.tokens, drawn.codes

        tokens, codes = in_groups(some, (jax.tree.map(paired, (x, head)), self.keys), group)
        return Drawn(tokens, codes)

    def settle(self, sample: Callable[[], Shaped[Array, "B T ..."]]) -> Shaped[Array, "B T ..."]:
        """The tokens that `sample` draws, with forced ones in their place."""
        if self.forced is None:
            return sample()
        known, drawn = self.forced
        if drawn is None:
            return known
        tokens = sample()
        if tokens.ndim > known.ndim:  # mixtures over a vocabulary
            known = jax.nn.one_hot(known, tokens.shape[-1])
        drawn = drawn.reshape(*drawn.shape, *[1] * (tokens.ndim - 2))
        return jnp.where(drawn, tokens, known)


class Drawn(NamedTuple):
    """What one scale drew. codes: what a family adds to the tokens' own codes. captured: logits.

    counted: tokens whose codes enter the sum, None for all of them.
    """

    tokens: Shaped[Array, "B T ..."]
    codes: Float[Array, "B T N"] | None = None
    captured: dict[str, jax.Array] = {}  # noqa: RUF012
    counted: Bool[Array, "B T"] | None = None

    def silenced(self, codes: Float[Array, "B height width Cd"], scale: Scale) -> jax.Array:
        """Codes of a scale on its token grid or a finer one, zero at tokens that do not count."""
        if self.counted is None:
            return codes
        fine = codes.shape[1] // scale.height, codes.shape[2] // scale.width
        where = self.counted.reshape(-1, scale.height, scale.width)
        where = where.repeat(fine[0], axis=1).repeat(fine[1], axis=2)
        return jnp.where(where[..., None], codes, 0)


@runtime_checkable
class ModelConfig(Protocol):
    """What the run-time reads of a configuration. logit_bound: see `Place`."""

    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def logit_bound(self) -> float | None: ...


@runtime_checkable
class ScaleBlock(Protocol):
    """One transformer block; equal blocks are traced once."""

    def __call__(
        self, stream: Stream, inputs: Any, positions: Any, attend: Attend, config: Any
    ) -> Stream:
        """The residual stream after this block; its last update may be left undone.

        Branches are run through `attend.branch`; where they are not, plans that change tokens or
        rows of a branch are refused.
        """
        ...


@runtime_checkable
class ScaleModel(Protocol):
    """A transformer that draws scale by scale: flax module, or any pytree with these methods."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def blocks(self) -> Sequence[ScaleBlock]: ...

    def embed_codes(
        self, codes: Float[Array, "B T N"] | None, condition: Any
    ) -> Float[Array, "R T C"]:
        """The sequence entering a scale, for all rows; codes are None at scale 0."""
        ...

    def add_level(self, x: Float[Array, "R T C"], place: Place) -> Float[Array, "R T C"]:
        """The residual stream before block 0: what tells scales and places apart is added."""
        ...

    def positions(self, condition: Any, place: Place) -> Any:
        """What blocks need of the tokens' places: arrays [T, D], or [R, T, D] by row."""
        ...

    def block_inputs(self, layer: int, condition: Any) -> Any:
        """What a block needs of a condition; a stream of fewer rows meets the first of them."""
        ...

    def finish(self, x: Float[Array, "R T C"], condition: Any, place: Place, draw: Draw) -> Drawn:
        """The scale's tokens from the hidden states after the last block."""
        ...

    def start_codes(self, batch: int, schedule: ScaleSchedule) -> Float[Array, "B h w Cd"]:
        """The empty code sum."""
        ...

    def accumulate(
        self,
        drawn: Drawn,
        code_sum: Float[Array, "B h w Cd"],
        scale: Scale,
        following: Scale | None,
        codebook: Any,
    ) -> tuple[Float[Array, "B h w Cd"], Float[Array, "B T2 N"] | None]:
        """The code sum with one scale added, and the input codes of the following scale."""
        ...
