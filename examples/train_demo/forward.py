"""The forward of training: the package's one-pass forward, from prompts to one logits array."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparvar_jax.models.infinity import Infinity
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.study.teacher import teacher_forced_logits


def teacher_forced(
    model: Infinity,
    text: Float[Array, "B M Ct"],
    lengths: Int[Array, "B"],
    inputs: tuple[Float[Array, "B _ _ N"], ...],
    schedule: ScaleSchedule,
    *,
    remat: bool = False,
) -> Float[Array, "B T logits"]:
    """Conditional logits of the first `len(inputs) + 1` scales, float32.

    inputs: the code sums resized to every scale but the first, as `quantise` gives them. `remat`
    keeps only the residual stream of every block for the backward pass.
    """
    codes = tuple(x.reshape(x.shape[0], -1, x.shape[-1]) for x in inputs)
    condition = model.embed_condition(text, lengths)
    logits = teacher_forced_logits(model, condition, codes, schedule, scan=True, remat=remat)
    return jnp.concatenate(logits, axis=1)
