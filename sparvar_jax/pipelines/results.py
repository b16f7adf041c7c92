"""What a call gives back: pictures as an array, and in the forms other libraries give them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

OutputType = Literal["pil", "np", "jax"]


class Pictures(np.ndarray):
    """uint8 [B, height, width, 3], RGB: an ordinary array that also has `.images`."""

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as Pillow's."""
        if self.dtype != np.uint8 or self.ndim not in (3, 4):
            raise AttributeError(f"{self.dtype} of shape {self.shape} are no pictures any more")
        batch = self if self.ndim == 4 else self[None]
        return [Image.fromarray(np.asarray(picture)) for picture in batch]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call with `output_type` gives back.

    images: a list of Pillow's pictures ("pil"), or float32 [B, height, width, 3] in 0..1 of numpy
    ("np") or jax ("jax"), RGB.
    """

    images: Any


def result(
    pictures: UInt8[np.ndarray, "B height width 3"], output_type: str | None
) -> Pictures | Result:
    """Drawn pictures in the form that was asked for; None is `Pictures`."""
    require_output_type(output_type)
    found = pictures.view(Pictures)
    if output_type is None:
        return found
    if output_type == "pil":
        return Result(found.images)
    floats = pictures.astype(np.float32) / 255
    return Result(floats if output_type == "np" else jax.numpy.asarray(floats))


def require_output_type(output_type: str | None) -> None:
    """ValueError for a form that there is not."""
    if output_type is not None and output_type not in get_args(OutputType):
        known = ", ".join(map(repr, get_args(OutputType)))
        raise ValueError(f"output_type must be {known} or None, got {output_type!r}")
