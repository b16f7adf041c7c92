"""What pictures are drawn from: prompts or classes, made into what the steps of a model take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparvar_jax.models.vqvae import Tokenised, Vqvae
from sparvar_jax.pipelines.numbers import whole_numbers
from sparvar_jax.pipelines.prefix_text import PrefixEncoder, PrefixFeatures
from sparvar_jax.pipelines.text_encoder import TextEncoder, TextFeatures
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.bound import Bound
from sparvar_jax.runtime.devices import Devices
from sparvar_jax.weights.told import shown

Jobs = list[Callable[[], Any]]


class Prompted:
    """Pictures of prompts, or of the features that its kind of text encoder makes of them.

    model: a function that gives the model as it is now. text_encoder: False where calls bring
    features. devices: make what steps take of the prompts where it is used; None is the default.
    """

    draws, names = "prompts", ("prompt", "prompts")
    encoder: Any = TextEncoder
    features: Any = TextFeatures

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        text_encoder: bool = True,
        devices: Devices | None = None,
    ):
        self._text = self.encoder.of(model) if text_encoder else None
        self._conditions = {
            learned: Bound(lambda: model().transformer, function, devices)
            for learned, function in ((True, _with_learned_guidance), (False, _with_guidance))
        }

    def listed(self, subject: Any) -> Any:
        """The prompts of a call as a list; features as they are."""
        if isinstance(subject, str):
            return [subject]
        if isinstance(subject, self.features):
            return subject
        if not isinstance(subject, Sequence):
            raise ValueError(f"expected a prompt or a list of prompts, got {shown(subject)}")
        if not subject:
            raise ValueError("expected at least one prompt, got none")
        for prompt in subject:
            if not isinstance(prompt, str):
                raise ValueError(f"prompts are text, got {shown(prompt)}: give strings")
        return list(subject)

    def repeated(self, subject: Any, count: int) -> Any:
        """Every prompt so many times."""
        if isinstance(subject, self.features):
            features, ends = (np.repeat(np.asarray(part), count, 0) for part in subject)
            return self.features(jnp.asarray(features), ends)
        return [prompt for prompt in subject for _ in range(count)]

    def count(self, subject: Any) -> int:
        """How many pictures it asks for."""
        return len(subject[0]) if isinstance(subject, self.features) else len(subject)

    def condition(self, subject: Any, asked: Any, plan: Plan) -> Any:
        """What the steps take."""
        learned, arguments = self._arguments(subject, asked, plan, self.encode)
        return self._conditions[learned](*arguments)

    def shape(self, subject: Any, asked: Any, plan: Plan) -> tuple[Any, Jobs]:
        """The condition as shapes, and what compiles all that makes it."""
        jobs: Jobs = []

        def encode(texts: Any) -> Any:
            if isinstance(texts, self.features):
                return texts
            features, job = self._encoder().shape(texts)
            jobs.append(job)
            return features

        learned, arguments = self._arguments(subject, asked, plan, encode)
        condition = self._conditions[learned]
        jobs.append(lambda: condition.compile(*arguments))
        return condition.shape(*arguments), jobs

    def encode(self, subject: Any) -> Any:
        """Text features of prompts; features are returned as they are."""
        if isinstance(subject, self.features):
            return subject
        return self._encoder()(self.listed(subject))

    def lengths(self, subject: Any) -> list[tuple[int, int]]:
        """(tokens, padded tokens) of prompts."""
        return self._encoder().lengths(self.listed(subject))

    def _encoder(self) -> Any:
        if self._text is None:
            raise ValueError(
                "this pipeline has no text encoder: give it the features of a TextEncoder, or load "
                "it with text_encoder=True"
            )
        return self._text

    def _arguments(
        self, subject: Any, asked: Any, plan: Plan, encode: Callable[[Any], Any]
    ) -> tuple[bool, tuple[Any, ...]]:
        """Whether guidance is learned, and the arguments: text, lengths, negative prompts."""
        text, guided = encode(subject), plan.steps[0].rows == "both"
        negative = asked.negative
        if negative is None:
            return guided, (*text, None)
        if not guided:
            raise ValueError("a negative prompt works through guidance, which is off: raise it")
        count = self.count(subject)
        others = [negative] * count if isinstance(negative, str) else self.listed(negative)
        if self.count(others) != count:
            raise ValueError(f"got {self.count(others)} negative prompts for {count} prompts")
        return False, (*text, encode(others))


class PrefixPrompted(Prompted):
    """Prompts as a prefix of fixed length; calls may bring features of a `PrefixEncoder`."""

    encoder, features = PrefixEncoder, PrefixFeatures


class Classes:
    """Pictures of classes; None draws without one, and guidance then does nothing.

    model: a function that gives the model as it is now. devices: as of `Prompted`.
    """

    draws, names = "classes", ("label", "labels")
    encoder = None

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        text_encoder: bool = True,
        devices: Devices | None = None,
    ):
        del text_encoder
        self._model = model
        self._conditions = {
            guided: Bound(lambda: model().transformer, function, devices)
            for guided, function in ((True, _guided_classes), (False, _plain_classes))
        }
        sides = model().transformer.config.sides
        self._tokenise = Bound(
            lambda: model().tokenizer, lambda vqvae, pictures: _tokenise(vqvae, pictures, sides)
        )

    def listed(self, subject: Any) -> np.ndarray:
        """Class numbers, one a picture; that of "no class" for None."""
        classes = self._model().transformer.config.classes
        labels = whole_numbers("classes", subject)
        if not labels:
            raise ValueError("expected at least one class, got none")
        for label in labels:
            if label is not None and not 0 <= label < classes:
                raise ValueError(f"classes must lie in 0..{classes - 1}, got {shown(label)}")
        return np.array([classes if label is None else label for label in labels], np.int32)

    def repeated(self, subject: np.ndarray, count: int) -> np.ndarray:
        """Every class so many times."""
        return np.repeat(subject, count)

    def count(self, subject: np.ndarray) -> int:
        """How many pictures it asks for."""
        return len(subject)

    def condition(self, subject: np.ndarray, asked: Any, plan: Plan) -> Any:
        """What the steps take."""
        return self._conditions[plan.steps[0].rows == "both"](subject)

    def shape(self, subject: np.ndarray, asked: Any, plan: Plan) -> tuple[Any, Jobs]:
        """The condition as shapes, and what compiles all that makes it."""
        condition = self._conditions[plan.steps[0].rows == "both"]
        return condition.shape(subject), [lambda: condition.compile(subject)]

    def tokenise(self, pictures: Any) -> Tokenised:
        """RGB pictures as token maps of every scale; they must have the model's own size."""
        return self._tokenise(np.asarray(pictures))


def _with_learned_guidance(model: Any, text: Array, lengths: Array, _: None) -> Any:
    return model.embed_condition(text, lengths, "learned")


def _with_guidance(model: Any, text: Array, lengths: Array, other: Any) -> Any:
    return model.embed_condition(text, lengths, other)


def _guided_classes(model: Any, labels: Array) -> Any:
    return model.embed_condition(labels, guidance=True)


def _plain_classes(model: Any, labels: Array) -> Any:
    return model.embed_condition(labels, guidance=False)


def _tokenise(tokenizer: Vqvae, pictures: Array, sides: tuple[int, ...]) -> Tokenised:
    latent = tokenizer.encode(pictures.astype(jnp.float32) / 127.5 - 1)
    return tokenizer.tokenise(latent, sides)
