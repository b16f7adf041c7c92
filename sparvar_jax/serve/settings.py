"""What a server offers and where its limits lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

Filter = Callable[[UInt8[np.ndarray, "B height width 3"]], Sequence[bool]]
"""Says of every picture whether to hold it back."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Configuration of one server; ValueError for what cannot be.

    plans, sizes: texts such as "dense" and "1024x1024"; the first is what "auto" means, none are
    the model's defaults. Only these are served: each is compiled before the port opens.
    batches: how many pictures are drawn at once; a group is filled up to the next number. Rounding
    may depend on the number, so a picture is the same bits as one drawn in a batch of that many.
    prompt_tokens: of the longest prompt; None is the model's own limit.
    negative, unguided: whether negative prompts, and guidance 1, are served.
    waiting: pictures in the queue. seconds: of one request, from its last byte to its last picture.
    most_body: bytes. most_prompt: characters. flagged: a safety filter, by default none.
    page, study: whether the page is served, and whether it measures attention.
    """

    plans: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    prompt_tokens: int | None = None
    negative: bool = True
    unguided: bool = False
    waiting: int = 64
    most_pictures: int = 10
    most_body: int = 256 << 10
    most_prompt: int = 32_000
    seconds: float = 120.0
    api_key: str | None = dataclasses.field(default=None, repr=False)
    flagged: Filter | None = None
    page: bool = False
    study: bool = False

    def __post_init__(self) -> None:
        counts = {
            "batches": self.batches,
            "waiting": (self.waiting,),
            "most_pictures": (self.most_pictures,),
            "prompt_tokens": () if self.prompt_tokens is None else (self.prompt_tokens,),
        }
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1, got {min(values)}")
        if not self.batches:
            raise ValueError("batches must name at least one number of pictures, got none")
        if self.waiting < self.most_pictures:
            raise ValueError(
                f"a queue of {self.waiting} cannot take a request for {self.most_pictures} "
                "pictures: raise the one or lower the other"
            )
        if not self.seconds > 0:
            raise ValueError(f"the time of a request must be positive, got {self.seconds} s")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty: give one, or none at all")
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))

    @property
    def largest(self) -> int:
        """Pictures of the largest batch."""
        return self.batches[-1]

    def padded(self, count: int) -> int:
        """The smallest batch that holds so many pictures."""
        return next(size for size in self.batches if size >= count)
