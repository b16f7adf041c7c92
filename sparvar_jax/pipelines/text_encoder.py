"""Prompts to text features; its encoder can be loaded, used and freed before everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from sparvar_jax.models import t5
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.text_tokens import Tokenizer, load_tokenizer, padded_length
from sparvar_jax.pipelines import parts
from sparvar_jax.runtime.bound import Bound
from sparvar_jax.weights import checkpoint


class TextFeatures(NamedTuple):
    """What the text encoder says of prompts: features, zero behind each end, and lengths."""

    features: Float[Array, "B T Ct"]
    lengths: Int[np.ndarray, "B"]


class TextEncoder:
    """Tokenizer and T5 encoder behind one call. encoder: gives the module as it is now.

    Where memory is short, compute the features first; the encoder is freed with this object:

        text = TextEncoder.from_checkpoint(folder)(["a red apple"])
        pictures = Pipeline.from_checkpoint(folder, text_encoder=False)(text)
    """

    load_tokenizer = staticmethod(load_tokenizer)

    def __init__(self, encoder: Callable[[], t5.T5Encoder], tokenizer: Tokenizer, max_length: int):
        self._encode = Bound(encoder, t5.encode)
        self._tokenizer, self._max_length = tokenizer, max_length

    @classmethod
    def of(cls, model: Callable[[], Any]) -> TextEncoder:
        """That of a loaded model; a function gives the model as it is now."""
        now = model()
        longest = now.transformer.config.text_max_length
        return cls(lambda: model().text_encoder, now.text_tokenizer, longest)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path | None = None,
        *,
        dtype: str | None = None,
        weights: parts.Weights = "dense",
    ) -> TextEncoder:
        """Load the text encoder of a model directory and nothing else; None is the demo model.

        dtype, weights: as in `loading.load_model`.
        """
        folder = parts.model_folder(directory)
        config, kinds = checkpoint.read_config(folder), {"t5": (t5.T5Encoder, t5.T5Config)}
        _, transformer = parts.part_config(
            config, "transformer", {"infinity": (Infinity, InfinityConfig)}
        )
        encoder = parts.load_text(folder, kinds, dtype, weights)
        tokenizer = load_tokenizer(folder / "text")
        return cls(lambda: encoder, tokenizer, transformer.text_max_length)

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; ValueError for an empty one, a warning for one that is cut."""
        ids, lengths = self._tokenizer.encode(prompts, self._max_length)
        return TextFeatures(self._encode(ids, lengths), lengths)

    def lengths(self, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """(tokens, padded tokens) of every prompt; the first may exceed what is read of it."""
        counts = [self._tokenizer.count(prompt) for prompt in prompts]
        return [(count, padded_length(count, self._max_length)) for count in counts]

    def shape(self, prompts: Sequence[str]) -> tuple[TextFeatures, Any]:
        """Abstract features of prompts, and a function that compiles what computes them."""
        ids, lengths = self._tokenizer.encode(prompts, self._max_length)
        features = TextFeatures(self._encode.shape(ids, lengths), lengths)
        return features, lambda: self._encode.compile(ids, lengths)
