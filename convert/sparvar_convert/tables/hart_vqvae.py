"""Names of HART's hybrid tokenizer, `tokenizer/` of the released repository.

The network is the VQVAE of class-conditional VAR under the prefix `vae.`; beside it lie the
discriminator of its training, and in some files a second decoder that generation never uses.
"""

from __future__ import annotations

import dataclasses

from sparvar_convert.rules import Ignore, Table
from sparvar_convert.stream import Reader
from sparvar_convert.tables import vqvae
from sparvar_convert.wrappers import Unwrapped
from sparvar_jax.models.hart_parts import SIDES_1024
from sparvar_jax.models.vqvae import VqvaeConfig

PREFIX = "vae."


def table(scales: int = len(SIDES_1024)) -> Table:
    """Rules of a tokenizer; `scales` is how many rows its statistics have when written back."""
    plain = vqvae.table(scales)
    second = "a second decoder: generation never uses it"
    ignored = (
        *plain.ignored,
        Ignore("disc.{rest:.+}", "the discriminator: it served training alone"),
        Ignore("decoder2.{rest:.+}", second),
        Ignore("post_quant_conv2.{rest:.+}", second),
    )
    return dataclasses.replace(
        plain,
        kind="hart_vqvae",
        ignored=ignored,
        canonical=lambda key: key.removeprefix(PREFIX),
        released=lambda name: PREFIX + name,
    )


TABLE = table()


def infer_config(reader: Reader) -> VqvaeConfig:
    """The shape of a tokenizer from its tensors; ConversionError where one is missing."""
    inner = {key.removeprefix(PREFIX): key for key in reader.names() if key.startswith(PREFIX)}
    return vqvae.infer_config(Unwrapped(reader, inner))
