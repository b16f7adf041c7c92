"""Prompts to the text features that stand before the grids, as HART takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparvar_jax.models import prefix_tokens, qwen2
from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.prefix_tokens import PrefixTokenizer, load_prefix_tokenizer
from sparvar_jax.models.qwen2 import Qwen2, Qwen2Config
from sparvar_jax.pipelines import parts
from sparvar_jax.pipelines.prefix_requests import PrefixDefaults
from sparvar_jax.runtime.bound import Bound
from sparvar_jax.weights import checkpoint


class PrefixFeatures(NamedTuple):
    """What the text encoder says of prompts: features of every position, padding included.

    positions: of every token; those of the padding repeat the last word's.
    """

    features: Float[Array, "B P Ct"]
    positions: Int[np.ndarray, "B P"]


class PrefixEncoder:
    """Tokenizer and Qwen2 behind one call. encoder: gives the module as it is now.

    length: tokens of every prompt, padding included. system: whether the released system prompt
    stands before it. It can be loaded, used and freed before everything else, see `TextEncoder`.
    """

    load_tokenizer = staticmethod(load_prefix_tokenizer)

    def __init__(
        self,
        encoder: Callable[[], Any],
        tokenizer: PrefixTokenizer,
        length: int,
        *,
        system: bool = True,
    ):
        self._encode = Bound(encoder, qwen2.prefix_features)
        self._tokenizer, self._length = tokenizer, length
        self._system = tokenizer.system() if system else np.zeros(0, np.int32)

    @classmethod
    def of(cls, model: Callable[[], Any]) -> PrefixEncoder:
        """That of a loaded model; a function gives the model as it is now."""
        now = model()
        return cls(
            lambda: model().text_encoder,
            now.text_tokenizer,
            now.transformer.config.text_tokens,
            system=now.defaults.system_prompt,
        )

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path | None = None,
        *,
        dtype: str | None = None,
        weights: parts.Weights = "dense",
    ) -> PrefixEncoder:
        """Load the text encoder of a model directory and nothing else.

        dtype, weights: as in `loading.load_model`.
        """
        folder = parts.model_folder(directory)
        config = checkpoint.read_config(folder)
        _, transformer = parts.part_config(config, "transformer", {"hart": (Hart, HartConfig)})
        kinds = {"qwen2": (Qwen2, Qwen2Config)}
        encoder = parts.load_text(folder, kinds, dtype, weights)
        tokenizer = load_prefix_tokenizer(folder / "text")
        defaults = checkpoint.config_from_json(PrefixDefaults, config.get("defaults", {}))
        length, system = transformer.text_tokens, defaults.system_prompt
        return cls(lambda: encoder, tokenizer, length, system=system)

    def __call__(self, prompts: Sequence[str]) -> PrefixFeatures:
        """Features of prompts; ValueError for an empty one, a warning for one that is cut."""
        arguments = self._arguments(prompts)
        return PrefixFeatures(self._encode(*arguments), prefix_tokens.positions(arguments[2]))

    def shape(self, prompts: Sequence[str]) -> tuple[PrefixFeatures, Any]:
        """Abstract features of prompts, and a function that compiles what computes them."""
        arguments = self._arguments(prompts)
        features = self._encode.shape(*arguments)
        positions = prefix_tokens.positions(arguments[2])
        return PrefixFeatures(features, positions), lambda: self._encode.compile(*arguments)

    def _arguments(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        return (self._system, *self._tokenizer.encode(prompts, self._length))
