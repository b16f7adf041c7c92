"""Which generations are measured, and in which order: what matters most comes first.

Time on a device is short, and most of it goes into compiling, so a suite lists groups of plans that
are compiled together, and everything of one model at one batch and picture size stays together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from sparvar_jax.pipelines.loading import DEMO
from sparvar_jax.plans.caches import Cache

Text = Literal["features", "encoder", "encoder freed"]

INFINITY = ("infinity_2b", "infinity_8b")
PAIR = ("dense", "sparvar-fast")
PRESETS = ("almost-lossless", "balanced", "fastest", "sparvar-fast")
BESIDES_DENSE = ("sparvar-paper", "sparvar-fast", "sparvar-fast+drop_uncond(3)")


@dataclasses.dataclass(frozen=True)
class Group:
    """Plans of one model that are compiled together and then measured one after the other.

    size: of an Infinity schedule, None for the model's own. text: random features (or classes);
    the text encoder as part of every draw; or run first and freed before the transformer comes.
    """

    model: str
    batch: int
    size: str | None
    text: Text
    plans: tuple[str, ...]
    cache: Cache = "full"

    @property
    def bench(self) -> tuple[str, int, str | None, Text, Cache]:
        """What two groups share if they can share compiled steps."""
        return self.model, self.batch, self.size, self.text, self.cache


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table of rows.

    rounds: batches in the order of their importance; every round goes through all models.
    waves: plans compiled together; the first rows are there before the second wave compiles.
    texts: in this order, because a resident text encoder raises the process's peak for good.
    caches: kinds of key/value cache.
    check: compare every row with XLA.
    """

    models: tuple[str, ...]
    waves: tuple[tuple[str, ...], ...] = (PAIR,)
    rounds: tuple[tuple[int, ...], ...] = ((1,),)
    sizes: tuple[str | None, ...] = (None,)
    texts: tuple[Text, ...] = ("features",)
    caches: tuple[Cache, ...] = ("full",)
    check: bool = False

    def groups(self) -> tuple[Group, ...]:
        """The groups in order."""
        return tuple(
            Group(model, batch, size, text, plans, cache)
            for batches in self.rounds
            for model in self.models
            for size, batch, text, cache, plans in itertools.product(
                self.sizes, batches, self.texts, self.caches, self.waves
            )
        )

    def asked(
        self,
        models: Sequence[str] | None,
        plans: Sequence[str] | None,
        batches: Sequence[int] | None,
        sizes: Sequence[str] | None,
        caches: Sequence[Cache] | None = None,
        texts: Sequence[Text] | None = None,
    ) -> Suite:
        """The suite with what was asked for in place of its own; None keeps that."""
        return dataclasses.replace(
            self,
            models=tuple(models or self.models),
            waves=(tuple(plans),) if plans else self.waves,
            rounds=(tuple(batches),) if batches else self.rounds,
            sizes=tuple(sizes or self.sizes),
            caches=tuple(caches or self.caches),
            texts=tuple(texts or self.texts),
        )


WAYS = (
    "sparvar-fast+drop_uncond(1)",
    "sparvar-fast+drop_uncond(3)",
    "sparvar-fast+drop_uncond(1,((-3,0.75),(-2,0.5)))",
    "sparvar-fast+share_rows(3)",
    "sparvar-fast+prune(0.4,(8,16))+drop_uncond(2)",
    "sparvar-fast+skip_last_scales(1)+drop_uncond(2)",
    "sparvar-fast+router()",
    "fastvar()",
)
"""Other ways to draw less, over the fast attention where they compose with it."""

SUITES = {
    "latency": Suite(INFINITY, waves=(("dense",), BESIDES_DENSE), check=True),
    "demo": Suite((str(DEMO),), waves=(("dense",), ("sparvar-fast",)), check=True),
    "policies": Suite(INFINITY[::-1], waves=(("dense",), PRESETS, WAYS)),
    "throughput": Suite(INFINITY, rounds=((1, 8), (4,), (2,)), check=True),
    "sizes": Suite(("infinity_2b",), sizes=("0.25M", "2.25M", "1M"), check=True),
    "memory": Suite(("infinity_8b", "infinity_2b"), texts=("encoder freed", "encoder"), check=True),
    "classes": Suite(("var_d30", "var_d36", "var_d16"), rounds=((1,), (64,), (8,)), check=True),
}
