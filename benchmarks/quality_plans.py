"""The plans of the quality table: the published method taken apart, and what goes beyond it."""

from __future__ import annotations

SHARE = 0.34375
"""Layers that use CS4A in the published 2B configuration: 11 of 32."""

_FIRST, _REST = f"layers=(0, {SHARE})", f"layers=({SHARE}, 1.0)"


def _paper(**changes: object) -> str:
    """The published recipe with some options changed, as plan text."""
    columns = {key[8:]: value for key, value in changes.items() if key.startswith("columns_")}
    rest = [f"{key}={value!r}" for key, value in changes.items() if not key.startswith("columns_")]
    if columns:
        rest.append(f"columns_options={columns!r}")
    return f"sparvar({', '.join([str(SHARE), *rest])})"


OTHERS = {
    "drop_uncond(1, ((-3, 0.75), (-2, 0.5)))": "drop 1, ramp before it",
    "guidance_range(2, 11)": "guidance in scales 2..10",
    "share_rows(1)": "rows share attention, last scale",
    "share_rows(3)": "rows share attention, 3 scales",
    "prune(0.4)": "prune, 0.4 by 4x4",
    "prune(0.4, (8, 16))": "prune, 0.4 by 8x16",
    "prune(0.4) + drop_uncond(1)": "prune and drop 1",
    "fastvar()": "FastVAR as published",
    "fastvar(((-2, 0.6), (-1, 0.7)), -3, 0)": "FastVAR, no scale skipped",
    "scalekv(keep=0.1)": "ScaleKV, a tenth of the rows",
    "router()": "router (SkipVAR)",
}
"""The other ways to draw less."""
LABELS = {
    "dense/xla": "dense, other kernels (noise floor)",
    f"cs4a(cache=False, {_FIRST})": "CS4A alone, no cache",
    f"cs4a({_FIRST})": "CS4A alone",
    f"csla({_REST})": "CSLA alone",
    "sparvar-paper": "sparvar-paper",
    "sparvar-fast": "sparvar-fast",
    _paper(columns_cache=False): "paper, no cache",
    _paper(sinks=0): "paper, sinks removed",
    _paper(first_scale=8): "paper, decision 8",
    _paper(first_scale=9): "paper, decision 9",
    _paper(columns_keep=0.1): "paper, keep 0.1",
    _paper(columns_keep=0.3): "paper, keep 0.3",
    _paper(columns_mapping="scale"): "paper, mapping scale",
    _paper(columns_mapping="relative"): "paper, mapping relative",
    _paper(columns_granularity=8, columns_multiple=64): "paper, runs of 8",
    _paper(block=64): "paper, blocks of 64",
    _paper(form="boxes"): "paper, boxes",
    _paper(form="boxes", exact=True): "paper, exact windows",
    _paper(windows=(-1,) * 8 + (1, 1, 1, 3, 5)): "paper, smaller windows",
    _paper(windows=(-1,) * 8 + (3, 3, 5, 7, 9)): "paper, larger windows",
    _paper(windows=(1,) * 8 + (1, 1, 3, 5, 7)): "paper, no blind scales",
    _paper(form="boxes", windows=(3,) * 8 + (3, 3, 3, 5, 7)): "boxes, no blind scales",
    "adaptive(0.8)": "adaptive 0.8",
    "adaptive(0.9)": "adaptive 0.9",
    "adaptive(0.95)": "adaptive 0.95",
    "skip_last_scales(1)": "skip 1",
    "skip_last_scales(2)": "skip 2",
    "drop_uncond(1)": "drop 1",
    "drop_uncond(2)": "drop 2",
    "drop_uncond(3)": "drop 3",
    **OTHERS,
}
DEFAULT_PLANS = tuple(LABELS)


def label(plan: str) -> str:
    """A short name of a plan."""
    return LABELS.get(plan, plan)
