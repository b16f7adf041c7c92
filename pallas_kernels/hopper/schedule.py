"""Work order of a persistent kernel: which CTA serves which work items, computed with numpy.

Items are taken in waves of one per CTA, in order, so that concurrent CTAs read the keys of the same
few heads from the L2 cache. Within a wave the longest item goes to the CTA with the least work.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def balanced_order(
    work: Int[np.ndarray, " items"], ctas: int
) -> tuple[Int[np.ndarray, "ctas steps"], Int[np.ndarray, " ctas"]]:
    """Items of every CTA (padded with 0) and their number."""
    lists: list[list[int]] = [[] for _ in range(ctas)]
    load = np.zeros(ctas, np.int64)
    for start in range(0, len(work), ctas):
        wave = np.arange(start, min(start + ctas, len(work)))
        wave = wave[np.argsort(-work[wave], kind="stable")]
        least_loaded = np.argsort(load, kind="stable")[: len(wave)]
        for cta, item in zip(least_loaded, wave, strict=True):
            lists[cta].append(int(item))
        load[least_loaded] += work[wave]
    return pad_lists(lists)


def strided_order(items: int, ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """Item i goes to CTA i mod ctas: for tables whose counts are traced."""
    return pad_lists([list(range(cta, items, ctas)) for cta in range(ctas)])


def pad_lists(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rectangular int32 array and lengths."""
    lengths = np.array([len(items) for items in lists], np.int32)
    order = np.zeros((len(lists), max(int(lengths.max()), 1)), np.int32)
    for cta, items in enumerate(lists):
        order[cta, : len(items)] = items
    return order, lengths
