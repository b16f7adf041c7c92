"""How far timed programs may be from plain XLA, for every kind of model: derived from rounding."""

from __future__ import annotations

import dataclasses

from benchmarks.models import Parts
from sparvar_jax.models import eight_bits


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far two bfloat16 programs may be apart: twice what rounding makes of them.

    cache: relative error (Frobenius) of a layer's new keys or values. tokens: share that differs.
    """

    cache: float
    tokens: float


# Infinity with random weights: bfloat16 differs from float32 by 0.0044 in these rows after 24
# layers, and hardly more after more; two that round differently are 2**0.5 times as far apart. Keys
# read 8 rows off make a difference of 0.03 and more. 0.15 percent of the tokens differ: those whose
# draw was a close call.
INFINITY = Tolerance(1.25e-2, 1e-2)
# Bits of a trained model are more often close calls: raw logits of the demo differ by 0.023 at its
# last scale (teacher-forced), which guidance 3 and temperature 0.5 make 0.17; a bit of probability
# p then flips with 0.8 * 0.17 * p (1 - p), 0.015 on average.
TRAINED = Tolerance(1.25e-2, 3e-2)
# With 8-bit products a value moved by a rounding may fall on another step, which is larger than the
# rounding was: Infinity with random weights in bfloat16 differs from the same 8-bit weights and
# activations in float32 by 0.0128 after 24 layers, where bfloat16 alone makes 0.0054 (width 1024 at
# 512 px, XLA on a CPU, same state), and hardly more after more; two programs by 2**0.5 times that
# where they share no rounding. Errors are means over millions of values, 5 percent apart among the
# timed models, so that a quarter more is enough. 0.47 percent of the tokens differ. Keys read 8
# rows off make a difference of 0.028 and more.
INFINITY_EIGHT = Tolerance(2.25e-2, 1.5e-2)
# The demo's norms have larger peaks, of which 8-bit steps are parts: 0.070 after 6 layers at its
# last scale of 512 px, where bfloat16 alone makes 0.018, and 1.7 percent of the tokens. Keys read
# 8 rows off make a difference of 0.48.
TRAINED_EIGHT = Tolerance(0.15, 5e-2)
# Class-conditional VAR with random weights passes rounding on from layer to layer: after the 16
# layers of d16 keys in bfloat16 are 0.064 from those in float32 (XLA on a CPU, same tokens), and 14
# percent of the last scale's tokens, one of 4096 each, are drawn differently. Keys read 8 rows off
# make a difference of 0.5 and more.
CLASSES = Tolerance(0.18, 0.28)
# The same in 8 bits, one scale from one state: 0.059 where bfloat16 alone makes 0.0175, and 9
# percent of the tokens for 3. Timed programs in bfloat16 were 0.065 apart at most (d30), of which
# 3.4 times is 0.22, and 16 percent of the tokens, so that tokens say little.
CLASSES_EIGHT = Tolerance(0.33, 0.6)
# HART with random weights and peaked attention: after 24 layers of width 512 keys in bfloat16 are
# 0.022 from those in float32 (XLA on a CPU, same tokens), and 2.8 percent of the last scale's
# mixtures have another heaviest code. Keys read 8 rows off make a difference of 0.7.
HART = Tolerance(6.5e-2, 8e-2)


def tolerance(parts: Parts) -> Tolerance:
    """What rounding may do to the tokens and the cache of this model."""
    narrow = eight_bits.form_of(parts.transformer) is not None
    if parts.draws_classes:
        return CLASSES_EIGHT if narrow else CLASSES
    if parts.begins_with_text:
        return HART
    if parts.weights == "random":
        return INFINITY_EIGHT if narrow else INFINITY
    return TRAINED_EIGHT if narrow else TRAINED
