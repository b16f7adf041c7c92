"""Pictures as the files an answer carries."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sparvar_jax.pipelines import metadata
from sparvar_jax.serve.schema import Format

PNG_EFFORT = 1  # of nine: files are a few percent larger, and written several times faster
USUAL_QUALITY = 100


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How pictures are written. quality: 0 to 100, of formats that lose some."""

    form: Format = "png"
    quality: int = USUAL_QUALITY

    def write(self, pixels: UInt8[np.ndarray, "height width 3"], told: Mapping[str, str]) -> bytes:
        """One file. told: how the picture was made, which PNG files say."""
        if self.form == "png":
            return metadata.png_bytes(pixels, told, effort=PNG_EFFORT)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=self.form.upper(), quality=self.quality)
        return file.getvalue()

    def base64(self, pixels: UInt8[np.ndarray, "height width 3"], told: Mapping[str, str]) -> str:
        """One file as text."""
        return base64.b64encode(self.write(pixels, told)).decode("ascii")

    def data_url(self, encoded: str) -> str:
        """The address of a file that is given as text."""
        return f"data:image/{self.form};base64,{encoded}"
