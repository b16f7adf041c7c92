"""In-painting, out-painting and editing by class: known tokens are forced at every scale.

The picture is split into token maps; inside a region tokens are drawn, elsewhere the picture's own
are taken. No training and no extra model are needed (arXiv 2404.02905, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from sparvar_jax.models.family import Forced
from sparvar_jax.models.quantizer import resize_matrix
from sparvar_jax.pipelines.numbers import flag
from sparvar_jax.pipelines.pictures import region_of
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.requests import Request
from sparvar_jax.runtime.state import ScaleOutput
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import real, whole
from sparvar_jax.weights.told import shown


def box(
    height: int, width: int, top: int, left: int, bottom: int, right: int
) -> Bool[np.ndarray, "height width"]:
    """A region of pixels: True in rows top..bottom and columns left..right, ends excluded."""
    corners = {"top": top, "left": left, "bottom": bottom, "right": right}
    top, left, bottom, right = (whole(name, value) for name, value in corners.items())
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"a box must be top < bottom and left < right within {height}x{width}, got "
            f"{shown(top)},{shown(left)},{shown(bottom)},{shown(right)}"
        )
    region = np.zeros((height, width), bool)
    region[top:bottom, left:right] = True
    return region


def drawn_tokens(
    region: Bool[np.ndarray, "height width"],
    sides: Sequence[int],
    *,
    threshold: float = 0.5,
    keep_scales: int = 1,
) -> tuple[Bool[np.ndarray, "T"], ...]:
    """Which tokens of every scale are drawn: those the region covers by more than `threshold`.

    The first `keep_scales` scales are kept whole: their few tokens carry tone and layout.
    """
    if not 0 <= real("threshold", threshold) < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    kept = whole("keep_scales", keep_scales, *BOUNDS["keep_scales"])
    height, width = region.shape
    tokens = []
    for index, side in enumerate(sides):
        rows = resize_matrix(height, side, "area")
        columns = resize_matrix(width, side, "area")
        covered = rows @ region.astype(np.float32) @ columns.T
        # A hair above the threshold, so that rounding of an exact share does not decide.
        tokens.append((covered > threshold + 1e-6).reshape(-1) & (index >= kept))
    return tuple(tokens)


def edit(
    pipe: Pipeline,
    pictures: UInt8[np.ndarray, "B height width 3"],
    region: Bool[np.ndarray, "height width"] | Integer[np.ndarray, "height width"],
    labels: int | Sequence[int | None] | None = None,
    *,
    threshold: float = 0.5,
    keep_scales: int = 1,
    paste: bool = False,
    **options: Any,
) -> UInt8[np.ndarray, "B height width 3"]:
    """Draw a region of pictures anew; everything outside keeps its tokens.

    pictures: RGB, of the model's own size. region: True where to draw: a hole for in-painting, the
    margin for out-painting, an object's box for editing by class; 0 and 1, or 0 and 255, will do.
    labels: classes of what is drawn, one or one a picture; None draws without a class.
    paste: put the pictures' own pixels back outside the region; else they pass the tokenizer.
    Other options are those of `ClassOptions` and `drawn_tokens`.
    """
    pictures = np.asarray(pictures)
    if pictures.ndim != 4 or pictures.dtype != np.uint8 or pictures.shape[-1] != 3:
        raise ValueError(
            f"expected uint8 RGB pictures [B, height, width, 3], got {pictures.dtype} "
            f"{list(pictures.shape)}"
        )
    where = region_of(region, pictures.shape[1:3])
    paste = flag("paste", paste)
    classes: list[Any] = [labels] * len(pictures)
    if np.ndim(labels):  # type: ignore[arg-type]
        classes = list(labels)  # type: ignore[arg-type]
    config = pipe.model.transformer.config
    drawn = drawn_tokens(where, config.sides, threshold=threshold, keep_scales=keep_scales)
    known = pipe.tokenise(pictures).tokens
    request = pipe.request(list(classes), **options)
    code_sum, _ = draw(pipe, request, known, drawn)
    result = pipe.decode(code_sum)
    return np.where(where[None, :, :, None], result, pictures) if paste else result


def draw(
    pipe: Pipeline,
    request: Request,
    known: Sequence[Int[Array, "B _"]],
    drawn: Sequence[Bool[np.ndarray, "_"]],
) -> tuple[Float[Array, "B height width N"], tuple[ScaleOutput, ...]]:
    """(sum of codes, what every scale drew) with known tokens where nothing is to be drawn."""
    batch = request.keys.shape[0]
    forced = [
        Forced(tokens, jnp.broadcast_to(jnp.asarray(where), (batch, len(where))))
        for tokens, where in zip(known, drawn, strict=False)
    ]
    return pipe.generator.run(
        request.plan,
        request.condition,
        request.controls,
        request.keys,
        forced=forced,
        how=request.how,
    )
